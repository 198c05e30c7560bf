"""What learned editors read of an edit: inputs and output gradients of linear maps, token by token.

The gradient of a loss in a matrix is a sum of rank-one terms, grad W = sum_n d_n x_n', with x_n a token's input
and d_n the loss's gradient in its output.

Shapes: B rows, T tokens, I inputs and O outputs of a matrix, n tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.hooks import Hook, hooked
from modules.lm import LanguageModel, Rows
from modules.tail import Tail

CLAMP = 10.0  # of normalised inputs, in standard deviations


def gradient_factors(
    lm: LanguageModel,
    tail: Tail,
    rows: Rows,
    owner_B: Tensor,
    num_edits: int,
    names: Sequence[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{matrix: (x_BTI, d_BTO)}``: inputs, and gradients of the edits' losses in the outputs.

    An edit's loss is the mean NLL of the target tokens of all its rows. Gradients are taken at zeros added to the
    outputs, so no weight needs one.

    Args:
        lm: the language model.
        tail: the rows' lower blocks, run.
        rows: answer rows.
        owner_B: the edit of each row.
        num_edits: how many edits there are.
        names: paths of the linear maps.
    """
    leaves: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watch(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            leaves[name] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[name]

        return hook

    row_N, position_N = rows.answer_positions()
    with torch.enable_grad(), hooked([(lm.net.get_submodule(n), watch(n)) for n in names]):
        logprob_NV = tail.logits(row_N, position_N).float().log_softmax(-1)
        target_N = rows.ids_BT[row_N, position_N + 1]
        nll_N = -logprob_NV.gather(1, target_N[:, None])[:, 0]
        edit_N = owner_B[row_N]
        tokens_E = torch.bincount(edit_N, minlength=num_edits)
        loss = (nll_N / tokens_E[edit_N]).sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    shape = (len(rows.ids_BT), -1)
    return {
        name: (inputs[name].reshape(*shape, inputs[name].shape[-1]).float(),
               d.reshape(*shape, d.shape[-1]).float())
        for name, d in zip(names, gradients, strict=True)
    }  # fmt: skip


class Normaliser(nn.Module):
    """Running mean and standard deviation of each coordinate; batches are merged exactly (Chan et al., 1979)."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_nI: Tensor) -> None:
        """Takes in n more rows."""
        x_nI = x_nI.double()
        count, mean = len(x_nI), x_nI.mean(0)
        total = self.count + count
        shift = mean - self.mean
        self.squares += ((x_nI - mean) ** 2).sum(0) + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / std, clamped; x itself before any statistics."""
        if self.count < 2:
            return x
        std = (self.squares / (self.count - 1)).sqrt()
        return ((x - self.mean.float()) / (std.float() + 1e-7)).clamp(-CLAMP, CLAMP)
