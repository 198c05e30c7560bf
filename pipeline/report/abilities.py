"""Reads what tasks a run has scored, and after how many edits: ``abilities.jsonl`` in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from corrigenda.pipeline.report.records import parse

FILE = "abilities.jsonl"


class Score(NamedTuple):
    """A task's score, its standard error, and the share of answers that are none; NaN where unknown."""

    value: float
    error: float = math.nan
    invalid: float = math.nan


def read_abilities(folder: Path) -> dict[str, dict[int, Score]]:
    """Scores by task and number of edits, ascending; empty if there are none.

    Where a resumed run repeats a score, the last one counts. A line that was written in part is left out.
    """
    found: dict[str, dict[int, Score]] = {}
    path = folder / FILE
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = parse(line)
            score = Score(*(_number(row, key) for key in ("score", "stderr", "invalid")))
            task, count = str(row["task"]), int(row["edits"])
            found.setdefault(task, {})[count] = score
    return {task: dict(sorted(scores.items())) for task, scores in found.items()}


def _number(row: Mapping[str, object], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
