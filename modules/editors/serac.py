"""SERAC: a memory of edits, a scope classifier, a counterfactual model (Mitchell et al., 2022, arXiv 2206.06520).

The base model is never changed. Edits are stored as text; phi is the probability that a prompt x is within the
scope of an edit e, and the prompt is answered by

    base(x)                 if the memory is empty or max_e phi(e, x) is not above the threshold
    psi(e*, x)              else, with e* the edit of the largest phi

phi (:class:`~corrigenda.modules.training.scope.ScopeClassifier`) and psi
(:class:`~corrigenda.modules.training.counterfactual.CounterfactualModel`) are trained by two runs of ``fit``;
their own departures from the paper are listed there.

Departures from the authors' code: routing reads the prompt alone, once, so that a teacher-forced target cannot
influence it; vectors are computed once per edit; of several edits of one prompt the newest counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.memory import MemoryEditor, MemoryPatch
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.model.handle import GenerationRequest, ScoreRequest
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.retrieval.retriever import Encoder, SentenceEncoder
from corrigenda.modules.training.counterfactual import Counterfactual, in_front
from corrigenda.modules.training.scope import ScopeClassifier


class ScopePatch(MemoryPatch):
    """Active edits; prompts within the scope of one are answered by the counterfactual model."""

    editor: SERAC

    def score(self, request: ScoreRequest) -> TargetScores:
        """The base model's scores, with rows within scope replaced.

        The base model always runs the whole batch, so that all other rows are bit-exactly its own.
        """
        base = self.lm.score_request(request)
        prompts, inside = self._within_scope(request.prompts)
        if not inside:
            return base
        targets = [request.targets[b] for b in inside]
        other = self.editor.counterfactual.score(prompts, targets, request.full)
        rows = torch.tensor(inside, device=base.target_BM.device)
        width = other.target_BM.shape[1]
        same = torch.equal(base.target_BM[rows, :width], other.target_BM)
        if not same or not torch.equal(base.mask_BM[rows, :width], other.mask_BM):
            raise EditError(
                "a target has different tokens when an edit precedes its prompt: "
                f"{[(request.prompts[b], request.targets[b]) for b in inside][:3]}"
            )
        new = {"logprob_BM": other.logprob_BM, "greedy_BM": other.greedy_BM}
        if request.full:
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

    def generate(self, request: GenerationRequest) -> list[str]:
        """Continuations; each is written by the model that its prompt is routed to."""
        prompts, inside = self._within_scope(request.prompts)
        outside = [b for b in range(len(request.prompts)) if b not in set(inside)]
        texts = [""] * len(request.prompts)
        if outside:
            found = self.lm.generate_request(request.select(outside))
            for b, text in zip(outside, found, strict=True):
                texts[b] = text
        if inside:
            found = self.editor.counterfactual.generate(replace(request, prompts=prompts))
            for b, text in zip(inside, found, strict=True):
                texts[b] = text
        return texts

    def _within_scope(self, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
        """Prompts for the counterfactual model, and the rows that it answers."""
        edits = self.route(prompts)
        found = {
            b: in_front(edit, prompts[b], self.lm.tokens.separator)
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
    """Stores edits as text; a counterfactual model answers prompts within their scope.

    All edits of one model share a memory.

    Args:
        scope: checkpoint of a trained :class:`~corrigenda.modules.training.scope.ScopeClassifier`.
        counterfactual: checkpoint of a trained
            :class:`~corrigenda.modules.training.counterfactual.CounterfactualModel`.
        threshold: prompts with phi above this are within scope; the one found in validation if not given.
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
        """The scope classifier's encoder."""
        self.prepare(lm)
        return self._encoders[lm]

    def key(self, edit: Edit) -> str:
        return edit.text

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> MemoryPatch:
        handle = super().edit(lm, edits)
        handle.memory.encode()  # so that its time counts as the edit's, not as the first look-up's
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
        """Counters, the largest size of the memory, and the mean time of a look-up with encoding and phi."""
        milliseconds = 1000 * self._seconds / max(1, self._lookups)
        return {**super().numbers(), "lookup_milliseconds": milliseconds}
