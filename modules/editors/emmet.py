"""EMMET: an equality-constrained mass edit in a transformer (Gupta et al., 2024, arXiv 2403.14236).

Every key in K gets its value exactly, with the least change of the output on ordinary text (second moment C):

    Delta = R (K' C^-1 K)^-1 K' C^-1

For one edit this is ROME with one key, and it is the limit of MEMIT as lambda goes to zero. The keys must be
linearly independent, so there can be at most as many edits as a key is wide; a ``ridge`` relaxes the constraint
and is MEMIT's lambda. Values and keys are MEMIT's (:mod:`corrigenda.modules.editors.spread`).

Departures from the authors' code: no inverse or pseudo-inverse is formed; edits whose keys coincide are reported
by name; a ridge applies to a single edit, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editors.key_value import solve_update
from corrigenda.modules.editors.spread import SpreadEditor
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.statistics.moments import Moments

LEAST_EIGENVALUE = 1e-12  # of the keys' correlations; below it they are dependent to rounding


class EMMET(SpreadEditor):
    """Writes all edits together and exactly.

    Args:
        layers: blocks whose projections are edited, from 0, the lowest first; one in the paper.
        ridge: lambda as a multiple of the key width; 0 is the exact constraint.
        **search: further settings, of SpreadEditor.
    """

    def __init__(self, layers: list[int], ridge: float = 0.0, **search: Any) -> None:  # noqa: ANN401
        super().__init__(layers, **search)
        checks.at_least(0, ridge=ridge)
        self.ridge = ridge

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
        if self.ridge == 0 and len(edits) > 1:
            _require_independent(layer, edits, keys_FN, factor_FF)
        return solve_update(factor_FF, keys_FN, residual_DN, self.ridge * len(factor_FF))


def _require_independent(
    layer: int, edits: Sequence[Edit], keys_FN: Tensor, factor_FF: Tensor
) -> None:
    """Raises EditError if no update can satisfy all constraints; names the edits with the most similar keys."""
    cure = "give a ridge such as 0.01, or fewer edits per batch"
    if len(edits) > len(factor_FF):
        raise EditError(
            f"{len(edits)} edits cannot hold exactly, keys are {len(factor_FF)} wide: {cure}"
        )
    white_FN = torch.linalg.solve_triangular(factor_FF, keys_FN.double(), upper=False)
    white_FN = white_FN / white_FN.norm(dim=0)
    alike_NN = white_FN.T @ white_FN
    if torch.linalg.eigvalsh(alike_NN)[0] < LEAST_EIGENVALUE:
        alike_NN.fill_diagonal_(0)
        one, other = divmod(int(alike_NN.abs().argmax()), len(edits))
        raise EditError(
            f"the keys of {len(edits)} edits are not independent at layer {layer}, the most similar are those of "
            f"{edits[one].text!r} and {edits[other].text!r}: {cure}"
        )
