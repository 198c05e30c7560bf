"""SERAC: a memory of edits, a scope classifier, a counterfactual model (Mitchell et al., 2022, arXiv 2206.06520).

The base model is never changed. Edits are kept as text; phi says how likely a prompt x is within the scope of an
edit e, and the model that answers is

    base(x)                 if the memory is empty or max_e phi(e, x) is not above the threshold
    psi(e*, x)              else, with e* the edit of the largest phi

phi (:class:`~corrigenda.modules.training.scope.ScopeClassifier`) and psi (:class:`~corrigenda.modules.training.counterfactual.CounterfactualModel`) are
trained by two runs of ``fit``; their departures from the paper are told there.

Departures from the authors' code: the decision reads the prompt alone, once, so that a teacher-forced target
cannot give it away; vectors are computed once per edit; of several edits of one prompt the newest counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.memory import MemoryEditor, MemoryPatch
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.retrieval.retriever import Encoder, SentenceEncoder
from corrigenda.modules.training.counterfactual import Counterfactual, in_front
from corrigenda.modules.training.scope import ScopeClassifier


class ScopePatch(MemoryPatch):
    """Edits in force: prompts within the scope of one are answered by the counterfactual model."""

    editor: SERAC

    def score(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        deltas: Sequence[Delta] | None,
        owners: Sequence[int] | None,
        full: bool,
    ) -> TargetScores:
        """The base model's scores of everything, with rows within scope replaced.

        The base sees the whole batch whatever is within scope, so that the other rows are its own to the bit.
        """
        base = self.lm.score(prompts, targets, deltas, owners, full)
        asked, inside = self._within_scope(prompts)
        if not inside:
            return base
        other = self.editor.counterfactual.score(asked, [targets[b] for b in inside], full)
        rows = torch.tensor(inside, device=base.target_BM.device)
        width = other.target_BM.shape[1]
        same = torch.equal(base.target_BM[rows, :width], other.target_BM)
        if not same or not torch.equal(base.mask_BM[rows, :width], other.mask_BM):
            raise EditError(
                "a target has other tokens where an edit stands in front of its prompt: "
                f"{[(prompts[b], targets[b]) for b in inside][:3]}"
            )
        new = {"logprob_BM": other.logprob_BM, "greedy_BM": other.greedy_BM}
        if full:
            new["full_BMV"] = cast(Tensor, other.full_BMV)
        merged = {}
        for name, values in new.items():
            merged[name] = getattr(base, name).clone()
            merged[name][rows, :width] = values.to(merged[name].device)
        return TargetScores(
            merged["logprob_BM"],
            merged["greedy_BM"],
            base.target_BM,
            base.mask_BM,
            merged.get("full_BMV"),
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **options: Any) -> list[str]:  # noqa: ANN401
        """Who answers is decided once, on the prompt."""
        asked, inside = self._within_scope(prompts)
        outside = [b for b in range(len(prompts)) if b not in set(inside)]
        texts = [""] * len(prompts)
        if outside:
            owners = options.get("owners")
            own = options | {"owners": [owners[b] for b in outside] if owners is not None else None}
            found = self.lm.generate([prompts[b] for b in outside], max_new_tokens, **own)
            for b, text in zip(outside, found, strict=True):
                texts[b] = text
        if inside:
            rest = {k: v for k, v in options.items() if k not in ("deltas", "owners")}
            found = self.editor.counterfactual.generate(asked, max_new_tokens, **rest)
            for b, text in zip(inside, found, strict=True):
                texts[b] = text
        return texts

    def _within_scope(self, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
        """What the counterfactual model is asked, and the prompts it is asked in place of."""
        edits = self.route(prompts)
        found = {
            b: in_front(edit, prompts[b], self.lm.separator)
            for b, edit in enumerate(edits)
            if edit is not None
        }
        return list(found.values()), list(found)

    def route(self, prompts: Sequence[str]) -> list[Edit | None]:
        """For each prompt the edit in whose scope it falls, or None."""
        unique = list(dict.fromkeys(prompts))
        found = dict(zip(unique, self.editor.look_up(self, unique), strict=True))
        return [found[prompt] for prompt in prompts]


class SERAC(MemoryEditor):
    """Keeps edits as text and lets a counterfactual model answer what falls within their scope.

    Edits made one after the other on one model share a memory.

    Args:
        scope: checkpoint of a trained :class:`~corrigenda.modules.training.scope.ScopeClassifier`.
        counterfactual: checkpoint of a trained :class:`~corrigenda.modules.training.counterfactual.CounterfactualModel`.
        threshold: a prompt is within scope above this; the one found in validation if not given.
    """

    patch = ScopePatch
    scope: ScopeClassifier
    counterfactual: Counterfactual

    def __init__(self, scope: str, counterfactual: str, threshold: float | None = None) -> None:
        super().__init__()
        checks.between(0, 1, threshold=threshold)
        self.scope_path, self.counterfactual_path = scope, counterfactual
        self.threshold = threshold
        missing = [path for path in (scope, counterfactual) if not Path(path).is_file()]
        if missing:
            raise EditError(
                f"SERAC needs two trained checkpoints, and there is no {' and no '.join(missing)}: train them "
                "with fit (configs/serac/smollm2-scope.yaml and smollm2-counterfactual.yaml) and set "
                "--edit.editor.scope and --edit.editor.counterfactual"
            )
        self._lm: LanguageModel | None = None
        self._seconds, self._lookups = 0.0, 0

    def prepare(self, lm: LanguageModel) -> None:
        if self._lm is lm:
            return
        self.scope = ScopeClassifier.load(self.scope_path).to(lm.device)
        self.counterfactual = Counterfactual.load(self.counterfactual_path, lm)
        self._encoders[lm] = SentenceEncoder(self.scope.scorer.finder)
        self._lm = lm

    def encoder(self, lm: LanguageModel) -> Encoder:
        """The scope classifier's own."""
        self.prepare(lm)
        return self._encoders[lm]

    def key(self, edit: Edit) -> str:
        return edit.text

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> MemoryPatch:
        handle = super().edit(lm, edits)
        handle.memory.encode()  # part of making an edit, not of the first look-up
        return handle

    def look_up(self, handle: ScopePatch, prompts: Sequence[str]) -> list[Edit | None]:
        """For each prompt the edit in whose scope it falls, or None."""
        start = time.perf_counter()
        memory, end = handle.memory, handle.end
        near = memory.search(prompts, self.scope.scorer.num_candidates, end)
        score_B, place_B = self.scope.best(prompts, memory.keys, *near)
        threshold = self.scope.threshold.item() if self.threshold is None else self.threshold
        found = [
            memory.current(place, end) if score > threshold else None
            for score, place in zip(score_B.tolist(), place_B.tolist(), strict=True)
        ]
        self._seconds += time.perf_counter() - start
        self._lookups += len(prompts)
        return found

    def numbers(self) -> dict[str, float]:
        """The memory's size at most, and the mean time of a look-up, encoding and phi included."""
        milliseconds = 1000 * self._seconds / max(1, self._lookups)
        return {**super().numbers(), "lookup_milliseconds": milliseconds}
