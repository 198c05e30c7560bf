"""Methods: :class:`Editor` and :class:`WeightEditor`.

An edit is active through one of three kinds of handle: :class:`WeightPatch` (parameters), :class:`ModulePatch`
(outputs
of modules, through an adapter) and :class:`TextPatch` (prompts and answers).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel

log = logging.getLogger(__name__)


class Editor(ABC):
    """A method. ``edit`` writes all the given edits together and returns how to undo them."""

    def check(self, lm: LanguageModel) -> None:
        """Raises ValueError, at once, where ``layer`` or ``layers`` name a block that the model does not have."""
        own = getattr(self, "layer", None)
        for layer in [*(getattr(self, "layers", None) or ()), *([] if own is None else [own])]:
            lm.structure.block_name(layer)

    def check_edits(self, edits: Sequence[Edit]) -> None:
        """Raises EditError where there are none; warns, once, where two contradict each other."""
        if not edits:
            raise EditError(f"{type(self).__name__} was given no edit: give at least one")
        targets: dict[str, str] = {}
        against = [
            (edit.text, other, edit.target_new)
            for edit in edits
            if (other := targets.setdefault(edit.text, edit.target_new)) != edit.target_new
        ]
        if against:
            log.warning("%r is to be both %r and %r (%d such prompts): edited together, at most one can hold",
                        *against[0], len({text for text, *_ in against}))  # fmt: skip

    def prepare(self, lm: LanguageModel) -> None:  # noqa: B027  optional
        """Once per model, before the first edit: statistics, prompts. Idempotent."""

    @abstractmethod
    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> EditHandle:
        """Puts the edits in force."""

    @cached_property
    def counts(self) -> Counter[str]:
        """What the method counts of itself; a run that goes on adds what was counted before."""
        return Counter()

    def numbers(self) -> dict[str, float]:
        """What the method has counted of itself, for the run's summary."""
        return dict(self.counts)

    def origin(self, lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, Any]:
        """Where an edit comes from, for its metadata: base weights, editor, edits."""
        return {
            "base": lm.weights_hash,
            "model": lm.name,
            "editor": type(self).__name__,
            "edits": [[e.prompt, e.subject, e.target_new] for e in edits],
        }


class WeightEditor(Editor):
    """A method whose product is a weight update: computing (``propose``) is apart from writing (``edit``)."""

    @abstractmethod
    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """The update that writes all these edits together; the model is unchanged afterwards."""

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per entry, each computed as if the others did not exist.

        Methods that can, override it to compute all of them side by side with equal results.
        """
        return [self.propose(lm, group) for group in edits]

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> WeightPatch:
        self.check(lm)
        self.check_edits(edits)
        with editing_mode():
            self.prepare(lm)
            return WeightPatch(lm, self.stamp(lm, self.propose(lm, edits), edits))

    def stamp(self, lm: LanguageModel, delta: Delta, edits: Sequence[Edit]) -> Delta:
        """The delta with its origin in the metadata: base weights, editor, edits; warns where it is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in delta.tensors().values()):
            log.warning("%s: the update for %r is not finite: the edited model's answers will be NaN",
                        type(self).__name__, "; ".join(edit.text for edit in edits[:3]))  # fmt: skip
        return replace(delta.detach(), metadata=delta.metadata | self.origin(lm, edits))


@contextmanager
def editing_mode() -> Iterator[None]:
    """Gradients on, autocast off: what every method needs, also inside a validation loop."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
