"""Text to token ids and back: the only place that tokenises, and that puts prompts into a chat template.

Prompt and target are always encoded together, as one text (:func:`corrigenda.datamodules.records.joined`). The
target's tokens are those after the longest common prefix with the encoded prompt, so that no rule about leading
spaces or begin-of-text tokens depends on the model's family.

A *prompt* is what a user asks: in a chat the model reads it inside the tokenizer's chat template. A *text* is read
as it is: corpora, sampled contexts, perplexity.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from corrigenda.datamodules.records import Edit, Separator, joined, prompt_end
from corrigenda.modules.interrupts import Reversible, replaced
from corrigenda.modules.model.chat import ChatTemplate, answer_of
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.model.placement import device_of
from corrigenda.modules.model.rows import Rows, common_prefix

MOST_CHARACTERS = 1_000_000  # of a text, if the model does not limit its tokens
SHOWN = 60  # characters of a text that a message shows


class Tokens:
    """A model's tokenizer, with the model's limits.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        net: the network that reads the tokens.
        name: the model's name, for messages.
        separator: text between a prompt and its target, see :class:`LanguageModel`.
        chat: read prompts inside the tokenizer's chat template.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401
        net: Any,  # noqa: ANN401
        name: str,
        separator: Separator,
        chat: bool = False,
    ) -> None:
        self.tokenizer, self.net, self.name = tokenizer, net, name
        self.separator: Separator = separator
        self.template = ChatTemplate.of(tokenizer, name) if chat else None
        self.num_boundary_merges = 0  # rows in which a token spans the end of the prompt
        self._as_written = False  # see :meth:`as_written`

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have; None if the model sets no limit."""
        config = self.net.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        found = [getattr(config, name, None) for name in names]
        return min((n for n in found if isinstance(n, int) and n > 0), default=None)

    @property
    def form(self) -> str:
        """How prompts are read: ``plain``, or a hash of the chat template."""
        return "plain" if self.template is None else f"chat {self.template.form}"

    @property
    def _around(self) -> ChatTemplate | None:
        """The template that prompts are read in now."""
        return None if self._as_written else self.template

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, with the tokenizer's special tokens at the start, and none at the end."""
        rows = self.tokenizer(list(texts), padding=False, truncation=False).input_ids
        special = set(self.tokenizer.all_special_ids)
        return self._known([
            row[:-1] if len(row) > 1 and row[-1] in special and self.appends else row
            for row in rows
        ])  # fmt: skip

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, however long."""
        return self._encode([self.question(prompt) for prompt in prompts])

    def _encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of what :meth:`question` gives; a template contains its own special tokens."""
        if self._around is None:
            return self.encode(questions)
        return self._known(self.tokenizer(list(questions), add_special_tokens=False).input_ids)

    def _known(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows; raises ModelError if the tokenizer has more tokens than the model embeds."""
        known = self.net.get_input_embeddings().weight.shape[0]
        if (most := max(map(max, filter(None, rows)), default=0)) >= known:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise ModelError(
                f"the tokenizer of {self.name!r} does not fit the model: its token {token!r} has the id {most}, "
                f"and the model embeds {known} tokens; load both as they were published together"
            )
        return rows

    def encode_whole(self, questions: Sequence[str], reserve: int = 0) -> list[list[int]]:
        """Token ids of what :meth:`question` gives, also with targets after it, that must fit into the context.

        Raises ValueError for a text that does not fit together with the ``reserve`` tokens that are to follow it.
        """
        self.require_readable(questions)
        rows = self._encode(questions)
        limit = self.max_length
        for text, row in zip(questions, rows, strict=True):
            if limit is not None and len(row) + reserve > limit:
                more = f", and {reserve} are to follow" if reserve else ""
                raise ValueError(
                    f"{_beginning(text)} has {len(row)} tokens{more}: more than the context of {self.name!r}, "
                    f"{limit} tokens; shorten it or choose a model with a longer context"
                )
        return rows

    def require_readable(self, texts: Sequence[str]) -> None:
        """Raises ValueError for a text so long that it cannot fit, without tokenising it."""
        limit = self.max_length
        most = MOST_CHARACTERS if limit is None else limit * self._longest_token
        for text in texts:
            if len(text) > most:
                context = f"{most:,} characters" if limit is None else f"{limit} tokens"
                raise ValueError(
                    f"{_beginning(text)} has {len(text):,} characters: more than the context of {self.name!r}, "
                    f"{context}; shorten it"
                )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token in the vocabulary."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def appends(self) -> bool:
        """Whether the tokenizer appends a special token to a text."""
        return self.tokenizer("a").input_ids[-1] in self.tokenizer.all_special_ids

    def as_written(self) -> Reversible:
        """Inside, texts are taken character by character, as lm-evaluation-harness takes them.

        No separator is added and no blank is dropped. A target begins after as many tokens as its prompt has when
        encoded alone, without the whitespace at its end.
        """
        return replaced(self, _as_written=True)

    def join(self, prompt: str, target: str) -> str:
        """A prompt and its target as one text, see :func:`corrigenda.datamodules.records.joined`."""
        return prompt + target if self._as_written else joined(prompt, target, self.separator)

    def question(self, prompt: str) -> str:
        """What the model reads for a prompt where text is to follow it."""
        return self._placed(prompt)[0]

    def _placed(self, prompt: str) -> tuple[str, int]:
        """(text, offset): what the model reads for a prompt, and where in it the prompt begins."""
        prompt = prompt if self._as_written else prompt_end(prompt)
        return (prompt, 0) if self._around is None else self._around.around(prompt)

    def _answered(self, question: str, target: str) -> str:
        """A question with its target."""
        return self.join(question, target) if self._around is None else question + target.strip()

    def answer(self, ids: Sequence[int] | Tensor) -> str:
        """The text of generated tokens; in a chat without its thinking part."""
        text = self.decode(ids)
        return text if self._around is None else answer_of(text)

    def rows(
        self, prompts: Sequence[str], targets: Sequence[str] | None = None, end: bool = False
    ) -> Rows:
        """Encodes prompts, each followed by its target if targets are given, with ``end`` by end-of-text, too.

        Raises ValueError for an empty target, for a text that does not fit into the model's context, and for a
        tokenizer without an end-of-text token where it is wanted.
        """
        ending = [self.end_token] if end else []
        questions = [self.question(prompt) for prompt in prompts]
        if targets is None:
            ids = self.encode_whole(questions)
            return self.pad(ids, [len(row) for row in ids])
        joint = [self._answered(*pair) for pair in zip(questions, targets, strict=True)]
        before = [text.rstrip() for text in questions] if self._as_written else questions
        encoded = self.encode_whole(before + joint, len(ending))
        rows, starts = [], []
        for left, row in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            start = common_prefix(left, row)
            self.num_boundary_merges += start < len(left)
            if self._as_written:
                start, row = len(left), left + row[len(left) :]
            starts.append(max(start, 1))  # nothing predicts a row's first token
            rows.append(row + ending)
        for prompt, target, start, row in zip(prompts, targets, starts, rows, strict=True):
            if start >= len(row) - len(ending) or not (self._as_written or target.strip()):
                raise ValueError(f"the target {target!r} adds no token to the prompt {prompt!r}")
        return self.pad(rows, starts)

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer: end of turn in a chat, and end of text."""
        ends = [self.tokenizer.eos_token_id]
        if self.template is not None:
            after = self.tokenizer(self.template.end, add_special_tokens=False).input_ids
            special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
            ends = [*(token for token in after[:1] if token in special), *ends]
        return list(dict.fromkeys(int(token) for token in ends if token is not None))

    @property
    def end_token(self) -> int:
        """The token that ends an answer; raises ValueError if the tokenizer has none."""
        token = next(iter(self.ends), None)
        if token is None:
            raise ValueError(f"the tokenizer of {self.name!r} has no token that ends a text")
        return int(token)

    def first_texts(self, texts: Iterable[str], max_tokens: int) -> list[str]:
        """The first texts, as many as have ``max_tokens`` tokens together; each is cut by whoever runs it."""
        found: list[str] = []
        total = 0
        for text in texts:
            found.append(text)
            total += len(self.encode([text])[0])
            if total >= max_tokens:
                break
        return found

    def pad(self, ids: Sequence[list[int]], starts: Sequence[int]) -> Rows:
        """Rows of token ids, padded on the right; ``starts`` are the places of their first target tokens."""
        return Rows.of(ids, starts, device_of(self.net.get_input_embeddings()))

    def subject_span(self, prompt: str, start: int, subject: str) -> tuple[int, int]:
        """(first, last) token index of the subject that begins at character ``start`` of ``prompt``."""
        self.require_readable([prompt])
        text, offset = self._placed(prompt)
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=self._around is None
        )
        start += offset
        end = start + len(subject)
        inside = [
            i for i, (a, b) in enumerate(encoded.offset_mapping) if b > a and a < end and b > start
        ]
        if not inside:
            raise ValueError(f"no token of {prompt!r} belongs to the subject {subject!r}")
        return inside[0], inside[-1]

    def subject_end(self, edit: Edit, prefix: str = "") -> int:
        """Index of the subject's last token in ``prefix`` + the edit's prompt."""
        return self.subject_span(
            prefix + edit.text, len(prefix) + edit.subject_start, edit.subject
        )[1]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids, without special tokens, spaces as they are."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _beginning(text: str) -> str:
    """How a text is named in a message."""
    return f"the text {text if len(text) <= SHOWN else text[:SHOWN] + '...'!r}"
