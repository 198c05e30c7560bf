"""What a scope classifier learns from: edits' prompts, other prompts, and whether the one is about the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from corrigenda.datamodules.records import EditCase
from corrigenda.modules.evaluation.measures import LOCALITY_CRITERIA

Kin = dict[
    str, list[EditCase]
]  # by relation: cases of other relations that subjects of this one have, too


@dataclass(frozen=True)
class Pairs:
    """Edits' prompts, prompts asked, and whether the second is in the scope of the first."""

    entries: list[str]
    queries: list[str]
    inside: list[bool]

    @classmethod
    def of(cls, triples: Sequence[tuple[str, str, bool]]) -> Pairs:
        return cls(*map(list, zip(*triples, strict=True)))

    @classmethod
    def to_train(
        cls, batch: Sequence[EditCase], draw: random.Random, count: int, kin: Kin | None = None
    ) -> Pairs:
        """One phrasing of each case, and up to ``count`` hard and ``count`` easy negatives.

        Hard: something else about the subject, a locality probe, and how cases of the same relation are asked.
        Easy: an unrelated probe, and how the rest of the batch is asked. Each case is asked in one way
        throughout, so that there are few texts.
        """
        asked = [draw.choice(case.phrasings).prompt for case in batch]
        triples = []
        for case, prompt in zip(batch, asked, strict=True):
            text = case.edits[0].text
            triples.append((text, prompt, True))
            for criterion, alike in (("locality", True), ("unrelated", False)):
                probes = case.probes.get(criterion, ())
                pool = [draw.choice(probes).prompt] if probes else []
                pool += [
                    its
                    for other, its in zip(batch, asked, strict=True)
                    if _same_relation(case, other) is alike
                ]
                others = draw.sample(pool, min(count, len(pool)))
                if alike:
                    others += _something_else(case, kin or {}, draw)
                triples += [(text, its, False) for its in others if its != text]
        return cls.of(triples)

    @classmethod
    def to_validate(cls, cases: Sequence[EditCase]) -> Pairs:
        """All phrasings of each case, its probes that must not move, and the next case's own prompt."""
        triples = []
        for i, case in enumerate(cases):
            text = case.edits[0].text
            triples += [(text, probe.prompt, True) for probe in case.phrasings]
            triples += [(text, prompt, False) for prompt in unmoved(case)]
            other = cases[(i + 1) % len(cases)]
            if _same_relation(case, other) is not None:
                triples.append((text, other.edits[0].text, False))
        return cls.of(triples)


def subject_of(case: EditCase) -> str:
    """Equal for cases about the same."""
    return case.edits[0].subject.casefold()


def unmoved(case: EditCase) -> list[str]:
    """What is asked about a case and must not move."""
    return [probe.prompt for name in LOCALITY_CRITERIA for probe in case.probes.get(name, ())]


def _same_relation(case: EditCase, other: EditCase) -> bool | None:
    """Whether another case has the relation of this one; None where it may even mean the same.

    Cases about the same subject and the same or an unnamed relation may, and are no negatives.
    """
    mine, its = case.edits[0], other.edits[0]
    alike = mine.relation is not None and mine.relation == its.relation
    if subject_of(case) == subject_of(other) and (
        alike or mine.relation is None or its.relation is None
    ):
        return None
    return alike


def kin_of(cases: Sequence[EditCase]) -> Kin:
    """For each relation what else is known about its subjects: where somebody was born and what he plays."""
    by_subject: dict[str, list[EditCase]] = {}
    for case in cases:
        by_subject.setdefault(subject_of(case), []).append(case)
    kin: Kin = {}
    for about in by_subject.values():
        for case, other in permutations(about, 2):
            if _same_relation(case, other) is False:
                kin.setdefault(str(case.edits[0].relation), []).append(other)
    return kin


def _something_else(case: EditCase, kin: Kin, draw: random.Random) -> list[str]:
    """A question usually asked about another subject, put to that of the case; none if its relation has no kin."""
    edit = case.edits[0]
    others = kin.get(str(edit.relation))
    if not others:
        return []
    other = draw.choice(others)
    return [draw.choice(other.phrasings).prompt.replace(other.edits[0].subject, edit.subject)]
