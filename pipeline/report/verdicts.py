"""A judge's verdicts on freely generated answers: ``judged.jsonl`` in a run folder, see ``corrigenda judge``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.records import parse

FILE = "judged.jsonl"


class Answer(NamedTuple):
    """A question, its right answer, and what a model has said."""

    question: str
    gold: str
    said: str


def answers(probes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Answer]]:
    """(criterion, answer) of the probes of a case that were answered freely."""
    for probe in probes:
        if isinstance(said := probe.get("answer"), str):
            answer = Answer(str(probe.get("prompt")), str(probe.get("target")), said)
            yield probe["criterion"], answer


def read_verdicts(folder: Path) -> dict[Answer, dict[str, Any]]:
    """The lines of ``judged.jsonl`` by the answer that they judge; raises UserError for a damaged file."""
    file = folder / FILE
    if not file.exists():
        return {}
    found = {}
    try:
        for line in file.read_text("utf-8").splitlines():
            row = parse(line)
            if not isinstance(row["correct"], bool):
                raise ValueError("correct must be true or false")
            found[Answer(row["question"], row["gold"], row["said"])] = row
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}): remove it to judge again") from None
    return found


def judged(
    probes: Iterable[Mapping[str, Any]], verdicts: Mapping[Answer, Mapping[str, Any]]
) -> dict[str, float]:
    """``<criterion>/judged``: the share of a case's free answers that the judge calls correct."""
    by_criterion: dict[str, list[float]] = {}
    for criterion, answer in answers(probes):
        if answer in verdicts:
            by_criterion.setdefault(criterion, []).append(float(verdicts[answer]["correct"]))
    return {f"{criterion}/judged": fmean(values) for criterion, values in by_criterion.items()}
