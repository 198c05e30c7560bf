"""Facts: simple true facts that come with the project, so that everything runs offline.

``assets/facts`` holds one table per relation and the prompts of each relation; its README describes
the format. A case makes one fact false: its object is replaced by another object of the same
relation, and other subjects of that relation must not change.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.records import SLOT, Edit, EditCase, Probe
from corrigenda.datamodules.tasks import Tasks

FOLDER = Path(__file__).parent / "assets" / "facts"
NUM_SEEN = 3  # paraphrase templates of training cases; the others are kept for val and test
NUM_NEIGHBOURS = 4
NUM_UNRELATED = 2

# The example shows that the answer alone is expected; without it small models begin a sentence.
QUESTION = "Question: On which planet do we live?\nAnswer: Earth\nQuestion: {}\nAnswer:"

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
        place = int(_digest(f"split {self.subject.casefold()}")[:8], 16) / 16**8
        return "train" if place < 0.7 else "val" if place < 0.8 else "test"

    def say(self, template: str) -> str:
        return template.replace(SLOT, self.subject)

    def could_be(self, answer: str) -> bool:
        return answer == self.object or answer in self.also


class Facts(EditDataModule):
    """The project's facts in fixed splits that share no subject: about 70 % train, 10 % val, 20 % test.

    The probes of a case: ``efficacy``, the statement itself; ``generality``, three paraphrases, in
    val and test other ones than in train, so that a learned editor is evaluated on wordings it has
    never seen; ``question``, the fact as a question, after an example; ``locality``, the statement
    about up to four other subjects of the split, first those with the same true object;
    ``unrelated``, two statements of the split about other relations and other subjects.

    Cases are in a mixed order, so that the first few cover many relations.

    Args:
        batch_size: cases per batch.
        limit: evaluate only the first so many cases (counted after known_only).
        seed: random seed of the false targets and the choice of neighbours; splits do not depend on it.
        known_only: evaluate only cases the model answers correctly before it is edited.
        val_limit: validate during fit on only the first so many held-out cases.
        tasks: how the evaluation cases become tasks that fit learns one after the other; by default they are
            one set.
        eval_batch_size: cases per batch when they are evaluated; by default batch_size.
        max_probes: evaluate only the first so many probes of each criterion of a case; by default all.
    """

    def __init__(
        self,
        batch_size: int = 8,
        limit: int | None = None,
        seed: int = 0,
        known_only: bool = False,
        val_limit: int | None = None,
        tasks: Tasks | None = None,
        eval_batch_size: int | None = None,
        max_probes: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            limit=limit,
            seed=seed,
            known_only=known_only,
            val_limit=val_limit,
            tasks=tasks,
            eval_batch_size=eval_batch_size,
            max_probes=max_probes,
        )
        self._cases: dict[str, list[EditCase]] = {}

    def cases(self, split: Split) -> list[EditCase]:
        if split not in self._cases:
            members = _by_relation(fact for fact in all_facts() if fact.split == split)
            elsewhere = {
                id: [f for o, fs in members.items() if o != id for f in fs] for id in members
            }
            objects = {id: _objects(facts) for id, facts in _by_relation(all_facts()).items()}
            cases = [
                _case(fact, objects[id], facts, elsewhere[id], self.seed)
                for id, facts in members.items()
                for fact in facts
            ]
            self._cases[split] = sorted(cases, key=lambda case: _digest(case.case_id))
        return self._cases[split]


def statements() -> list[str]:
    """Every fact of the train split as plain sentences, one per template, in a mixed order."""
    sentences = [
        f"{fact.say(template)} {fact.object}."
        for fact in all_facts()
        if fact.split == "train"
        for template in (fact.relation.statement, *fact.relation.paraphrases)
    ]
    return sorted(sentences, key=_digest)


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


def _by_relation(facts: Iterable[Fact]) -> Mapping[str, list[Fact]]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.relation.id, []).append(fact)
    return groups


def _objects(facts: Iterable[Fact]) -> list[str]:
    return sorted({fact.object for fact in facts})


def _case(
    fact: Fact, objects: list[str], others: list[Fact], elsewhere: list[Fact], seed: int
) -> EditCase:
    """The edit that makes ``fact`` false and its probes.

    Args:
        fact: the true fact.
        objects: all objects of its relation.
        others: facts of its relation and split.
        elsewhere: facts of other relations of its split.
        seed: random seed of the false target and the choice of probes.
    """
    rng = random.Random(f"{seed} {fact.case_id}")
    relation, true = fact.relation, fact.object
    new = rng.choice([answer for answer in objects if not fact.could_be(answer)])
    edit = Edit(relation.statement, fact.subject, new, true, relation.id)
    seen, unseen = relation.paraphrases[:NUM_SEEN], relation.paraphrases[NUM_SEEN:]
    wordings = [fact.say(template) for template in (seen if fact.split == "train" else unseen)]
    probes = {
        "efficacy": (Probe(edit.text, new, true),),
        "generality": tuple(Probe(wording, new, true) for wording in wordings),
        "question": (Probe(_question(fact), new, true),),
    }
    neighbours = _neighbours(fact, new, others, rng)
    probes["unrelated"] = tuple(
        Probe(other.say(other.relation.statement), other.object)
        for other in _unrelated(fact, elsewhere, rng)
    )
    if neighbours:
        probes["locality"] = tuple(
            Probe(other.say(relation.statement), other.object, new) for other in neighbours
        )
    return EditCase(fact.case_id, (edit,), probes)


def _question(fact: Fact) -> str:
    return QUESTION.replace(SLOT, fact.say(fact.relation.question))


def _neighbours(fact: Fact, new: str, others: list[Fact], rng: random.Random) -> list[Fact]:
    """Other subjects for which ``new`` is false, those with the object of ``fact`` first."""
    others = [other for other in others if other != fact and not other.could_be(new)]
    rng.shuffle(others)
    return sorted(others, key=lambda other: other.object != fact.object)[:NUM_NEIGHBOURS]


def _unrelated(fact: Fact, elsewhere: list[Fact], rng: random.Random) -> list[Fact]:
    """A few facts from ``elsewhere`` about other subjects; more are drawn than needed."""
    drawn = rng.sample(elsewhere, min(4 * NUM_UNRELATED, len(elsewhere)))
    others = [other for other in drawn if other.subject.casefold() != fact.subject.casefold()]
    return others[:NUM_UNRELATED]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
