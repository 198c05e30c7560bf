"""Joins runs case by case: means with bootstrap intervals, paired differences, curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, stdev
from typing import Any, NamedTuple

from torch import Tensor

from corrigenda.modules.metrics import bootstrap_interval, harmonic_score, paired_difference
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import sequences
from corrigenda.pipeline.report.logs import Training
from corrigenda.pipeline.report.runs import Row, Run

HEADLINE = (
    "efficacy/exact",
    "efficacy/preference",
    "generality/exact",
    "generality/preference",
    "locality/agreement",
    "locality/preference",
    "unrelated/agreement",
)
PREFERENCES = HEADLINE[1:6:2]
PANELS = (HEADLINE[0:6:2], PREFERENCES)  # rows of three criteria
CRITERIA = tuple(zip(*PANELS, strict=True))
BY_SIZE = ("each", "batch", "epoch")  # schedules that differ only in the number of active edits
SEED = 0  # of the resampling, so that reports are reproducible


class Estimate(NamedTuple):
    """A mean over ``n`` cases and its 95 % interval, or a value of the whole run (``n`` is 0).

    With several seeds it is the mean over them, and ``sd`` is their standard deviation.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    sd: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs joined over the cases they share; mappings go from run name to metric to value."""

    runs: Sequence[Run]
    case_ids: Sequence[str]
    baseline: str | None
    measured: Sequence[str]
    estimates: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    scores: Mapping[str, float]
    notes: Sequence[str]
    trainings: Sequence[Training]
    tasks: Mapping[str, Mapping[str, sequences.Interval]]
    task_differences: Mapping[str, Mapping[str, sequences.Interval]]
    matrices: Mapping[str, Mapping[str, Tensor]]

    def metrics(self, wanted: Iterable[str] = HEADLINE) -> list[str]:
        """Those of the wanted metrics that any run has."""
        return [name for name in wanted if any(name in found for found in self.estimates.values())]

    @property
    def num_seeds(self) -> int:
        """The largest number of seeds of any run."""
        return max(len(run.seeds) or 1 for run in self.runs)

    @property
    def repeated_runs(self) -> list[Run]:
        return [run for run in self.runs if run.is_repeated]

    def curve(self, run: Run, metric: str, phase: str) -> dict[int, float]:
        """The metric's mean over the compared cases, by number of edits."""
        wanted = set(self.case_ids)
        values: dict[int, list[float]] = {}
        for row in run.rows:
            if row.phase == phase and row.case_id in wanted and metric in row.metrics:
                values.setdefault(row.num_edits, []).append(row.metrics[metric])
        return {num_edits: fmean(values[num_edits]) for num_edits in sorted(values)}


def join(
    runs: Sequence[Run],
    baseline: str | None,
    notes: Sequence[str] = (),
    trainings: Sequence[Training] = (),
) -> Comparison:
    """Runs over the cases they share, with intervals and paired differences to the baseline."""
    if baseline is not None and baseline not in (run.name for run in runs):
        names = ", ".join(run.name for run in runs)
        raise UserError(f"the baseline {baseline!r} is not among the runs: {names}")
    case_ids = [case for case in runs[0].last if all(case in run.last for run in runs)]
    counts = ", ".join(f"{len(run.last)} in {run.name}" for run in runs)
    if not case_ids:
        raise UserError(f"the runs have no case in common ({counts}); they used different data")
    if any(len(run.last) > len(case_ids) for run in runs):
        differ = f"The runs' cases differ ({counts}); compared on the {len(case_ids)} in common."
        notes = [differ, *notes]
    for single in (single for run in runs for single in run.seeds or [run]):
        _require_same_probes(runs[0], single, case_ids)
    values = {run.name: _values(run, case_ids) for run in runs}
    learned = {run.name: found for run in runs if (found := sequences.of_run(run))}
    estimates = {run.name: _estimates(run, case_ids) for run in runs}
    measured = _measured(runs, estimates)
    return Comparison(
        runs=runs,
        case_ids=case_ids,
        baseline=baseline,
        measured=measured,
        estimates=estimates,
        differences={
            name: _differences(of_run, values[baseline])
            for name, of_run in values.items()
            if baseline is not None and name != baseline
        },
        scores={
            name: harmonic_score(*(of_run[metric].mean for metric in PREFERENCES))
            for name, of_run in estimates.items()
            if all(metric in of_run for metric in PREFERENCES)
        },
        notes=[*notes, *_without_probes(measured)],
        trainings=trainings,
        tasks={name: sequences.statistics(found) for name, found in learned.items()},
        task_differences={
            name: sequences.differences(parts, learned[baseline])
            for name, parts in learned.items()
            if baseline in learned and name != baseline
        },
        matrices={name: sequences.mean_matrices(found) for name, found in learned.items()},
    )


def _without_probes(measured: Sequence[str]) -> list[str]:
    """Which criteria of the headline no case has probes for, in one line; none for runs that measure no edits."""
    criteria = {metric.partition("/")[0] for metric in measured}
    missing = [
        name
        for name in ("generality", "locality")
        if "efficacy" in criteria and name not in criteria
    ]
    return [f"Not measured, as no case has probes for it: {', '.join(missing)}."] if missing else []


def _require_same_probes(first: Run, other: Run, case_ids: Sequence[str]) -> None:
    for case in case_ids:
        row, other_row = first.last[case], other.last[case]
        if row.fingerprint != other_row.fingerprint:
            raise UserError(
                f"case {case} differs between the runs {first.name} and {other.name}: "
                f"{_what_differs(row, other_row)}; run both with the same data settings"
            )


def _what_differs(row: Row, other: Row) -> str:
    absent: Mapping[str, Any] = {}
    for pair in zip_longest(row.probes, other.probes, fillvalue=absent):
        for key in ("criterion", "prompt", "target", "rival"):
            one, another = (probe.get(key) for probe in pair)
            if one != another:
                criterion = pair[0].get("criterion") or pair[1].get("criterion")
                return f"{criterion} {key} {_quote(one)} against {_quote(another)}"
    return f"fingerprint {row.fingerprint} against {other.fingerprint}"


def _quote(value: object) -> str:
    return f"{json.dumps(value, ensure_ascii=False):.60}"


def _values(run: Run, case_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Values by metric and case id."""
    values: dict[str, dict[str, float]] = {}
    for case in case_ids:
        for metric, value in run.last[case].metrics.items():
            values.setdefault(metric, {})[case] = value
    return values


def _whole_run_values(run: Run) -> dict[str, float]:
    """Metrics that the run has only as one value for all cases, such as perplexity."""
    per_case = {metric for row in run.rows for metric in row.metrics}
    means = run.summary.get("means") or {}
    return {
        name: float(value)
        for name, value in means.items()
        if isinstance(value, int | float)
        and name not in per_case
        and not name.startswith("all/")  # scores over the run's own cases
    }


def _measured(runs: Sequence[Run], metrics: Mapping[str, Iterable[str]]) -> list[str]:
    """All metrics; raises UserError if one was measured by different protocols."""
    columns: dict[str, list[Run]] = {}
    for run in runs:
        for metric in metrics[run.name]:
            columns.setdefault(metric, []).append(run)
    for metric, column in columns.items():
        measures = {run.protocol(metric).partition("@")[0] for run in column}
        schedules = {_schedule(run, metric) for run in column if run.is_edited}
        if max(len(measures), len(schedules)) > 1:
            stated: dict[str, list[str]] = {}
            for run in column:
                stated.setdefault(run.protocol(metric), []).append(run.name)
            parts = "; ".join(f"{how} in {', '.join(names)}" for how, names in stated.items())
            hint = "" if len(measures) > 1 else ", or name runs of different sizes NAME@SIZE"
            raise UserError(
                f"{metric} was measured by different protocols: {parts}. Report these separately{hint}"
            )
    return sorted(columns)


def _schedule(run: Run, metric: str) -> str:
    """The run's schedule; those of runs named by their number of edits (``memit@100``) may differ."""
    schedule = run.protocol(metric).partition("@")[2]
    return "any number" if run.is_sized and schedule in BY_SIZE else schedule


def _estimates(run: Run, case_ids: Sequence[str]) -> dict[str, Estimate]:
    """Estimates by metric: means over the cases, or values of the whole run."""
    estimates = {
        metric: Estimate(fmean(values), *bootstrap_interval(values, SEED), len(values))
        for metric, by_case in _values(run, case_ids).items()
        for values in [list(by_case.values())]
    }
    estimates |= {metric: Estimate(value) for metric, value in _whole_run_values(run).items()}
    per_seed = [_means(seed, case_ids) for seed in run.seeds]
    for metric, estimate in estimates.items():
        means = [found[metric] for found in per_seed if metric in found]
        if len(means) > 1:
            estimates[metric] = estimate._replace(sd=stdev(means))
    return estimates


def _means(run: Run, case_ids: Sequence[str]) -> dict[str, float]:
    by_metric = _values(run, case_ids)
    means = {metric: fmean(by_case.values()) for metric, by_case in by_metric.items()}
    return means | _whole_run_values(run)


def _differences(
    values: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]]
) -> dict[str, Estimate]:
    """Paired differences of a run to the baseline, by headline metric."""
    differences = {}
    for metric in HEADLINE:
        by_case, other = values.get(metric, {}), baseline.get(metric, {})
        cases = [case for case in by_case if case in other]
        if cases:
            pairs = [by_case[case] for case in cases], [other[case] for case in cases]
            differences[metric] = Estimate(*paired_difference(*pairs, SEED), len(cases))
    return differences
