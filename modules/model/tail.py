"""The frozen prefix: the part of a network that an intervention cannot change runs once, the rest many times.

An intervention at block L changes nothing below L, and with causal attention nothing before its first token. A
:class:`Tail` therefore stores the hidden states that enter block L and, if the first token is given, keys and
values of the tokens before it. Blocks below L are replaced by modules that return the stored states, so embedding,
masks, rotary tables, final norm and head are the network's own, and no model family needs code of its own.

Shapes: B rows, T tokens, D width, N positions, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from corrigenda.modules.interrupts import Reversible
from corrigenda.modules.model.hooks import capture, first, remove_all, replace_first
from corrigenda.modules.model.kv_cache import empty_cache, first_tokens, fork, select_rows
from corrigenda.modules.model.merging import sees
from corrigenda.modules.model.structure import Structure


class _StandIn(nn.Module):
    """Takes a block's place and returns stored hidden states; other attributes are the block's own."""

    def __init__(self, block: nn.Module, output: Any) -> None:  # noqa: ANN401
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._output = output

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)

    def forward(self, *_: object, **__: object) -> Any:  # noqa: ANN401
        return self._output


class Tail:
    """Blocks from ``layer`` up, for right-padded rows; what is below is computed here, without gradient.

    Args:
        net: a causal LM, which is changed only during a call.
        structure: where its blocks are.
        ids_BT: token ids, padded on the right.
        mask_BT: 1 on real tokens.
        layer: the lowest block that may change. 0 runs every block.
        start_B: first token of each row that may change; of those before, keys and values are stored. None
            runs all tokens.
        reuse: False recomputes everything in every call, head included: the reference path.
        prefix: cache of the tokens before ``start_B`` from :func:`run_start`, if all rows share them.
        stored: output of the block below ``layer`` for these rows, if it is known.
        depth_BT: depths, if rows are trees (:mod:`corrigenda.modules.model.merging`), which are not cut.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        structure: Structure,
        ids_BT: Tensor,
        mask_BT: Tensor,
        layer: int,
        start_B: Tensor | None = None,
        reuse: bool = True,
        prefix: DynamicCache | None = None,
        stored: Any = None,  # noqa: ANN401  as the block returns it
        depth_BT: Tensor | None = None,
    ) -> None:
        self.net, self.structure, self.layer, self.reuse = net, structure, layer, reuse
        self.blocks = cast(nn.ModuleList, net.get_submodule(structure.blocks))
        self.offset_B = torch.zeros(len(ids_BT), dtype=torch.long, device=ids_BT.device)
        self.ids_BT, self.mask_BT = ids_BT, mask_BT
        self._positions = depth_BT
        self._cache: DynamicCache | None = None
        self.stored = stored
        if not reuse or stored is not None:
            return
        if start_B is not None and int(start_B.max()) > 0:
            self._split(start_B, prefix)
        if layer > 0:
            self.stored = self.below(layer)

    @torch.no_grad()
    def _split(self, start_B: Tensor, prefix: DynamicCache | None) -> None:
        """Cuts rows at ``start_B``, aligns the cuts, and stores keys and values of the tokens before them.

        Leaves rows whole if a layer keeps a running state instead, which can be neither cut nor forked.
        """
        cache = empty_cache(self.net)
        if cache is None:
            return
        ids_BT, mask_BT = self.ids_BT, self.mask_BT
        length_B = mask_BT.sum(1)
        before, after = int(start_B.max()), int((length_B - start_B).max())
        column = (
            torch.arange(before + after, device=ids_BT.device)[None] - before + start_B[:, None]
        )
        inside = (column >= 0) & (column < length_B[:, None])
        ids = ids_BT.gather(1, column.clamp(0, ids_BT.shape[1] - 1))
        mask = inside.to(mask_BT.dtype)
        positions = column.clamp(min=0)
        if prefix is not None:
            cache = first_tokens(prefix, before, len(ids))
        else:
            self.net.get_decoder()(
                input_ids=ids[:, :before],
                attention_mask=mask[:, :before],
                position_ids=positions[:, :before],
                past_key_values=cache,
                use_cache=True,
            )
        self.ids_BT, self.mask_BT, self._positions = ids[:, before:], mask, positions[:, before:]
        self._cache, self.offset_B = cache, start_B

    @property
    def is_cut(self) -> bool:
        """Whether the tokens before ``start_B`` are stored, as keys and values."""
        return self._cache is not None

    def from_block(self, layer: int, stored: Any = None) -> Tail:  # noqa: ANN401
        """The same rows from a higher block on; ``stored`` is the output of the block below it, if known."""
        part = copy.copy(self)
        part.stored = self.below(layer) if stored is None else stored
        part.layer = layer
        return part

    @torch.no_grad()
    def below(self, layer: int) -> Any:  # noqa: ANN401  as the block returns it
        """Output of the block below ``layer`` for these rows."""
        output = self.through(layer)
        return replace_first(output, first(output).detach())

    def through(self, layer: int) -> Any:  # noqa: ANN401  as the block returns it
        """The same, differentiable."""
        name = self.structure.block_name(layer - 1)
        last = {name: self.net.get_submodule(name)}
        with self._stand_ins(), capture(last, stop=True) as seen:
            self.net(**self._inputs())
        return seen[name][1]

    def _inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": self.ids_BT,
            "attention_mask": self.mask_BT,
            "use_cache": False,
        }
        if self._cache is not None:
            inputs |= {
                "past_key_values": fork(self._cache),
                "position_ids": self._positions,
                "use_cache": True,
            }
        elif self._positions is not None:
            sees_B1TT = sees(self._positions)[:, None]
            mask_B1TT = torch.zeros_like(sees_B1TT, dtype=self.net.dtype)
            mask_B1TT.masked_fill_(~sees_B1TT, torch.finfo(self.net.dtype).min)
            inputs |= {"position_ids": self._positions, "attention_mask": mask_B1TT}
        return inputs

    def logits(self, row_N: Tensor, position_N: Tensor) -> Tensor:
        """logits_NV after token ``position_N`` of row ``row_N``, counted in the unpadded row."""
        if not self.reuse:
            return self.net(**self._inputs()).logits[row_N, position_N]
        position_N = position_N - self.offset_B[row_N]
        with self._stand_ins(), read_at(self.net, row_N, position_N):
            return self.net(**self._inputs()).logits.squeeze(0)

    def select(self, row_R: Tensor) -> Tail:
        """The same tail for some of its rows; nothing is recomputed."""
        part = copy.copy(self)
        part.ids_BT, part.mask_BT = self.ids_BT[row_R], self.mask_BT[row_R]
        part.offset_B = self.offset_B[row_R]
        if self._positions is not None:
            part._positions = self._positions[row_R]
        if self._cache is not None:
            part._cache = fork(self._cache)
            select_rows(part._cache, row_R)
        if self.stored is not None:
            part.stored = replace_first(self.stored, first(self.stored)[row_R])
        return part

    @property
    def _before(self) -> int:
        """Columns of the mask that belong to stored keys and values."""
        return self.mask_BT.shape[1] - self.ids_BT.shape[1]

    @property
    def length_B(self) -> Tensor:
        """How many tokens of each row every call runs."""
        return self.mask_BT[:, self._before :].sum(1)

    def trimmed(self) -> Tail:
        """The same tail without trailing columns of padding alone."""
        width, before = int(self.length_B.max()), self._before
        part = copy.copy(self)
        part.ids_BT, part.mask_BT = self.ids_BT[:, :width], self.mask_BT[:, : before + width]
        if self._positions is not None:
            part._positions = self._positions[:, :width]
        if self.stored is not None:
            part.stored = replace_first(self.stored, first(self.stored)[:, :width])
        return part

    def run(self) -> None:
        """Runs the blocks for the sake of hooks on them; no logits."""
        with self._stand_ins():
            self.net.get_decoder()(**self._inputs())

    def _stand_ins(self) -> AbstractContextManager:
        if self.stored is None:
            return nullcontext()
        originals = [self.blocks[i] for i in range(self.layer)]
        others = [_StandIn(block, self.stored) for block in originals]

        def place(blocks: Sequence[nn.Module]) -> None:
            for i, block in enumerate(blocks):
                self.blocks[i] = block

        return Reversible(lambda: place(others), lambda: place(originals))


def read_at(net: PreTrainedModel, row_N: Tensor, position_N: Tensor) -> Reversible:
    """Inside, the head runs at the given positions only, and the network returns logits of shape [1, N, V]."""

    def select(_module: nn.Module, args: tuple) -> tuple:
        hidden_BTD = args[0]
        return (
            hidden_BTD[row_N.to(hidden_BTD.device), position_N.to(hidden_BTD.device)][None],
            *args[1:],
        )

    head = net.get_output_embeddings()
    handles: list[RemovableHandle] = []
    return Reversible(
        lambda: handles.append(head.register_forward_pre_hook(select)),
        lambda: remove_all(handles),
    )
