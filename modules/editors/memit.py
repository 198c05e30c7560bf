"""MEMIT: mass-editing memory (Meng et al., 2023, arXiv 2210.07229).

Each of some consecutive MLP output projections takes an equal share of what the edits' values still lack
(:mod:`corrigenda.modules.editors.spread`), by least squares over the new keys K and, with weight lambda, over
the second
moment C of the keys of ordinary text:

    Delta = R K' (lambda C + K K')^-1

With ``sequential`` the keys P of the edits in force join the ordinary ones, so that a later batch does not
overwrite an earlier one: Delta = R K' (lambda C + P P' + K K')^-1. They are read on the model that their edit
left, and are kept with that edit.

Departures from the authors' code: C is factored once per layer, and the smaller of the two equal forms is
solved; see also the module on spreading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editors.key_value import solve_update
from corrigenda.modules.editors.spread import SpreadEditor
from corrigenda.modules.statistics.moments import Moments


class MEMIT(SpreadEditor):
    """Writes all edits together, spread over several layers.

    Args:
        layers: blocks whose projections are edited, from 0, the lowest first.
        ridge: lambda as a multiple of the key width; lambda ordinary tokens weigh as much as one edit.
        sequential: leave the keys of the edits in force alone (MEMIT-seq).
        **search: as of SpreadEditor.
    """

    def __init__(
        self,
        layers: list[int],
        ridge: float = 1.0,
        sequential: bool = False,
        **search: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(layers, **search)
        checks.positive(ridge=ridge)
        self.ridge, self.keeps_keys = ridge, sequential

    def statistics(self, moments: Moments, layer: int) -> Tensor:
        return moments.factor(layer)

    def solve(
        self,
        layer: int,
        edits: Sequence[Edit],
        keys_FN: Tensor,
        residual_DN: Tensor,
        earlier_FP: Tensor,
    ) -> tuple[Tensor, Tensor]:
        factor_FF = self._statistics[layer]
        ridge = self.ridge * len(factor_FF)
        return solve_update(factor_FF, keys_FN, residual_DN, ridge, earlier_FP)
