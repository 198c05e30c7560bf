"""A Hugging Face causal language model and its tokenizer: text goes in, numbers or text come out.

The only place that tokenises, pads, or picks a padding side. Prompt and target are always encoded together, as
one text (:func:`corrigenda.datamodules.records.joined`); the target is what follows their longest common prefix with the
prompt alone, so no rule about leading spaces or begin-of-text tokens depends on the model's family.

Shapes: B rows, T tokens, M tokens of the longest target, N positions read, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, NoReturn

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache

from corrigenda.datamodules.records import Edit, Separator, joined, prompt_end
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import TextPatch
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.kv_cache import can_be_cut, empty_cache, first_tokens, with_room
from corrigenda.modules.model.loading import ModelError, load_model
from corrigenda.modules.model.network import Network
from corrigenda.modules.model.rows import Rows, TargetScores, common_prefix, padded_left

TEXT_TOKENS = 512  # of a plain text whose perplexity is taken
MOST_CHARACTERS = 1_000_000  # of a text, where the model sets no limit to its tokens
SHOWN = 60  # characters of a text in a message
LOOKS_AHEAD = 1e-4  # most that a later token may move logits, as a share of how it moves its own
ORDINARY = "The capital of France is Paris, and the capital of Italy is Rome."


class LanguageModel(Network):
    """One causal LM and its tokenizer, see :class:`corrigenda.modules.model.network.Network`.

    Args:
        name: a hub id (``gpt2-xl``), a local folder, or ``smollm2``, which comes as a Python package.
        dtype: of the weights; editing is exact in float32.
        device: where to put the model now; Lightning moves it anyway when it runs.
        quantization: load the linear maps in 4 or 8 bit with bitsandbytes.
        requantize: pack a map that is edited in a quantised model again, which loses part of the update
            (how much, the edit's metadata say); otherwise it is kept in ``dtype``. Independent edits are then
            evaluated one after the other, as they are written.
        separator: what stands between a prompt and its target. ``auto``: a space, or nothing after a script that
            writes none between words, such as Chinese, Japanese or Thai.
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
        separator: Separator = "auto",
    ) -> None:
        checks.at_least(0, cache_memory_gib=cache_memory_gib, cache_disk_gib=cache_disk_gib)
        net, tokenizer = self._load(name, getattr(torch, dtype), quantization, revision)
        scaled_together = quantization == "int8"
        super().__init__(net, reuse_prefix, cache_memory_gib, cache_disk_gib, scaled_together)
        self.name, self.tokenizer, self.requantize = name, tokenizer, requantize
        self.separator: Separator = separator
        self.num_boundary_merges = 0
        if device is not None:
            self.net.to(device)
        self._require_causal()

    def _load(
        self, name: str, dtype: torch.dtype, quantization: str | None, revision: str | None
    ) -> tuple[Any, Any]:
        """The network and its tokenizer."""
        return load_model(name, dtype, quantization, revision)

    @torch.no_grad()
    def _require_causal(self) -> None:
        """Raises ModelError unless ordinary text has finite logits that depend on no later token."""
        row = self.encode([ORDINARY])[0][: self.max_length]
        if len(row) < 2:
            raise ModelError(
                f"the tokenizer of {self.name!r} makes no tokens of ordinary text: its files are missing or "
                "damaged"
            )
        other = [*row[:-1], next(token for token in range(3) if token != row[-1])]
        one_TV, other_TV = (
            self.net(ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
            .logits[0]
            .float()
            for ids_1T in torch.tensor([row, other], device=self.device)[:, None]
        )
        if one_TV.isnan().any():
            self.refuse_not_finite()
        moved_T = (one_TV - other_TV).abs().nan_to_num(0.0).amax(1)
        if moved_T[:-1].max() > LOOKS_AHEAD * moved_T[-1] and not self._scaled_together:
            raise ModelError(
                f"the model {self.name!r} looks at the tokens that follow, as encoders like BERT do: only models "
                "that write text from left to right can be edited"
            )

    def refuse_not_finite(self) -> NoReturn:
        """Raises ModelError: the unedited model gives NaN."""
        dtype = str(self.net.dtype).removeprefix("torch.")
        raise ModelError(
            f"the model {self.name!r} in {dtype} gives logits that are not finite for ordinary text: load it with "
            "another dtype (--model.lm.dtype float32), or its weights are damaged"
        )

    def _text_patch(self) -> TextPatch | None:
        """The newest edit in force on what the model is asked."""
        patches = [h for h in self.handles if isinstance(h, TextPatch) and h.active]
        return patches[-1] if patches else None

    # ------------------------------------------------------------------ tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens in front, none behind."""
        rows = self.tokenizer(list(texts), padding=False, truncation=False).input_ids
        special = set(self.tokenizer.all_special_ids)
        rows = [
            row[:-1] if len(row) > 1 and row[-1] in special and self.appends else row
            for row in rows
        ]
        known = self.net.get_input_embeddings().weight.shape[0]
        if (most := max(map(max, filter(None, rows)), default=0)) >= known:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise ModelError(
                f"the tokenizer of {self.name!r} does not fit the model: its token {token!r} has number {most}, "
                f"and the model embeds {known} tokens; load both as they were published together"
            )
        return rows

    def encode_whole(self, texts: Sequence[str], reserve: int = 0) -> list[list[int]]:
        """As :meth:`encode`, of texts that are read whole.

        Raises ValueError for a text that has more tokens than the model reads at once, ``reserve`` tokens that are
        to follow it included.
        """
        self.require_readable(texts)
        rows = self.encode(texts)
        limit = self.max_length
        for text, row in zip(texts, rows, strict=True):
            if limit is not None and len(row) + reserve > limit:
                more = f", and {reserve} are to follow" if reserve else ""
                raise ValueError(
                    f"{_beginning(text)} has {len(row)} tokens{more}: more than the {limit} that {self.name!r} "
                    "reads at once; shorten it or choose a model with a longer context"
                )
        return rows

    def require_readable(self, texts: Sequence[str]) -> None:
        """Raises ValueError for a text so long that it need not be tokenised to know that it is too long."""
        limit = self.max_length
        most = MOST_CHARACTERS if limit is None else limit * self._longest_token
        for text in texts:
            if len(text) > most:
                reads = f"{most:,} characters" if limit is None else f"{limit} tokens"
                raise ValueError(
                    f"{_beginning(text)} has {len(text):,} characters: more than the {reads} that {self.name!r} "
                    "reads at once; shorten it"
                )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token, as the tokenizer writes it."""
        return max(map(len, self.tokenizer.get_vocab()))

    def join(self, prompt: str, target: str) -> str:
        """A prompt and its target as one text, see :func:`corrigenda.datamodules.records.joined`."""
        return joined(prompt, target, self.separator)

    @cached_property
    def appends(self) -> bool:
        """Whether the tokenizer puts a special token behind a text."""
        return self.tokenizer("a").input_ids[-1] in self.tokenizer.all_special_ids

    def rows(self, prompts: Sequence[str], targets: Sequence[str] | None = None) -> Rows:
        """Encodes prompts, each with its target behind it.

        Raises ValueError for an empty target, and for what is longer than the model reads at once.
        """
        prompts = [prompt_end(prompt) for prompt in prompts]
        if targets is None:
            ids = self.encode_whole(prompts)
            return self.pad(ids, [len(row) for row in ids])
        joint = [self.join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        encoded = self.encode_whole(prompts + joint)
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
        self.require_readable([text])
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
            targets: B continuations, see :meth:`join`.
            deltas: further updates, side by side; row b sees ``deltas[owners[b]]`` (all see a single one).
            owners: for each row the index of its delta.
            full: also return log-probabilities of the whole vocabulary.

        Raises ModelError where the unedited model gives no finite numbers; of an edited one they are returned.
        """
        self.require_readable([*prompts, *targets])
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
        if not (deltas or self.edited) and logprob_BM.isnan().any():
            self.refuse_not_finite()
        return TargetScores(logprob_BM, greedy_BM, target_BM, mask_BM, full_BMV)

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
        for chunk_B in self.chunks(rows, share=4):  # all logits of all tokens
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
        num_beams: int = 1,
    ) -> list[str]:
        """The continuation of each prompt, greedy or sampled from the ``top_k`` likeliest tokens.

        A continuation ends before the first of the texts in ``stop``. With ``num_beams`` it is the likeliest
        that a search over so many at a time finds.
        """
        self.require_readable(prompts)
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
                    num_beams=num_beams,
                )
        ids = self.encode_whole([prompt_end(prompt) for prompt in prompts], max_new_tokens)
        owner_B = _owners(deltas, owners, len(ids))
        start, begun = 0, None
        if self._may_share(deltas) and num_beams == 1:
            same = min(common_prefix(ids[0], row) for row in ids)
            start, begun = self._begun(ids[0], min(same, *(len(row) - 1 for row in ids)))
            if begun and not (can_be_cut(begun) and self._sees_all):
                start, begun = 0, None  # padding behind the start would count in a local window
        sampling = {"top_k": top_k, "temperature": 1.0} if top_k else {}
        config = transformers.GenerationConfig(
            do_sample=bool(top_k),
            num_beams=num_beams,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        texts = [""] * len(ids)
        for begin in range(0, len(order), batch_size):
            chunk = order[begin : begin + batch_size]
            rows, own_B = [ids[i] for i in chunk], owner_B[chunk]
            new = self._generate_chunk(
                rows, max_new_tokens, config, stop, start, begun, deltas, own_B
            )
            for i, row in zip(chunk, new, strict=True):
                texts[i] = _before(stop, self.decode(row))
        return texts

    def _generate_chunk(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        config: transformers.GenerationConfig,
        stop: Sequence[str],
        start: int,
        begun: DynamicCache | None,
        deltas: Sequence[Delta] | None,
        owner_B: Tensor,
    ) -> list[Tensor]:
        """New tokens of each row; as soon as most rows have ended, the others go on without them."""
        ids_BT, mask_BT = padded_left(ids, start, self.device)
        width = ids_BT.shape[1]
        beams = config.num_beams
        cache = empty_cache(self.net) if self.reuse_prefix and beams == 1 else None
        if begun:
            cache = first_tokens(begun, start, len(ids))
        if cache is not None:
            cache = with_room(cache, width + max_new_tokens)
        can_part = cache is not None and not self.adapted  # adapters decide on the whole batch
        end = -1 if config.eos_token_id is None else config.eos_token_id

        def ended(ids_BT: Tensor) -> Tensor:
            new_BM = ids_BT[:, width:]
            done_B = (new_BM == end).any(1)
            if stop:
                texts = [self.decode(row) for row in new_BM]
                done_B |= done_B.new_tensor(
                    [any(words in text for words in stop) for text in texts]
                )
            return done_B

        def may_pause(ids_BT: Tensor, _scores: object, **_: object) -> Tensor:
            done_B = ended(ids_BT)
            return done_B | (can_part and 2 * done_B.sum() > len(done_B))

        new: dict[int, Tensor] = {}
        row_B = torch.arange(len(ids))  # the prompts that are not yet answered
        while len(row_B):
            config.max_new_tokens = max_new_tokens + width - ids_BT.shape[1]
            branch = self.side_by_side(deltas, owner_B[row_B].repeat_interleave(beams))
            with branch, self.asking(mask_BT.bool().repeat_interleave(beams, 0)):
                ids_BT = self.net.generate(
                    ids_BT,
                    attention_mask=mask_BT,
                    past_key_values=cache,
                    generation_config=config,
                    stopping_criteria=[may_pause],
                )
            done_B = ended(ids_BT) | (ids_BT.shape[1] == width + max_new_tokens) | (not can_part)
            left_B = ~done_B
            new |= zip(row_B[done_B.cpu()].tolist(), ids_BT[done_B, width:].cpu(), strict=True)
            row_B, ids_BT, mask_BT = row_B[left_B.cpu()], ids_BT[left_B], mask_BT[left_B]
            mask_BT = pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
            if cache is not None and len(row_B):
                cache.batch_select_indices(left_B.nonzero()[:, 0])
        return [new[row] for row in range(len(ids))]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _beginning(text: str) -> str:
    """How a text is named in a message."""
    return f"the text {text if len(text) <= SHOWN else text[:SHOWN] + '...'!r}"


def _before(stop: Sequence[str], text: str) -> str:
    """The text up to the first of the strings to stop at."""
    return text[: min((text.find(end) for end in stop if end in text), default=None)]


def _owners(deltas: Sequence[Delta] | None, owners: Sequence[int] | None, count: int) -> Tensor:
    """owner_B, the delta of each row; raises ValueError where it is not given and there is a choice."""
    if owners is None and deltas and len(deltas) > 1:
        raise ValueError("several deltas need owners, the delta of each row")
    return torch.tensor(owners if owners is not None else [0] * count)
