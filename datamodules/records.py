"""The records of every dataset: edits, probes and cases, frozen and made of strings.

No other code sees raw JSON, and nothing here depends on a tokenizer or a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Literal

log = logging.getLogger(__name__)

SLOT = "{}"
BLANKS = " \u00a0"
REPHRASED = ("generality", "question")  # criteria whose prompts rephrase the edit
Separator = Literal["auto", " ", ""]  # text between a prompt and its answer
# Prefixes of the Unicode names of letters whose scripts put no spaces between words.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR",
            "TIBETAN", "TAI", "NEW TAI LUE", "BALINESE", "JAVANESE")  # fmt: skip


def prompt_end(prompt: str) -> str:
    """The prompt without trailing spaces; a trailing line break or tab stays, with the spaces around it."""
    text = prompt.rstrip()
    return prompt if prompt[len(text) :].strip(BLANKS) else text


def joined(prompt: str, target: str, separator: Separator = "auto") -> str:
    """A prompt and its answer as one text.

    Spaces where they meet count as the separator. A line break or tab that ends the prompt or begins the
    answer stays as it is, and no separator is added to it.

    Args:
        prompt: the text to continue.
        target: its continuation; whitespace at its end is dropped.
        separator: ``auto`` is a space, or nothing where the last letter of the prompt belongs to a script that
            puts no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...).
    """
    start, answer = prompt_end(prompt), target.strip()
    own = target[: len(target) - len(target.lstrip())]
    if own.strip(BLANKS):
        return start + own + answer
    if start != start.rstrip():
        return start + answer
    if separator == "auto":
        last = next(filter(str.isalpha, reversed(start)), answer[:1])
        separator = "" if _is_unspaced(last) else " "
    return start + separator + answer


def occurrences(text: str, subject: str, ignore_case: bool = False) -> list[int]:
    """Where a subject begins in a text: as whole words or, if it never does, inside other words."""
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    starts = [found.start() for found in re.finditer(f"(?={re.escape(subject)})", text, flags)]
    whole = [s for s in starts if all(_is_boundary(text, i) for i in (s, s + len(subject)))]
    return whole or starts


def located(text: str, subject: str) -> tuple[str, str, list[int]]:
    """(text, subject, starts): where a subject occurs in a text, the subject spelled as it is there.

    It is searched as it is written, then whatever its letter case, then with both in one Unicode form (NFC), in
    which the text is then returned. There are no starts if it does not occur at all.
    """
    composed = (unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", subject))
    for inside, part in ((text, subject), composed):
        for ignore_case in (False, True):
            if starts := occurrences(inside, part, ignore_case):
                return inside, inside[starts[0] : starts[0] + len(part)], starts
    return text, subject, []


def _is_boundary(text: str, place: int) -> bool:
    """Whether a word may begin or end before the character at ``place``."""
    around = text[place - 1 : place + 1] if place else ""
    return len(around) < 2 or not all(map(_is_of_word, around)) or any(map(_is_unspaced, around))


def _is_of_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LMN"


@cache
def _is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that puts no spaces between words."""
    plain = unicodedata.normalize("NFKC", character)[:1]  # half-width forms have other names
    return bool(plain) and unicodedata.name(plain, "").startswith(UNSPACED)


@cache
def _warn_ambiguous(text: str, subject: str, start: int) -> None:
    """Warns, once for each text, which of several occurrences is edited."""
    log.warning("the subject %r occurs several times in %r; the one at character %d is edited: write {} in "
                "its place to choose another", subject, text, start + 1)  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """One fact to write: ``prompt`` with its slot filled by ``subject`` continues as ``target_new``.

    Blanks around the subject and the targets are dropped; a line break before a target is a part of it.

    Args:
        prompt: template with exactly one ``{}`` for the subject; it may contain other braces.
        subject: what the fact is about, as it is spelled in the text.
        target_new: the answer to write, without leading space.
        target_true: the answer before the edit, where the dataset has one.
        relation: the dataset's name of the relation, where it has one.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = name in ("target_true", "relation")
            if not isinstance(value, str) and not (optional and value is None):
                raise ValueError(f"an edit's {name} must be text, got {value!r}")
        if self.prompt.count(SLOT) != 1:
            raise ValueError(
                f"an edit's prompt needs exactly one {{}} for the subject, got {self.prompt!r}; "
                "use Edit.from_text for a prompt that already holds its subject"
            )
        for name in ("subject", "target_new"):
            if not getattr(self, name).strip():
                raise ValueError(f"an edit's {name} is empty (prompt {self.prompt!r})")
        object.__setattr__(self, "subject", self.subject.strip())
        for name in ("target_new", "target_true"):
            if (target := getattr(self, name)) is not None:
                object.__setattr__(self, name, target.lstrip(BLANKS).rstrip())

    @classmethod
    def from_text(cls, text: str, subject: str, target_new: str, **rest: str | None) -> Edit:
        """An edit from a prompt that already holds its subject.

        Whole words come first ("India", not the beginning of "Indiana"). Where several occurrences remain, the
        first is the slot, and a warning says so.
        """
        found = occurrences(text, subject) if subject else []
        if not found:
            raise ValueError(f"the subject {subject!r} does not occur in the prompt {text!r}")
        if SLOT in text:
            raise ValueError(f"the prompt {text!r} holds {{}}, which marks the subject's place")
        start = found[0]
        if len(found) > 1:
            _warn_ambiguous(text, subject, start)
        prompt = text[:start] + SLOT + text[start + len(subject) :]
        return cls(prompt, subject, target_new, **rest)

    @property
    def text(self) -> str:
        """The prompt with the subject in its slot."""
        return self.prompt.replace(SLOT, self.subject, 1)

    @property
    def subject_start(self) -> int:
        """Character index in ``text`` where the subject begins."""
        return self.prompt.index(SLOT)


@dataclass(frozen=True)
class Probe:
    """One thing to evaluate; its fields determine what is measured.

    Args:
        prompt: the text the model continues.
        target: the expected continuation (measures ``accuracy``, ``exact``).
        rival: the competing answer (with a target also ``preference``, ``margin``).
        aliases: other acceptable answers, for free-running generation.
    """

    prompt: str
    target: str | None = None
    rival: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditCase:
    """The edits of one record and everything to evaluate about them.

    Args:
        case_id: unique in its dataset.
        edits: usually one; several for multi-hop records.
        probes: criterion (``efficacy``, ``generality``, ``locality``, ``portability``, ...) to probes.
        generation_prompts: texts to continue freely.
        task: the dataset's name of the task it belongs to, where it has one.
    """

    case_id: str
    edits: tuple[Edit, ...]
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    generation_prompts: tuple[str, ...] = ()
    task: str | None = None

    @property
    def phrasings(self) -> tuple[Probe, ...]:
        """The prompts of the first edit: its own, paraphrases, the question."""
        edit = self.edits[0]
        others = [p for name in REPHRASED for p in self.probes.get(name, ())]
        return (Probe(edit.text, edit.target_new), *others)

    def with_probes(self, most: int | None) -> EditCase:
        """The case with at most so many probes of each criterion, the first ones; None: all."""
        return replace(self, probes={name: probes[:most] for name, probes in self.probes.items()})

    @property
    def fingerprint(self) -> str:
        """Hash of the whole case, without its task: runs with equal hashes evaluated the same thing."""
        fields = {name: value for name, value in asdict(self).items() if name != "task"}
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
