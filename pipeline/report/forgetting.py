"""Figures of streams of edits: abilities, retention, facts forgotten and weights over the number of edits.

Every seed, which is an order of the edits, is a line of its own: a mean over orders that collapse at different
times would look gradual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from corrigenda.modules.metrics import share_interval
from corrigenda.pipeline.report.comparison import Comparison
from corrigenda.pipeline.report.heat_maps import draw_matrix
from corrigenda.pipeline.report.streams import Stream, kept, kept_error, read_stream, streams
from corrigenda.pipeline.report.style import COLOURS, FAINT, MARKERS, STYLE, Colours, words

EFFICACY = "efficacy/exact"
MOST_COLUMNS = 4
MOST_LAYERS = 8  # lines of a panel


def abilities_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """A panel per task: scores over the number of edits, with a line per run and seed.

    Runs of one family that were scored at a single number of edits, such as ``memit@10`` and ``memit@100``, are
    joined: their line shows the effect of the batch size.
    """
    return _abilities(_of_runs(comparison), colours)


def retention_by_count_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Share of all edits that hold, and of facts forgotten, over the number of edits."""
    return _retention(_of_runs(comparison), colours)


def age_figure(comparison: Comparison, _colours: Colours) -> Figure | None:
    """Retention of edits by their age, as a heat map per run (the first seed)."""
    return _ages(_of_runs(comparison))


def norms_figure(comparison: Comparison, _colours: Colours) -> Figure | None:
    """Norms of the changes per edited weight over the number of edits, a panel per run (the first seed)."""
    return _norms(_of_runs(comparison))


def kept_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Efficacy against ability kept, a point with both intervals per run: edit methods and fine-tuning alike."""
    points = []
    for run in comparison.runs:
        estimate = comparison.estimates[run.name].get(EFFICACY)
        found = streams(run)
        shares = [share for one in found if math.isfinite(share := kept(one))]
        if estimate is not None and shares:
            errors = [kept_error(one) for one in found]
            error = max((e for e in errors if math.isfinite(e)), default=0.0)
            points.append((run.name, sum(shares) / len(shares), error, estimate))
    if not points:
        return None
    figure = Figure(figsize=(6.2, 3.8))
    axes = figure.subplots()
    for index, (name, share, error, (mean, low, high, *_)) in enumerate(points):
        style: Any = {"color": colours[name], "alpha": 0.6}
        axes.plot([100 * (share - error), 100 * (share + error)], [100 * mean] * 2, **style)
        axes.plot([100 * share] * 2, [100 * low, 100 * high], **style)
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(100 * share, 100 * mean, marker, color=colours[name], markersize=7, label=name)
    axes.axvline(100, color=FAINT, linestyle="--", linewidth=1)
    axes.set(xlabel="ability kept, % of the unedited model", ylabel=f"{words(EFFICACY)}, %")
    axes.set_ylim(-4, 104)
    figure.legend(loc="outside right center")
    return figure


def stream_pictures(folder: Path, name: str) -> dict[str, Figure]:
    """The figures of a single run, for W&B."""
    stream = read_stream(folder, name)
    found, colours = {name: [stream]}, {name: COLOURS[0]}
    with matplotlib.rc_context(STYLE):
        drawn = {
            "abilities": _abilities(found, colours),
            "retention": _retention(found, colours),
            "retention by age": _ages(found),
            "norms of changes": _norms(found),
        }
    return {title: figure for title, figure in drawn.items() if figure}


# ---------------------------------------------------------------------------- drawing

Found = Mapping[str, Sequence[Stream]]  # streams of every run, by its name


def _markers(found: Found) -> dict[str, str]:
    """A marker for each run, so that lines differ without their colours, too."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(found)}


def _of_runs(comparison: Comparison) -> Found:
    return {run.name: found for run in comparison.runs if (found := streams(run))}


def _abilities(found: Found, colours: Colours) -> Figure | None:
    lines = _task_lines(found)
    tasks = list(dict.fromkeys(task for task, *_ in lines))
    if not tasks:
        return None
    figure, panels = _grid(len(tasks))
    markers = _markers(found)
    for task, axes in zip(tasks, panels, strict=True):
        for of, name, label, scores in lines:
            if of == task:
                counts = sorted(scores)
                values = [100 * scores[count].value for count in counts]
                errors = [1.96 * 100 * scores[count].error for count in counts]
                bars = [0.0 if math.isnan(error) else error for error in errors]
                axes.errorbar(counts, values, bars, fmt=f"{markers[name]}-", color=colours[name], label=label,
                              markersize=3.5, linewidth=1.2, elinewidth=0.8, capsize=2)  # fmt: skip
        axes.set(title=words(task), xlabel="edits", ylim=(-4, 104))
        if any("@" in name for of, name, *_ in lines if of == task):  # sizes differ by factors
            axes.set_xscale("symlog", linthresh=10)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.margins(x=0.08)
    return _with_legend(figure, panels)


def _task_lines(found: Found) -> list[tuple[str, str, str, dict[int, Any]]]:
    """(task, run, label, scores by number of edits) of every line."""
    lines: list[tuple[str, str, str, dict[int, Any]]] = []
    joined: dict[tuple[str, str], tuple[str, dict[int, Any]]] = {}
    for name, of_run in found.items():
        for stream in of_run:
            for task, scores in (stream.abilities or {}).items():
                family = name.partition("@")[0]
                if "@" in name and len([count for count in scores if count]) == 1:
                    joined.setdefault((task, family), (name, {}))[1].update(scores)
                else:
                    lines.append((task, name, name, dict(scores)))
    for (task, family), (name, scores) in joined.items():
        lines.append((task, name, family, scores))
    return lines


def _retention(found: Found, colours: Colours) -> Figure | None:
    measured = {name: [one for one in of if one.counts] for name, of in found.items()}
    if not any(measured.values()):
        return None
    titles = ("edits that hold, %", "targets likelier than rivals, %", "facts forgotten, %")
    figure, panels = _grid(len(titles))
    markers = _markers(found)
    for axes, title, key in zip(
        panels, titles, ("retained", "preferred", "forgotten"), strict=True
    ):
        for name, of_run in measured.items():
            for stream in of_run:
                line = _share_line(axes, stream, getattr(stream, key), colours[name])
                line.set(marker=markers[name], label=name)
        axes.set(title=title, xlabel="edits", ylim=(-4, 104))
    return _with_legend(figure, panels)


def _share_line(axes: Axes, stream: Stream, values: Sequence[float], colour: str) -> Line2D:
    """A share of the edits over their number, with its 95 % interval as a band."""
    bands = [
        share_interval(value, count) for value, count in zip(values, stream.counts, strict=True)
    ]
    low, high = zip(*bands, strict=True)
    axes.fill_between(
        stream.counts, [100 * v for v in low], [100 * v for v in high],
        color=colour, alpha=0.12, linewidth=0,
    )  # fmt: skip
    (line,) = axes.plot(stream.counts, [100 * v for v in values], color=colour, markersize=3.5)
    return line


def _ages(found: Found) -> Figure | None:
    first = {name: of[0] for name, of in found.items() if of[0].counts}
    if not first:
        return None
    columns = min(len(first), MOST_COLUMNS)
    rows = -(-len(first) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.9, 2.6 * rows + 0.3))
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    image = None
    for axes, (name, stream) in zip(panels, first.items(), strict=False):
        image = draw_matrix(axes, [[100 * value for value in row] for row in stream.by_age])
        labels = [str(count) for count in stream.counts]
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set(title=name, xlabel="made until", ylabel="measured after edits")
    for unused in panels[len(first) :]:
        unused.remove()
    assert image is not None
    figure.colorbar(image, ax=panels[: len(first)], label="edits that hold, %", aspect=30)
    return figure


def _norms(found: Found) -> Figure | None:
    first = {name: of[0] for name, of in found.items() if of[0].norms}
    if not first:
        return None
    figure, panels = _grid(len(first), shared=True)
    for axes, (name, stream) in zip(panels, first.items(), strict=True):
        norms = sorted((stream.norms or {}).items(), key=lambda item: -item[1][-1])[:MOST_LAYERS]
        for index, (parameter, values) in enumerate(norms):
            axes.plot(
                stream.operations, values, color=COLOURS[index % len(COLOURS)], label=parameter
            )
        detected = (stream.detected or {}).get("T_dist")
        if detected is not None:
            axes.axvline(detected, color=FAINT, linestyle=":", linewidth=1.2)
        axes.set(title=name, xlabel="edits", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(fontsize=6.5)
    panels[0].set_ylabel("norm of all changes")
    return figure


def _grid(count: int, shared: bool = False) -> tuple[Figure, list[Axes]]:
    columns = min(count, MOST_COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.6 + 2.75 * columns, 0.4 + 2.6 * rows))
    every = figure.subplots(rows, columns, squeeze=False, sharey=shared).flatten().tolist()
    for unused in every[count:]:
        unused.remove()
    return figure, every[:count]


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """One legend for all panels, with an entry per label."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    return figure
