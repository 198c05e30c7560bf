"""Facts: simple true facts that come with the project, so that everything runs offline.

A case makes one fact false: its object is replaced by another object of the same
relation, and other subjects of that relation must not change.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.fact_tables import Fact, Split, all_facts, digest
from corrigenda.datamodules.records import SLOT, Edit, EditCase, Probe
from corrigenda.datamodules.tasks import Tasks

NUM_SEEN = 3  # paraphrase templates of training cases; the others are kept for val and test
NUM_NEIGHBOURS = 4
NUM_UNRELATED = 2

# The example shows that the answer alone is expected; without it small models begin a sentence.
QUESTION = "Question: On which planet do we live?\nAnswer: Earth\nQuestion: {}\nAnswer:"


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
        order_seed: random seed of the order in which the cases are edited, 0 for that of the run; by default
            they keep the order of the dataset.
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
        order_seed: int | None = None,
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
            order_seed=order_seed,
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
            self._cases[split] = sorted(cases, key=lambda case: digest(case.case_id))
        return self._cases[split]


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
