"""Streams of edits: ``forgetting.json`` and ``abilities.jsonl`` of a run, as the figures need them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.abilities import Score, read_abilities
from corrigenda.pipeline.report.records import parse
from corrigenda.pipeline.report.runs import Run

FILE = "forgetting.json"
FORMAT = 1


@dataclass(frozen=True)
class Stream:
    """What was measured of one run, under one seed.

    Attributes:
        run: the run's name, which all seeds share.
        counts: numbers of edits at which earlier ones were scored; of each of these:
        retained: share of all edits that hold.
        preferred: share of all edits whose target is likelier than its rival.
        forgotten: share of the edits that were right when made and have failed at any count since.
        by_age: retention of the edits made between two counts, row by row; NaN for those to come.
        operations: number of edits after each operation.
        norms: by parameter, the norm of all changes after each operation.
        detected: number of edits at which each detector has fired.
        abilities: scores by task and number of edits.
    """

    run: str
    counts: Sequence[int] = ()
    retained: Sequence[float] = ()
    preferred: Sequence[float] = ()
    forgotten: Sequence[float] = ()
    by_age: Sequence[Sequence[float]] = ()
    operations: Sequence[int] = ()
    norms: Mapping[str, Sequence[float]] | None = None
    detected: Mapping[str, int | None] | None = None
    abilities: Mapping[str, Mapping[int, Score]] | None = None


def streams(run: Run) -> list[Stream]:
    """What was measured under each seed of a run; empty if nothing was."""
    found = [read_stream(one.path, run.name) for one in run.seeds or [run]]
    return [one for one in found if one.counts or one.abilities]


def read_stream(folder: Path, name: str) -> Stream:
    """What the run in a folder has measured; raises UserError for a damaged file."""
    abilities, path = read_abilities(folder), folder / FILE
    if not path.is_file():
        return Stream(name, abilities=abilities)
    try:
        content = parse(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        return Stream(
            run=name,
            counts=[int(count) for count in content["counts"]],
            retained=_numbers(content["retention"]["exact"]),
            preferred=_numbers(content["retention"]["preference"]),
            forgotten=_numbers(content["forgotten"]),
            by_age=[_numbers(row) for row in content["by_age"]],
            operations=[int(count) for count in content["operations"]],
            norms={str(n): _numbers(v) for n, v in (content["norms"] or {}).items()},
            detected={str(n): v for n, v in content["detected"].items()},
            abilities=abilities,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a record of forgetting ({error}); repair or remove it"
        ) from None


def _numbers(values: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def kept(stream: Stream) -> float:
    """Ability kept: mean over tasks of the last score relative to the unedited model's; NaN if unknown."""
    shares = [
        scores[max(scores)].value / scores[0].value
        for scores in (stream.abilities or {}).values()
        if 0 in scores and len(scores) > 1 and scores[0].value > 0
    ]
    return sum(shares) / len(shares) if shares else math.nan


def kept_error(stream: Stream) -> float:
    """Half the 95 % interval of :func:`kept`, from the standard errors of the scores; NaN if unknown.

    The tasks' scores are taken as independent; the error of the unedited model's score is left out, because its
    answers to the same questions share it.
    """
    errors = [
        scores[max(scores)].error / scores[0].value
        for scores in (stream.abilities or {}).values()
        if 0 in scores and len(scores) > 1 and scores[0].value > 0
    ]
    return 1.96 * math.hypot(*errors) / len(errors) if errors else math.nan
