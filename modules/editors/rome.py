"""ROME: rank-one model editing (Meng et al., 2022, arXiv 2202.05262).

The MLP output projection W of one layer is seen as a linear key-value memory. One more key and value are inserted
with the least change of its output on ordinary text (second moment C of the keys):

    W' = W + Lambda (C^-1 k*)',   Lambda = (v* - W k1) / ((C^-1 k*)' k1)

k* is the mean key of the subject's last token over sampled contexts, k1 its key in the bare prompt, and v* the
value that makes the new target likely (``value_search.py``), so that W' k1 = v* exactly.

    ROME     ROME(layer)              k* gives the direction, k1 the place where W' k1 = v*
    r-ROME   ROME(layer, key="mean")  k* is both: Lambda = (v* - W k*) / (C^-1 k*)' k*   (arXiv 2403.07175)
    p-ROME   ROME(layer, key="bare")  k1 is both

If k* and k1 differ a lot, ROME divides by a number near zero (the "disabling edits" of arXiv 2403.07175): an
update larger than ``largest_change`` is computed with k1 in place of k*, with a warning.

Departures from the authors' code: C is factored in float64, never inverted; the subject's last token is found by
character offsets; contexts begin with common words; the limit above; the KL term is read after
``"<subject> is a"``. ``ROME(layer, essence="{}", largest_change=inf)`` undoes the last two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.key_value import KeyRows, keys_and_values, solve_update
from corrigenda.modules.editors.value_search import (
    ValueEditor,
    optimise_values,
    searched_together,
    warn_of_unread,
)
from corrigenda.modules.model.delta import Delta, LowRank, add_deltas
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import read_weight
from corrigenda.modules.statistics.moments import Moments

log = logging.getLogger(__name__)


class ROME(ValueEditor):
    """Writes each fact as a rank-one update of one MLP output projection.

    Args:
        layer: block whose projection is edited, from 0.
        steps: evaluations of the value's loss; at most one update fewer.
        clamp_norm: the value may move by at most this multiple of its norm.
        contexts: pairs of (tokens, number of texts) of the sampled texts before the prompt.
        key: ``both`` uses the mean key over contexts for the update's direction and the bare prompt's key for the
            constraint; ``mean`` (r-ROME) and ``bare`` (p-ROME) use one key for both.
        largest_change: with ``both``, an update larger than this multiple of the weight's norm is computed with
            the bare prompt's key alone.
        **search: further settings of the value search, of ValueEditor.
    """

    def __init__(
        self,
        layer: int,
        steps: int = 20,
        clamp_norm: float = 4.0,
        contexts: list[tuple[int, int]] = [(5, 10), (10, 10)],  # noqa: B006  never changed
        key: Literal["both", "mean", "bare"] = "both",
        largest_change: float = 0.5,
        **search: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(steps=steps, clamp_norm=clamp_norm, contexts=contexts, **search)
        checks.whole(0, layer=layer)
        if largest_change != math.inf:  # which is no limit
            checks.at_least(0, largest_change=largest_change)
        self.layer, self.key, self.largest_change = layer, key, largest_change

    def read_statistics(self, lm: LanguageModel) -> None:
        lm.structure.block_name(self.layer)
        self._factor_FF = Moments(lm, self.corpus).factor(self.layer)

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One edit after the other, each on the model that the earlier ones left."""
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
        warn_of_unread(lm, edits, self.layer)
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
        """(factors, notes): the rank-one update with (W + left right) key = v* at the chosen key."""
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
    """The update along C^-1 direction that adds ``residual`` to the output for ``key``; float64."""
    if torch.equal(direction_F, key_F):
        return LowRank(*solve_update(factor_FF, key_F[:, None], residual_D[:, None], ridge=0.0))
    right_F = torch.cholesky_solve(direction_F.double()[:, None], factor_FF)[:, 0]
    left_D = residual_D.double() / (right_F @ key_F.double())
    return LowRank(left_D[:, None], right_F[None])
