"""Free generation of a language model.

Shapes: B rows, T tokens, M new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from corrigenda.modules.model.active_edits import ActiveEdits
from corrigenda.modules.model.handle import GenerationRequest
from corrigenda.modules.model.kv_cache import empty_cache, first_tokens, preallocated, select_rows
from corrigenda.modules.model.reuse import Prefix, Reuse
from corrigenda.modules.model.rows import padded_left
from corrigenda.modules.model.tokens import Tokens


class Generator:
    """Generates text with one model.

    Args:
        tokens: the model's tokenizer.
        edits: its network and active edits.
        reuse: what is computed once.
    """

    def __init__(self, tokens: Tokens, edits: ActiveEdits, reuse: Reuse) -> None:
        self.tokens, self.edits, self.reuse = tokens, edits, reuse

    def generate(self, request: GenerationRequest) -> list[str]:
        """See :meth:`LanguageModel.generate`; prompts run in batches of similar length."""
        prompts = [self.tokens.question(prompt) for prompt in request.prompts]
        ids = self.tokens.encode_whole(prompts, request.max_new_tokens)
        owner_B = request.owner_B
        prefix = None
        if ids and request.num_beams == 1:
            prefix = self.reuse.prefix_of_prompts(ids, beside_deltas=bool(request.deltas))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        texts = [""] * len(ids)
        for begin in range(0, len(order), request.batch_size):
            chunk = order[begin : begin + request.batch_size]
            batch = _Batch(self, request, [ids[i] for i in chunk], owner_B[chunk], prefix)
            for i, row in zip(chunk, batch.run(), strict=True):
                texts[i] = _before(request.stop, self.tokens.answer(row))
        return texts


class _Batch:
    """Prompts that are continued together; once more than half have ended, the others go on without them."""

    def __init__(
        self,
        on: Generator,
        request: GenerationRequest,
        ids: list[list[int]],
        owner_B: Tensor,
        prefix: Prefix | None,
    ) -> None:
        self.on, self.request, self.owner_B = on, request, owner_B
        start = prefix.length if prefix else 0
        self.ids_BT, self.mask_BT = padded_left(ids, start, on.edits.device)
        self.width = self.ids_BT.shape[1]
        self.most = self.width + request.max_new_tokens  # most tokens of a row
        self.ends = on.tokens.ends
        self.cache = self._cache(len(ids), prefix)
        self._told = ""  # what on_text has been given
        # Adapters that decide by prompt do so for the whole batch.
        self.can_shrink = self.cache is not None and not on.edits.need_whole_rows

    def _cache(self, rows: int, prefix: Prefix | None) -> DynamicCache | None:
        """A cache with memory for all tokens; None leaves caching to ``transformers``."""
        if prefix is not None:
            return preallocated(first_tokens(prefix.cache, prefix.length, rows), self.most)
        default = not self.on.reuse.enabled or self.request.num_beams > 1
        cache = None if default else empty_cache(self.on.edits.net)
        return None if cache is None else preallocated(cache, self.most)

    def run(self) -> list[Tensor]:
        """New tokens of each row."""
        new: dict[int, Tensor] = {}
        row_B = torch.arange(len(self.ids_BT))  # prompts whose continuation has not ended
        while len(row_B):
            self._extend(row_B)
            full = self.ids_BT.shape[1] == self.most
            done_B = self._ended(self.ids_BT) | full | (not self.can_shrink)
            ready = self.ids_BT[done_B, self.width :].cpu()
            new |= zip(row_B[done_B.cpu()].tolist(), ready, strict=True)
            row_B = row_B[~done_B.cpu()]
            self._keep(~done_B)
        return [new[row] for row in range(len(new))]

    def _extend(self, row_B: Tensor) -> None:
        """Generates until more than half of the rows have ended, or all."""
        beams = self.request.num_beams
        edits = self.on.edits
        owner_B = self.owner_B[row_B].repeat_interleave(beams)
        announced = edits.announce(self.mask_BT.bool().repeat_interleave(beams, 0))
        with edits.side_by_side(self.request.deltas, owner_B), announced:
            self.ids_BT = edits.net.generate(
                self.ids_BT,
                attention_mask=self.mask_BT,
                past_key_values=self.cache,
                generation_config=self._config(),
                stopping_criteria=[self._may_pause],
            )

    def _config(self) -> transformers.GenerationConfig:
        top_k = self.request.top_k
        sampling: dict[str, Any] = {"top_k": top_k, "temperature": 1.0} if top_k else {}
        return transformers.GenerationConfig(
            do_sample=bool(top_k),
            num_beams=self.request.num_beams,
            max_new_tokens=self.most - self.ids_BT.shape[1],
            eos_token_id=self.ends or None,
            pad_token_id=next(iter(self.ends), None),
            **sampling,
        )

    def _may_pause(self, ids_BT: Tensor, _scores: object, **_: object) -> Tensor:
        self._tell(ids_BT)
        done_B = self._ended(ids_BT)
        return done_B | (self.can_shrink and 2 * done_B.sum() > len(done_B))

    def _tell(self, ids_BT: Tensor) -> None:
        """Gives the new text of a single prompt to ``on_text``, up to the last whole character."""
        if self.request.on_text is None or len(ids_BT) != 1:
            return
        text = self.on.tokens.answer(ids_BT[0, self.width :])
        if text.startswith(self._told) and not text.endswith("\ufffd"):
            self.request.on_text(text[len(self._told) :])
            self._told = text

    def _ended(self, ids_BT: Tensor) -> Tensor:
        """Whether each row has reached an end token or one of the texts to stop at."""
        new_BM = ids_BT[:, self.width :]
        done_B = torch.isin(new_BM, new_BM.new_tensor(self.ends)).any(1)
        if self.request.stop:
            texts = [self.on.tokens.decode(row) for row in new_BM]
            stopped = [any(words in text for words in self.request.stop) for text in texts]
            done_B |= done_B.new_tensor(stopped)
        return done_B

    def _keep(self, left_B: Tensor) -> None:
        """Drops the rows that have ended."""
        self.ids_BT, self.mask_BT = self.ids_BT[left_B], self.mask_BT[left_B]
        more = self.ids_BT.shape[1] - self.mask_BT.shape[1]
        self.mask_BT = pad(self.mask_BT, (0, more), value=1)
        if self.cache is not None and left_B.any():
            select_rows(self.cache, left_B.nonzero()[:, 0])


def _before(stop: Sequence[str], text: str) -> str:
    """The text before the first of the strings to stop at."""
    return text[: min((text.find(end) for end in stop if end in text), default=None)]
