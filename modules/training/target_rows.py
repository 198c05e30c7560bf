"""The loss of fine-tuning: rows of prompts with their targets, and the positions where the targets are predicted.

Shapes: R rows, T tokens, N target tokens, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.tail import Tail

Loss = Literal["target", "prompt_last"]


@dataclass(frozen=True)
class TargetRows:
    """Rows that run together, and the positions of their targets' loss.

    Attributes:
        tail: the rows, with the blocks below the tuned ones already run.
        prompt_RT: True on prompt tokens.
        owner_R: the index of the problem that each row belongs to.
        row_N: the row of each target token.
        position_N: the position that predicts it.
        target_N: its id.
    """

    tail: Tail
    prompt_RT: Tensor
    owner_R: Tensor
    row_N: Tensor
    position_N: Tensor
    target_N: Tensor

    @classmethod
    def of(
        cls, lm: LanguageModel, rows: Rows, owner_R: Tensor, layer: int, loss: Loss
    ) -> TargetRows:
        row_N, position_N = rows.answer_positions()
        target_N = rows.ids_BT[row_N, position_N + 1]
        if loss == "prompt_last":
            position_N = rows.start_B[row_N] - 1
        return cls(lm.reuse.tail(rows, layer), rows.prompt_BT, owner_R, row_N, position_N, target_N)

    @property
    def answers_N(self) -> tuple[Tensor, Tensor]:
        """Rows and positions that predict the target tokens."""
        return self.row_N, self.position_N

    def logits(
        self, lm: LanguageModel, deltas: Sequence[Delta], row_N: Tensor, position_N: Tensor
    ) -> Tensor:
        """logits_NV after the given positions, under each row's problem's update."""
        with lm.edits.announce(self.prompt_RT), lm.edits.side_by_side(deltas, self.owner_R.cpu()):
            return self.tail.logits(row_N, position_N)

    def nll(self, logits_NV: Tensor) -> Tensor:
        """loss_R: the mean over each row's target tokens, from the logits that predict them."""
        nll_N = cross_entropy(logits_NV.float(), self.target_N, reduction="none")
        total_R = nll_N.new_zeros(len(self.owner_R)).index_add(0, self.row_N, nll_N)
        return total_R / self.length_R

    def losses(self, lm: LanguageModel, deltas: Sequence[Delta] = ()) -> Tensor:
        """loss_R, under each row's problem's update."""
        return self.nll(self.logits(lm, deltas, *self.answers_N))

    @property
    def length_R(self) -> Tensor:
        """How many target tokens each row has."""
        return torch.bincount(self.row_N, minlength=len(self.owner_R))

    def select(self, active_E: Tensor) -> TargetRows | None:
        """The rows of active problems; None if there are none."""
        keep_R = active_E[self.owner_R]
        if keep_R.all():
            return self
        rows = keep_R.nonzero()[:, 0]
        if not len(rows):
            return None
        keep_N = keep_R[self.row_N]
        renumbered_R = keep_R.cumsum(0) - 1
        return TargetRows(
            self.tail.select(rows),
            self.prompt_RT[rows],
            self.owner_R[rows],
            renumbered_R[self.row_N[keep_N]],
            self.position_N[keep_N],
            self.target_N[keep_N],
        )
