"""Training pairs of a scope classifier: an edit's prompt, another prompt, and whether that is within its scope."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from corrigenda.datamodules.records import EditCase
from corrigenda.modules.evaluation.measures import LOCALITY_CRITERIA

# For each relation, cases of other relations about the same subjects.
Related = dict[str, list[EditCase]]


@dataclass(frozen=True)
class Pairs:
    """Edits' prompts, queries, and whether each query is within the scope of its edit."""

    entries: list[str]
    queries: list[str]
    inside: list[bool]

    @classmethod
    def of(cls, triples: Sequence[tuple[str, str, bool]]) -> Pairs:
        return cls(*map(list, zip(*triples, strict=True)))

    @classmethod
    def to_train(
        cls,
        batch: Sequence[EditCase],
        draw: random.Random,
        count: int,
        related: Related | None = None,
    ) -> Pairs:
        """One phrasing of each case, and up to ``count`` hard and ``count`` easy negatives.

        Hard: another fact about the subject, a locality probe, and the prompts of cases of the same relation.
        Easy: an unrelated probe, and the prompts of the rest of the batch. Each case has one phrasing throughout,
        which keeps the number of texts small.
        """
        phrasings = [draw.choice(case.phrasings).prompt for case in batch]
        triples = []
        for case, prompt in zip(batch, phrasings, strict=True):
            text = case.edits[0].text
            triples.append((text, prompt, True))
            for criterion, alike in (("locality", True), ("unrelated", False)):
                probes = case.probes.get(criterion, ())
                pool = [draw.choice(probes).prompt] if probes else []
                pool += [
                    its
                    for other, its in zip(batch, phrasings, strict=True)
                    if _same_relation(case, other) is alike
                ]
                others = draw.sample(pool, min(count, len(pool)))
                if alike:
                    others += _something_else(case, related or {}, draw)
                triples += [(text, its, False) for its in others if its != text]
        return cls.of(triples)

    @classmethod
    def to_validate(cls, cases: Sequence[EditCase]) -> Pairs:
        """All phrasings of each case, its locality probes, and the next case's own prompt."""
        triples = []
        for i, case in enumerate(cases):
            text = case.edits[0].text
            triples += [(text, probe.prompt, True) for probe in case.phrasings]
            triples += [(text, prompt, False) for prompt in locality_prompts(case)]
            other = cases[(i + 1) % len(cases)]
            if _same_relation(case, other) is not None:
                triples.append((text, other.edits[0].text, False))
        return cls.of(triples)


def subject_of(case: EditCase) -> str:
    """The case's subject, regardless of case."""
    return case.edits[0].subject.casefold()


def locality_prompts(case: EditCase) -> list[str]:
    """The prompts of a case's locality probes."""
    return [probe.prompt for name in LOCALITY_CRITERIA for probe in case.probes.get(name, ())]


def _same_relation(case: EditCase, other: EditCase) -> bool | None:
    """Whether another case has the same relation; None if it may even state the same fact.

    Cases about the same subject with the same or an unnamed relation may, so they are no negatives.
    """
    mine, its = case.edits[0], other.edits[0]
    alike = mine.relation is not None and mine.relation == its.relation
    if subject_of(case) == subject_of(other) and (
        alike or mine.relation is None or its.relation is None
    ):
        return None
    return alike


def related_cases(cases: Sequence[EditCase]) -> Related:
    """For each relation (birthplace, say), the cases of other relations (instrument) about its subjects."""
    by_subject: dict[str, list[EditCase]] = {}
    for case in cases:
        by_subject.setdefault(subject_of(case), []).append(case)
    related: Related = {}
    for about in by_subject.values():
        for case, other in permutations(about, 2):
            if _same_relation(case, other) is False:
                related.setdefault(str(case.edits[0].relation), []).append(other)
    return related


def _something_else(case: EditCase, related: Related, draw: random.Random) -> list[str]:
    """A prompt of a related relation, rewritten for the case's subject; none if no relation is related."""
    edit = case.edits[0]
    others = related.get(str(edit.relation))
    if not others:
        return []
    other = draw.choice(others)
    return [draw.choice(other.phrasings).prompt.replace(other.edits[0].subject, edit.subject)]
