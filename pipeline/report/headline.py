"""The headline of the page: quality and cost of every run in one table that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from corrigenda.pipeline.report.comparison import Comparison, Estimate
from corrigenda.pipeline.report.runs import Run
from corrigenda.pipeline.report.tables import ABSENT, budget_text

COST = {
    "seconds_per_edit": "seconds per edit",
    "training_seconds": "training",
    "bytes_per_edit": "size of an edit",
    "peak_gib": "memory (GiB)",
}
NOTE = (
    "Quality ×100 with 95 % intervals below. ↑ higher is better, ↓ lower is better; "
    "★ the best of the runs that edit. A column's title sorts by it."
)


@dataclass(frozen=True)
class Cell:
    """A number to sort by (NaN where there is none), the text that shows it, and its interval."""

    value: float = math.nan
    text: str = ABSENT
    interval: str = ""


@dataclass(frozen=True)
class Column:
    group: str
    title: str
    sign: int  # 1 if higher is better, -1 if lower is, 0 if neither
    cells: Sequence[Cell]
    best: float = math.nan

    @property
    def arrow(self) -> str:
        return {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}[self.sign]

    @property
    def label(self) -> str:
        group = "" if self.group == "cost" else self.group
        return f"{group} {self.title}{self.arrow}".strip()


def headline(comparison: Comparison) -> str:
    """The table, with a list for sorting where the screen is too narrow for column titles."""
    columns = list(_columns(comparison))
    options = "".join(
        f"<option value={index}>{escape(column.label)}</option>"
        for index, column in enumerate(columns, start=1)
    )
    rows = "\n".join(_row(index, run, columns) for index, run in enumerate(comparison.runs))
    return (
        f"<p class=soft>{NOTE}</p>\n"
        f"<label class=narrow>Sort by <select class=sort><option value=0>run</option>{options}"
        "</select></label>\n"
        f"<table class=headline><thead>{_head(columns)}</thead>\n<tbody>{rows}</tbody></table>"
    )


def _head(columns: Sequence[Column]) -> str:
    groups = "".join(
        f"<th colspan={len(list(members))} class=group>{escape(name)}</th>"
        for name, members in groupby(columns, key=lambda column: column.group)
    )
    titles = "".join(
        f"<th aria-sort=none><button data-column={index} data-sign={column.sign}>"
        f"{escape(column.title)}<span class=arrow>{column.arrow}</span></button></th>"
        for index, column in enumerate(columns, start=1)
    )
    run = "<th rowspan=2 aria-sort=none><button data-column=0 data-sign=0>run</button></th>"
    return f"<tr>{run}{groups}</tr><tr>{titles}</tr>"


def _row(index: int, run: Run, columns: Sequence[Column]) -> str:
    name = escape(run.name)
    link = f'<a href="#cases" data-run={index} title="its cases">{name}</a>'
    cells = "".join(_cell(column, column.cells[index], run.is_edited) for column in columns)
    return f'<tr><td data-value="{name}">{link}</td>{cells}</tr>'


def _cell(column: Column, cell: Cell, is_edited: bool) -> str:
    is_best = is_edited and cell.value == column.best
    star = "<span class=star>★</span>" if is_best else ""
    interval = f"<span class=interval>{escape(cell.interval)}</span>" if cell.interval else ""
    value = "" if math.isnan(cell.value) else repr(cell.value)
    return (
        f'<td{" class=best" if is_best else ""} data-label="{escape(column.label)}" '
        f'data-value="{value}"><span>{escape(cell.text)}{star}{interval}</span></td>'
    )


def _columns(comparison: Comparison) -> Iterator[Column]:
    runs, estimates = comparison.runs, comparison.estimates
    if any(run.is_sized for run in runs):
        yield _column(runs, "", "active edits", 0, map(_size, runs))
    for metric in comparison.metrics():
        group, _, title = metric.partition("/")
        found = [estimates[run.name].get(metric) for run in runs]
        cells = [_quality(estimate, len(comparison.case_ids)) for estimate in found]
        yield _column(runs, group, title, 1, cells)
    if scores := comparison.scores:
        yield _column(runs, "", "score", 1, [_score(scores.get(run.name)) for run in runs])
    for key, title in COST.items():
        if any(run.budget.get(key) for run in runs):
            yield _column(runs, "cost", title, -1, [_cost(run, key) for run in runs])


def _column(
    runs: Sequence[Run], group: str, title: str, sign: int, cells: Iterable[Cell]
) -> Column:
    """A column with the best value of the runs that edit, if they differ."""
    cells = list(cells)
    of_edits = [cell.value for cell, run in zip(cells, runs, strict=True) if run.is_edited]
    known = [sign * value for value in of_edits if not math.isnan(value)]
    best = sign * max(known) if sign and len(set(known)) > 1 else math.nan
    return Column(group, title, sign, cells, best)


def _size(run: Run) -> Cell:
    return Cell(run.active_edits, f"{run.active_edits:,}")


def _score(score: float | None) -> Cell:
    return Cell() if score is None else Cell(score, f"{100 * score:.1f}")


def _cost(run: Run, key: str) -> Cell:
    value = run.budget.get(key)
    if value is None or not run.is_edited:
        return Cell()
    return Cell(value, _size_text(value) if key == "bytes_per_edit" else budget_text(run, key))


def _size_text(size: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _quality(estimate: Estimate | None, total: int) -> Cell:
    """The mean, its deviation over seeds if there are several, and the interval without decimals.

    Where it is a mean over fewer than ``total`` cases, their number is added.
    """
    if estimate is None:
        return Cell()
    text = f"{100 * estimate.mean:z.1f}"
    if estimate.sd is not None:
        text += f" ± {100 * estimate.sd:.1f}"
    interval = "" if not estimate.n else f"{100 * estimate.low:z.0f}–{100 * estimate.high:z.0f}"
    if 0 < estimate.n < total:
        interval += f", n={estimate.n}"
    return Cell(estimate.mean, text, interval)
