"""How a chat model reads a prompt: as what the user says, inside its tokenizer's chat template.

The template is rendered once, with a placeholder in the user's place. What stands around it is the same for every
prompt, so that a character of the prompt has a known place in the text, and rows share their beginning.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from corrigenda.modules.model.loading import ModelError

QUESTION, ANSWER = "QUESTION\u2042", "ANSWER\u2042"  # placeholders that no template contains
OPEN, CLOSE = "<think>", "</think>"
EMPTY_THOUGHT = f"\n{CLOSE}\n\n"  # follows a template that ends with an open thinking part
# The date that some templates write into the system's text; a fixed one, so that runs can be repeated.
DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
        "%H": "00", "%M": "00", "%S": "00"}  # fmt: skip
FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('{code}', '{value}')" for code, value in DATE.items())
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """The text around a user's words and a model's answer.

    Attributes:
        head: what stands before the user's words: the system's text and the marks of a turn.
        tail: what stands between them and the answer.
        end: what follows the answer.
        trims: whether blanks and line breaks around the user's words are dropped.
    """

    head: str
    tail: str
    end: str
    trims: bool

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> ChatTemplate:  # noqa: ANN401
        """The template of a tokenizer.

        Thinking is switched off where the template has a switch for it, and dates are fixed.

        Raises:
            ModelError: there is no template, or it does not contain the user's words as they are.
        """
        try:
            template = FIXED_DATE + tokenizer.get_chat_template()
        except (ValueError, AttributeError, TypeError):
            raise ModelError(
                f"the tokenizer of {name!r} has no chat template: leave out chat, or choose a model that was "
                "trained to chat"
            ) from None

        def render(said: str, answer: str | None = None) -> str:
            turns = [{"role": "user", "content": said}]
            turns += [{"role": "assistant", "content": answer}] if answer is not None else []
            return str(tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=answer is None,
                enable_thinking=False, date_string="26 Jul 2024",
            ))  # fmt: skip

        try:
            unanswered, answered = render(f" {QUESTION} "), render(QUESTION, ANSWER)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the chat template of {name!r} cannot be used: {reason}") from None
        head, found, tail = unanswered.partition(QUESTION)
        if not found or answered.count(ANSWER) != 1:
            raise ModelError(f"the chat template of {name!r} does not contain the user's words")
        trims = not (head.endswith(" ") and tail.startswith(" "))
        if not trims:
            head, tail = head[:-1], tail[1:]
        if tail.count(OPEN) > tail.count(CLOSE):
            tail = tail.rstrip() + EMPTY_THOUGHT
        before, _, end = answered.partition(ANSWER)
        blank = " " if before.endswith(" ") and not tail.endswith(" ") else ""
        return cls(head, tail + blank, end, trims)

    @cached_property
    def form(self) -> str:
        """A hash of the template as it is used."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]

    def around(self, prompt: str) -> tuple[str, int]:
        """(text, offset): the text that the model reads, and where in it the prompt begins.

        The prompt's character i is the text's character offset + i.
        """
        said = prompt.strip() if self.trims else prompt
        begin = prompt.index(said) if said else 0
        return self.head + said + self.tail, len(self.head) - begin


def answer_of(text: str) -> str:
    """A generated text without its thinking part; empty while that has not ended."""
    if CLOSE in text:
        return text.rpartition(CLOSE)[2]
    return "" if text.lstrip().startswith(OPEN) else text
