"""The tables of a report, as CSV, as Markdown and for the terminal."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import TextIO

from corrigenda.pipeline.report.comparison import HEADLINE, Comparison, Estimate
from corrigenda.pipeline.report.runs import Run
from corrigenda.pipeline.report.sequences import Interval
from corrigenda.pipeline.report.streams import Stream, read_stream

DETECTORS = ("T_edit", "T_forget", "T_down", "T_dist", "inflection")
MAX_CURVE_ROWS = 20
ABSENT = "–"


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def all_tables(comparison: Comparison, extra: Sequence[Table] = ()) -> list[Table]:
    """All tables that have content: the headline first, all metrics last, and ``extra`` before it."""
    tables = [headline_table(comparison)]
    tables += [_difference_table(comparison)] if comparison.differences else []
    tables += _free_tables(comparison)
    tables += _task_tables(comparison) + _collapse_tables(comparison)
    tables += [_budget_table(comparison), _run_table(comparison)]
    tables += [_curve_table(comparison)] if comparison.repeated_runs else []
    return [*tables, *extra, _metric_table(comparison)]


def _collapse_tables(comparison: Comparison) -> list[Table]:
    """What streams have forgotten and where they collapse: a row per order of edits, and the medians."""
    rows = []
    for run in comparison.runs:
        orders = [one for one in run.seeds or [run] if read_stream(one.path, run.name).counts]
        found = [read_stream(one.path, run.name) for one in orders]
        for one, stream in zip(orders, found, strict=True):
            accepted = one.summary.get("accepted")
            shares = [stream.retained[-1], stream.forgotten[-1]]
            shares += [math.nan if accepted is None else float(accepted)]
            cells = [ABSENT if math.isnan(share) else f"{100 * share:.1f}" for share in shares]
            fired = [_fired(name, stream) for name in DETECTORS]
            rows.append([one.name, f"{stream.counts[-1]:,}", *cells, *fired])
        if len(found) > 1:
            medians = [_median_fired(found, name) for name in DETECTORS]
            rows.append([f"{run.name}, median", "", "", "", "", *medians])
    header = ["run", "edits", "hold", "forgotten", "accepted", *DETECTORS]
    note = (
        "hold, forgotten, accepted: ×100. T: number of edits at which a detector has fired first. T_edit: new "
        "edits fail, T_forget: many facts are forgotten at once, T_down: a task is lost, T_dist: a weight jumps. "
        "inflection: where retention bends down. Medians are over the orders in which it has fired."
    )
    return [Table("Forgetting and collapse", header, rows, note)] if rows else []


def _fired(name: str, stream: Stream) -> str:
    count = (stream.detected or {}).get(name)
    return ABSENT if count is None else f"{count:,}"


def _median_fired(found: Sequence[Stream], name: str) -> str:
    counts = [n for one in found if (n := (one.detected or {}).get(name)) is not None]
    return f"{median(counts):g} ({len(counts)} of {len(found)})" if counts else ABSENT


def headline_table(comparison: Comparison, interval: str = "z.1f") -> Table:
    """One row per run; a column for each headline metric that any run has, and the score."""
    metrics, scores = comparison.metrics(), comparison.scores
    sized = any(run.is_sized for run in comparison.runs)
    rows = []
    for run in comparison.runs:
        of_run = comparison.estimates[run.name]
        cells = [
            _percent(of_run.get(metric), interval=interval, total=len(comparison.case_ids))
            for metric in metrics
        ]
        if scores:
            cells.append(f"{100 * scores[run.name]:.1f}" if run.name in scores else ABSENT)
        rows.append([run.name, *([f"{run.active_edits:,}"] if sized else []), *cells])
    header = _header("run", metrics) + (["score"] if scores else [])
    if sized:
        header.insert(1, "active edits")
    over_seeds = " ± standard deviation over seeds" if comparison.num_seeds > 1 else ""
    note = f"×100, mean over {len(comparison.case_ids)} cases{over_seeds} with 95 % interval."
    if any("(n=" in cell for row in rows for cell in row):
        note += " n: over so many of them, which have such probes."
    return Table("Headline", header, rows, note)


def _difference_table(comparison: Comparison) -> Table:
    metrics = comparison.metrics()
    rows = [
        [name, *(_percent(of_run.get(metric), "+z.1f", "+z.1f") for metric in metrics)]
        for name, of_run in comparison.differences.items()
    ]
    note = "×100, run minus baseline, paired by case. A difference is significant if its interval excludes 0."
    return Table(f"Difference to {comparison.baseline}", _header("run", metrics), rows, note)


FREE = {"exact": "exact, teacher-forced", "wild_exact": "exact, free", "wild_contains": "contained, free",
        "judged": "judged correct, free"}  # fmt: skip


def _free_tables(comparison: Comparison) -> list[Table]:
    """Teacher-forced answers beside freely generated ones of the same runs, if there are any."""
    criteria = [
        name.partition("/")[0] for name in comparison.measured if name.endswith("/wild_exact")
    ]
    kinds = [k for k in FREE if comparison.metrics(f"{criterion}/{k}" for criterion in criteria)]
    rows = [
        [run.name, criterion, *(_percent(of_run.get(f"{criterion}/{kind}")) for kind in kinds)]
        for run in comparison.runs
        for criterion in criteria
        if f"{criterion}/wild_exact" in (of_run := comparison.estimates[run.name])
    ]
    note = "×100. Free answers are generated up to a line break, the end token or --model.generate_tokens."
    header = ["run", "criterion", *(FREE[kind] for kind in kinds)]
    return [Table("Teacher-forced and free answers", header, rows, note)] if rows else []


def _task_tables(comparison: Comparison) -> list[Table]:
    """What runs that learned a sequence of tasks know at its end, and what they forgot on the way."""
    if not comparison.tasks:
        return []
    columns = list(dict.fromkeys(name for found in comparison.tasks.values() for name in found))
    note = (
        "×100, with 95 % intervals over resampled cases. Each criterion: the mean over all tasks after the last. "
        "Of efficacy exact also: its mean over the tasks learned so far, averaged over the sequence "
        "(incremental); what earlier tasks lost (backward transfer, forgetting); what later ones gained before "
        "they were learned (forward transfer)."
    )
    tables = [_interval_table("Tasks", columns, comparison.tasks, "z.1f", note)]
    if comparison.task_differences:
        title = f"Tasks: difference to {comparison.baseline}"
        note = "×100, run minus baseline on the same resampled cases."
        tables.append(_interval_table(title, columns, comparison.task_differences, "+z.1f", note))
    return tables


def _interval_table(
    title: str,
    columns: Sequence[str],
    found: Mapping[str, Mapping[str, Interval]],
    style: str,
    note: str,
) -> Table:
    def cell(interval: Interval | None) -> str:
        if interval is None:
            return ABSENT
        value, low, high = (f"{100 * number:{style}}" for number in interval)
        return f"{value} [{low}, {high}]"

    rows = [
        [name, *(cell(of_run.get(column)) for column in columns)] for name, of_run in found.items()
    ]
    return Table(title, ["run", *columns], rows, note)


def _header(first: str, metrics: Sequence[str]) -> list[str]:
    return [first, *(metric.replace("/", " ") for metric in metrics)]


def _percent(
    estimate: Estimate | None, mean: str = "z.1f", interval: str = "z.1f", total: int = 0
) -> str:
    """An estimate ×100, with format strings for the mean and for the interval's ends ('' for no interval).

    Where it is a mean over fewer than ``total`` cases, their number is added.
    """
    if estimate is None:
        return ABSENT
    text = f"{100 * estimate.mean:{mean}}"
    if estimate.sd is not None:
        text += f" ± {100 * estimate.sd:.1f}"
    if interval:
        text += f" [{100 * estimate.low:{interval}}, {100 * estimate.high:{interval}}]"
    return text + (f" (n={estimate.n})" if 0 < estimate.n < total else "")


def _budget_table(comparison: Comparison) -> Table:
    header = ["run", *(title for title, _ in BUDGET.values())]
    rows = [[run.name, *(budget_text(run, key) for key in BUDGET)] for run in comparison.runs]
    return Table("Budget", header, rows, "The cost of an edit, as measured in each run.")


def budget_text(run: Run, key: str) -> str:
    value = run.budget.get(key)
    return ABSENT if value is None else BUDGET[key][1](value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


BUDGET: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("seconds", "{:.3g}".format),
    "seconds_per_edit": ("seconds per edit", "{:.3g}".format),
    "gradient_steps": ("gradient steps", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "peak_gib": ("peak memory (GiB)", "{:.2f}".format),
    "parameters_touched": ("parameters touched", "{:,.0f}".format),
    "bytes_per_edit": ("bytes per edit", "{:,.0f}".format),
    "bytes_kept": ("bytes kept", "{:,.0f}".format),
    "query_overhead": ("time per query (unedited = 1)", "{:.2f}".format),
    "training_seconds": ("training time", _duration),
}


def _run_table(comparison: Comparison) -> Table:
    rows = []
    for run in comparison.runs:
        stated = [str(run.summary.get(key) or ABSENT) for key in ("model", "dataset", "schedule")]
        num_edits = run.budget.get("num_edits")
        edits = ABSENT if num_edits is None else f"{num_edits:,.0f}"
        editor = run.summary.get("editor") or "none"
        seeds = [ABSENT if one.seed is None else str(one.seed) for one in run.seeds or [run]]
        rows.append([run.name, editor, *stated, edits, str(len(run.last)), ", ".join(seeds)])
    header = ["run", "editor", "model", "dataset", "schedule", "edits", "cases scored", "seed"]
    return Table("Runs", header, rows)


def _curve_table(comparison: Comparison) -> Table:
    """Repeated evaluations, thinned to a readable number that includes the last one."""
    metrics = comparison.metrics()
    rows = []
    for run in comparison.repeated_runs:
        curves = [comparison.curve(run, metric, "val") for metric in metrics]
        points = sorted({num_edits for curve in curves for num_edits in curve})
        step = -(-len(points) // MAX_CURVE_ROWS)
        for num_edits in points[::-1][::step][::-1]:
            means = [curve.get(num_edits) for curve in curves]
            cells = [ABSENT if mean is None else f"{100 * mean:.1f}" for mean in means]
            rows.append([run.name, str(num_edits), *cells])
    header = ["run", *_header("edits so far", metrics)]
    return Table("Retention", header, rows, "×100, over the cases edited up to each evaluation.")


def _metric_table(comparison: Comparison) -> Table:
    """Every metric of every run, not scaled."""
    rows = []
    for metric in comparison.measured:
        for run in comparison.runs:
            estimate = comparison.estimates[run.name].get(metric)
            if estimate is None:
                continue
            mean, low, high, num_cases, sd = estimate
            spread = ABSENT if sd is None else f"{sd:.4g}"
            cells = [f"[{low:.4g}, {high:.4g}]", str(num_cases)] if num_cases else [ABSENT, ABSENT]
            rows.append([metric, run.name, f"{mean:.4g}", spread, *cells, run.protocol(metric)])
    note = "Not scaled. Rows without n are values of the whole run, over all of its cases."
    header = ["metric", "run", "mean", "sd over seeds", "95 % interval", "n", "protocol"]
    return Table("All metrics", header, rows, note)


EXPLANATIONS = {
    "efficacy": "efficacy: the edited prompt itself. Higher is better.",
    "generality": "generality: paraphrases of the edited prompt. Higher is better.",
    "locality": "locality: related facts that must not change. Higher is better.",
    "unrelated": "unrelated: facts with other subjects and relations, which must not change either.",
    "exact": "exact: every target token is the most likely one, given the correct tokens before it.",
    "preference": "preference: the new answer is more likely than the old one "
    "(for locality: the true answer is more likely than the edit's).",
    "agreement": "agreement: the edited model predicts the same tokens as the unedited model.",
}


def legend(comparison: Comparison) -> list[str]:
    """Explanations of the numbers that are shown."""
    shown = {part for metric in comparison.metrics() for part in metric.split("/")}
    lines = [text for word, text in EXPLANATIONS.items() if word in shown]
    if comparison.scores:
        lines.append("score: harmonic mean of the three preferences.")
    lines.append(
        "[low, high]: 95 % bootstrap interval over the cases. It reflects the choice of cases, "
        "not the seed or the order of edits."
    )
    if comparison.num_seeds > 1:
        lines.append(
            "±: standard deviation over seeds, after the mean over seeds. The interval resamples the "
            "cases' means over seeds."
        )
    points = [
        estimate.n
        for of_run in comparison.estimates.values()
        for metric, estimate in of_run.items()
        if metric in HEADLINE and estimate.low == estimate.high
    ]
    if points:
        alike = min(points)
        lines.append(
            "An interval of a single point means that all cases agree, not that the value is certain: with "
            f"{alike} cases, up to {100 * (1 - 0.05 ** (1 / alike)):.0f} % of other cases may still differ."
        )
    if any(run.is_sized for run in comparison.runs):
        lines.append(
            "active edits: how many edits were active during the evaluation. The schedules (each, batch, "
            "epoch) are in the table of all metrics."
        )
    if comparison.baseline is None:
        lines.append("No differences are shown because no baseline was given (--baseline).")
    return lines


def as_csv(comparison: Comparison) -> str:
    """One line per run and metric; n and the interval are empty for values of the whole run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["run", "editor", "metric", "protocol", "n", "mean", "ci_low", "ci_high"]
    writer.writerow([*header, "seeds", "sd_over_seeds"])
    for run in comparison.runs:
        estimates = comparison.estimates[run.name]
        for metric in sorted(estimates):
            mean, low, high, num_cases, sd = estimates[metric]
            start = [run.name, run.summary.get("editor"), metric, run.protocol(metric)]
            cells = [num_cases, mean, low, high] if num_cases else ["", mean, "", ""]
            writer.writerow([*start, *cells, len(run.seeds) or 1, sd])
    return text.getvalue()


def as_markdown(comparison: Comparison, extra: Sequence[Table] = ()) -> str:
    headline, *others = all_tables(comparison, extra)
    notes = map(_as_plain_text, comparison.notes)
    parts = ["# Report", counts(comparison), *notes, _markdown_table(headline)]
    parts.append("\n".join(f"- {_as_plain_text(line)}" for line in legend(comparison)))
    parts += [_markdown_table(table) for table in others]
    return "\n\n".join(parts) + "\n"


def counts(comparison: Comparison) -> str:
    runs, cases = len(comparison.runs), len(comparison.case_ids)
    return f"{runs} run{'s' * (runs != 1)}, {cases} case{'s' * (cases != 1)}."


def _markdown_table(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(map(_as_plain_text, cells))} |"

    rule = line(["---", *["---:"] * (len(table.header) - 1)])
    lines = "\n".join([line(table.header), rule, *map(line, table.rows)])
    title = f"## {_as_plain_text(table.title)}"
    return "\n\n".join(part for part in (title, table.note, lines) if part)


def _as_plain_text(text: str) -> str:
    """Escapes text for a Markdown table cell: no HTML, code, links, images, cell or line breaks."""
    text = " ".join(escape(text, quote=False).split())
    for characters in ("|", "`", "\\", "]("):
        text = text.replace(characters, "".join(f"&#{ord(c)};" for c in characters))
    return text


def print_headline(comparison: Comparison, stream: TextIO, width: int | None = None) -> None:
    """Prints the headline as aligned text; intervals are rounded or left out in narrow terminals."""
    over_seeds = " and ± over seeds" if comparison.num_seeds > 1 else ""
    width = width or shutil.get_terminal_size((120, 24)).columns
    intervals = {
        "z.1f": "95 % intervals over the cases",
        "z.0f": "95 % intervals over the cases, rounded",
        "": "intervals are in the report",
    }
    for interval, about in intervals.items():
        lines = _aligned(headline_table(comparison, interval))
        note = f"×100, means over {len(comparison.case_ids)} cases{over_seeds}; {about}."
        if max(map(len, lines)) <= width:
            break
    stream.write("\n".join(["", *lines, "", note, *comparison.notes]) + "\n")


def _aligned(table: Table) -> list[str]:
    """Lines of a table: one header word per line, the first column left-aligned, numbers right-aligned."""
    words = [cell.split() for cell in table.header]
    height = max(map(len, words))
    headers = [[""] * (height - len(cell)) + cell for cell in words]
    lines = [*zip(*headers, strict=True), *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *numbers in lines:
        right = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        texts.append("  ".join([f"{first:<{widths[0]}}", *right]).rstrip())
    return [*texts[:height], "─" * max(map(len, texts)), *texts[height:]]
