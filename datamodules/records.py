"""What every dataset becomes: edits, probes and cases, as frozen records of strings.

Nothing downstream sees raw JSON, and nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

SLOT = "{}"
REPHRASED = ("generality", "question")  # criteria that ask for an edit in other words


@dataclass(frozen=True)
class Edit:
    """One fact to write: ``prompt`` with its slot filled by ``subject`` continues as ``target_new``.

    Args:
        prompt: template with exactly one ``{}``, where the subject goes; may hold other braces.
        subject: what the fact is about, as it stands in the text.
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
        if self.prompt.count(SLOT) != 1:
            raise ValueError(
                f"an edit's prompt needs exactly one {{}} for the subject, got {self.prompt!r}; "
                "use Edit.from_text for a prompt that already holds its subject"
            )
        for name in ("subject", "target_new"):
            if not getattr(self, name).strip():
                raise ValueError(f"an edit's {name} is empty (prompt {self.prompt!r})")

    @classmethod
    def from_text(cls, text: str, subject: str, target_new: str, **rest: str | None) -> Edit:
        """An edit from a prompt that already holds its subject (its first occurrence is the slot)."""
        if not subject or subject not in text:
            raise ValueError(f"the subject {subject!r} does not occur in the prompt {text!r}")
        if SLOT in text:
            raise ValueError(f"the prompt {text!r} holds {{}}, which marks the subject's place")
        return cls(text.replace(subject, SLOT, 1), subject, target_new, **rest)

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
    """One thing to check; what it carries decides what is measured.

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
    """The edit(s) of one record and everything to check about them.

    Args:
        case_id: unique in its dataset.
        edits: usually one; several for multi-hop records.
        probes: criterion (``efficacy``, ``generality``, ``locality``, ``portability``, ...) to probes.
        generation_prompts: texts to continue freely.
    """

    case_id: str
    edits: tuple[Edit, ...]
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    generation_prompts: tuple[str, ...] = ()

    @property
    def phrasings(self) -> tuple[Probe, ...]:
        """The ways to ask for the first edit: its own prompt, paraphrases, the question."""
        edit = self.edits[0]
        others = [p for name in REPHRASED for p in self.probes.get(name, ())]
        return (Probe(edit.text, edit.target_new), *others)

    @property
    def fingerprint(self) -> str:
        """Hash of everything asked: equal in two runs only if they measured the same thing."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
