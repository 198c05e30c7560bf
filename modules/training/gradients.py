"""What learned editors read of an edit: inputs and output gradients of linear layers, token by token.

The gradient of a loss with respect to a matrix is a sum of rank-one terms, grad W = sum_n d_n x_n', with x_n a
token's input and d_n the gradient with respect to its output.

Shapes: B rows, T tokens, I inputs and O outputs of a matrix, n tokens of all rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corrigenda.modules.model.delta import LowRank
from corrigenda.modules.model.hooks import Hook, first, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.tail import Tail

CLAMP = 10.0  # of normalised inputs, in standard deviations


def gradient_factors(
    lm: LanguageModel,
    tail: Tail,
    rows: Rows,
    names: Sequence[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{matrix: (x_BTI, d_BTO)}``: inputs, and gradients of the rows' losses with respect to the outputs.

    A row's loss is the mean NLL of its target tokens, so what is read of an edit does not depend on the batch it
    is in. Gradients are taken with respect to zeros added to the outputs, so no weight needs one.

    Args:
        lm: the language model.
        tail: the rows, with the lower blocks already run.
        rows: answer rows, one per edit.
        names: paths of the linear layers.
    """
    leaves: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watch(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            leaves[name] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[name]

        return hook

    weight_B = 1 / (rows.length_B - rows.start_B)
    top = max(lm.structure.layer_of(name) for name in names) + 1
    back_BTD = _cached_gradient(lm, tail.layer, rows, top)
    with torch.enable_grad(), hooked([(lm.net.get_submodule(n), watch(n)) for n in names]):
        if back_BTD is None:
            loss = (_nll(tail, rows) * weight_B).sum()
        else:
            states_BTD = first(tail.through(top))
            back_BTD = back_BTD[:, : states_BTD.shape[1]] * weight_B[:, None, None]
            loss = (states_BTD * back_BTD.to(states_BTD.dtype)).sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    shape = (len(rows.ids_BT), -1)
    return {
        name: (inputs[name].reshape(*shape, inputs[name].shape[-1]).float(),
               d.reshape(*shape, d.shape[-1]).float())
        for name, d in zip(names, gradients, strict=True)
    }  # fmt: skip


def _nll(tail: Tail, rows: Rows) -> Tensor:
    """nll_B: the sum over each row's target tokens."""
    row_N, position_N = rows.answer_positions()
    target_N = rows.ids_BT[row_N, position_N + 1]
    nll_N = cross_entropy(tail.logits(row_N, position_N).float(), target_N, reduction="none")
    return nll_N.new_zeros(len(rows.ids_BT)).index_add(0, row_N, nll_N)


def _cached_gradient(lm: LanguageModel, layer: int, rows: Rows, top: int) -> Tensor | None:
    """back_BTD, the gradient of each row's summed NLL at the input of block ``top``; None if nothing is cached."""
    cache = lm.reuse.store(lm.structure.num_layers)
    if cache is None:
        return None

    def run(part: Rows) -> Tensor:
        tail = lm.reuse.higher(lm.reuse.tail(part.without_last(), layer), top)
        with torch.enable_grad():
            states_BTD = first(tail.stored).requires_grad_()
            return torch.autograd.grad(_nll(tail, part).sum(), states_BTD)[0]

    return cache.states(f"back to {top} from {layer}", rows, run)


def by_owner(left_nO: Tensor, right_nI: Tensor, owner_n: Tensor, num_owners: int) -> list[LowRank]:
    """Every owner's sum of ``left_n right_n'``, as low-rank factors."""
    order_n = owner_n.argsort(stable=True)
    counts = torch.bincount(owner_n, minlength=num_owners).tolist()
    parts = zip(left_nO[order_n].split(counts), right_nI[order_n].split(counts), strict=True)
    return [LowRank(left_mO.T, right_mI) for left_mO, right_mI in parts]


class Normaliser(nn.Module):
    """Mean and standard deviation of each coordinate, per matrix; batches are merged exactly (Chan et al., 1979).

    Args:
        count: how many matrices.
        width: how many coordinates.
    """

    seen: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(count, width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(count, width, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_nI: Tensor, index: int) -> None:
        """Adds n rows to the statistics of matrix ``index``."""
        x_nI = x_nI.double()
        rows, mean = len(x_nI), x_nI.mean(0)
        before = self.seen[index].clone()
        total = before + rows
        shift = mean - self.mean[index]
        self.squares[index] += ((x_nI - mean) ** 2).sum(0) + shift**2 * (before * rows / total)
        self.mean[index] += shift * (rows / total)
        self.seen[index] = total

    def forward(self, x: Tensor, index: int | Tensor) -> Tensor:
        """(x - mean) / std, clamped; x itself while there are no statistics."""
        std = (self.squares / (self.seen - 1).clamp(min=1)[:, None]).sqrt().float()
        mean = self.mean.float()
        normal = ((x - mean[index]) / (std[index] + 1e-7)).clamp(-CLAMP, CLAMP)
        return torch.where((self.seen[index] > 1)[..., None], normal, x)


class PairNetwork(nn.Module, ABC):
    """A low-rank residual network on a token's normalised input and output gradient; starts as the identity.

    Matrices of one shape share it and differ by a scale and an offset per block, and by the statistics of their
    inputs. A subclass says where scale and offset act.

    Args:
        inputs: I.
        outputs: O.
        count: how many matrices share it.
        rank: rank of each block.
        num_blocks: residual blocks.
    """

    def __init__(
        self, inputs: int, outputs: int, count: int, rank: int, num_blocks: int = 2
    ) -> None:
        super().__init__()
        width = inputs + outputs
        rank = min(rank, width)
        self.inputs = inputs
        self.normalise_x, self.normalise_d = Normaliser(count, inputs), Normaliser(count, outputs)
        self.down = nn.ParameterList([torch.randn(rank, width) for _ in range(num_blocks)])
        self.up = nn.ParameterList([torch.zeros(width, rank) for _ in range(num_blocks)])
        self.bias = nn.ParameterList([torch.zeros(width) for _ in range(num_blocks)])
        self.scale = nn.ParameterList([torch.ones(count, width) for _ in range(num_blocks)])
        self.offset = nn.ParameterList([torch.zeros(count, width) for _ in range(num_blocks)])

    @staticmethod
    @abstractmethod
    def step(h: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """What a block adds, given the output ``h`` of its low-rank layer.

        Rectify with ``clamp(min=0)``, not relu: its gradient at 0 is 1, without which zeros in ``up`` would never
        move.
        """

    def forward(self, x: Tensor, d: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """(x~, d~) of pairs (last dimensions I and O); ``index`` is their matrix, one for all or one each."""
        y = torch.cat([self.normalise_x(x, index), self.normalise_d(d, index)], -1)
        blocks = zip(self.down, self.up, self.bias, self.scale, self.offset, strict=True)
        for down, up, bias, scale, offset in blocks:
            y = y + self.step(y @ down.T @ up.T + bias, scale[index], offset[index])
        return y[..., : self.inputs], y[..., self.inputs :]
