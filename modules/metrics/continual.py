"""What a model knows of a sequence of tasks while it learns them one by one.

All functions take ``after_TT``: [..., T, T], row i the accuracy on every task after task i was learned. Leading
dimensions are independent (resamples, say). Where T is 1 there is nothing to forget, and what is a mean over
earlier or later tasks is NaN.

GEM: Lopez-Paz and Ranzato, 2017, arXiv 1706.08840. RWalk: Chaudhry et al., 2018, arXiv 1801.10112.
"""

from __future__ import annotations

import torch
from torch import Tensor


def final_accuracy(after_TT: Tensor) -> Tensor:
    """ACC, the mean over all tasks after the last: mean_j R[T, j] (GEM, equation 2)."""
    return after_TT[..., -1, :].mean(-1)


def incremental_accuracy(after_TT: Tensor) -> Tensor:
    """The mean over i of the accuracy on the tasks learned by then: mean_i mean_{j <= i} R[i, j].

    Average incremental accuracy: Rebuffi et al., 2017 (iCaRL), arXiv 1611.07725.
    """
    learned_TT = torch.ones_like(after_TT).tril()
    return ((after_TT * learned_TT).sum(-1) / learned_TT.sum(-1)).mean(-1)


def backward_transfer(after_TT: Tensor) -> Tensor:
    """BWT, what earlier tasks gained since then: mean_{j < T} (R[T, j] - R[j, j]) (GEM, equation 3)."""
    just_learned_T = after_TT.diagonal(dim1=-2, dim2=-1)
    return (after_TT[..., -1, :-1] - just_learned_T[..., :-1]).mean(-1)


def forward_transfer(after_TT: Tensor, before_T: Tensor) -> Tensor:
    """FWT, what later tasks gained before they were learned: mean_{j >= 2} (R[j-1, j] - b_j) (GEM, equation 4).

    Args:
        after_TT: accuracies [..., T, T].
        before_T: b, accuracies of the model before the first task, [..., T].
    """
    next_T = after_TT.diagonal(offset=1, dim1=-2, dim2=-1)
    return (next_T - before_T[..., 1:]).mean(-1)


def forgetting(after_TT: Tensor) -> Tensor:
    """How far tasks fell from their best: mean_{j < T} (max_{j <= l < T} R[l, j] - R[T, j]) (RWalk, section 3).

    Only evaluations since a task was learned count: what a model knew of it before is not learned from it.
    """
    earlier_TT = after_TT[..., :-1, :-1]
    since_TT = torch.ones_like(earlier_TT, dtype=torch.bool).tril()
    if not since_TT.numel():
        return after_TT.new_full(after_TT.shape[:-2], torch.nan)
    best_T = earlier_TT.masked_fill(~since_TT, -torch.inf).amax(-2)
    return (best_T - after_TT[..., -1, :-1]).mean(-1)
