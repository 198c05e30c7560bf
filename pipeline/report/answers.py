"""What the models answered, case by case, and the means of groups of cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from corrigenda.pipeline.report.comparison import Comparison
from corrigenda.pipeline.report.runs import Row, Run
from corrigenda.pipeline.report.tables import ABSENT, Table

MAX_CASES = 200  # whose answers are in the page
MAX_GROUPS = 30
MAX_LENGTH = 4  # tokens; longer targets are one group
GROUPED = ("efficacy/exact", "generality/exact", "locality/agreement", "unrelated/agreement")
# A generated answer if there is one, otherwise the tokens predicted after the correct ones.
ANSWER = ("answer", "prediction")
CORRECT = ("wild_prefix", "exact")
UNCHANGED = ("wild_same", "agreement")


def cases(comparison: Comparison) -> list[dict[str, Any]]:
    """The first cases as JSON values: relation, length of the target, and the answers of every run."""
    return [_case(comparison.runs, case_id) for case_id in comparison.case_ids[:MAX_CASES]]


def are_generated(comparison: Comparison) -> bool:
    """Whether any run has noted generated answers."""
    return any("answer" in probe for run in comparison.runs for probe in _any(run).probes)


def _any(run: Run) -> Row:
    return next(iter(run.last.values()))


def _case(runs: Sequence[Run], case_id: str) -> dict[str, Any]:
    rows = [run.last[case_id] for run in runs]
    states = [
        {
            "worked": _is_one(row.metrics.get("efficacy/exact")),
            "kept": _is_one(row.metrics.get("locality/agreement")),
        }
        for row in rows
    ]
    return {
        "id": case_id,
        "relation": rows[0].relation,
        "tokens": rows[0].target_tokens,
        "states": states,
        "probes": [_probe(index, rows) for index in range(len(rows[0].probes))],
    }


def _probe(index: int, rows: Sequence[Row]) -> dict[str, Any]:
    """One question; that runs of one case have the same questions is known from their fingerprint."""
    of_runs = [row.probes[index] if index < len(row.probes) else {} for row in rows]
    first = of_runs[0]
    before = next((probe["answer_before"] for probe in of_runs if "answer_before" in probe), None)
    return {
        "criterion": str(first.get("criterion")),
        "prompt": str(first.get("prompt") or ""),
        "expected": str(first.get("target") or ""),
        "before": None if before is None else str(before),
        "answers": [_answer(probe) for probe in of_runs],
    }


def _answer(probe: Mapping[str, Any]) -> dict[str, Any]:
    text = _first(probe, ANSWER)
    return {
        "text": None if text is None else str(text),
        "correct": _is_one(_first(probe, CORRECT)),
        "unchanged": _is_one(_first(probe, UNCHANGED)),
    }


def _first(probe: Mapping[str, Any], keys: Sequence[str]) -> object:
    return next((probe[key] for key in keys if probe.get(key) is not None), None)


def _is_one(value: object) -> bool | None:
    return None if value is None else value == 1


# ---------------------------------------------------------------------------- groups


def relation_tables(comparison: Comparison) -> list[Table]:
    """One table per criterion: a row per relation, a column per run."""
    return _tables(comparison, "relation", lambda row: row.relation)


def length_tables(comparison: Comparison) -> list[Table]:
    """One table per criterion: a row per number of target tokens, a column per run."""
    return _tables(comparison, "tokens of the target", _length)


def _length(row: Row) -> str | None:
    length = row.target_tokens
    if length is None:
        return None
    return str(length) if length < MAX_LENGTH else f"{MAX_LENGTH} or more"


def _tables(comparison: Comparison, name: str, of: Callable[[Row], str | None]) -> list[Table]:
    """The means of every group of cases; none where cases have no group, or all have the same."""
    first = comparison.runs[0].last
    group = {case: found for case in comparison.case_ids if (found := of(first[case])) is not None}
    sizes = Counter(group.values())
    if len(sizes) < 2:
        return []
    largest = sorted(sizes, key=lambda key: (-sizes[key], key))[:MAX_GROUPS]
    order = largest if name == "relation" else sorted(largest)
    note = "×100, means over the cases of each group; n: their number."
    if len(sizes) > len(largest):
        note += f" The {len(largest)} largest of {len(sizes)} groups."
    names = [run.name for run in comparison.runs]
    return [
        Table(
            metric.replace("/", " "),
            [name, "n", *names],
            [[key, str(sizes[key]), *_means(comparison, metric, group, key)] for key in order],
            note,
        )
        for metric in comparison.metrics(GROUPED)
    ]


def _means(comparison: Comparison, metric: str, group: Mapping[str, str], key: str) -> list[str]:
    members = [case for case, its_group in group.items() if its_group == key]
    cells = []
    for run in comparison.runs:
        metrics = [run.last[case].metrics for case in members]
        values = [found[metric] for found in metrics if metric in found]
        cells.append(f"{100 * fmean(values):.1f}" if values else ABSENT)
    return cells
