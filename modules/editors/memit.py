"""MEMIT: mass-editing memory (Meng et al., 2023, arXiv 2210.07229).

Each of some consecutive MLP output projections takes an equal share of the remaining residual R
(:mod:`corrigenda.modules.editors.spread`), by least squares over the new keys K and, with weight lambda, over the
second moment C of the keys of ordinary text:

    Delta = R K' (lambda C + K K')^-1

With ``sequential`` the keys P of the active edits are added to the ordinary ones, so that a later batch does not
overwrite an earlier one: Delta = R K' (lambda C + P P' + K K')^-1. They are read right after their edit was made
and are stored with it.

Departures from the authors' code: C is factored once per layer, and the smaller of the two equivalent systems is
solved; see also ``spread.py``.
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
        ridge: lambda as a multiple of the key width; the second moment counts as much as lambda tokens, each edit
            as one.
        sequential: preserve the outputs for the keys of active edits (MEMIT-seq).
        **search: further settings, of SpreadEditor.
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
