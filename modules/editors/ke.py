"""KE: a hypernetwork that reads the edit (De Cao et al., 2021, arXiv 2104.08164), on causal LMs.

A bidirectional LSTM reads the text "old answer >> new answer || prompt" into a condition vector c. Every edited
matrix W has its own head, which maps c to a gate and four vectors. These give a mask for the gradient G of the
edit's loss, and a term that needs no gradient:

    W' = W + sigma(eta) * s_max * (G o A + B),   A = softmax(a_row) a_col',   B = softmax(b_row) b_col'

G is a sum of token terms d_n x_n', so G o A = sum_n (softmax(a_row) o d_n) (a_col o x_n)': the update is of low
rank and is stored exactly, as its factors. The sign is learned.

Training is constrained: it minimises the edit loss such that the drift on unrelated text stays below a margin,

    min max over alpha >= 0 of   NLL(edited; phrasing) + alpha * (KL(base || edited; unrelated) - margin)

alpha ascends its own gradient, and the margin shrinks after each validation in which the edits succeed.

Departures from the authors' code: words are embedded by the language model's own, frozen embedding; rows of A
and B are outputs and columns inputs, however the module stores its weight; several edits at once are the sum of
their updates, each computed as if alone; an edit is made once, not repeated until it succeeds; alpha is updated by
plain gradient ascent, not by the network's optimizer.

Shapes: E edits, B rows, I inputs and O outputs of a matrix, n tokens of all rows, C width of the condition.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from corrigenda.modules import checks
from corrigenda.modules.model.delta import Delta, Update
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.model.tail import Tail
from corrigenda.modules.training.gradients import by_owner, gradient_factors
from corrigenda.modules.training.learned import LearnedEditor, chosen_blocks, mlp_matrices

DECAY = 0.8  # of the margin, after a validation in which the edits succeed
MADE = 0.9  # rate of successful edits above which it decays


class Head(nn.Module):
    """Maps the condition to a matrix's gate and vectors.

    Args:
        condition: C.
        hidden: width of the hidden layer.
        inputs: I.
        outputs: O.
    """

    def __init__(self, condition: int, hidden: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.widths = [inputs, outputs, inputs, outputs, 1]
        self.net = nn.Sequential(
            weight_norm(nn.Linear(condition, hidden)),
            nn.Tanh(),
            weight_norm(nn.Linear(hidden, sum(self.widths))),
        )

    def forward(self, condition_BC: Tensor) -> list[Tensor]:
        """a_col_BI, softmax(a_row)_BO, b_col_BI, softmax(b_row)_BO, eta_B1."""
        a_col, a_row, b_col, b_row, eta = self.net(condition_BC).split(self.widths, dim=-1)
        return [a_col, a_row.softmax(-1), b_col, b_row.softmax(-1), eta]


class KE(LearnedEditor):
    """Learns to turn an edit's text and gradient into an update; train it with ``fit``.

    Args:
        lm: the language model to edit.
        layers: blocks whose MLP matrices are edited, from 0; the last three if not given.
        projections: ``mlp``: every MLP matrix of these blocks; ``out``: the output projections.
        hidden: width of the LSTM in each direction, and of the heads' hidden layer.
        condition: width of the condition vector.
        max_scale: s_max, the largest factor of an update.
        lr: RMSprop's learning rate for the hypernetwork.
        lr_alpha: learning rate of the ascent in alpha.
        warm_up: steps until ``lr`` is reached; then a cosine to 5 % over the run's ``max_steps``.
        margin: drift allowed at first, in nats per token.
        least_margin: lower bound of the margin.
        scale: factor by which updates are multiplied when edits are made, not in training.
        together: training cases whose edits are summed into one update.
        generate_tokens: length of free-running answers; 0 leaves them out.
    """

    multiplier: Tensor
    margin: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        layers: list[int] | None = None,
        projections: Literal["mlp", "out"] = "mlp",
        hidden: int = 128,
        condition: int = 1024,
        max_scale: float = 1.0,
        lr: float = 3e-4,
        lr_alpha: float = 0.1,
        warm_up: int = 100,
        margin: float = 1e-3,
        least_margin: float = 1e-5,
        scale: float = 1.0,
        together: int = 1,
        generate_tokens: int = 0,
    ) -> None:
        super().__init__(lm, scale=scale, together=together, generate_tokens=generate_tokens)
        checks.whole(1, hidden=hidden, condition=condition)
        checks.positive(max_scale=max_scale, lr=lr)
        checks.at_least(0, lr_alpha=lr_alpha, margin=margin, least_margin=least_margin)
        checks.whole(0, warm_up=warm_up)
        self.layers = chosen_blocks(lm, layers, 3)
        self.names = mlp_matrices(lm, self.layers, projections)
        self.max_scale = max_scale
        self.lr, self.lr_alpha, self.warm_up = lr, lr_alpha, warm_up
        self.least_margin = least_margin
        width = lm.net.get_input_embeddings().weight.shape[1]
        self.reader = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.summary = nn.Linear(2 * hidden, condition)
        shapes = [sizes(lm.net.get_submodule(name)) for name in self.names]
        self.heads = nn.ModuleList([Head(condition, hidden, i, o) for i, o in shapes])
        self.register_buffer("multiplier", torch.ones(()))  # alpha
        self.register_buffer("margin", torch.tensor(margin))
        self._excesses: list[Tensor] = []  # of the batches since the last step

    @property
    def lowest_layer(self) -> int:
        return self.layers[0]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.RMSprop(parameters, lr=self.lr, centered=True)
        return self.scheduled(optimizer, self.warm_up)

    # ------------------------------------------------------------------ editing

    def deltas(self, tail: Tail, rows: Rows, owner_B: Tensor, num_edits: int) -> list[Delta]:
        alone_B = torch.arange(len(owner_B), device=owner_B.device)
        pairs = gradient_factors(self.lm, tail, rows, self.names)
        condition_BC = self.condition(tail, rows)
        updates: list[dict[str, Update]] = [{} for _ in range(num_edits)]
        for head, (name, (x_BTI, d_BTO)) in zip(self.heads, pairs.items(), strict=True):
            a_col_BI, a_row_BO, b_col_BI, b_row_BO, eta_B1 = head(condition_BC)
            gate_B1 = self.max_scale * eta_B1.sigmoid()
            used_BT = (d_BTO != 0).any(-1)
            row_n = used_BT.nonzero()[:, 0]
            left_nO = torch.cat([(gate_B1 * a_row_BO)[row_n] * d_BTO[used_BT], gate_B1 * b_row_BO])
            right_nI = torch.cat([a_col_BI[row_n] * x_BTI[used_BT], b_col_BI])
            owner_n = owner_B[torch.cat([row_n, alone_B])]
            for e, update in enumerate(by_owner(left_nO, right_nI, owner_n, num_edits)):
                updates[e][f"{name}.weight"] = update
        return [Delta(update) for update in updates]

    def condition(self, tail: Tail, rows: Rows) -> Tensor:
        """condition_BC of every row; the old answer is the model's own, as long as the new one."""
        row_N, position_N = rows.answer_positions()
        with torch.no_grad():
            greedy_N = tail.logits(row_N, position_N).argmax(-1)
        new, bar = (
            torch.tensor(self.lm.tokenizer(mark, add_special_tokens=False).input_ids).to(greedy_N)
            for mark in (" >> ", " || ")
        )
        embed = self.lm.net.get_input_embeddings()
        texts = []
        for b, (start, end) in enumerate(
            zip(rows.start_B.tolist(), rows.length_B.tolist(), strict=True)
        ):
            ids, old = rows.ids_BT[b], greedy_N[row_N == b]
            text = torch.cat([old, new, ids[start:end], bar, ids[:start]])
            texts.append(embed(text).float())
        _, (state_2BH, _) = self.reader(pack_sequence(texts, enforce_sorted=False))
        return torch.tanh(self.summary(torch.cat([*state_2BH], -1)))

    # ------------------------------------------------------------------ training

    def objective(self, edit_loss: Tensor, kl: Tensor) -> Tensor:
        excess = kl - self.margin
        self._excesses.append(excess.detach())
        return edit_loss + self.multiplier * excess

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """alpha rises while the drift is above the margin, and is never below zero.

        It is updated before the batch ends, since checkpoints are written then.
        """
        super().on_before_optimizer_step(optimizer)
        excess = self.mean_over_processes(torch.stack(self._excesses).mean())
        self._excesses.clear()
        if torch.isfinite(excess):
            self.multiplier.add_(self.lr_alpha * excess).clamp_(min=0)
        self.log("train/alpha", self.multiplier)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        made = self.means.get("efficacy/exact", 0.0) > MADE
        if self.global_step > 0 and made and self.margin > self.least_margin:
            self.margin.mul_(DECAY).clamp_(min=self.least_margin)
        self.log("val/margin", self.margin)
