"""Gradient descent on many independent problems together.

Shapes: E independent problems, stacked in the first dimension of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class IndependentAdam:
    """Adam (Kingma and Ba, 2015) on stacked problems; one that has stopped keeps its value bit-exactly.

    Zeroing a stopped problem's gradient is not enough: Adam's momentum would still move it. All problems start
    together and none starts again, so one step count serves all.

    Args:
        tensors: leaves of shape [E, ...], updated in place.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: L2 decay added to the gradient.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.tensors, self.lr, self.betas, self.eps = list(tensors), lr, betas, eps
        self.weight_decay, self.steps = weight_decay, 0
        self.first = [torch.zeros_like(t) for t in self.tensors]
        self.second = [torch.zeros_like(t) for t in self.tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], active_E: Tensor) -> None:
        """One step of the active problems; ``gradients`` are of the full stacks."""
        self.steps += 1
        beta1, beta2 = self.betas
        rows = active_E.nonzero()[:, 0]
        rate = self.lr / (1 - beta1**self.steps)
        for x, g, m, v in zip(self.tensors, gradients, self.first, self.second, strict=True):
            g = g[rows] + self.weight_decay * x[rows] if self.weight_decay else g[rows]
            m[rows] = beta1 * m[rows] + (1 - beta1) * g
            v[rows] = beta2 * v[rows] + (1 - beta2) * g * g
            scale = (v[rows] / (1 - beta2**self.steps)).sqrt() + self.eps
            x[rows] -= rate * m[rows] / scale
