"""ROME: rank-one model editing (Meng et al., 2022, arXiv 2202.05262).

The MLP output projection W of one layer is read as a linear memory and given one more key and value with the
least change of what it answers to ordinary text (second moment C):

    W' = W + Lambda (C^-1 k*)',   Lambda = (v* - W k1) / ((C^-1 k*)' k1)

k* is the mean key of the subject's last token over sampled contexts, k1 its key in the bare prompt, and v* the
value that makes the new target likely (``value_search.py``), so that W' k1 = v* exactly.

    ROME     ROME(layer)              k* gives the direction, k1 is where the value holds
    r-ROME   ROME(layer, key="mean")  k* is both: Lambda = (v* - W k*) / (C^-1 k*)' k*   (arXiv 2403.07175)
    p-ROME   ROME(layer, key="bare")  k1 is both

Where k* and k1 point apart ROME divides by a number near zero, the "disabling edits" of arXiv 2403.07175: an
update larger than ``largest_change`` uses k1 in place of k* and says so.

Departures from the authors' code: C is factored in float64, never inverted; the subject's last token comes
from character offsets; contexts begin with common words; the guard above; the KL term is read after
``"<subject> is a"``. ``ROME(layer, essence="{}", largest_change=inf)`` takes back the last two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.key_value import (
    KeyRows,
    keys_and_values,
    sample_contexts,
    solve_update,
)
from corrigenda.modules.editors.value_search import (
    ValueSettings,
    optimise_values,
    searched_together,
)
from corrigenda.modules.model.delta import Delta, LowRank, add_deltas
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import read_weight
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.moments import Moments

log = logging.getLogger(__name__)


class ROME(WeightEditor):
    """Writes each fact as a rank-one update of one MLP output projection.

    Args:
        layer: block whose projection is edited, from 0.
        steps: evaluations of the value's loss; at most one update fewer.
        lr: step size of the value's search.
        clamp_norm: the value may move by this multiple of its norm.
        weight_decay: weight of the value's own size in the loss.
        kl_weight: weight of the drift of what follows the essence.
        contexts: pairs of (tokens, how many) of the sampled texts before the prompt.
        essence: text after which the next word is to stay as it was; the authors' code reads it after ``{}``.
        key: ``both`` takes the mean key over contexts for the direction and the bare prompt's for the place
            where the value holds; ``mean`` (r-ROME) and ``bare`` (p-ROME) take one for all.
        largest_change: with ``both``, an update larger than this multiple of the weight is made with the bare
            prompt's key alone.
        corpus: text of the second moment.
        seed: of the sampled contexts.
        parallel: edits whose values are looked for together, where they are independent.
        precision: ``bfloat16`` makes the search for values several times faster on hardware that has it.
    """

    def __init__(
        self,
        layer: int,
        steps: int = 20,
        lr: float = 0.5,
        clamp_norm: float = 4.0,
        weight_decay: float = 0.5,
        kl_weight: float = 0.0625,
        contexts: list[tuple[int, int]] = [(5, 10), (10, 10)],  # noqa: B006  never changed
        essence: str = "{} is a",
        key: Literal["both", "mean", "bare"] = "both",
        largest_change: float = 0.5,
        corpus: Corpus = Corpus(),  # noqa: B008  frozen
        seed: int = 0,
        parallel: int = 8,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        checks.whole(0, layer=layer)
        checks.contexts(contexts=contexts)
        checks.with_slot(essence=essence)
        if largest_change != math.inf:  # which is no limit
            checks.at_least(0, largest_change=largest_change)
        checks.seeds(seed=seed)
        checks.whole(1, parallel=parallel)
        self.layer, self.lengths, self.corpus, self.seed = layer, contexts, corpus, seed
        self.settings = ValueSettings(steps, lr, weight_decay, kl_weight, clamp_norm, precision)
        self.essence, self.key, self.largest_change = essence, key, largest_change
        self.parallel = parallel
        self._prepared: str | None = None

    def prepare(self, lm: LanguageModel) -> None:
        """Contexts and the factored second moment, once per model, from its unedited weights."""
        if self._prepared == lm.weights_hash:
            return
        lm.structure.block_name(self.layer)
        self._factor_FF = Moments(lm, self.corpus).factor(self.layer)
        self._contexts = sample_contexts(lm, self.lengths, self.seed)
        self._prepared = lm.weights_hash

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One after the other, each on the model that the ones before it left."""
        deltas: list[Delta] = []
        with lm.edits.provisional():
            for edit in edits:
                deltas += self._independent(lm, [edit])
                if len(edits) > 1:
                    WeightPatch(lm, deltas[-1])
        return add_deltas(deltas)

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        if any(len(group) != 1 for group in edits):
            return super().propose_each(lm, edits)
        single = [group[0] for group in edits]
        deltas: dict[int, Delta] = {}
        for part in searched_together(lm, single, self.parallel):
            deltas |= zip(part, self._independent(lm, [single[n] for n in part]), strict=True)
        return [deltas[n] for n in range(len(single))]

    def _independent(self, lm: LanguageModel, edits: Sequence[Edit]) -> list[Delta]:
        """One delta per edit, as if the others did not exist."""
        self.prepare(lm)
        name = lm.structure.out_name(self.layer)
        key_rows = KeyRows.of(lm, edits, self._contexts, self.essence)
        tail = key_rows.tail(lm, self.layer)
        keys_NQF, values_NQD = keys_and_values(lm, key_rows, tail, self.layer)
        v0_ND = values_NQD[:, 0]
        values = optimise_values(lm, key_rows, tail, name, v0_ND, self.settings)
        weight_norm = read_weight(lm.net.get_submodule(name)).float().norm().item()
        deltas = []
        for n, edit in enumerate(edits):
            target_D = v0_ND[n] + values.delta_ND[n]
            factors, notes = self._insert(keys_NQF[n], values_NQD[n], target_D, weight_norm, edit)
            notes |= {"loss": values.loss_N[n].item(), "iterations": int(values.iterations_N[n])}
            deltas.append(Delta({f"{name}.weight": factors}, {"notes": [notes]}))
            if not values.nll_N[n] <= 1:
                log.warning("%r -> %r: the value search ended at NLL %.2f; the edit will likely fail",
                            edit.text, edit.target_new, values.nll_N[n])  # fmt: skip
        return deltas

    def _insert(
        self,
        keys_QF: Tensor,
        values_QD: Tensor,
        target_D: Tensor,
        weight_norm: float,
        edit: Edit,
    ) -> tuple[LowRank, dict[str, float]]:
        """Rank-one factors with (W + left right) key = v* at the chosen key."""
        mean_F, bare_F = keys_QF.mean(0), keys_QF[0]
        notes = {"cosine": cosine_similarity(mean_F, bare_F, dim=0).item()}
        direction_F = bare_F if self.key == "bare" else mean_F
        key_F, value_D = (
            (mean_F, values_QD.mean(0)) if self.key == "mean" else (bare_F, values_QD[0])
        )
        factors = _rank_one(self._factor_FF, direction_F, key_F, target_D - value_D)
        notes["change"] = (factors.dense().norm() / weight_norm).item()
        if self.key == "both" and notes["change"] > self.largest_change:
            log.warning("%r: the update would be %.2f of the weight; using the bare prompt's key alone",
                        edit.text, notes["change"])  # fmt: skip
            factors = _rank_one(self._factor_FF, bare_F, bare_F, target_D - value_D)
            notes["change"] = (factors.dense().norm() / weight_norm).item()
        return factors, notes


def _rank_one(factor_FF: Tensor, direction_F: Tensor, key_F: Tensor, residual_D: Tensor) -> LowRank:
    """The update along C^-1 direction that adds ``residual`` to what W answers to ``key``; float64."""
    if torch.equal(direction_F, key_F):
        return LowRank(*solve_update(factor_FF, key_F[:, None], residual_D[:, None], ridge=0.0))
    right_F = torch.cholesky_solve(direction_F.double()[:, None], factor_FF)[:, 0]
    left_D = residual_D.double() / (right_F @ key_F.double())
    return LowRank(left_D[:, None], right_F[None])
