"""A causal network, the edits in force on it, and what is run once for many calls: token ids go in.

Shapes: B rows, T tokens, N positions read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from corrigenda.modules.editing.adapters import Asked, ModulePatch
from corrigenda.modules.editing.editor import EditHandle, TextPatch
from corrigenda.modules.interrupts import Reversible, replaced
from corrigenda.modules.model.delta import Delta, side_branches
from corrigenda.modules.model.hooks import first, replace_first
from corrigenda.modules.model.kv_cache import can_be_cut, run_start
from corrigenda.modules.model.loading import cache_dir, hash_weights
from corrigenda.modules.model.merging import Merged, SharedStates, distinct, trees, unmerged
from corrigenda.modules.model.prefix_cache import PrefixCache, Shards
from corrigenda.modules.model.rows import Rows, common_prefix
from corrigenda.modules.model.structure import Structure, find_structure
from corrigenda.modules.model.tail import Tail

CHUNK_TOKENS = 4096  # most padded tokens of one batch
ENOUGH_TOKENS = 512  # in a batch of more than these, no row is shorter than
SIMILAR = 7 / 8  # of the longest


class Network(nn.Module):
    """A causal network whose parameters are frozen; always in eval mode.

    Args:
        net: the network.
        reuse_prefix: run the blocks below the lowest edited one once and reuse their output. False is the
            plain way, for comparison.
        cache_memory_gib: most memory for what learned editors keep of the lower blocks, text by text.
        cache_disk_gib: most disk space for the same, in the cache folder; 0 keeps nothing there.
        scaled_together: whether the rows of a batch have a part in each other's numbers.
    """

    def __init__(
        self,
        net: Any,  # noqa: ANN401  a PreTrainedModel, whose types say too little
        reuse_prefix: bool,
        cache_memory_gib: float,
        cache_disk_gib: float,
        scaled_together: bool,
    ) -> None:
        super().__init__()
        self.net = net
        self.net.requires_grad_(False)
        self.eval()
        self.structure: Structure = find_structure(self.net)
        self.handles: list[EditHandle] = []
        self._aside = False  # the edits, see :meth:`pristine`
        self.asked: Asked | None = None
        self.reuse_prefix = reuse_prefix
        self.cache_memory_gib, self.cache_disk_gib = cache_memory_gib, cache_disk_gib
        self._scaled_together = scaled_together
        self._memo: SharedStates | None = None
        self._prefix: tuple[tuple[int, ...], PrefixCache] | None = None
        self._shares_start = False
        # Tokens, where they were run, and their keys and values.
        self._start: tuple[list[int], torch.device, DynamicCache] | None = None

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: dropout would change keys, values and scores."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.net.get_input_embeddings().weight.device

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have, None where the model sets no limit."""
        config = self.net.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        found = [getattr(config, name, None) for name in names]
        return min((n for n in found if isinstance(n, int) and n > 0), default=None)

    @cached_property
    def weights_hash(self) -> str:
        """Hash of every unedited weight: the identity of the base model."""
        with self.pristine():
            return hash_weights(self.net)

    # ------------------------------------------------------------------ edits in force

    def pristine(self) -> AbstractContextManager:
        """Inside, no edit is active; afterwards all are again, bit-exactly. Nested ones change nothing."""
        if self._aside:
            return nullcontext()
        swapped: list[EditHandle] = []

        def take_out() -> None:
            self._aside = True
            for handle in reversed(self.handles):
                handle.swap()
                swapped.append(handle)

        def put_back() -> None:
            while swapped:
                swapped.pop().swap()
            self._aside = False

        return Reversible(take_out, put_back)

    def provisional(self) -> Reversible:
        """Edits that are made inside are removed at the end."""
        count = len(self.handles)

        def remove() -> None:
            while len(self.handles) > count:
                self.handles[-1].remove()

        return Reversible(lambda: None, remove)

    @property
    def edited(self) -> bool:
        """Whether any edit is active now."""
        return bool(self.handles) and not self._aside

    @property
    def adapted(self) -> bool:
        """Whether a memory beside the network is in force, which must see rows whole."""
        return any(isinstance(handle, ModulePatch) for handle in self.handles)

    def lowest_edited_layer(self, deltas: Sequence[Delta] = ()) -> int:
        """Nothing below this block differs between the edited and the unedited model."""
        layers = [handle.lowest_layer for handle in self.handles]
        layers += [self.structure.layer_of(name) for delta in deltas for name in delta.updates]
        return min(layers, default=self.structure.num_layers - 1)

    def side_by_side(self, deltas: Sequence[Delta] | None, owner_B: Tensor | None) -> Any:  # noqa: ANN401
        """Context: row b runs through the model edited by ``deltas[owner_B[b]]``."""
        if not deltas:
            return nullcontext()
        if owner_B is None:
            if len(deltas) > 1:
                raise ValueError("several deltas need owner_B, the delta of each row")
            owner_B = torch.zeros(1, dtype=torch.long)
        return side_branches(self.net, deltas, owner_B)

    def asking(self, prompt_BT: Tensor) -> Reversible:
        """Inside, one batch runs whose prompts are these tokens: what adapters go by that decide by prompt.

        Whoever runs the network in another way than by scoring and generating runs it as if there were
        none of those.
        """
        return replaced(self, asked=Asked(prompt_BT))

    # ------------------------------------------------------------------ what is run once

    def shared_prefix(self, layer: int) -> AbstractContextManager:
        """Inside, what rows share runs once: below ``layer`` for all calls, above it for those of one call.

        Numbers may differ in their last bits from those outside.
        """
        return replaced(self, _memo=SharedStates(layer)) if self.reuse_prefix else nullcontext()

    def keep_prefix(self, *layers: int) -> None:
        """From here on what enters these blocks is computed once per text, see :class:`PrefixCache`.

        The number of blocks stands for what comes out of the last one. Until :meth:`drop_prefix` nothing
        may hook the blocks below.
        """
        self.drop_prefix()
        if self.reuse_prefix:
            disk = int(self.cache_disk_gib * 2**30)
            shards = Shards(cache_dir() / "prefixes", self._numerics(), disk) if disk else None
            batch_tokens = 1 if self._scaled_together else CHUNK_TOKENS
            memory = int(self.cache_memory_gib * 2**30)
            kept = tuple(layer for layer in layers if layer > 0)
            self._prefix = kept, PrefixCache(batch_tokens, memory, shards)

    def drop_prefix(self) -> None:
        """Lets go in memory of what :meth:`keep_prefix` has kept."""
        if self._prefix is not None:
            self._prefix[1].save()
        self._prefix = None

    def kept(self, layer: int) -> PrefixCache | None:
        """The cache of what enters a block, if that is kept and nothing below is edited."""
        layers, cache = self._prefix or ((), None)
        same = self.reuse_prefix and all(handle.lowest_layer >= layer for handle in self.handles)
        return cache if same and layer in layers else None

    @cached_property
    def _block_output(self) -> Any:  # noqa: ANN401
        """What a block returns: in some families hidden states, in others a tuple of them and more."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return Tail(self.net, self.structure, one, one, layer=0).below(1)

    def _numerics(self) -> dict[str, Any]:
        """What states depend on besides text and layer, to their last bits."""
        return {
            "weights": self.weights_hash,
            "attention": self.net.config._attn_implementation,
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{self.device.type} {torch.backends.cpu.get_cpu_capability()}",
            "precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def common_start(self) -> Reversible:
        """Inside, what all rows begin with is computed once: for questions after the same long text.

        It is kept for the next call as long as nothing but the texts is edited. Not done beside what hooks
        a module, which would see the beginning apart from the rest, and a single row of it.
        """
        return replaced(self, _shares_start=self.reuse_prefix)

    def tail(self, rows: Rows, layer: int, start_B: Tensor | None = None) -> Tail:
        """These rows with everything below block ``layer`` (and before ``start_B``) computed once."""
        stored = None
        if start_B is None and rows.depth_BT is None:
            stored = self._kept_states(rows.ids_BT, rows.mask_BT, layer)
        return self._tail(rows, layer, start_B, stored=stored)

    def _tail(self, rows: Rows, layer: int, start_B: Tensor | None = None, **more: Any) -> Tail:  # noqa: ANN401
        ids_BT, mask_BT, reuse = rows.ids_BT, rows.mask_BT, self.reuse_prefix
        more["depth_BT"] = rows.depth_BT
        return Tail(self.net, self.structure, ids_BT, mask_BT, layer, start_B, reuse, **more)

    def higher(self, tail: Tail, layer: int) -> Tail:
        """The tail of the same rows, from a higher block on."""
        if not self.reuse_prefix or layer == tail.layer:
            return tail
        whole = tail.ids_BT, tail.mask_BT
        return tail.from_block(layer, None if tail.is_cut else self._kept_states(*whole, layer))

    def _kept_states(self, ids_BT: Tensor, mask_BT: Tensor, layer: int) -> Any:  # noqa: ANN401
        """What the block below ``layer`` gives for these rows, if that is kept."""
        cache = self.kept(layer)
        if cache is None:
            return None
        lower = max((n for n in range(1, layer) if self.kept(n)), default=0)

        def run(rows: Rows) -> Tensor:
            return first(self.tail(rows, lower).below(layer))

        rows = Rows(ids_BT, mask_BT, ids_BT.new_zeros(len(ids_BT)))
        return replace_first(self._block_output, cache.states(f"block {layer}", rows, run))

    def _merged(self, rows: Rows, owner_B: Tensor, whole: bool) -> Merged:
        """The rows with what they share standing once; ``whole`` where no row may become part of another."""
        if not self.reuse_prefix:
            return unmerged(rows, owner_B)
        whole |= self._memo is None or self.kept(self._memo.layer) is not None  # kept row by row
        if whole or self.adapted or not self._branches:
            return distinct(rows, owner_B)
        return trees(rows, owner_B)

    @cached_property
    def _branches(self) -> bool:
        """Whether rows may be trees: whether the network goes by the positions and the mask that it is given."""
        named = inspect.signature(self.net.forward).parameters
        cache = DynamicCache(config=self.net.config)
        plain = (
            can_be_cut(cache) and self._sees_all and not getattr(self.net.config, "alibi", False)
        )
        if "position_ids" not in named or not plain:
            return False
        rows = Rows.of([[2, 3, 4, 5, 6], [2, 3, 7, 8, 9]], [1, 1], self.device)
        merged = trees(rows, torch.zeros(2))
        with self.pristine(), torch.no_grad():
            logits = self._tail(merged.rows, 0).logits(
                merged.row_BT[:, -1], merged.column_BT[:, -1]
            )
            every_B = torch.arange(2, device=self.device)
            expected = self._tail(rows, 0).logits(every_B, every_B.new_full((2,), 4))
        close = torch.finfo(self.net.dtype).eps ** 0.5
        return torch.allclose(logits, expected, rtol=close, atol=close)

    def _after(self, start: int, rows: Rows, begun: DynamicCache) -> Tail:
        """The tail of these rows from token ``start`` on, all rows being alike before."""
        return self._tail(rows, 0, torch.full_like(rows.start_B, start), begun=begun)

    def _may_share(self, deltas: Sequence[Delta] | None) -> bool:
        """Whether a common start may be computed apart from the rest."""
        return self._shares_start and not deltas and not self.adapted

    @property
    def _sees_all(self) -> bool:
        """Whether every block attends to all tokens, as far as caches do not say."""
        return "local" not in getattr(self.net.config, "attention_layers", ())  # GPT-Neo

    def _begun(self, ids: list[int], start: int) -> tuple[int, DynamicCache | None]:
        """How many of a row's first ``start`` tokens are at hand, and their keys and values.

        All of them, newly computed, unless what was kept has at least half.
        """
        as_it_was = all(isinstance(handle, TextPatch) for handle in self.handles)
        if as_it_was and self._start and self._start[1] == self.device:
            alike = min(common_prefix(self._start[0], ids), start)
            if 2 * alike >= start > 0:
                return alike, self._start[2]
        ids_1T = torch.tensor([ids[:start]], device=self.device)
        cache = run_start(self.net, ids_1T) if start > 0 else None
        if cache is None:
            return 0, None
        if as_it_was and can_be_cut(cache):
            self._start = ids[:start], self.device, cache
        return start, cache

    def _remembered(self, rows: Rows) -> Tail:
        """The tail of these rows; what it starts from is kept while a :meth:`shared_prefix` is open."""
        if self._memo is None or self._memo.layer == 0:
            return self._tail(rows, 0)

        def run(part: Rows) -> Tensor:
            return first(self.tail(part, layer).stored)

        layer = self._memo.layer
        states_BTD = self._memo.states(rows, run)
        return self._tail(rows, layer, stored=replace_first(self._block_output, states_BTD))

    def chunks(self, rows: Rows, start: int = 0, share: int = 1) -> Iterator[Tensor]:
        """Row indices in batches of similar length, with little padding once there is enough work.

        A batch has at most CHUNK_TOKENS padded tokens from ``start`` on, and twice as many with what is kept
        of those before it; the ``share``-th part of that where so much more is made of each.
        """
        tokens = CHUNK_TOKENS // share
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
