"""What a language model computes once and reuses: :class:`Reuse`.

Shapes: B rows, T tokens, N positions read, D width of hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from corrigenda.modules.interrupts import Reversible, replaced
from corrigenda.modules.model.active_edits import ActiveEdits
from corrigenda.modules.model.hooks import first, replace_first
from corrigenda.modules.model.kv_cache import can_be_cut, run_start
from corrigenda.modules.model.loading import cache_dir
from corrigenda.modules.model.merging import Merged, SharedStates, distinct, trees, unmerged
from corrigenda.modules.model.placement import devices
from corrigenda.modules.model.prefix_cache import PrefixCache, Shards
from corrigenda.modules.model.rows import BATCH_TOKENS, Rows, common_prefix
from corrigenda.modules.model.tail import Tail


@dataclass(frozen=True)
class Limits:
    """How much may be stored of the lower blocks' states, which are stored per text.

    Attributes:
        memory_gib: most memory.
        disk_gib: most disk space, in the cache folder; 0 stores nothing there.
        depends_on_batch: whether a row's numbers depend on batch composition, so that texts run one by one.
    """

    memory_gib: float = 2.0
    disk_gib: float = 8.0
    depends_on_batch: bool = False


@dataclass(frozen=True)
class Prefix:
    """Tokens that all rows begin with, and that have already run.

    Attributes:
        length: how many of them.
        cache: their attention keys and values, as a single row.
    """

    length: int
    cache: DynamicCache


class Reuse:
    """Results of the frozen part of a network that are computed once and reused.

    ======================  =======================================  ==========================================
    method                  what is reused                           where it is not
    ======================  =======================================  ==========================================
    :meth:`tail`            states below the lowest edited block,    nowhere
                            for all calls of that tail
    :meth:`shared`          inside, the same states, for all calls;  where an adapter decides by prompt, or the
                            tokens that rows share run once, as      network cannot run trees: then only equal
                            trees                                    rows are merged
    :meth:`common_prefix`   inside, keys and values of the tokens    beside deltas; with adapters that decide
                            that all rows of a call begin with; for  by prompt; in layers that keep a running
                            the next call, too, while no edit        state instead of keys and values
                            changes the network
    :meth:`keep`            until :meth:`drop`, states that enter    above an edited block; for rows that are
                            the given blocks, by text, in memory     trees
                            and on disk
    ======================  =======================================  ==========================================

    With ``enabled`` False nothing is reused: that is the reference path. Numbers may differ in their last bits
    between reuse and the reference path, and between trees and rows; states stored by :meth:`keep` are bit-exact.

    Args:
        edits: the network and its active edits.
        enabled: False recomputes everything in every call: the reference path.
        limits: of what :meth:`keep` stores.
    """

    def __init__(self, edits: ActiveEdits, enabled: bool, limits: Limits) -> None:
        self.edits, self.net, self.enabled, self.limits = edits, edits.net, enabled, limits
        self._shared: SharedStates | None = None
        self._kept: tuple[int, ...] = ()  # blocks whose inputs are stored
        self._store: PrefixCache | None = None
        self._finds_prefixes = False
        # The last prefix, if no edit changed the network: its tokens, their device, keys and values.
        self._last_prefix: tuple[list[int], torch.device, DynamicCache] | None = None

    # ------------------------------------------------------------------ what is reused for how long

    def shared(self, layer: int) -> AbstractContextManager:
        """Inside, tokens that rows share run once: below ``layer`` for all calls, above it for each call."""
        return replaced(self, _shared=SharedStates(layer)) if self.enabled else nullcontext()

    def common_prefix(self) -> Reversible:
        """Inside, the prefix that all rows of a call share runs once: for questions after the same long text."""
        return replaced(self, _finds_prefixes=self.enabled)

    def keep(self, *layers: int) -> None:
        """Until :meth:`drop`, computes the input of these blocks once per text, see :class:`PrefixCache`.

        A layer equal to the number of blocks means the output of the last one. Meanwhile, nothing may hook the
        blocks below.
        """
        self.drop()
        if self.enabled:
            disk = int(self.limits.disk_gib * 2**30)
            shards = Shards(cache_dir() / "prefixes", self._numerics(), disk) if disk else None
            batch_tokens = 1 if self.limits.depends_on_batch else BATCH_TOKENS
            self._store = PrefixCache(batch_tokens, int(self.limits.memory_gib * 2**30), shards)
            self._kept = tuple(layer for layer in layers if layer > 0)

    def drop(self) -> None:
        """Writes what :meth:`keep` has stored to disk and releases its memory."""
        if self._store is not None:
            self._store.save()
        self._store, self._kept = None, ()

    def store(self, layer: int) -> PrefixCache | None:
        """Where the inputs of a block are stored; None if they are not, or a block below is edited."""
        kept = self.enabled and layer in self._kept and self.edits.all_above(layer)
        return self._store if kept else None

    def _numerics(self) -> dict[str, Any]:
        """Everything besides text and layer that can change the last bits of states."""
        names = [
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
            for device in devices(self.net)
        ]
        return {
            "weights": self.edits.weights_hash,
            "attention": self.net.config._attn_implementation,
            "device": " + ".join(dict.fromkeys(names)),
            "precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    # ------------------------------------------------------------------ tails

    def tail(self, rows: Rows, layer: int, start_B: Tensor | None = None) -> Tail:
        """The tail of these rows: what is below block ``layer`` (and before ``start_B``) is computed once."""
        stored = None
        if start_B is None and rows.depth_BT is None:
            stored = self._kept_states(rows, layer)
        return self._tail(rows, layer, start_B, stored=stored)

    def higher(self, tail: Tail, layer: int) -> Tail:
        """The tail of the same rows from a higher block on."""
        if not self.enabled or layer == tail.layer:
            return tail
        rows = Rows(tail.ids_BT, tail.mask_BT, tail.ids_BT.new_zeros(len(tail.ids_BT)))
        return tail.from_block(layer, None if tail.is_cut else self._kept_states(rows, layer))

    def tail_of(self, rows: Rows, prefix: Prefix | None) -> Tail:
        """The tail that scores these rows: after a prefix, or from the states of :meth:`shared`."""
        if prefix is not None:
            start_B = torch.full_like(rows.start_B, prefix.length)
            return self._tail(rows, 0, start_B, prefix=prefix.cache)
        if self._shared is None or self._shared.layer == 0:
            return self._tail(rows, 0)
        layer = self._shared.layer

        def run(part: Rows) -> Tensor:
            return first(self.tail(part, layer).stored)

        states_BTD = self._shared.states(rows, run)
        return self._tail(rows, layer, stored=replace_first(self._block_output, states_BTD))

    def _tail(self, rows: Rows, layer: int, start_B: Tensor | None = None, **more: Any) -> Tail:  # noqa: ANN401
        ids_BT, mask_BT, depth_BT = rows.ids_BT, rows.mask_BT, rows.depth_BT
        return Tail(
            self.net, self.edits.structure, ids_BT, mask_BT, layer, start_B, self.enabled,
            depth_BT=depth_BT, **more,
        )  # fmt: skip

    def _kept_states(self, rows: Rows, layer: int) -> Any:  # noqa: ANN401  as a block returns it
        """The output of the block below ``layer`` for these rows, if it is stored.

        New texts start from the states of the highest stored block below.
        """
        store = self.store(layer)
        if store is None:
            return None
        lower = max((n for n in self._kept if n < layer and self.store(n)), default=0)

        def run(part: Rows) -> Tensor:
            tail = self._tail(part, lower, stored=self._kept_states(part, lower))
            return first(tail.below(layer))

        return replace_first(self._block_output, store.states(f"block {layer}", rows, run))

    @cached_property
    def _block_output(self) -> Any:  # noqa: ANN401
        """An example of a block's output: in some families hidden states, in others a tuple with more."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.edits.device)
        return Tail(self.net, self.edits.structure, one, one, layer=0).below(1)

    # ------------------------------------------------------------------ rows that share tokens

    def merge(self, rows: Rows, owner_B: Tensor, prefix: Prefix | None) -> Merged:
        """The rows, where possible with each token once that rows of one owner share."""
        if not self.enabled:
            return unmerged(rows, owner_B)
        shared = None if prefix else self._shared
        if shared is None or self.store(shared.layer) is not None:  # states are stored by row
            return distinct(rows, owner_B)
        if self.edits.need_whole_rows or not self._takes_trees:
            return distinct(rows, owner_B)
        return trees(rows, owner_B)

    def prefix_of_rows(self, rows: Rows, beside_deltas: bool) -> Prefix | None:
        """The tokens that all rows start with, run once; None where that is not possible or not wanted."""
        if not self._shares_prefixes(beside_deltas):
            return None
        return self._prefix(rows.ids_BT[0].tolist(), rows.common_start())

    def prefix_of_prompts(self, ids: Sequence[list[int]], beside_deltas: bool) -> Prefix | None:
        """The same of prompts whose padding is to the left, between the prefix and the rest."""
        if not self._shares_prefixes(beside_deltas):
            return None
        same = min(common_prefix(ids[0], row) for row in ids)
        found = self._prefix(ids[0], min(same, *(len(row) - 1 for row in ids)))
        # A local attention window would count the padding after the prefix.
        return found if found and can_be_cut(found.cache) and self._sees_all else None

    def _shares_prefixes(self, beside_deltas: bool) -> bool:
        return self._finds_prefixes and not beside_deltas and not self.edits.need_whole_rows

    def _prefix(self, ids: list[int], length: int) -> Prefix | None:
        """The first ``length`` of these tokens, run once; None where a layer keeps a running state.

        If the last call's prefix covers at least half of them, that part is reused instead.
        """
        device, can_last = self.edits.device, not self.edits.change_network
        if can_last and self._last_prefix and self._last_prefix[1] == device:
            same = min(common_prefix(self._last_prefix[0], ids), length)
            if 2 * same >= length > 0:
                return Prefix(same, self._last_prefix[2])
        ids_1T = torch.tensor([ids[:length]], device=device)
        cache = run_start(self.net, ids_1T) if length > 0 else None
        if cache is None:
            return None
        if can_last and can_be_cut(cache):
            self._last_prefix = ids[:length], device, cache
        return Prefix(length, cache)

    @cached_property
    def _takes_trees(self) -> bool:
        """Whether the network respects given positions and masks, tried on a small tree."""
        named = inspect.signature(self.net.forward).parameters
        cache = DynamicCache(config=self.net.config)
        plain = (
            can_be_cut(cache) and self._sees_all and not getattr(self.net.config, "alibi", False)
        )
        if "position_ids" not in named or not plain:
            return False
        rows = Rows.of([[2, 3, 4, 5, 6], [2, 3, 7, 8, 9]], [1, 1], self.edits.device)
        merged = trees(rows, torch.zeros(2))
        with self.edits.pristine(), torch.no_grad():
            logits = self._tail(merged.rows, 0).logits(
                merged.row_BT[:, -1], merged.column_BT[:, -1]
            )
            every_B = torch.arange(2, device=self.edits.device)
            expected = self._tail(rows, 0).logits(every_B, every_B.new_full((2,), 4))
        close = torch.finfo(self.net.dtype).eps ** 0.5
        return torch.allclose(logits, expected, rtol=close, atol=close)

    @property
    def _sees_all(self) -> bool:
        """Whether no block has local attention that its cache does not show."""
        return "local" not in getattr(self.net.config, "attention_layers", ())  # GPT-Neo
