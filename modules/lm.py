"""A Hugging Face causal language model and its tokenizer: text goes in, numbers or text come out.

The only place that tokenises, pads, or picks a padding side. Prompt and target are always encoded together;
the target is what follows their longest common prefix with the prompt alone, so no rule about leading spaces
or begin-of-text tokens depends on the model's family.

Shapes: B rows, T tokens, M tokens of the longest target, N positions read, V words of the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from datamodules.records import Edit
from modules.adapters import Asked, ModulePatch
from modules.delta import Delta, side_branches
from modules.editing import EditHandle, TextPatch
from modules.hooks import first, replace_first
from modules.loading import cache_dir, hash_weights, load_model
from modules.merging import Merged, SharedStates, distinct, trees, unmerged
from modules.prefix_cache import PrefixCache, Shards
from modules.rows import Rows, TargetScores, common_prefix
from modules.structure import Structure, find_structure
from modules.tail import Tail, can_be_cut, first_tokens, run_start

log = logging.getLogger(__name__)

CHUNK_TOKENS = 4096  # most padded tokens of one scoring batch
ENOUGH_TOKENS = 512  # in a batch of more than these, no row is shorter than
SIMILAR = 7 / 8  # of the longest
TEXT_TOKENS = 512  # of a plain text whose perplexity is taken


class LanguageModel(nn.Module):
    """One causal LM, its tokenizer, and the edits in force on it. Parameters are frozen; always in eval mode.

    Args:
        name: a hub id (``gpt2-xl``), a local folder, or ``smollm2``, which comes as a Python package.
        dtype: of the weights; editing is exact in float32.
        device: where to put the model now; Lightning moves it anyway when it runs.
        quantization: load the linear maps in 4 or 8 bit with bitsandbytes.
        requantize: pack a map that is edited in a quantised model again, which loses part of the update
            (how much, the edit's metadata say); otherwise it is kept in ``dtype``. Independent edits are then
            evaluated one after the other, as they are written.
        revision: commit or branch of a hub model.
        reuse_prefix: run the blocks below the lowest edited one once and reuse their output. False is the
            plain way, for comparison.
        cache_memory_gib: most memory for what learned editors keep of the lower blocks, text by text.
        cache_disk_gib: most disk space for the same, in the cache folder; 0 keeps nothing there.
    """

    def __init__(
        self,
        name: str = "smollm2",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        quantization: Literal["nf4", "fp4", "int8"] | None = None,
        revision: str | None = None,
        reuse_prefix: bool = True,
        requantize: bool = False,
        cache_memory_gib: float = 2.0,
        cache_disk_gib: float = 8.0,
    ) -> None:
        super().__init__()
        self.name, self.reuse_prefix, self.requantize = name, reuse_prefix, requantize
        self.net, self.tokenizer = self._load(getattr(torch, dtype), quantization, revision)
        if device is not None:
            self.net.to(device)
        self.net.requires_grad_(False)
        self.eval()
        self.structure: Structure = find_structure(self.net)
        self.handles: list[EditHandle] = []
        self.asked: Asked | None = None
        self.num_boundary_merges = 0
        self.cache_memory_gib, self.cache_disk_gib = cache_memory_gib, cache_disk_gib
        self._scaled_together = quantization == "int8"  # the rows of a batch
        self._memo: SharedStates | None = None
        self._prefix: tuple[tuple[int, ...], PrefixCache] | None = None
        self._shares_start = False
        # Tokens, where they were run, and their keys and values.
        self._start: tuple[list[int], torch.device, DynamicCache] | None = None

    def _load(
        self, dtype: torch.dtype, quantization: str | None, revision: str | None
    ) -> tuple[Any, Any]:
        """The network and its tokenizer."""
        return load_model(self.name, dtype, quantization, revision)

    def train(self, mode: bool = True) -> LanguageModel:
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

    @contextmanager
    def pristine(self) -> Iterator[None]:
        """Inside, no edit is in force; afterwards all are again, bit for bit."""
        for handle in reversed(self.handles):
            handle.swap()
        try:
            yield
        finally:
            for handle in self.handles:
                handle.swap()

    @property
    def adapted(self) -> bool:
        """Whether a memory beside the network is in force, which must see rows whole."""
        return any(isinstance(handle, ModulePatch) for handle in self.handles)

    def _text_patch(self) -> TextPatch | None:
        """The newest edit in force on what the model is asked."""
        patches = [h for h in self.handles if isinstance(h, TextPatch) and h.active]
        return patches[-1] if patches else None

    def lowest_edited_layer(self, deltas: Sequence[Delta] = ()) -> int:
        """Nothing below this block differs between the edited and the unedited model."""
        layers = [handle.lowest_layer for handle in self.handles]
        layers += [self.structure.layer_of(name) for delta in deltas for name in delta.updates]
        return min(layers, default=self.structure.num_layers - 1)

    @contextmanager
    def shared_prefix(self, layer: int) -> Iterator[None]:
        """Inside, what rows share runs once: below ``layer`` for all calls, above it for those of one call.

        Numbers may differ in their last bits from those outside.
        """
        if not self.reuse_prefix:
            yield
            return
        outer, self._memo = self._memo, SharedStates(layer)
        try:
            yield
        finally:
            self._memo = outer

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

    @contextmanager
    def common_start(self) -> Iterator[None]:
        """Inside, what all rows begin with is computed once: for questions after the same long text.

        It is kept for the next call as long as nothing but the texts is edited. Not done beside what hooks
        a module, which would see the beginning apart from the rest, and a single row of it.
        """
        self._shares_start, outer = self.reuse_prefix, self._shares_start
        try:
            yield
        finally:
            self._shares_start = outer

    @contextmanager
    def asking(self, prompt_BT: Tensor) -> Iterator[None]:
        """Inside, one batch runs whose prompts are these tokens: what adapters go by that decide by prompt.

        Whoever runs the network in another way than by scoring and generating runs it as if there were
        none of those.
        """
        outer, self.asked = self.asked, Asked(prompt_BT)
        try:
            yield
        finally:
            self.asked = outer

    # ------------------------------------------------------------------ tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens in front, none behind."""
        rows = self.tokenizer(list(texts), padding=False, truncation=False).input_ids
        special = set(self.tokenizer.all_special_ids)
        return [
            row[:-1] if len(row) > 1 and self.appends and row[-1] in special else row
            for row in rows
        ]

    @cached_property
    def appends(self) -> bool:
        """Whether the tokenizer puts a special token behind a text."""
        return self.tokenizer("a").input_ids[-1] in self.tokenizer.all_special_ids

    def rows(self, prompts: Sequence[str], targets: Sequence[str] | None = None) -> Rows:
        """Encodes prompts, each with its target behind it; raises ValueError for an empty target."""
        prompts = [prompt.rstrip() for prompt in prompts]
        if targets is None:
            ids = self.encode(prompts)
            return self.pad(ids, [len(row) for row in ids])
        joint = [
            f"{prompt} {target.strip()}" for prompt, target in zip(prompts, targets, strict=True)
        ]
        encoded = self.encode(prompts + joint)
        alone, ids = encoded[: len(prompts)], encoded[len(prompts) :]
        starts = []
        for prompt, target, left, row in zip(prompts, targets, alone, ids, strict=True):
            start = common_prefix(left, row)
            self.num_boundary_merges += start < len(left)
            start = max(start, 1)  # nothing predicts a row's first token
            if start >= len(row) or not target.strip():
                raise ValueError(f"the target {target!r} adds no token to the prompt {prompt!r}")
            starts.append(start)
        return self.pad(ids, starts)

    def pad(self, ids: Sequence[list[int]], starts: Sequence[int]) -> Rows:
        """Rows of token ids, padded on the right; ``starts`` are the places of their first target tokens."""
        return Rows.of(ids, starts, self.device)

    def subject_span(self, text: str, start: int, subject: str) -> tuple[int, int]:
        """(first, last) token index of the subject that begins at character ``start`` of ``text``."""
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        end = start + len(subject)
        inside = [
            i for i, (a, b) in enumerate(encoded.offset_mapping) if b > a and a < end and b > start
        ]
        if not inside:
            raise ValueError(f"no token of {text!r} belongs to the subject {subject!r}")
        return inside[0], inside[-1]

    def lookup(self, edit: Edit, prefix: str = "") -> int:
        """Index of the subject's last token in ``prefix`` + the edit's prompt."""
        return self.subject_span(
            prefix + edit.text, len(prefix) + edit.subject_start, edit.subject
        )[1]

    # ------------------------------------------------------------------ numbers

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

    def side_by_side(self, deltas: Sequence[Delta] | None, owner_B: Tensor | None) -> Any:  # noqa: ANN401
        """Context: row b runs through the model edited by ``deltas[owner_B[b]]``."""
        if not deltas:
            return nullcontext()
        if owner_B is None:
            if len(deltas) > 1:
                raise ValueError("several deltas need owner_B, the delta of each row")
            owner_B = torch.zeros(1, dtype=torch.long)
        return side_branches(self.net, deltas, owner_B)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        deltas: Sequence[Delta] | None = None,
        owners: Sequence[int] | None = None,
        full: bool = False,
    ) -> TargetScores:
        """Teacher-forced scores of each target after its prompt, on the edits in force.

        Args:
            prompts: B texts.
            targets: B continuations; one leading space is put in front of each.
            deltas: further updates, side by side; row b sees ``deltas[owners[b]]`` (all see a single one).
            owners: for each row the index of its delta.
            full: also return log-probabilities of the whole vocabulary.
        """
        if patch := self._text_patch():
            with patch.set_aside():
                return patch.score(prompts, targets, deltas, owners, full)
        rows = self.rows(prompts, targets)
        owner_B = _owners(deltas, owners, len(prompts))
        start, begun = 0, None
        if self._may_share(deltas):
            start, begun = self._begun(rows.ids_BT[0].tolist(), rows.common_start())
        merged = self._merged(rows.read, owner_B, whole=begun is not None)
        target_BM, mask_BM = rows.targets()
        row_K, column_K = mask_BM.nonzero(as_tuple=True)
        before_K = rows.start_B[row_K] + column_K - 1  # the tokens that predict them
        row_N, column_N, which_K = merged.places(row_K, before_K)
        logprob_BM = torch.zeros(target_BM.shape, device=self.device)
        greedy_BM = torch.zeros_like(target_BM)
        full_BMV: Tensor | None = None
        for chunk_C in self.chunks(merged.rows, start):
            part = merged.rows.select(chunk_C)
            here_N, place_U = torch.isin(row_N, chunk_C), chunk_C.argsort()
            in_chunk_N = place_U[torch.searchsorted(chunk_C[place_U], row_N[here_N])]
            tail = self._after(start, part, begun) if begun else self._remembered(part)
            branch = self.side_by_side(deltas, merged.owner_U[chunk_C.cpu()])
            with branch, self.asking(part.prompt_BT):
                logits_NV = tail.logits(in_chunk_N, column_N[here_N])
            logprob_NV = logits_NV.float().log_softmax(-1)
            here_K = here_N[which_K]
            found_K = (here_N.cumsum(0) - 1)[which_K[here_K]]  # rows of logprob_NV
            at_K = row_K[here_K], column_K[here_K]
            logprob_BM[at_K] = logprob_NV[found_K, target_BM[at_K]]
            greedy_BM[at_K] = logprob_NV.argmax(-1)[found_K]
            if full:
                if full_BMV is None:
                    full_BMV = logprob_NV.new_zeros(*target_BM.shape, logprob_NV.shape[-1])
                full_BMV[at_K] = logprob_NV[found_K]
        return TargetScores(logprob_BM, greedy_BM, target_BM, mask_BM, full_BMV)

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
        rows = self.pad([[2, 3, 4, 5, 6], [2, 3, 7, 8, 9]], [1, 1])
        merged = trees(rows, torch.zeros(2))
        with self.pristine(), torch.no_grad():
            logits = self._tail(merged.rows, 0).logits(
                merged.row_BT[:, -1], merged.column_BT[:, -1]
            )
            every_B = torch.arange(2, device=self.device)
            expected = self._tail(rows, 0).logits(every_B, every_B.new_full((2,), 4))
        close = torch.finfo(self.net.dtype).eps ** 0.5
        return torch.allclose(logits, expected, rtol=close, atol=close)

    @torch.no_grad()
    def perplexity(
        self, texts: Iterable[str], max_tokens: int, delta: Delta | None = None
    ) -> float:
        """exp of the mean NLL of plain text, over all tokens but each text's first; inf where not finite.

        Edits in weights and modules are in force; edits in the context are not, as nothing is asked.

        Args:
            texts: each is cut at 512 tokens and at what the model can take in.
            max_tokens: how many tokens are read in all.
            delta: a further update.
        """
        limit = min(TEXT_TOKENS, self.max_length or TEXT_TOKENS)
        ids: list[list[int]] = []
        left = max_tokens
        for text in texts:
            row = self.encode([text])[0][: min(limit, left)]
            if len(row) > 1:
                ids.append(row)
                left -= len(row)
            if left < 2:
                break
        if not ids:
            raise ValueError("perplexity needs text of at least two tokens, and there is none")
        rows = self.pad(ids, [1] * len(ids))
        total, count = 0.0, 0
        for chunk_B in self.chunks(rows, tokens=CHUNK_TOKENS // 4):  # all logits of all tokens
            part = rows.select(chunk_B)
            row_N, position_N = part.answer_positions()
            branch = self.side_by_side([delta] if delta else None, None)
            with branch, self.asking(part.mask_BT.bool()):
                logits_NV = self._remembered(part).logits(row_N, position_N)
            target_N = part.ids_BT[row_N, position_N + 1]
            total += float(cross_entropy(logits_NV.float(), target_N, reduction="sum"))
            count += len(target_N)
        mean = total / count
        return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf

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

    def chunks(self, rows: Rows, start: int = 0, tokens: int = CHUNK_TOKENS) -> Iterator[Tensor]:
        """Row indices in batches of similar length: at most ``tokens`` padded tokens from ``start`` on, and
        twice as many with what is kept of those before it; little padding once there is enough work."""
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

    # ------------------------------------------------------------------ text

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        deltas: Sequence[Delta] | None = None,
        owners: Sequence[int] | None = None,
        top_k: int | None = None,
        batch_size: int = 32,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The continuation of each prompt, greedy or sampled from the ``top_k`` likeliest tokens.

        A continuation ends before the first of the texts in ``stop``.
        """
        if patch := self._text_patch():
            with patch.set_aside():
                return patch.generate(
                    prompts,
                    max_new_tokens,
                    deltas=deltas,
                    owners=owners,
                    top_k=top_k,
                    batch_size=batch_size,
                    stop=stop,
                )
        ids = self.encode([prompt.rstrip() for prompt in prompts])
        owner_B = _owners(deltas, owners, len(ids))
        start, begun = 0, None
        if self._may_share(deltas):
            same = min(common_prefix(ids[0], row) for row in ids)
            start, begun = self._begun(ids[0], min(same, *(len(row) - 1 for row in ids)))
            if begun and not (can_be_cut(begun) and self._sees_all):
                start, begun = 0, None  # padding behind the start would count in a local window
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        texts = [""] * len(ids)
        for begin in range(0, len(order), batch_size):
            chunk = order[begin : begin + batch_size]
            with self.side_by_side(deltas, owner_B[chunk]):
                rows = [ids[i] for i in chunk]
                new = self._generate_chunk(rows, max_new_tokens, top_k, stop, start, begun)
            for i, row in zip(chunk, new, strict=True):
                texts[i] = _before(stop, self.decode(row))
        return texts

    def _generate_chunk(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        top_k: int | None,
        stop: Sequence[str],
        start: int,
        begun: DynamicCache | None,
    ) -> Tensor:
        """New tokens of each row; padding stands behind the ``start`` tokens that all begin with."""
        rest = [torch.tensor(row[start:][::-1]) for row in ids]
        rest_BS = pad_sequence(rest, batch_first=True).flip(1)
        length_B = torch.tensor([len(row) for row in ids])
        width = int(length_B.max())
        column_T = torch.arange(width)
        mask_BT = ((column_T >= width - length_B[:, None] + start) | (column_T < start)).long()
        same_BP = torch.tensor(ids[0][:start], dtype=torch.long).expand(len(ids), -1)
        ids_BT = torch.cat([same_BP, rest_BS], 1)
        cache = None if begun is None else first_tokens(begun, start, len(ids))
        sampling = (
            {"do_sample": True, "top_k": top_k, "temperature": 1.0}
            if top_k
            else {"do_sample": False}
        )

        def stopped(ids_BT: Tensor, _scores: object, **_: object) -> Tensor:
            texts = [self.decode(row) for row in ids_BT[:, width:]]
            return torch.tensor(
                [any(end in t for end in stop) for t in texts], device=ids_BT.device
            )

        mask_BT = mask_BT.to(self.device)
        with self.asking(mask_BT.bool()):
            out = self.net.generate(
                ids_BT.to(self.device),
                attention_mask=mask_BT,
                past_key_values=cache,
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.eos_token_id,
                    **sampling,
                ),
                stopping_criteria=[stopped] if stop else None,
            )
        return out[:, width:].cpu()

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _before(stop: Sequence[str], text: str) -> str:
    """The text up to the first of the strings to stop at."""
    return text[: min((text.find(end) for end in stop if end in text), default=None)]


def _owners(deltas: Sequence[Delta] | None, owners: Sequence[int] | None, count: int) -> Tensor:
    """owner_B, the delta of each row; raises ValueError where it is not given and there is a choice."""
    if owners is None and deltas and len(deltas) > 1:
        raise ValueError("several deltas need owners, the delta of each row")
    return torch.tensor(owners if owners is not None else [0] * count)
