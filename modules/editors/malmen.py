"""MALMEN: many edits in one update (Tan et al., 2024, arXiv 2311.04661).

For every token that predicts a target, a small network reads the key k (the input of an MLP output projection)
and the gradient g of the edit's loss with respect to the projection's output, and computes the change d of k's
value:

    (k~, g~) = network(normalise(k), normalise(g)),    d = -eta (k'k~) g~

The changes of all tokens of all edits are then fitted by one ridge regression, so that hundreds of edits do not
add up to a larger change than each of them needs:

    Delta = argmin sum_n |Delta k_n - d_n|^2 + lambda |Delta|^2 = D K' (K K' + lambda I)^-1 = (D S) K',
    S = (K'K + lambda I)^-1

Training keeps no graph of the language model. With M = dL/dDelta from plain back-propagation, in micro-batches,
the loss is pulled back to the network's outputs in closed form:

    dL/dD = P = M K S,    dL/d(log lambda) = -lambda <P, D S>

Departures from the authors' code: the step sizes eta are learned as logarithms; statistics of the inputs are
taken once, before the first step, and normalised inputs are clamped; the losses are means over edits, so that
results do not depend on the micro-batch size; in training the update is never written but runs as a side branch.

Shapes: B rows, T tokens, n predicting tokens of all rows, F width of a key, O outputs of a projection, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules import checks
from corrigenda.modules.model.delta import Delta, LowRank, Update
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.model.tail import Tail
from corrigenda.modules.training.drift import drift
from corrigenda.modules.training.gradients import PairNetwork, gradient_factors
from corrigenda.modules.training.learned import LearnedEditor, chosen_blocks


class Ridge:
    """The ridge regression of given keys, solved once; in float64.

    Args:
        keys_nF: one key per token.
        log_lambda: logarithm of the regularisation.
    """

    def __init__(self, keys_nF: Tensor, log_lambda: Tensor) -> None:
        self.keys_nF = keys_nF.detach().double()
        self.strength = log_lambda.detach().double().exp()
        gram_nn = self.keys_nF @ self.keys_nF.T
        gram_nn.diagonal().add_(self.strength)
        self.factor_nn = torch.linalg.cholesky(gram_nn)

    def solve(self, values_nO: Tensor) -> Tensor:
        """left_nO = (D S)', so that Delta = left' K'."""
        return torch.cholesky_solve(values_nO.detach().double(), self.factor_nn)

    def pull_back(self, gradient_OF: Tensor, left_nO: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dD, dL/d log lambda) of a loss with gradient dL/dDelta, D as values_nO."""
        pulled_nO = torch.cholesky_solve(self.keys_nF @ gradient_OF.double().T, self.factor_nn)
        return pulled_nO, -self.strength * (pulled_nO * left_nO).sum()


class ShiftNetwork(PairNetwork):
    """The network of all projections: (k~, g~) of a token's key and value gradient."""

    @staticmethod
    def step(h: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return scale * h.clamp(min=0) + offset


class MALMEN(LearnedEditor):
    """Learns to write many edits together; train it with ``fit``, then edit with schedule ``batch`` or ``epoch``.

    A training step makes the edits of the whole batch with one update: ``data.batch_size`` is the number of edits
    that it learns to make together. Training runs in a single process.

    Args:
        lm: the language model to edit.
        layers: blocks whose MLP output projections are edited; the last six if not given.
        rank: rank of the network's blocks.
        eta: initial step size of a value's change.
        strength: initial lambda.
        lr: Adam's learning rate for the network.
        lr_scales: Adam's learning rate for the logarithms of eta and lambda.
        warm_up: steps until ``lr`` is reached; then a cosine to 5 % over the run's ``max_steps``.
        num_normalising: training cases whose edits give the statistics of the inputs, taken before the first step.
        micro_batch: rows of one forward and backward pass through the language model; results do not depend on it.
        c_edit: weight of the edit loss.
        c_loc: weight of the locality loss.
        scale: factor by which updates are multiplied when edits are made, not in training.
        generate_tokens: length of free-running answers; 0 leaves them out.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: list[int] | None = None,
        rank: int = 256,
        eta: float = 1e-4,
        strength: float = 1.0,
        lr: float = 1e-5,
        lr_scales: float = 1e-2,
        warm_up: int = 10,
        num_normalising: int = 256,
        micro_batch: int = 32,
        c_edit: float = 1.0,
        c_loc: float = 1.0,
        scale: float = 1.0,
        generate_tokens: int = 0,
    ) -> None:
        super().__init__(lm, c_edit, c_loc, scale, generate_tokens=generate_tokens)
        checks.whole(1, rank=rank, num_normalising=num_normalising, micro_batch=micro_batch)
        checks.positive(eta=eta, strength=strength, lr=lr)
        checks.at_least(0, lr_scales=lr_scales)
        checks.whole(0, warm_up=warm_up)
        self.layers = chosen_blocks(lm, layers, 6)
        self.names = [lm.structure.out_name(layer) for layer in self.layers]
        self.lr, self.lr_scales, self.warm_up = lr, lr_scales, warm_up
        self.num_normalising, self.micro_batch = num_normalising, micro_batch
        shapes = {sizes(lm.net.get_submodule(name)) for name in self.names}
        if len(shapes) > 1:
            raise ValueError(
                f"the output projections of blocks {self.layers} have different shapes {sorted(shapes)} and "
                "cannot share a network: name blocks of one shape in --model.layers"
            )
        self.network = ShiftNetwork(*shapes.pop(), len(self.names), rank)
        self.log_eta = nn.Parameter(torch.full((len(self.names),), math.log(eta)))
        self.log_lambda = nn.Parameter(torch.full((len(self.names),), math.log(strength)))

    @property
    def lowest_layer(self) -> int:
        return self.layers[0]

    @property
    def _joins(self) -> bool:
        return True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(
            [
                {"params": list(self.network.parameters()), "lr": self.lr},
                {"params": [self.log_eta, self.log_lambda], "lr": self.lr_scales},
            ]
        )
        return self.scheduled(optimizer, self.warm_up)

    # ------------------------------------------------------------------ editing

    def deltas(self, tail: Tail, rows: Rows, owner_B: Tensor, num_edits: int) -> list[Delta]:
        """Each edit's update, all its rows in one regression; without gradient, see :meth:`_losses`."""
        pairs, row_n = self.keys_and_gradients(tail, rows)
        owner_n = owner_B[row_n]
        updates: list[dict[str, Update]] = [{} for _ in range(num_edits)]
        with torch.no_grad():
            for i, (name, (k_nF, g_nO)) in enumerate(pairs.items()):
                values_nO = self.values(k_nF, g_nO, i)
                for e in range(num_edits):
                    mine_n = owner_n == e
                    keys_mF = k_nF[mine_n]
                    left_mO = Ridge(keys_mF, self.log_lambda[i]).solve(values_nO[mine_n])
                    update = LowRank(left_mO.T.float(), keys_mF)
                    small = len(keys_mF) < min(k_nF.shape[1], g_nO.shape[1])
                    updates[e][f"{name}.weight"] = update if small else update.dense().float()
        return [Delta(update) for update in updates]

    def values(self, k_nF: Tensor, g_nO: Tensor, index: int) -> Tensor:
        """d_nO, the change of each token's value; differentiable in the network."""
        k, g = self.network(k_nF, g_nO, index)
        return -self.log_eta[index].exp() * (k_nF * k).sum(-1, keepdim=True) * g

    def keys_and_gradients(
        self, tail: Tail, rows: Rows
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """``{projection: (k_nF, g_nO)}`` at the tokens that predict targets, and row_n, the row of each.

        A row's loss is the mean NLL of its target tokens, independent of the other rows.
        """
        parts: list[dict[str, tuple[Tensor, Tensor]]] = []
        for index in torch.arange(len(rows.ids_BT), device=self.lm.device).split(self.micro_batch):
            some = rows.select(index)
            at = some.answer_positions()
            part = tail.select(index).trimmed()
            found = gradient_factors(self.lm, part, some, self.names)
            parts.append({name: (k[at], g[at]) for name, (k, g) in found.items()})
        pairs = {
            name: (torch.cat([p[name][0] for p in parts]), torch.cat([p[name][1] for p in parts]))
            for name in self.names
        }
        return pairs, rows.answer_positions()[0]

    def observe(self, cases: Sequence[EditCase]) -> None:
        """Takes statistics of keys and gradients from the first ``num_normalising`` cases."""
        edits = [case.edits[0] for case in cases[: self.num_normalising]]
        rows = self.lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        pairs, _ = self.keys_and_gradients(
            self.lm.reuse.tail(rows.without_last(), self.lowest_layer), rows
        )
        for index, (k_nF, g_nO) in enumerate(pairs.values()):
            self.network.normalise_x.update(k_nF, index)
            self.network.normalise_d.update(g_nO, index)

    # ------------------------------------------------------------------ training

    def _losses(
        self, edits: list[Edit], outer: list[Probe], local: list[Probe]
    ) -> tuple[Tensor, Tensor]:
        """(edit loss, locality KL) of one update for all edits.

        Their gradients with respect to the network are pulled back from those with respect to the update.
        """
        rows, tail = self._encoded(edits, outer, local)
        inner, outer_B, local_B = torch.arange(3 * len(edits), device=self.lm.device).view(3, -1)
        pairs, _ = self.keys_and_gradients(tail.select(inner), rows.select(inner))
        ridges, lefts, leaves = [], [], {}
        for i, (name, (k_nF, g_nO)) in enumerate(pairs.items()):
            with torch.no_grad():
                ridges.append(Ridge(k_nF, self.log_lambda[i]))
                lefts.append(ridges[i].solve(self.values(k_nF, g_nO, i)))
                delta_OF = (lefts[i].T @ ridges[i].keys_nF).float()
            leaves[f"{name}.weight"] = delta_OF.requires_grad_()
        losses = [
            self._accumulate(lambda b: self._nll(tail, rows, b, leaves) / len(edits), outer_B, leaves),
            self._accumulate(lambda b: self._drift(tail, rows, b, leaves) / len(edits), local_B, leaves),
        ]  # fmt: skip
        pulled = [torch.zeros((), device=self.lm.device) for _ in losses]
        for i, (k_nF, g_nO) in enumerate(pairs.values()):
            values_nO = self.values(k_nF, g_nO, i)
            for which, (_, gradients) in enumerate(losses):
                by_values, by_lambda = ridges[i].pull_back(gradients[i], lefts[i])
                pulled[which] = pulled[which] + (by_values.to(values_nO.dtype) * values_nO).sum()
                pulled[which] = pulled[which] + by_lambda.to(values_nO.dtype) * self.log_lambda[i]
        edit_loss, kl = (
            value + (p - p.detach()) for (value, _), p in zip(losses, pulled, strict=True)
        )
        return edit_loss, kl

    def _accumulate(
        self, loss: Callable[[Tensor], Tensor], index: Tensor, leaves: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """(value, gradients of the leaves) of a loss summed over rows, one micro-batch at a time."""
        value = torch.zeros((), device=index.device)
        total = [torch.zeros_like(leaf) for leaf in leaves.values()]
        for part in index.split(self.micro_batch):
            with torch.enable_grad():
                some = loss(part)
                gradients = torch.autograd.grad(some, list(leaves.values()))
            value = value + some.detach()
            total = [a + b for a, b in zip(total, gradients, strict=True)]
        return value, total

    def _nll(self, tail: Tail, rows: Rows, index: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """Sum over rows of the mean NLL of their targets under the update."""
        some = rows.select(index)
        row_N, position_N = some.answer_positions()
        logits_NV = self._edited(tail.select(index).trimmed(), row_N, position_N, leaves)
        target_N = some.ids_BT[row_N, position_N + 1]
        nll_N = cross_entropy(logits_NV.float(), target_N, reduction="none")
        return (nll_N / torch.bincount(row_N, minlength=len(index))[row_N]).sum()

    def _drift(self, tail: Tail, rows: Rows, index: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """Sum over rows of the mean over their tokens of KL(base || edited)."""
        row_N, position_N = rows.select(index).mask_BT.bool().nonzero(as_tuple=True)
        part = tail.select(index).trimmed()
        with torch.no_grad():
            base_tail = self.lm.reuse.higher(part, self.lm.structure.num_layers)
            base_NV = base_tail.logits(row_N, position_N)
        drift_N = drift(base_NV, self._edited(part, row_N, position_N, leaves))
        return (drift_N / torch.bincount(row_N, minlength=len(index))[row_N]).sum()

    def _edited(
        self, tail: Tail, row_N: Tensor, position_N: Tensor, leaves: dict[str, Tensor]
    ) -> Tensor:
        """logits_NV under the update."""
        updates: dict[str, Update] = {**leaves}
        with self.lm.edits.side_by_side([Delta(updates)], None):
            return tail.logits(row_N, position_N)
