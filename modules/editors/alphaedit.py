"""AlphaEdit: null-space constrained editing (Fang et al., 2025, arXiv 2410.02355).

Updates act only on the null space of ordinary text's keys: with Q the eigenvectors of their second moment C that
have the smallest eigenvalues, and P the keys of the active edits,

    Delta = R K_q' (K_q K_q' + P_q P_q' + l2 I)^-1 Q',   K_q = Q' K,   P_q = Q' P

so that Delta Q Q' = Delta. Values, keys and residuals R are MEMIT's (``spread.py``). An edit's keys are read right
after it was made and are stored with it.

Departures from the authors' code: the system is solved in the basis Q, where it is symmetric, in float64
(equivalent to the published form); the null space may be chosen by its share of C's trace, since the published
bound on eigenvalues means something else in every model; it is stored under the hash of the weights.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)


class AlphaEdit(SpreadEditor):
    """Writes all edits together, spread over several layers, in the null space of ordinary text's keys.

    Args:
        layers: blocks whose projections are edited, from 0, the lowest first.
        null_share: the null space has the smallest eigenvalues that sum up to at most this share of C's trace: the
            part of ordinary text's keys that an update may affect.
        threshold: the null space has the eigenvalues below this, in place of ``null_share`` (published: 0.02).
        l2: weight of the update's size, on the scale of squared norms of keys.
        **search: further settings, of SpreadEditor.
    """

    keeps_keys = True

    def __init__(
        self,
        layers: list[int],
        null_share: float = 0.02,
        threshold: float | None = None,
        l2: float = 10.0,
        **search: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(layers, **search)
        checks.positive(l2=l2, threshold=threshold)
        checks.share(null_share=null_share)
        self.null_share, self.threshold, self.l2 = null_share, threshold, l2

    def statistics(self, moments: Moments, layer: int) -> Tensor:
        """An orthonormal basis Q_Fq of the layer's null space."""
        values_F, vectors_FF = moments.eigen(layer)
        if self.threshold is not None:
            count = int((values_F < self.threshold).sum())
        else:
            count = int((values_F.cumsum(0) <= self.null_share * values_F.sum()).sum())
        log.info("layer %d: the null space has %d of %d dimensions", layer, count, len(values_F))
        if count == 0:
            raise EditError(
                f"layer {layer} has no direction in the null space (the smallest eigenvalue is "
                f"{values_F[0]:.2g}): give a larger null_share or threshold"
            )
        if count == len(values_F):
            log.warning("layer %d: every direction is in the null space, so nothing is protected: "
                        "give a smaller null_share or threshold", layer)  # fmt: skip
        return vectors_FF[:, :count]

    def solve(
        self,
        layer: int,
        edits: Sequence[Edit],
        keys_FN: Tensor,
        residual_DN: Tensor,
        earlier_FP: Tensor,
    ) -> tuple[Tensor, Tensor]:
        basis_Fq = self._statistics[layer]
        free_qN, earlier_qP = (basis_Fq.T @ keys.double() for keys in (keys_FN, earlier_FP))
        unit_qq = torch.eye(basis_Fq.shape[1], dtype=basis_Fq.dtype, device=basis_Fq.device)
        left_DN, right_Nq = solve_update(unit_qq, free_qN, residual_DN, self.l2, earlier_qP)
        return left_DN, right_Nq @ basis_Fq.T
