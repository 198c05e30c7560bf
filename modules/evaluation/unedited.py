"""Scores of the unedited model, which edited ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores

MAX_BYTES = 2**30


class UneditedScores:
    """Scores of probes over the whole vocabulary, computed once for probes that ``fit`` evaluates repeatedly.

    Args:
        lm: the language model.
        max_bytes: most memory for stored scores; what exceeds it is computed each time.

    Attributes:
        stores: whether scores are stored, because the same batches are scored again.
    """

    def __init__(self, lm: LanguageModel, max_bytes: int = MAX_BYTES) -> None:
        self._lm, self._left, self.stores = lm, max_bytes, False
        self._found: dict[tuple[tuple[str, ...], tuple[str, ...]], TargetScores] = {}

    def score(self, prompts: Sequence[str], targets: Sequence[str]) -> TargetScores:
        """The unedited model's scores of each target after its prompt."""
        key = tuple(prompts), tuple(targets)
        if key in self._found:
            return self._found[key]
        with self._lm.pristine():
            scores = self._lm.score(prompts, targets, full=True)
        size = scores.full_BMV.nbytes if scores.full_BMV is not None else 0
        if self.stores and size <= self._left:
            self._found[key] = scores
            self._left -= size
        return scores
