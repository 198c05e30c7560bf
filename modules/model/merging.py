"""Texts that begin alike, run once as far as they do.

Answers to one prompt share the prompt, and prompts about one subject often share their first words. With causal
attention the states of what is shared are the same, so the texts of one owner are written as a tree: a row of
tokens, each behind the one that it follows in its text, with its depth in place of a position, and a mask that
shows it the tokens on its way from the root and no others.

Shapes: B rows, U rows after merging, T tokens, K tokens asked for, N places of those, D width of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corrigenda.modules.model.rows import Rows, common_prefix

TREE_TOKENS = 128  # a tree has room for as many, or for twice its longest text


@dataclass(frozen=True)
class Merged:
    """Fewer tokens that stand for all tokens of some rows.

    Attributes:
        rows: U rows.
        owner_U: whose they are.
        row_BT: for each token of the rows that were merged, the row that holds it now.
        column_BT: and its place there.
    """

    rows: Rows
    owner_U: Tensor
    row_BT: Tensor
    column_BT: Tensor

    def places(self, row_K: Tensor, position_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row_N, column_N, which_K): where some tokens stand now, each place once, and which one is whose."""
        place_K2 = torch.stack(
            [self.row_BT[row_K, position_K], self.column_BT[row_K, position_K]], 1
        )
        place_N2, which_K = place_K2.unique(dim=0, return_inverse=True)
        return place_N2[:, 0], place_N2[:, 1], which_K


def unmerged(rows: Rows, owner_B: Tensor) -> Merged:
    """The rows as they are."""
    return _chosen(rows, owner_B, range(len(owner_B)), range(len(owner_B)))


def distinct(rows: Rows, owner_B: Tensor) -> Merged:
    """Whole rows, without those that one owner has already."""
    number: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    which: list[int] = []
    facts = zip(owner_B.tolist(), rows.start_B.tolist(), rows.unpadded(), strict=True)
    for b, (owner, start, row) in enumerate(facts):
        key = (owner, start, *row)
        if key not in number:
            number[key] = len(firsts)
            firsts.append(b)
        which.append(number[key])
    return _chosen(rows, owner_B, firsts, which)


def _chosen(rows: Rows, owner_B: Tensor, firsts: Sequence[int], which: Sequence[int]) -> Merged:
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
    before: list[int] = []  # the text before, and where its tokens are
    path: list[int] = []
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
    """sees_BTT of trees: whether the second token is the first one or stands on its way from the root."""
    later = (
        torch.ones_like(depth_BT[0], dtype=torch.bool)[None].expand(depth_BT.shape[1], -1).triu(1)
    )
    # Over the tokens from s (excluded) to t: a token is left behind once one as deep as itself follows.
    between_BST = depth_BT[:, None, :].expand(-1, depth_BT.shape[1], -1)
    least_BST = between_BST.masked_fill(~later, torch.iinfo(depth_BT.dtype).max).cummin(-1).values
    own = torch.eye(depth_BT.shape[1], dtype=torch.bool, device=depth_BT.device)
    return ((least_BST > depth_BT[:, :, None]) & later | own).transpose(1, 2)


class SharedStates:
    """What enters a block, token by token: the same in every row and tree that has the same tokens before it.

    Args:
        layer: the block.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._number: dict[tuple[int, int], int] = {}  # of a token behind a numbered one
        self._states: dict[int, Tensor] = {}

    def states(self, rows: Rows, run: Callable[[Rows], Tensor]) -> Tensor:
        """states_BTD of rows; ``run`` gives those of rows in which a token is new."""
        keys = self._keys(rows)
        new = [b for b, row in enumerate(keys) if any(key not in self._states for key in row)]
        if new:
            found_RTD = run(rows.select(torch.tensor(new, device=rows.ids_BT.device)))
            for b, row_TD in zip(new, found_RTD, strict=True):
                self._states.update(zip(keys[b], row_TD, strict=False))  # padding is behind
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
