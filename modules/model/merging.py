"""Rows that share a prefix are merged, so that the prefix runs once.

Targets of one prompt share the prompt, and prompts about one subject often share their first words. With causal
attention the states of a shared prefix are the same, so the texts of one owner are written as a tree: a row of
tokens, each after the one that it follows in its text, whose position is its depth and whose attention mask is
its path from the root.

Shapes: B rows, U rows after merging, T tokens, K requested tokens, N distinct places of those, D width of states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corrigenda.modules.model.rows import Rows, common_prefix

TREE_TOKENS = 128  # most tokens of a tree, or twice its longest text if that is more


@dataclass(frozen=True)
class Merged:
    """Rows with fewer tokens that stand for all tokens of some original rows.

    Attributes:
        rows: U rows.
        owner_U: the delta of each.
        row_BT: for each token of the original rows, the merged row that holds it.
        column_BT: its column there.
    """

    rows: Rows
    owner_U: Tensor
    row_BT: Tensor
    column_BT: Tensor

    def places(self, row_K: Tensor, position_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row_N, column_N, which_K): the distinct places of some tokens, and which of them each token has."""
        place_K2 = torch.stack(
            [self.row_BT[row_K, position_K], self.column_BT[row_K, position_K]], 1
        )
        place_N2, which_K = place_K2.unique(dim=0, return_inverse=True)
        return place_N2[:, 0], place_N2[:, 1], which_K


def unmerged(rows: Rows, owner_B: Tensor) -> Merged:
    """The rows as they are."""
    return _whole_rows(rows, owner_B, range(len(owner_B)), range(len(owner_B)))


def distinct(rows: Rows, owner_B: Tensor) -> Merged:
    """Whole rows, without duplicates of one owner."""
    number: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    which: list[int] = []
    every = zip(owner_B.tolist(), rows.start_B.tolist(), rows.unpadded(), strict=True)
    for b, (owner, start, row) in enumerate(every):
        key = (owner, start, *row)
        if key not in number:
            number[key] = len(firsts)
            firsts.append(b)
        which.append(number[key])
    return _whole_rows(rows, owner_B, firsts, which)


def _whole_rows(rows: Rows, owner_B: Tensor, firsts: Sequence[int], which: Sequence[int]) -> Merged:
    device, shape = rows.ids_BT.device, rows.ids_BT.shape
    row_U = torch.tensor(firsts, device=device)
    row_BT = torch.tensor(which, device=device)[:, None].expand(shape)
    column_BT = torch.arange(shape[1], device=device).expand(shape)
    return Merged(rows.select(row_U), owner_B[row_U.cpu()], row_BT, column_BT)


def trees(rows: Rows, owner_B: Tensor) -> Merged:
    """The rows of each owner as trees."""
    texts, owners = rows.unpadded(), owner_B.tolist()
    most = max(TREE_TOKENS, 2 * max(map(len, texts)))
    ids: list[list[int]] = []
    depths: list[list[int]] = []
    owner_U: list[int] = []
    which = [0] * len(texts)
    columns: list[Tensor] = [torch.empty(0)] * len(texts)
    before: list[int] = []  # the previous text
    path: list[int] = []  # columns of its tokens
    for b in sorted(range(len(texts)), key=lambda b: (owners[b], texts[b])):
        text = texts[b]
        same = common_prefix(before, text)
        is_other = owner_U[-1:] != [owners[b]]
        if is_other or len(ids[-1]) + len(text) - same > most:
            ids.append([])
            depths.append([])
            owner_U.append(owners[b])
            same = 0
        path = path[:same] + list(range(len(ids[-1]), len(ids[-1]) + len(text) - same))
        ids[-1] += text[same:]
        depths[-1] += range(same, len(text))
        which[b], columns[b], before = len(ids) - 1, torch.tensor(path), text
    device, width = rows.ids_BT.device, rows.ids_BT.shape[1]
    depth_UT = pad_sequence([torch.tensor(row) for row in depths], batch_first=True).to(device)
    row_BT = torch.tensor(which, device=device)[:, None].expand(-1, width)
    column_BT = pad_sequence(columns, batch_first=True).to(device)
    joined = replace(Rows.of(ids, [0] * len(ids), device), depth_BT=depth_UT)
    return Merged(joined, torch.tensor(owner_U), row_BT, column_BT)


def sees(depth_BT: Tensor) -> Tensor:
    """sees_BTT of trees: whether the second token is on the path from the root to the first one."""
    later = (
        torch.ones_like(depth_BT[0], dtype=torch.bool)[None].expand(depth_BT.shape[1], -1).triu(1)
    )
    # Token s is on the path to t if no token after s, up to t, is as deep as s or less deep.
    between_BST = depth_BT[:, None, :].expand(-1, depth_BT.shape[1], -1)
    least_BST = between_BST.masked_fill(~later, torch.iinfo(depth_BT.dtype).max).cummin(-1).values
    own = torch.eye(depth_BT.shape[1], dtype=torch.bool, device=depth_BT.device)
    return ((least_BST > depth_BT[:, :, None]) & later | own).transpose(1, 2)


class SharedStates:
    """Hidden states that enter a block, by token: equal wherever the tokens before are the same.

    Args:
        layer: the block.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._number: dict[tuple[int, int], int] = {}  # of (the number of the token before, token)
        self._states: dict[int, Tensor] = {}

    def states(self, rows: Rows, run: Callable[[Rows], Tensor]) -> Tensor:
        """states_BTD of rows; ``run`` computes them for rows with new tokens."""
        keys = self._keys(rows)
        new = [b for b, row in enumerate(keys) if any(key not in self._states for key in row)]
        if new:
            found_RTD = run(rows.select(torch.tensor(new, device=rows.ids_BT.device)))
            for b, row_TD in zip(new, found_RTD, strict=True):
                self._states.update(zip(keys[b], row_TD, strict=False))  # ignores padding
        found = [torch.stack([self._states[key] for key in row]) for row in keys]
        return pad_sequence(found, batch_first=True)

    def _keys(self, rows: Rows) -> list[list[int]]:
        """Every token's number."""
        texts = rows.unpadded()
        depths = [range(len(text)) for text in texts]
        if rows.depth_BT is not None:
            depths = rows.depth_BT.tolist()
        keys = []
        for text, depth in zip(texts, depths, strict=True):
            path: list[int] = []
            row = []
            for token, d in zip(text, depth, strict=False):
                above = path[d - 1] if d else -1
                path[d:] = [self._number.setdefault((above, token), len(self._number))]
                row.append(path[d])
            keys.append(row)
        return keys
