"""The KL divergence of an edited model from the base model, as a loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Drift(torch.autograd.Function):
    """KL divergence whose gradient, softmax(edited) - softmax(base), is computed in place in the forward pass."""

    @staticmethod
    def forward(ctx: Any, base_NV: Tensor, edited_NV: Tensor) -> Tensor:  # noqa: ANN401
        logprob_NV = edited_NV.float().log_softmax(-1)
        base_NV = base_NV.float().log_softmax(-1)
        probability_NV = base_NV.exp()
        drift_N = torch.linalg.vecdot(probability_NV, base_NV.sub_(logprob_NV))
        ctx.save_for_backward(logprob_NV.exp_().sub_(probability_NV))
        ctx.dtype = edited_NV.dtype
        return drift_N

    @staticmethod
    def backward(ctx: Any, *gradient_N: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401
        (difference_NV,) = ctx.saved_tensors
        return None, (gradient_N[0][:, None] * difference_NV).to(ctx.dtype)


def drift(base_NV: Tensor, edited_NV: Tensor) -> Tensor:
    """KL(base || edited) of the logits at each of N positions, in float32; differentiable in ``edited_NV``."""
    return cast(Tensor, _Drift.apply(base_NV, edited_NV))
