"""Reads and checks run folders (``summary.json`` and ``cases.jsonl``), and averages the seeds of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.logs import curve, read_log
from corrigenda.pipeline.report.records import (
    numbers,
    parse,
    probes,
    read_study_record,
    read_summary,
)
from corrigenda.pipeline.report.verdicts import judged, read_verdicts

K = TypeVar("K")
FILES = ("config.yaml", "cases.jsonl", "summary.json")  # any of them makes a run folder
SHARED_BY_SEEDS = ("editor", "model_hash", "dataset", "schedule")  # fields of summary.json


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one case in one evaluation: a line of ``cases.jsonl``."""

    case_id: str
    fingerprint: str
    phase: str
    num_edits: int
    metrics: Mapping[str, float]
    probes: Sequence[Mapping[str, Any]]
    relation: str | None = None  # of its first edit

    @property
    def target_tokens(self) -> int | None:
        """Length of the new answer; None if the run did not note it."""
        found = (p.get("target_tokens") for p in self.probes if p.get("criterion") == "efficacy")
        length = next(found, None)
        return length if isinstance(length, int) else None


@dataclass(frozen=True)
class Run:
    """A finished run folder. ``rows`` are in the order of the file, without those that a later one replaces.

    If it combines several ``seeds``, its values are means over them.
    """

    name: str
    path: Path
    summary: Mapping[str, Any]
    rows: Sequence[Row]
    seeds: Sequence[Run] = ()

    @cached_property
    def last(self) -> dict[str, Row]:
        """The row of each case's last evaluation, which the tables show."""
        return {row.case_id: row for row in self.rows if row.phase == "val"}

    @property
    def is_repeated(self) -> bool:
        """Whether any case was evaluated after different numbers of edits, which gives a curve."""
        return sum(row.phase == "val" for row in self.rows) > len(self.last)

    @property
    def family(self) -> str:
        """Runs of one family, such as ``memit@1`` and ``memit@100``, differ in the number of active edits."""
        return self.name.partition("@")[0]

    @property
    def is_sized(self) -> bool:
        return "@" in self.name

    @property
    def active_edits(self) -> int:
        """Number of active edits while cases were evaluated; the last batch may have had fewer."""
        return max(row.num_edits for row in self.last.values())

    @property
    def is_edited(self) -> bool:
        return self.summary.get("editor") is not None

    @property
    def seed(self) -> int | None:
        return self.summary.get("seed")

    def logged(self, metric: str, over: str) -> dict[float, float]:
        """One logged value over another; with several seeds, the mean where all of them have it."""
        return _means([curve(read_log(run.path), metric, over) for run in self.seeds or [self]])

    def protocol(self, metric: str) -> str:
        """How the metric was measured, and after the ``@`` the schedule."""
        if metric.endswith("/judged"):
            return f"judge@{self.summary.get('schedule')}"
        return (self.summary.get("protocols") or {}).get(metric, "unstated")

    @property
    def budget(self) -> Mapping[str, float | None]:
        return self.summary.get("budget") or {}


def read_runs(dirs: Sequence[Path]) -> tuple[list[Run], list[Path], list[str]]:
    """(runs in these folders, folders of runs a study does not report, notes on what was left out)."""
    notes: list[str] = []
    folders: dict[Path, Path] = {}
    unreported: list[Path] = []
    for folder in dirs:
        found = [folder]
        if not (folder / "summary.json").exists():
            found, others = _expand(folder, notes)
            unreported += others
        for path in found:
            folders.setdefault(path.resolve(), path)
    by_name: dict[str, list[Run]] = {}
    for run in map(read_run, folders.values()):
        by_name.setdefault(run.name, []).append(run)
    runs = [found[0] if len(found) == 1 else _pool(found) for found in by_name.values()]
    return runs, unreported, notes


def _pool(runs: Sequence[Run]) -> Run:
    """Combines the seeds of a run: means of the rows and numbers that all of them have."""
    for one, other in combinations(runs, 2):
        alike = all(one.summary.get(key) == other.summary.get(key) for key in SHARED_BY_SEEDS)
        if not alike or None in (one.seed, other.seed) or one.seed == other.seed:
            raise UserError(
                f"two runs are named {one.name!r}: {one.path} and {other.path}; "
                "rename one folder (runs of the same name may only differ in their seed)"
            )
    first = runs[0]
    tables = [{_place(run, row): row for row in run.rows} for run in runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    rows = [
        replace(tables[0][key], metrics=_means([table[key].metrics for table in tables]))
        for key in shared
    ]
    means = {k: _means([run.summary.get(k) or {} for run in runs]) for k in ("means", "budget")}
    seeds = [replace(run, name=f"{run.name}, seed {run.seed}") for run in runs]
    return Run(first.name, first.path, {**first.summary, **means}, rows, seeds)


def _place(run: Run, row: Row) -> tuple[str, str, int | None]:
    """What seeds have in common: a case's last evaluation, or those after the same number of edits.

    A stream that undoes edits ends with other numbers of edits under other seeds.
    """
    is_last = run.last.get(row.case_id) is row
    return row.case_id, row.phase, None if is_last else row.num_edits


def _means(mappings: Sequence[Mapping[K, Any]]) -> dict[K, float]:
    """The mean of every number that all mappings have."""
    return {
        key: fmean(mapping[key] for mapping in mappings)
        for key in mappings[0]
        if all(isinstance(mapping.get(key), int | float) for mapping in mappings)
    }


def _expand(folder: Path, notes: list[str]) -> tuple[list[Path], list[Path]]:
    """(finished runs with cases below ``folder``, in the study's order; folders that it does not report)."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; give run folders, or a folder that contains them"
        )
    seeds = sorted(folder.glob("seed-*/"), key=lambda path: (len(path.name), path.name))
    runs, unreported = [], []
    members = [member for part in (folder, *seeds) for member in _members(part).items()]
    for path, is_reported in members:
        name = path.relative_to(folder)
        if not is_reported:
            unreported.append(path)
        elif not is_finished(path):
            notes.append(f"{name} is unfinished and was left out.")
        elif not (path / "cases.jsonl").exists():
            notes.append(f"{name} has no evaluated cases and was left out.")
        else:
            runs.append(path)
    if runs:
        return runs, unreported
    if _has_any(folder, *FILES):
        raise UserError(f"run {folder} is unfinished (no summary.json): resume it first")
    raise UserError(f"{folder} is not a run folder and contains no finished run (no summary.json)")


def _members(folder: Path) -> dict[Path, bool]:
    """Run folders one level below, in the study's order, and whether the study reports them."""
    study = read_study_record(folder)
    names = [*study, *sorted({path.name for path in folder.iterdir()} - {*study})]
    return {
        folder / name: study.get(name, {}).get("report", True)
        for name in names
        if _has_any(folder / name, *FILES)
    }


def _has_any(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has finished; not if its summary is damaged."""
    try:
        return read_summary(folder).get("finished") is True
    except (OSError, UserError):
        return False


def read_run(folder: Path) -> Run:
    """A finished run; raises UserError for any other folder."""
    summary = read_summary(folder)
    if summary.get("finished") is not True:
        raise UserError(f"run {folder} is unfinished (according to summary.json): resume it first")
    if summary.get("format") != 1:
        raise UserError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r}, but this version reads format 1"
        )
    path = folder / "cases.jsonl"
    if not path.exists():
        raise UserError(f"run {folder} has no evaluated cases (no cases.jsonl); leave it out")
    rows: dict[tuple[str, str, int], Row] = {}
    verdicts = read_verdicts(folder)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _parse_row(line, f"{path}:{number}")
                if verdicts:
                    row = replace(row, metrics={**row.metrics, **judged(row.probes, verdicts)})
                key = (row.case_id, row.phase, row.num_edits)
                rows.pop(key, None)  # a resumed run may repeat an evaluation; the last one counts
                rows[key] = row
    run = Run(folder.resolve().name, folder, summary, list(rows.values()))
    if not run.last:
        raise UserError(f"{path} has no evaluation (no row with phase 'val'); leave the run out")
    return run


def _parse_row(line: str, where: str) -> Row:
    try:
        row = parse(line)
        metrics = numbers(row["metrics"], "metrics")
        return Row(
            case_id=str(row["case_id"]),
            fingerprint=str(row["fingerprint"]),
            phase=str(row["phase"]),
            num_edits=int(row["num_edits"]),
            metrics=metrics,
            probes=probes(row.get("probes") or []),
            relation=_relation(row),
        )
    except KeyError as error:
        raise UserError(f"{where}: the row has no {error}; repair or remove that line") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not a case row: {error}; repair or remove that line") from None


def _relation(row: Mapping[str, Any]) -> str | None:
    """The relation of the first edit, if the row has one."""
    match row.get("edits"):
        case [{"relation": str(name)}, *_]:
            return name
    return None
