"""Edits that change prompts or answers: :class:`TextPatch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from corrigenda.modules.interrupts import Reversible
from corrigenda.modules.model.handle import Answering, EditHandle, GenerationRequest, ScoreRequest
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores


class TextPatch(EditHandle):
    """An edit that rewrites prompts, or answers them itself; no weight changes.

    A subclass overrides :meth:`rewrite` (other prompts to the same model) or :meth:`score` and
    :meth:`generate` themselves. The patch is set aside while one of them runs, so that they can call the language
    model, with the older edits active, in the ordinary way.
    """

    changes_network = False

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._active, self._aside = False, 0
        self.lowest_layer = lm.structure.num_layers - 1
        super().__init__(lm)

    @property
    def answering(self) -> Answering | None:
        return self if self._active and not self._aside else None

    def swap(self) -> None:
        self._active = not self._active

    def set_aside(self) -> Reversible:
        """Inside, the model answers as if this patch were not there."""
        return set_aside([self])

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the model reads instead of these; unchanged by default."""
        return list(prompts)

    def score(self, request: ScoreRequest) -> TargetScores:
        """Called in place of :meth:`LanguageModel.score`."""
        return self.lm.score_request(replace(request, prompts=self.rewrite(request.prompts)))

    def generate(self, request: GenerationRequest) -> list[str]:
        """Called in place of :meth:`LanguageModel.generate`."""
        return self.lm.generate_request(replace(request, prompts=self.rewrite(request.prompts)))


def set_aside(patches: Sequence[TextPatch]) -> Reversible:
    """Inside, the model answers as if these patches were not there."""
    aside: list[TextPatch] = []

    def put() -> None:
        for patch in patches:
            patch._aside += 1
            aside.append(patch)

    def put_back() -> None:
        while aside:
            aside.pop()._aside -= 1

    return Reversible(put, put_back)
