"""``corrigenda report``: run folders in, one comparison out (HTML, Markdown, CSV, terminal).

- Runs are joined case by case: a number is compared only over cases that every run was asked, and a
  case counts as the same only if its fingerprint is.
- A run folder says everything in ``summary.json`` and ``cases.jsonl``; no method is known here.
- A column holds one protocol. Means carry bootstrap intervals over cases, differences are paired.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CRITERIA = ("efficacy", "generality", "locality", "portability")
MEASURES = ("exact", "accuracy", "agreement", "preference", "margin")
HEADLINE = (
    "efficacy/exact",
    "efficacy/preference",
    "generality/exact",
    "generality/preference",
    "locality/agreement",
    "locality/preference",
)
PREFERENCES = ("efficacy/preference", "generality/preference", "locality/preference")
CSV_HEADER = ("run", "editor", "metric", "protocol", "n", "mean", "ci_low", "ci_high")
SEED = 0  # of the resampling, so that a report can be made again to the digit
MAX_CASES_SHOWN = 50
MAX_CURVE_ROWS = 20
TRAIL = 10  # single edits are 0 or 1 and hide the trend
ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """One case as one evaluation found it: a line of ``cases.jsonl``."""

    case_id: str
    fingerprint: str
    phase: str
    num_edits: int
    metrics: Mapping[str, float]
    probes: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished run folder; ``rows`` are in the order of the file, a repeated evaluation once."""

    name: str
    path: Path
    summary: Mapping[str, Any]
    rows: Sequence[Row]

    @cached_property
    def last(self) -> dict[str, Row]:
        """The row of each case's last evaluation, which is what the tables show."""
        return {row.case_id: row for row in self.rows if row.phase == "val"}

    @property
    def is_repeated(self) -> bool:
        """Whether some case was evaluated at several numbers of edits, so that there is a curve."""
        counts: dict[str, set[int]] = {}
        for row in self.rows:
            if row.phase == "val":
                counts.setdefault(row.case_id, set()).add(row.num_edits)
        return any(len(seen) > 1 for seen in counts.values())

    @property
    def budget(self) -> Mapping[str, float | None]:
        return self.summary.get("budget") or {}

    @property
    def editor(self) -> str:
        return self.summary.get("editor") or "none"


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` cases and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Runs joined over the cases they share; the mappings go from run name to metric to number."""

    runs: Sequence[Run]
    case_ids: Sequence[str]
    baseline: str | None
    protocols: Mapping[str, str]
    estimates: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    scores: Mapping[str, float]
    whole_run: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = field(default=())

    def metrics(self, wanted: Iterable[str] = HEADLINE) -> list[str]:
        """Those of the wanted metrics that any run has."""
        return [name for name in wanted if name in self.protocols and self.has(name)]

    def has(self, metric: str) -> bool:
        return any(metric in of_run for of_run in self.estimates.values())


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, for whichever format."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def report(dirs: list[Path], out: Path, baseline: str | None = None) -> None:
    """Compare finished runs case by case: report.html, report.md, report.csv and a table on screen.

    Args:
        dirs: run folders, or folders that hold run folders.
        out: folder for the three files; an earlier report there is replaced.
        baseline: name of the run that the others are subtracted from.
    """
    runs, notes = read_runs(dirs)
    comparison = join(runs, baseline, notes)
    texts = {
        "report.csv": as_csv(comparison),
        "report.md": as_markdown(comparison),
        "report.html": as_html(comparison),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out} is a file; name a folder for the report") from None
    for name, text in texts.items():
        write_atomically(out / name, text)
    print_headline(comparison, sys.stdout)
    sys.stdout.write(f"\nreport: {out / 'report.html'} (and report.md, report.csv beside it)\n")


def write_atomically(path: Path, text: str) -> None:
    """Leave either the old file or the whole new one, whatever happens in between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Reading


def read_runs(dirs: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, in this order, and notes on what was left out."""
    notes: list[str] = []
    folders: list[Path] = []
    for folder in dirs:
        found = [folder] if (folder / "summary.json").exists() else _expand(folder, notes)
        known = {known.resolve() for known in folders}
        folders += [path for path in found if path.resolve() not in known]
    runs = [read_run(folder) for folder in folders]
    by_name: dict[str, Run] = {}
    for run in runs:
        if run.name in by_name:
            raise UserError(
                f"two runs are called {run.name!r}: {by_name[run.name].path} and {run.path}; "
                "rename one folder"
            )
        by_name[run.name] = run
    return runs, notes


def _expand(folder: Path, notes: list[str]) -> list[Path]:
    """The finished, scored runs one level below ``folder``; a study's order and choice are kept."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name run folders or a folder of them")
    study = _study_runs(folder)
    names = [name for name in study if (folder / name).is_dir()]
    names += sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name not in study
    )
    runs = []
    for path in (folder / name for name in names if study.get(name, True)):
        if not any(
            (path / name).exists() for name in ("summary.json", "cases.jsonl", "config.yaml")
        ):
            continue
        if not is_finished(path):
            notes.append(f"{path.name} is unfinished and was left out.")
        elif not (path / "cases.jsonl").exists():
            notes.append(f"{path.name} scored no cases and was left out.")
        else:
            runs.append(path)
    if runs:
        return runs
    if any((folder / name).exists() for name in ("cases.jsonl", "config.yaml")):
        raise UserError(f"run {folder} is unfinished (it has no summary.json); let it finish first")
    raise UserError(f"{folder} is no run folder and holds no finished run (no summary.json)")


def _study_runs(folder: Path) -> dict[str, bool]:
    """What ``corrigenda compare`` noted in ``folder``: run name to whether it is reported."""
    path = folder / "study.json"
    if not path.exists():
        return {}
    return {name: run.get("report", True) for name, run in _read_json(path).get("runs", {}).items()}


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end; a damaged summary is no end."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("finished") is True


def read_run(folder: Path) -> Run:
    """A finished run, checked."""
    summary = _read_json(folder / "summary.json")
    if summary.get("finished") is not True:
        raise UserError(f"run {folder} is unfinished (summary.json says so); let it finish first")
    if summary.get("format") != 1:
        raise UserError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r}, this version reads 1"
        )
    path = folder / "cases.jsonl"
    if not path.exists():
        raise UserError(f"run {folder} scored no cases (it has no cases.jsonl); leave it out")
    rows: dict[tuple[str, str, int], Row] = {}
    for row in _read_rows(path):
        key = (row.case_id, row.phase, row.num_edits)
        rows.pop(key, None)  # a resumed run may repeat an evaluation: the later one counts
        rows[key] = row
    if not any(row.phase == "val" for row in rows.values()):
        raise UserError(f"{path} holds no evaluation (no row with phase 'val'); leave the run out")
    return Run(folder.resolve().name, folder, summary, list(rows.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_rows(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_row(line, f"{path}:{number}")


def _parse_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        stated = row["metrics"].items()
        values = {str(name): float(value) for name, value in stated if value is not None}
        return Row(
            case_id=str(row["case_id"]),
            fingerprint=str(row["fingerprint"]),
            phase=str(row["phase"]),
            num_edits=int(row["num_edits"]),
            metrics={name: value for name, value in values.items() if not math.isnan(value)},
            probes=[dict(probe) for probe in row.get("probes") or ()],
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); repair or remove that line") from None
    except KeyError as error:
        raise UserError(f"{where}: a case row lacks {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not a case row ({error})") from None


# Joining


def join(runs: Sequence[Run], baseline: str | None, notes: Sequence[str] = ()) -> Comparison:
    """Runs over the cases they share, with intervals and paired differences to the baseline."""
    if baseline is not None and baseline not in (run.name for run in runs):
        names = ", ".join(run.name for run in runs)
        raise UserError(f"there is no run {baseline!r} to be the baseline; the runs are {names}")
    case_ids, counts = _shared_cases(runs)
    for run in runs[1:]:
        _require_same_questions(runs[0], run, case_ids)
    values = {run.name: _values(run, case_ids) for run in runs}
    whole_run = {run.name: _whole_run_values(run) for run in runs}
    estimates = {name: _estimates(of_run) for name, of_run in values.items()}
    return Comparison(
        runs=runs,
        case_ids=case_ids,
        baseline=baseline,
        protocols=_protocols(runs, values, whole_run),
        estimates=estimates,
        differences=_differences(values, baseline),
        scores=_scores(estimates),
        whole_run=whole_run,
        notes=[*counts, *notes],
    )


def _shared_cases(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Ids of the cases in every run, in the first run's order, and a note if some are not."""
    asked = {run.name: run.last for run in runs}
    shared = [
        case for case in asked[runs[0].name] if all(case in cases for cases in asked.values())
    ]
    counts = ", ".join(f"{len(cases)} in {name}" for name, cases in asked.items())
    if not shared:
        raise UserError(f"the runs share no case ({counts}); they used different data")
    if all(len(cases) == len(shared) for cases in asked.values()):
        return shared, []
    return shared, [f"The runs' cases differ ({counts}): compared on the {len(shared)} they share."]


def _require_same_questions(first: Run, other: Run, case_ids: Sequence[str]) -> None:
    rows, others = first.last, other.last
    for case in case_ids:
        if rows[case].fingerprint != others[case].fingerprint:
            raise UserError(
                f"case {case} asked different things in runs {first.name} and {other.name}: "
                f"{_what_differs(rows[case], others[case])}; run both with the same data settings"
            )


def _what_differs(row: Row, other: Row) -> str:
    absent: Mapping[str, Any] = {}
    for probe, other_probe in zip_longest(row.probes, other.probes, fillvalue=absent):
        for key in ("criterion", "prompt", "target", "rival"):
            if probe.get(key) != other_probe.get(key):
                kind = probe.get("criterion") or other_probe.get("criterion")
                return (
                    f"{kind} {key} {_quote(probe.get(key))} against {_quote(other_probe.get(key))}"
                )
    return f"fingerprint {row.fingerprint} against {other.fingerprint}"


def _quote(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f'{text[: limit - 2]}…"'


def _values(run: Run, case_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metric to case id to value, for the cases that have it."""
    last = run.last
    values: dict[str, dict[str, float]] = {}
    for case in case_ids:
        for metric, value in last[case].metrics.items():
            values.setdefault(metric, {})[case] = value
    return values


def _whole_run_values(run: Run) -> dict[str, float]:
    """What the run states only as one number for all of it (general abilities, distances)."""
    per_case = {metric for row in run.rows for metric in row.metrics}
    means = run.summary.get("means") or {}
    return {
        name: float(value)
        for name, value in means.items()
        if name not in per_case and isinstance(value, int | float)
    }


def _protocols(
    runs: Sequence[Run],
    values: Mapping[str, Mapping[str, object]],
    whole_run: Mapping[str, Mapping[str, object]],
) -> dict[str, str]:
    """Metric to the one protocol all runs measured it by; a column of several is refused."""
    from modules.metrics import require_same_protocol  # imports torch: seconds

    columns: dict[str, dict[str, str]] = {}
    for run in runs:
        stated = run.summary.get("protocols") or {}
        for metric in [*values[run.name], *whole_run[run.name]]:
            columns.setdefault(metric, {})[run.name] = stated.get(metric, "unstated")
    protocols = {}
    for metric in sorted(columns, key=_metric_order):
        column = columns[metric]
        try:
            protocols[metric] = require_same_protocol(list(column.values()), metric)
        except ValueError:
            raise UserError(_mixed(metric, column)) from None
    return protocols


def _mixed(metric: str, column: Mapping[str, str]) -> str:
    runs_by_protocol: dict[str, list[str]] = {}
    for run, protocol in column.items():
        runs_by_protocol.setdefault(protocol, []).append(run)
    parts = [f"{protocol} in {', '.join(runs)}" for protocol, runs in runs_by_protocol.items()]
    return f"{metric} was measured by different protocols: {'; '.join(parts)}. Report these apart"


def _metric_order(metric: str) -> tuple[int, str, int, str]:
    criterion, _, measure = metric.partition("/")
    return (
        CRITERIA.index(criterion) if criterion in CRITERIA else len(CRITERIA),
        criterion,
        MEASURES.index(measure) if measure in MEASURES else len(MEASURES),
        measure,
    )


def _estimates(values: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    from modules.metrics import bootstrap_interval

    estimates = {}
    for metric, by_case in values.items():
        numbers = list(by_case.values())
        estimates[metric] = Estimate(
            fmean(numbers), *bootstrap_interval(numbers, SEED), len(numbers)
        )
    return estimates


def _differences(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], baseline: str | None
) -> dict[str, dict[str, Estimate]]:
    """Each run minus the baseline by headline metric, over the cases that have it in both."""
    from modules.metrics import paired_difference

    differences: dict[str, dict[str, Estimate]] = {}
    if baseline is None:
        return differences
    for name, of_run in values.items():
        if name == baseline:
            continue
        differences[name] = {}
        for metric in HEADLINE:
            by_case, other = of_run.get(metric, {}), values[baseline].get(metric, {})
            cases = [case for case in by_case if case in other]
            if cases:
                pairs = [by_case[case] for case in cases], [other[case] for case in cases]
                differences[name][metric] = Estimate(*paired_difference(*pairs, SEED), len(cases))
    return differences


def _scores(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, float]:
    """Run to the harmonic mean of its three preferences, where it has all three."""
    from modules.metrics import harmonic_score

    return {
        name: harmonic_score(*(of_run[metric].mean for metric in PREFERENCES))
        for name, of_run in estimates.items()
        if all(metric in of_run for metric in PREFERENCES)
    }


# Tables


def headline_table(comparison: Comparison, show: Callable[[Estimate], str] | None = None) -> Table:
    """A row per run, a column per headline metric any run has, and the score."""
    show = show or _percent
    metrics = comparison.metrics()
    rows = []
    for run in comparison.runs:
        of_run = comparison.estimates[run.name]
        cells = [show(of_run[metric]) if metric in of_run else ABSENT for metric in metrics]
        if comparison.scores:
            score = comparison.scores.get(run.name)
            cells.append(ABSENT if score is None else _hundred(score))
        rows.append([run.name, *cells])
    header = ["run", *(metric.replace("/", " ") for metric in metrics)]
    header += ["score"] if comparison.scores else []
    note = f"×100, mean over {len(comparison.case_ids)} cases with 95 % interval."
    return Table("Headline", header, rows, note)


def difference_table(comparison: Comparison) -> Table:
    metrics = comparison.metrics()
    rows = []
    for name, of_run in comparison.differences.items():
        found = [of_run.get(metric) for metric in metrics]
        rows.append([name, *(_percent(one, signed=True) if one else ABSENT for one in found)])
    note = (
        "×100, run minus baseline case by case. An interval without 0 is a difference to believe."
    )
    header = ["run", *(metric.replace("/", " ") for metric in metrics)]
    return Table(f"Difference to {comparison.baseline}", header, rows, note)


def budget_table(comparison: Comparison) -> Table:
    header = ["run", *(column.title for column in BUDGET)]
    rows = [
        [run.name, *(column.text(run.budget.get(column.key)) for column in BUDGET)]
        for run in comparison.runs
    ]
    return Table("Budget", header, rows, "What an edit costs, as each run measured it.")


def run_table(comparison: Comparison) -> Table:
    header = ["run", "editor", "model", "dataset", "schedule", "edits", "cases scored"]
    rows = []
    for run in comparison.runs:
        stated = [str(run.summary.get(key) or ABSENT) for key in ("model", "dataset", "schedule")]
        num_edits = run.budget.get("num_edits")
        edits = ABSENT if num_edits is None else f"{num_edits:,.0f}"
        rows.append([run.name, run.editor, *stated, edits, str(len(run.last))])
    return Table("Runs", header, rows)


def metric_table(comparison: Comparison) -> Table:
    """Every metric of every run, as it is (not ×100)."""
    rows = []
    for metric, protocol in comparison.protocols.items():
        for run in comparison.runs:
            estimate = comparison.estimates[run.name].get(metric)
            whole = comparison.whole_run[run.name].get(metric)
            if estimate:
                interval = f"[{estimate.low:.4g}, {estimate.high:.4g}]"
                mean, num_cases = f"{estimate.mean:.4g}", str(estimate.n)
            elif whole is not None:
                mean, interval, num_cases = f"{whole:.4g}", ABSENT, ABSENT
            else:
                continue
            rows.append([metric, run.name, mean, interval, num_cases, protocol])
    note = "Not scaled. Rows without n are one number for the whole run, over its own cases."
    header = ["metric", "run", "mean", "95 % interval", "n", "protocol"]
    return Table("All metrics", header, rows, note)


def curve_table(comparison: Comparison) -> Table:
    """Repeated evaluations, thinned to a readable number with the last one kept."""
    metrics = comparison.metrics()
    rows = []
    for run in _repeated_runs(comparison):
        curves = {metric: curve(run, metric, "val", comparison.case_ids) for metric in metrics}
        points = sorted({num_edits for of_metric in curves.values() for num_edits in of_metric})
        step = -(-len(points) // MAX_CURVE_ROWS)
        for num_edits in points[::-1][::step][::-1]:
            means = [of_metric.get(num_edits) for of_metric in curves.values()]
            cells = [ABSENT if mean is None else f"{100 * mean:.1f}" for mean in means]
            rows.append([run.name, str(num_edits), *cells])
    header = ["run", "edits so far", *(metric.replace("/", " ") for metric in metrics)]
    return Table("Retention", header, rows, "×100, over the cases edited up to each evaluation.")


def curve(run: Run, metric: str, phase: str, case_ids: Sequence[str]) -> dict[int, float]:
    """Number of edits to the metric's mean over the compared cases evaluated there."""
    wanted = set(case_ids)
    values: dict[int, list[float]] = {}
    for row in run.rows:
        if row.phase == phase and row.case_id in wanted and metric in row.metrics:
            values.setdefault(row.num_edits, []).append(row.metrics[metric])
    return {num_edits: fmean(values[num_edits]) for num_edits in sorted(values)}


def _repeated_runs(comparison: Comparison) -> list[Run]:
    return [run for run in comparison.runs if run.is_repeated]


def _tables(comparison: Comparison) -> list[Table]:
    tables = [headline_table(comparison)]
    tables += [difference_table(comparison)] if comparison.differences else []
    tables += [budget_table(comparison), run_table(comparison)]
    tables += [curve_table(comparison)] if _repeated_runs(comparison) else []
    return [*tables, metric_table(comparison)]


def _percent(estimate: Estimate, signed: bool = False) -> str:
    low, high = _hundred(estimate.low, signed), _hundred(estimate.high, signed)
    return f"{_hundred(estimate.mean, signed)} [{low}, {high}]"


def _rounded(estimate: Estimate) -> str:
    return f"{_hundred(estimate.mean)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _bare(estimate: Estimate) -> str:
    return _hundred(estimate.mean)


def _hundred(value: float, signed: bool = False) -> str:
    rounded = round(100 * value, 1) + 0.0  # adding 0 turns -0.0 into 0.0
    return f"{rounded:+.1f}" if signed else f"{rounded:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class BudgetColumn:
    key: str
    title: str
    show: Callable[[float], str]

    def text(self, value: float | None) -> str:
        return ABSENT if value is None else self.show(value)


BUDGET = (
    BudgetColumn("seconds_per_edit", "seconds per edit", lambda value: f"{value:.3g}"),
    BudgetColumn("peak_gib", "peak memory (GiB)", lambda value: f"{value:.2f}"),
    BudgetColumn("parameters_touched", "parameters touched", lambda value: f"{value:,.0f}"),
    BudgetColumn("training_seconds", "training time", _duration),
)


def _legend(comparison: Comparison) -> list[str]:
    """How to read the numbers, for those that are shown."""
    lines = {
        "efficacy": "efficacy: the edited prompt itself. Higher is better.",
        "generality": "generality: other wordings of it. Higher is better.",
        "locality": "locality: facts that must not move. Higher is better.",
        "exact": "exact: each target token is the first choice after the right ones before it.",
        "preference": "preference: the new answer is likelier than the old one "
        "(under locality: the true one likelier than the edit's).",
        "agreement": "agreement: the edited model's choices equal the unedited model's.",
    }
    shown = {part for metric in comparison.metrics() for part in metric.split("/")}
    legend = [text for word, text in lines.items() if word in shown]
    if comparison.scores:
        legend.append("score: harmonic mean of the three preferences; one bad one pulls it down.")
    legend.append(
        "[low, high]: 95 % bootstrap interval over the cases. It covers the choice of cases, "
        "not another seed or order of edits."
    )
    alike = [
        estimate.n
        for of_run in comparison.estimates.values()
        for metric, estimate in of_run.items()
        if metric in HEADLINE and estimate.low == estimate.high
    ]
    if alike:
        legend.append(
            "An interval of one point means that all cases agree, not certainty: after "
            f"{min(alike)} alike, up to {100 * (1 - 0.05 ** (1 / min(alike))):.0f} % of others "
            "may still differ."
        )
    if comparison.baseline is None:
        legend.append("No baseline was named (--baseline), so no differences are shown.")
    return legend


# Text formats


def as_csv(comparison: Comparison) -> str:
    """One line per run and metric; n and the interval are empty where a run states one number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for run in comparison.runs:
        for metric, protocol in comparison.protocols.items():
            estimate = comparison.estimates[run.name].get(metric)
            whole = comparison.whole_run[run.name].get(metric)
            numbers: list[float | str]
            if estimate:
                numbers = [estimate.n, estimate.mean, estimate.low, estimate.high]
            elif whole is not None:
                numbers = ["", whole, "", ""]
            else:
                continue
            editor = run.summary.get("editor") or ""
            writer.writerow([run.name, editor, metric, protocol, *numbers])
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    headline, *others = _tables(comparison)
    parts = ["# Report", _title(comparison), *comparison.notes, _markdown_table(headline)]
    parts += ["\n".join(f"- {line}" for line in _legend(comparison))]
    parts += [_markdown_table(table) for table in others]
    return "\n\n".join(parts) + "\n"


def _title(comparison: Comparison) -> str:
    runs, cases = len(comparison.runs), len(comparison.case_ids)
    return f"{runs} run{'s' * (runs != 1)}, {cases} case{'s' * (cases != 1)}."


def _markdown_table(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = f"| {' | '.join(['---', *['---:'] * (len(table.header) - 1)])} |"
    lines = [line(table.header), rule, *(line(row) for row in table.rows)]
    parts = [f"## {table.title}", table.note, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def print_headline(comparison: Comparison, stream: TextIO, width: int | None = None) -> None:
    """The headline as aligned text; the narrower the terminal, the less of the intervals."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    whole = "95 % intervals over the cases"
    forms = (
        (_percent, whole),
        (_rounded, f"{whole}, rounded"),
        (_bare, "their intervals are in the report"),
    )
    for show, about in forms:
        lines = _aligned(headline_table(comparison, show))
        note = f"×100, means over {len(comparison.case_ids)} cases; {about}."
        if max(map(len, lines)) <= width:
            break
    stream.write("\n".join(["", *lines, "", note, *comparison.notes]) + "\n")


def _aligned(table: Table) -> list[str]:
    """Header words on lines of their own, the first column left, numbers right."""
    words = [cell.split() for cell in table.header]
    height = max(map(len, words))
    headers = [[""] * (height - len(cell)) + cell for cell in words]
    lines = [[cell[level] for cell in headers] for level in range(height)] + list(table.rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(words))]
    texts = [
        "  ".join(
            f"{cell:{'<' if column == 0 else '>'}{widths[column]}}"
            for column, cell in enumerate(line)
        )
        for line in lines
    ]
    texts = [text.rstrip() for text in texts]
    return [*texts[:height], "─" * max(map(len, texts)), *texts[height:]]


# Figures. INK marks what takes the page's text colour, so that a dark page stays readable.

INK = "#0b0c0e"
FAINT = "#8a919b"
COLOURS = (
    "#4c8dd6",
    "#e0812f",
    "#3fa66a",
    "#d65a6f",
    "#9a72c9",
    "#2fa8b5",
    "#b89b2e",
    "#d070b0",
    "#8b6b4f",
    "#6f7fd9",
)
FIGURE_STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.09,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": FAINT,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figures(comparison: Comparison) -> list[tuple[str, Figure]]:
    """Caption and picture of everything that can be drawn from these runs."""
    drawn = [("Mean and 95 % interval over the cases.", headline_figure(comparison))]
    drawn.append(
        (
            "Up and right is better: new wordings follow, other facts stay.",
            trade_off_figure(comparison),
        )
    )
    drawn.append(("What an edit costs, as each run measured it.", budget_figure(comparison)))
    drawn.append(
        (
            f"Solid: all cases edited so far. Dotted: those just edited, trailing mean of {TRAIL}.",
            curve_figure(comparison),
        )
    )
    return [(caption, figure) for caption, figure in drawn if figure is not None]


def _colours(comparison: Comparison) -> dict[str, str]:
    """Run name to colour; the baseline is grey."""
    others = [run.name for run in comparison.runs if run.name != comparison.baseline]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    return {run.name: colours.get(run.name, FAINT) for run in comparison.runs}


def headline_figure(comparison: Comparison) -> Figure | None:
    """A panel per headline metric, criteria across, a bar per run."""
    from matplotlib.figure import Figure

    grid = [
        [f"{criterion}/{measure}" for criterion in CRITERIA[:3]]
        for measure in ("exact", "preference")
    ]
    grid[0][2] = "locality/agreement"
    grid = [line for line in grid if comparison.metrics(line)]
    if not grid:
        return None
    num_runs = len(comparison.runs)
    figure = Figure(figsize=(9.6, len(grid) * (0.75 + 0.27 * num_runs)), layout="constrained")
    panels = figure.subplots(len(grid), 3, squeeze=False, sharex=True, sharey=True)
    for axes, metric in zip(panels.flat, sum(grid, []), strict=True):
        _draw_bars(axes, comparison, metric)
    return figure


def _draw_bars(axes: Axes, comparison: Comparison, metric: str) -> None:
    colours = _colours(comparison)
    names = [run.name for run in comparison.runs]
    axes.set_title(metric.replace("/", " · "), loc="left")
    axes.set(xlim=(0, 122), xticks=range(0, 101, 25), ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="both", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)
    for position, name in enumerate(names):
        estimate = comparison.estimates[name].get(metric)
        if estimate is None or not math.isfinite(estimate.mean):
            axes.text(2, position, ABSENT, va="center")
            continue
        mean, low, high = 100 * estimate.mean, 100 * estimate.low, 100 * estimate.high
        axes.barh(position, mean, height=0.66, color=colours[name], alpha=0.85)
        axes.plot([low, high], [position] * 2, color=INK, linewidth=1.2, solid_capstyle="butt")
        axes.text(max(mean, high) + 2, position, f"{mean:.1f}", va="center", fontsize=9)


def trade_off_figure(comparison: Comparison) -> Figure | None:
    """Generality against locality, a point per run with both intervals."""
    from matplotlib.figure import Figure

    pairs = [
        (f"generality/{measure}", f"locality/{other}")
        for measure, other in (("exact", "agreement"), ("preference", "preference"))
    ]
    pairs = [pair for pair in pairs if len(comparison.metrics(pair)) == 2]
    if not pairs:
        return None
    figure = Figure(figsize=(2.6 + 3.5 * len(pairs), 3.6), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, pair in zip(panels, pairs, strict=True):
        _draw_trade_off(axes, comparison, *pair)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _draw_trade_off(axes: Axes, comparison: Comparison, across: str, up: str) -> None:
    colours = _colours(comparison)
    markers = "osD^vPX*<>"
    axes.set(xlabel=across.replace("/", " · "), ylabel=up.replace("/", " · "))
    axes.set(xlim=(-4, 104), ylim=(-4, 104), aspect="equal")
    for index, run in enumerate(comparison.runs):
        of_run = comparison.estimates[run.name]
        if across not in of_run or up not in of_run:
            axes.plot([], [], markers[index % 10], color=colours[run.name], label=run.name)
            continue
        x, y = of_run[across], of_run[up]
        colour = colours[run.name]
        axes.plot([100 * x.low, 100 * x.high], [100 * y.mean] * 2, color=colour, alpha=0.6)
        axes.plot([100 * x.mean] * 2, [100 * y.low, 100 * y.high], color=colour, alpha=0.6)
        axes.plot(
            100 * x.mean,
            100 * y.mean,
            markers[index % 10],
            color=colour,
            markersize=7,
            label=run.name,
        )


def budget_figure(comparison: Comparison) -> Figure | None:
    """A panel per budget column any run has, a bar per run."""
    from matplotlib.figure import Figure

    runs = comparison.runs
    columns = [column for column in BUDGET if any(run.budget.get(column.key) for run in runs)]
    if not columns:
        return None
    figure = Figure(
        figsize=(1 + 2.15 * len(columns), 0.75 + 0.27 * len(runs)), layout="constrained"
    )
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    colours = _colours(comparison)
    for axes, column in zip(panels, columns, strict=True):
        values = [run.budget.get(column.key) for run in runs]
        largest = max(value for value in values if value is not None)
        axes.set_title(column.title, loc="left")
        axes.set(xlim=(0, 1.6 * largest), xticks=[], ylim=(len(runs) - 0.4, -0.6))
        axes.set_yticks(range(len(runs)), [run.name for run in runs])
        axes.tick_params(axis="both", length=0)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        for position, (run, value) in enumerate(zip(runs, values, strict=True)):
            axes.barh(position, value or 0, height=0.66, color=colours[run.name], alpha=0.85)
            end = (value or 0) + 0.03 * largest
            axes.text(end, position, column.text(value), va="center", fontsize=9)
    return figure


def curve_figure(comparison: Comparison) -> Figure | None:
    """Efficacy, generality and locality over the number of edits, for runs evaluated repeatedly."""
    from matplotlib.figure import Figure

    from modules.metrics import trailing_mean

    runs = _repeated_runs(comparison)
    choices = (HEADLINE[:2], HEADLINE[2:4], HEADLINE[4:])
    metrics = [found[0] for choice in choices if (found := comparison.metrics(choice))]
    if not runs or not metrics:
        return None
    figure = Figure(figsize=(1.4 + 2.75 * len(metrics), 3), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    colours = _colours(comparison)
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_title(metric.replace("/", " · "), loc="left")
        axes.set(ylim=(-4, 104), xlabel="edits")
        for run in runs:
            colour = colours[run.name]
            retained = curve(run, metric, "val", comparison.case_ids)
            current = curve(run, metric, "current", comparison.case_ids)
            smooth = trailing_mean(list(current.values()), TRAIL)
            means = [100 * mean for mean in retained.values()]
            axes.plot(list(retained), means, "o-", color=colour, markersize=3.5, label=run.name)
            axes.plot(list(current), [100 * mean for mean in smooth], ":", color=colour)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def as_svg(figure: Figure, prefix: str) -> str:
    """A figure as an element to put into a page: no header, no outside names, ids of its own."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href=", "href=").replace(INK, "currentColor")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    width = figure.get_figwidth()
    return svg.replace("<svg", f'<svg role="img" style="width: {96 * width:.0f}px"', 1)


# The page

CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6673; --line: #dfe3e8; --page: #ffffff;
  --band: #f5f7f9; --good: #1d7f49; --bad: #b3374a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4b1; --line: #343b45;
  --page: #14171b; --band: #1b1f25; --good: #62c98d; --bad: #f08a98; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; color: var(--ink);
  background: var(--page); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 0.4rem; }
p { margin: 0.3rem 0 0.8rem; } .soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.note { border-left: 3px solid #e0a12f; padding: 0.2rem 0.8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
td:first-child { font-weight: 600; }
tbody tr:hover { background: var(--band); }
.text td { white-space: normal; min-width: 7rem; max-width: 22rem; overflow-wrap: anywhere; }
.text td:first-child { min-width: 3rem; } .text tr.first td { border-top: 2px solid var(--line); }
.interval { color: var(--soft); font-size: 0.92em; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 1.4rem 0; } figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
ul { padding-left: 1.1rem; } li { margin: 0.15rem 0; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; font-size: 1.15rem; }
"""


def as_html(comparison: Comparison) -> str:
    """One page that needs nothing but itself."""
    import matplotlib

    headline, *others = _tables(comparison)
    with matplotlib.rc_context(FIGURE_STYLE):
        pictures = [
            f"<figure>{as_svg(figure, f'f{index}')}<figcaption>{caption}</figcaption></figure>"
            for index, (caption, figure) in enumerate(figures(comparison))
        ]
    names = ", ".join(run.name for run in comparison.runs)
    legend = "".join(f"<li>{html.escape(line)}</li>" for line in _legend(comparison))
    *tables, everything = [_html_table(table) for table in others]
    parts = [
        f"<h1>Report</h1>\n<p class=soft>{html.escape(f'{_title(comparison)} {names}')}</p>",
        *(f"<p class=note>{html.escape(note)}</p>" for note in comparison.notes),
        _html_table(headline),
        *pictures,
        f"<h2>How to read this</h2>\n<ul>{legend}</ul>",
        *tables,
        f"<details><summary>All metrics, not scaled</summary>{everything}</details>",
        _html_cases(comparison),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Report: {html.escape(names)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{_html_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<p class=soft>{html.escape(table.note)}</p>\n"
        f"<div class=wide><table><thead><tr>{header}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _html_cell(cell: str) -> str:
    number, bracket, rest = html.escape(cell).partition(" [")
    return f"{number} <span class=interval>[{rest}</span>" if bracket else number


def _html_cases(comparison: Comparison) -> str:
    """The first probe of each criterion of the first cases, and every run's answer to it."""
    shown = comparison.case_ids[:MAX_CASES_SHOWN]
    header = ["case", "criterion", "prompt", "target", *(run.name for run in comparison.runs)]
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = [line for case in shown for line in _html_case(comparison.runs, case)]
    count = f"{len(shown)} of {len(comparison.case_ids)}"
    return (
        f"<details><summary>Cases ({count})</summary>\n"
        "<p class=soft>The first probe of each criterion. Green: as it should be. Red: not.</p>\n"
        f"<div class=wide><table class=text><thead><tr>{cells}</tr></thead>\n<tbody>"
        + "\n".join(rows)
        + "</tbody></table></div></details>"
    )


def _html_case(runs: Sequence[Run], case: str) -> list[str]:
    answers = [_first_probes(run.last[case]) for run in runs]
    criteria = list(dict.fromkeys(criterion for of_run in answers for criterion in of_run))
    lines = []
    for index, criterion in enumerate(criteria):
        probe = next(of_run[criterion] for of_run in answers if criterion in of_run)
        texts = [case if index == 0 else "", criterion, probe.get("prompt"), probe.get("target")]
        cells = [f"<td>{html.escape(str(text or ''))}</td>" for text in texts]
        cells += [_html_answer(of_run.get(criterion, {})) for of_run in answers]
        lines.append(f"<tr{' class=first' if index == 0 else ''}>{''.join(cells)}</tr>")
    return lines


def _first_probes(row: Row) -> dict[str, Mapping[str, Any]]:
    probes: dict[str, Mapping[str, Any]] = {}
    for probe in row.probes:
        probes.setdefault(str(probe.get("criterion")), probe)
    return probes


def _html_answer(probe: Mapping[str, Any]) -> str:
    value = next((probe[key] for key in ("agreement", "exact") if probe.get(key) is not None), None)
    style = "" if value is None else f" class={'good' if value == 1 else 'bad'}"
    return f"<td{style}>{html.escape(str(probe.get('prediction') or ABSENT))}</td>"
