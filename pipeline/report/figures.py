"""The figures of a report: as SVG elements of its page, and as files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corrigenda.modules.files import replacing
from corrigenda.pipeline.report.comparison import PANELS, Comparison, Estimate
from corrigenda.pipeline.report.curves import (
    SMOOTH,
    TRAIL,
    learning_figure,
    retention_figure,
    size_figure,
)
from corrigenda.pipeline.report.forgetting import (
    abilities_figure,
    age_figure,
    kept_figure,
    norms_figure,
    retention_by_count_figure,
)
from corrigenda.pipeline.report.heat_maps import task_figure
from corrigenda.pipeline.report.style import INK, MARKERS, STYLE, Colours, palette, words
from corrigenda.pipeline.report.tables import ABSENT, BUDGET, budget_text

FILES: dict[str, Any] = {  # kinds of picture files, and how they are written
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"dpi": 200, "transparent": False, "facecolor": "white"},
}
MISSING = Estimate(math.nan)  # draws nothing


def pictures(comparison: Comparison) -> list[tuple[str, str]]:
    """(caption, SVG) of every figure that these runs have data for."""
    return [
        (caption, _as_svg(figure, prefix=f"f{index}"))
        for index, (_, caption, figure) in enumerate(drawings(comparison))
    ]


def write_pictures(comparison: Comparison, folder: Path) -> None:
    """Writes every figure into the folder, as SVG and as PNG (white background, 200 dots per inch)."""
    for name, _, figure in drawings(comparison):
        for kind, more in FILES.items():
            with replacing(folder / f"{name}.{kind}") as part:
                figure.savefig(part, format=kind, **more)


def drawings(comparison: Comparison) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of every figure that these runs have data for; save one before the next is drawn."""
    makers = {
        _headline_figure: "Mean and 95 % interval over the cases.",
        _trade_off_figure: "Up and right is better: paraphrases follow the edit, other facts stay unchanged.",
        _budget_figure: "The cost of an edit, as measured in each run.",
        retention_figure: "Solid: all cases edited so far. "
        f"Dotted: the latest edits, trailing mean over {TRAIL}.",
        task_figure: "Rows: before the first task and after each. Columns: the tasks. Below the diagonal "
        "are the tasks learned so far, above it those to come.",
        size_figure: "The same cases with an increasing number of active edits. "
        "Bands: 95 % intervals over the cases.",
        abilities_figure: "General abilities: scores of tasks and their 95 % intervals.",
        retention_by_count_figure: "All edits made so far, a line per order of edits; bands: 95 % intervals. "
        "A fact forgotten once stays counted, also if it is recalled later.",
        age_figure: "Edits that hold, by when they were made (columns) and when they were measured (rows).",
        norms_figure: "How far edited weights have moved, as the norm of all changes; dotted: a jump (T_dist).",
        kept_figure: "Up and right is better: edits hold, and tasks are answered as before.",
        learning_figure: "Training. Losses: every logged step (faint) and the trailing mean over "
        f"{SMOOTH}. Criteria: on the validation cases; a star marks the best checkpoint.",
    }
    names = [run.name for run in comparison.runs] + [one.name for one in comparison.trainings]
    colours = palette(names, grey=comparison.baseline)
    with matplotlib.rc_context(STYLE):
        for make, caption in makers.items():
            if figure := make(comparison, colours):
                yield make.__name__.strip("_").removesuffix("_figure"), caption, figure


def _headline_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """One panel per headline metric, with a bar per run."""
    grid = [line for line in PANELS if comparison.metrics(line)]
    if not grid:
        return None
    figure = Figure(figsize=(9.6, len(grid) * (0.75 + 0.27 * len(comparison.runs))))
    panels = figure.subplots(len(grid), 3, squeeze=False, sharex=True, sharey=True)
    for axes, metric in zip(panels.flat, sum(grid, ()), strict=True):
        axes.set(title=words(metric), xlim=(0, 122), xticks=range(0, 101, 25))
        bars = []
        for position, run in enumerate(comparison.runs):
            mean, low, high, *_ = comparison.estimates[run.name].get(metric, MISSING)
            axes.plot([100 * low, 100 * high], [position] * 2, color=INK, linewidth=1.2)
            if math.isnan(mean):
                bars.append((0.0, 2.0, ABSENT))
            else:
                bars.append((100 * mean, 100 * max(mean, high) + 2, f"{100 * mean:.1f}"))
        _draw_bars(axes, comparison, colours, bars)
    return figure


def _draw_bars(
    axes: Axes,
    comparison: Comparison,
    colours: Colours,
    bars: Sequence[tuple[float, float, str]],
) -> None:
    """Draws a bar per run, given its length, the position of its label and the label."""
    names = [run.name for run in comparison.runs]
    lengths, ends, texts = zip(*bars, strict=True)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="both", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)
    filled = [colours[name] for name in names]
    axes.barh(range(len(names)), lengths, height=0.66, color=filled, alpha=0.85)
    for position, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.text(end, position, text, va="center", fontsize=9)


def _trade_off_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Generality against locality, with a point and both intervals per run."""
    pairs = [line[1:] for line in PANELS if len(comparison.metrics(line[1:])) == 2]
    if not pairs:
        return None
    figure = Figure(figsize=(2.6 + 3.5 * len(pairs), 3.6))
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (across, up) in zip(panels, pairs, strict=True):
        axes.set(xlabel=words(across), ylabel=words(up))
        axes.set(xlim=(-4, 104), ylim=(-4, 104), aspect="equal")
        for index, run in enumerate(comparison.runs):
            colour = colours[run.name]
            of_run = comparison.estimates[run.name]
            x, y = of_run.get(across, MISSING), of_run.get(up, MISSING)
            marker = MARKERS[index % len(MARKERS)]
            axes.plot([100 * x.low, 100 * x.high], [100 * y.mean] * 2, color=colour, alpha=0.6)
            axes.plot([100 * x.mean] * 2, [100 * y.low, 100 * y.high], color=colour, alpha=0.6)
            point = 100 * x.mean, 100 * y.mean
            axes.plot(*point, marker, color=colour, markersize=7, label=run.name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _budget_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """One panel per budget column that any run has, with a bar per run."""
    runs = comparison.runs
    keys = [key for key in BUDGET if any(run.budget.get(key) for run in runs)]
    if not keys:
        return None
    figure = Figure(figsize=(1 + 2.15 * len(keys), 0.75 + 0.27 * len(runs)))
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for axes, key in zip(panels, keys, strict=True):
        values = [run.budget.get(key) or 0 for run in runs]
        largest = max(values)
        axes.set(title=BUDGET[key][0], xlim=(0, 1.6 * largest), xticks=[])
        ends = [value + 0.03 * largest for value in values]
        texts = [budget_text(run, key) for run in runs]
        _draw_bars(axes, comparison, colours, list(zip(values, ends, texts, strict=True)))
    return figure


def _as_svg(figure: Figure, prefix: str) -> str:
    """An SVG element to embed in HTML: no XML header, no namespaces, ids with a prefix."""
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
