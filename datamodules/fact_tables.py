"""The tables of Facts, as plain records: what is true, and the sentences that say it.

``assets/facts`` holds one table per relation and the prompts of each relation; its README describes the format.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from corrigenda.datamodules.records import SLOT

FOLDER = Path(__file__).parent / "assets" / "facts"
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Relation:
    """One kind of fact and its prompts; every template has one ``{}`` for the subject.

    Args:
        id: name of the relation and of its table.
        statement: the template of edits; the object follows it after a space.
        paraphrases: six more such templates.
        question: ends in a question mark.
    """

    id: str
    statement: str
    paraphrases: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Fact:
    """A true fact: ``object`` is the correct continuation of ``relation.statement`` for ``subject``.

    Args:
        also: other objects that could be considered correct, and so are never false targets.
    """

    relation: Relation
    subject: str
    object: str
    also: tuple[str, ...] = ()

    @property
    def case_id(self) -> str:
        return f"{self.relation.id}/{self.subject}"

    @property
    def split(self) -> Split:
        """Depends on the subject alone, so that all facts about it are in one split."""
        place = int(digest(f"split {self.subject.casefold()}")[:8], 16) / 16**8
        return "train" if place < 0.7 else "val" if place < 0.8 else "test"

    def say(self, template: str) -> str:
        return template.replace(SLOT, self.subject)

    def could_be(self, answer: str) -> bool:
        return answer == self.object or answer in self.also


def statements() -> list[str]:
    """Every fact of the train split as plain sentences, one per template, in a mixed order."""
    sentences = [
        f"{fact.say(template)} {fact.object}."
        for fact in all_facts()
        if fact.split == "train"
        for template in (fact.relation.statement, *fact.relation.paraphrases)
    ]
    return sorted(sentences, key=digest)


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact of every relation, in the order of the files."""
    rows = json.loads((FOLDER / "relations.json").read_text(encoding="utf-8"))
    relations = [Relation(**{**row, "paraphrases": tuple(row["paraphrases"])}) for row in rows]
    return tuple(fact for relation in relations for fact in _table(relation))


def _table(relation: Relation) -> list[Fact]:
    """The lines of a relation's table: subject, object and, if there are any, also-true objects."""
    facts = []
    text = (FOLDER / f"{relation.id}.tsv").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        subject, *objects = line.split("\t")
        if not objects or len(objects) > 2:
            raise ValueError(
                f"{relation.id}.tsv, line {number}: expected subject, object and at most one list "
                f"of also-true objects, separated by tabs, got {line!r}"
            )
        also = tuple(objects[1].split(", ")) if len(objects) == 2 else ()
        facts.append(Fact(relation, subject, objects[0], also))
    return facts


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
