"""Figures over the number of edits so far, the number of active edits, and training steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from corrigenda.modules.metrics import trailing_mean
from corrigenda.pipeline.report.comparison import CRITERIA, PANELS, Comparison
from corrigenda.pipeline.report.logs import Training, curve
from corrigenda.pipeline.report.style import COLOURS, FAINT, STYLE, Colours, words

TRAIL = 10  # edits in a trailing mean, because single ones are 0 or 1
SMOOTH = 5  # steps in a trailing mean, because batches vary
LOSSES = ("train/loss", "train/edit_loss", "train/kl")
PERPLEXITY = "text/perplexity"


def retention_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Criteria, and perplexity if it was logged, over the number of edits so far."""
    runs = comparison.repeated_runs
    metrics = [found[0] for column in CRITERIA if (found := comparison.metrics(column))]
    logged = {run.name: run.logged(f"val/{PERPLEXITY}", over="edit/num_edits") for run in runs}
    perplexity = [PERPLEXITY] if any(logged.values()) else []
    if not runs or not metrics:
        return None
    figure, panels = _panels([*metrics, *perplexity], len(metrics) + len(perplexity))
    for run in runs:
        style: Any = {"color": colours[run.name], "markersize": 3.5, "label": run.name}
        for metric in metrics:
            retained = comparison.curve(run, metric, "val")
            current = comparison.curve(run, metric, "current")
            smooth = trailing_mean(_percent(current.values()), TRAIL)
            panels[metric].plot(list(retained), _percent(retained.values()), "o-", **style)
            panels[metric].plot(list(current), smooth, ":", color=colours[run.name])
        if values := logged[run.name]:
            panels[PERPLEXITY].plot(list(values), list(values.values()), "o-", **style)
    return _finish(figure, panels, "edits")


def size_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Criteria and perplexity over the number of active edits, with a line per family of runs."""
    sized = [run for run in comparison.runs if run.is_sized and run.active_edits]
    sized.sort(key=lambda run: run.active_edits)
    sizes = {run.active_edits for run in sized}
    exact, preference = (comparison.metrics(line) for line in PANELS)
    metrics = [*exact, *comparison.metrics([PERPLEXITY]), *preference]
    if len(sizes) < 2 or not metrics:
        return None
    figure, panels = _panels(metrics, max(len(metrics) - len(preference), len(preference)))
    for metric, axes in panels.items():
        scale = 1 if metric == PERPLEXITY else 100
        values = {
            name: [scale * value for value in of_run[metric][:3]]
            for name, of_run in comparison.estimates.items()
            if metric in of_run
        }
        for family in dict.fromkeys(run.family for run in sized if run.name in values):
            runs = [run for run in sized if run.family == family and run.name in values]
            size, colour = [run.active_edits for run in runs], colours[runs[0].name]
            mean, low, high = zip(*(values[run.name] for run in runs), strict=True)
            axes.plot(size, mean, "o-", color=colour, markersize=3.5, label=family)
            axes.fill_between(size, low, high, color=colour, alpha=0.12, linewidth=0)
        for run in comparison.runs:
            if not run.is_edited and run.name in values:
                level = values[run.name][0]
                axes.axhline(level, color=FAINT, linestyle="--", label=run.name)
        axes.set_xscale("log")
        axes.set_xticks(_ticks(sizes), [f"{size:,}" for size in _ticks(sizes)])
        axes.xaxis.set_minor_locator(NullLocator())
    return _finish(figure, panels, "active edits")


def _ticks(sizes: Iterable[int]) -> list[int]:
    """The largest size, and those of the others whose labels do not overlap on a logarithmic axis."""
    ticks: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not ticks or size <= ticks[-1] / 3:
            ticks.append(size)
    return ticks


def learning_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """Losses and validation criteria over training steps, with a line per run and seed."""
    return _learning(comparison.trainings, colours)


def learning_picture(training: Training) -> Figure | None:
    """The learning curves of a single run."""
    with matplotlib.rc_context(STYLE):
        return _learning([training], {training.name: COLOURS[0]})


def _learning(trainings: Sequence[Training], colours: Colours) -> Figure | None:
    logged = {metric for training in trainings for row in training.log for metric in row}
    if not logged:
        return None
    losses = [metric for metric in LOSSES if metric in logged]
    columns = ([f"val/{metric}" for metric in column] for column in (*CRITERIA, ("scope/auc",)))
    validated = [found[0] for column in columns if (found := [m for m in column if m in logged])]
    count = len(losses) + len(validated)
    figure, panels = _panels([*losses, *validated], count if count <= 4 else 3)
    for training in trainings:
        style: Any = {"color": colours[training.name], "label": training.name}
        for metric in losses:
            values = curve(training.log, metric)
            steps, smooth = _done(values), trailing_mean(list(values.values()), SMOOTH)
            panels[metric].plot(steps, list(values.values()), color=style["color"], alpha=0.3)
            panels[metric].plot(steps, smooth, **style)
        for metric in validated:
            values = curve(training.log, metric)
            steps, percent = _done(values), _percent(values.values())
            panels[metric].plot(steps, percent, "o-", markersize=3.5, **style)
            if seen := [i for i, step in enumerate(steps) if step <= (training.best or 0)]:
                star = steps[seen[-1]], percent[seen[-1]]
                panels[metric].plot(*star, "*", color=style["color"], markersize=13)
    return _finish(figure, panels, "steps")


def _done(values: Mapping[float, float]) -> list[float]:
    """Numbers of completed steps; the Trainer logs steps from 0."""
    return [step + 1 for step in values]


def _percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def _panels(metrics: Sequence[str], columns: int) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel per metric."""
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(1.4 + 2.75 * columns, 0.4 + 2.6 * rows))
    every = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in every[len(metrics) :]:
        unused.remove()
    return figure, dict(zip(metrics, every, strict=False))


def _finish(figure: Figure, panels: Mapping[str, Axes], across: str) -> Figure:
    """Titles, limits and one legend for all panels."""
    entries: dict[str, Artist] = {}
    for metric, axes in panels.items():
        axes.set(title=words(metric), xlabel=across)
        if metric not in (*LOSSES, PERPLEXITY):
            axes.set(ylim=(-4, 104))
        elif _spread(axes) > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    return figure


def _spread(axes: Axes) -> float:
    """Ratio of the largest to the smallest value drawn; 0 if any is not positive."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    return values.max() / values.min() if values.size and values.min() > 0 else 0.0
