"""The linear algebra of second moments: Gram matrix, Cholesky factor and eigenvectors."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def gram(keys_nF: Tensor, parts: int = 4) -> Tensor:
    """The Gram matrix K^T K; each pair of coordinates is computed once and written twice."""
    width = keys_nF.shape[1]
    gram_FF = keys_nF.new_empty(width, width)
    step = -(-width // parts)
    for at in range(0, width, step):
        right_XF = keys_nF[:, at : at + step].T @ keys_nF[:, at:]
        gram_FF[at : at + step, at:] = right_XF
        gram_FF[at:, at : at + step] = right_XF.T
    return gram_FF


def cholesky(moment_FF: Tensor) -> Tensor:
    """Lower factor in float64; if necessary a small multiple of the identity is added, with a warning.

    Rounding of float32 products can exceed the smallest eigenvalues of a second moment, so that their sum is not
    positive definite.
    """
    moment_FF = moment_FF.double()
    diagonal_F = moment_FF.diagonal()
    for share in (0.0, 1e-8, 1e-7, 1e-6, 1e-5):
        jitter = share * diagonal_F.mean()
        factor, failed = torch.linalg.cholesky_ex(
            moment_FF + torch.diag(jitter.expand_as(diagonal_F))
        )
        if not failed:
            if share:
                log.warning(
                    "the second moment is numerically singular: added %.1e to its diagonal", jitter
                )
            return factor
    raise ValueError(
        "the second moment has no Cholesky factor: it is not finite, or computed from too little text"
    )


def eigen(moment_FF: Tensor) -> dict[str, Tensor]:
    """Eigenvalues, ascending and clamped at 0, and eigenvectors, one per column."""
    values_F, vectors_FF = torch.linalg.eigh(moment_FF)
    return {"values": values_F.clamp(min=0), "vectors": vectors_FF}
