"""Reads the values that a run has logged per step: ``logs/version_N/metrics.csv``, one per start of the run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corrigenda.pipeline.errors import UserError

Log = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Training:
    """The log of a training run, and the step of its best checkpoint, if known."""

    name: str
    log: Log
    best: int | None = None


def read_training(folder: Path) -> Training | None:
    """What ``fit`` has logged in a run folder; None if nothing was trained."""
    log = read_log(folder)
    if not any("train/loss" in row for row in log):
        return None
    return Training(folder.resolve().name, log, _steps(folder / "checkpoints" / "best.ckpt"))


def read_log(folder: Path) -> Log:
    """All rows in the order in which they were written."""
    files = (folder / "logs").glob("version_*/metrics.csv")
    rows = []
    for file in sorted(files, key=lambda file: (len(file.parent.name), file.parent.name)):
        with file.open(newline="", encoding="utf-8") as lines:
            try:
                rows += [_numbers(row) for row in csv.DictReader(lines)]
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"{file}: not CSV ({error}); repair or remove it") from None
    return rows


def _numbers(row: Mapping[str, str | None]) -> dict[str, float]:
    """The cells that hold a number; a killed run may have left an incomplete line."""
    numbers = {}
    for name, text in row.items():
        with suppress(TypeError, ValueError):
            numbers[name] = float(text or "")
    return numbers


def curve(log: Log, metric: str, over: str = "step") -> dict[float, float]:
    """The metric over ``over``, sorted; where a resumed run repeats a point, the last one counts."""
    values = {row[over]: row[metric] for row in log if over in row and metric in row}
    return dict(sorted(values.items()))


def _steps(checkpoint: Path) -> int | None:
    """The step at which a checkpoint was written; None if there is no readable checkpoint."""
    from corrigenda.modules.training.checkpoints import read_checkpoint  # takes seconds

    try:
        return read_checkpoint(checkpoint, "global_step")["global_step"]
    except ValueError:
        return None
