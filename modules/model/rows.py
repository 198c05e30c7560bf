"""Encoded prompts with their targets, and the scores of those targets.

Shapes: B rows, T tokens, M tokens of the longest target, N positions, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

BATCH_TOKENS = 4096  # most padded tokens of one batch
ENOUGH_TOKENS = 512  # a larger batch has no row shorter than
SIMILAR = 7 / 8  # of its longest row


@dataclass(frozen=True)
class Rows:
    """Encoded rows, padded on the right.

    Attributes:
        ids_BT: token ids.
        mask_BT: 1 on real tokens.
        start_B: index of each row's first target token (the row's length where it has no target).
        depth_BT: if rows are trees (:mod:`corrigenda.modules.model.merging`), how many tokens precede each token.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    start_B: Tensor
    depth_BT: Tensor | None = None

    @classmethod
    def of(cls, ids: Sequence[list[int]], starts: Sequence[int], device: torch.device) -> Rows:
        """Rows of token ids; ``starts`` are the indices of their first target tokens."""
        ids_BT = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        length_B = torch.tensor([len(row) for row in ids], device=device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=device) < length_B[:, None]).long()
        return cls(ids_BT, mask_BT, torch.tensor(starts, device=device))

    @property
    def length_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    def without_last(self, count: int | None = None) -> Rows:
        """Masks the last token of the rows, whose output predicts nothing.

        Args:
            count: only of the first ``count`` rows; by default of all.
        """
        count = len(self.ids_BT) if count is None else count
        device = self.ids_BT.device
        column_T = torch.arange(self.ids_BT.shape[1], device=device)
        is_cut_B = torch.arange(len(self.ids_BT), device=device) < count
        mask_BT = self.mask_BT * (column_T < (self.length_B - is_cut_B.long())[:, None])
        return Rows(self.ids_BT, mask_BT, self.start_B)

    @property
    def prompt_BT(self) -> Tensor:
        """True on the tokens before each row's target."""
        column_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return column_T < self.start_B[:, None]

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, padded to the longest."""
        ids = pad_sequence([row for part in parts for row in part.ids_BT], batch_first=True)
        mask = pad_sequence([row for part in parts for row in part.mask_BT], batch_first=True)
        return cls(ids, mask, torch.cat([part.start_B for part in parts]))

    def select(self, row_R: Tensor) -> Rows:
        """Some of the rows, without columns of padding alone."""
        width = int(self.mask_BT[row_R].sum(1).max())
        ids_BT, mask_BT = self.ids_BT[row_R, :width], self.mask_BT[row_R, :width]
        depth_BT = None if self.depth_BT is None else self.depth_BT[row_R, :width]
        return Rows(ids_BT, mask_BT, self.start_B[row_R], depth_BT)

    def widened(self, width: int) -> Rows:
        """The rows, padded to a width."""
        more = (0, width - self.ids_BT.shape[1])
        return Rows(pad(self.ids_BT, more), pad(self.mask_BT, more), self.start_B)

    def common_start(self) -> int:
        """Length of the prefix that all rows share, at most up to the last prompt token, which is left out."""
        same_T = (self.ids_BT == self.ids_BT[:1]).all(0) & self.mask_BT.bool().all(0)
        return min(int(same_T.long().cumprod(0).sum()), int(self.start_B.min()) - 1)

    def unpadded(self) -> list[list[int]]:
        """The rows' tokens."""
        lengths = self.length_B.tolist()
        return [row[:n] for row, n in zip(self.ids_BT.tolist(), lengths, strict=True)]

    def targets(self) -> tuple[Tensor, Tensor]:
        """(target_BM, mask_BM): each row's target tokens, padded, and True where they are."""
        row_N, position_N = self.answer_positions()
        column_N = position_N + 1 - self.start_B[row_N]
        width = int((self.length_B - self.start_B).max())
        mask_BM = torch.zeros(len(self.ids_BT), width, dtype=torch.bool, device=self.ids_BT.device)
        mask_BM[row_N, column_N] = True
        target_BM = self.ids_BT.new_zeros(mask_BM.shape)
        target_BM[row_N, column_N] = self.ids_BT[row_N, position_N + 1]
        return target_BM, mask_BM

    def answer_positions(self) -> tuple[Tensor, Tensor]:
        """(row_N, position_N): positions whose logits predict target tokens, row by row."""
        column_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        reads = (column_T >= self.start_B[:, None] - 1) & (column_T < self.length_B[:, None] - 1)
        row_N, position_N = reads.nonzero(as_tuple=True)
        return row_N, position_N


@dataclass(frozen=True)
class TargetScores:
    """Teacher-forced results, one row per prompt and target; padding is masked out.

    Attributes:
        logprob_BM: log-probability of each target token, float32.
        greedy_BM: the most likely token at each target position.
        target_BM: the target tokens.
        mask_BM: True on target tokens.
        full_BMV: log-probabilities of the whole vocabulary, if they were requested.
    """

    logprob_BM: Tensor
    greedy_BM: Tensor
    target_BM: Tensor
    mask_BM: Tensor
    full_BMV: Tensor | None = None

    def __getitem__(self, rows: slice | list[int]) -> TargetScores:
        """Some of the rows, without columns of padding alone."""
        width = int(self.mask_BM[rows].sum(1).max()) if len(self.mask_BM[rows]) else 0
        return TargetScores(
            self.logprob_BM[rows, :width],
            self.greedy_BM[rows, :width],
            self.target_BM[rows, :width],
            self.mask_BM[rows, :width],
            None if self.full_BMV is None else self.full_BMV[rows, :width],
        )

    @property
    def exact_B(self) -> Tensor:
        """Whether every target token is the most likely one."""
        return ((self.greedy_BM == self.target_BM) | ~self.mask_BM).all(1)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the prefix that two token lists share."""
    same = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        same += 1
    return same


def padded_left(
    ids: Sequence[list[int]], start: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT) of rows aligned at their ends; padding comes after the ``start`` tokens that all share."""
    rest = [torch.tensor(row[start:][::-1]) for row in ids]
    rest_BS = pad_sequence(rest, batch_first=True).flip(1)
    same_BP = torch.tensor(ids[0][:start], dtype=torch.long).expand(len(ids), -1)
    ids_BT = torch.cat([same_BP, rest_BS], 1)
    padding_B = ids_BT.shape[1] - torch.tensor([len(row) for row in ids])
    column_T = torch.arange(ids_BT.shape[1])
    mask_BT = (column_T < start) | (column_T >= start + padding_B[:, None])
    return ids_BT.to(device), mask_BT.long().to(device)


def batches(rows: Rows, start: int = 0, share: int = 1) -> Iterator[Tensor]:
    """Row indices in batches of similar length, with little padding in larger batches.

    A batch has at most BATCH_TOKENS padded tokens from ``start`` on, and at most twice as many including the
    cached ones before; divided by ``share`` if each token needs that much more memory.
    """
    tokens = BATCH_TOKENS // share
    order = rows.length_B.argsort(descending=True, stable=True)
    lengths = rows.length_B[order].tolist()
    begin = 0
    while begin < len(order):
        longest = lengths[begin] - start
        most = min(tokens // longest, 2 * tokens // lengths[begin], len(order) - begin)
        count = max(1, min(ENOUGH_TOKENS // longest, most))
        while count < most and lengths[begin + count] - start >= SIMILAR * longest:
            count += 1
        yield order[begin : begin + count]
        begin += count
