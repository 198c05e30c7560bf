"""The matrices of a sequence of tasks as heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from corrigenda.pipeline.report.comparison import Comparison
from corrigenda.pipeline.report.sequences import KNOWN
from corrigenda.pipeline.report.style import Colours, words

MOST_NUMBERED = 6  # tasks up to which every cell says its number


def task_figure(comparison: Comparison, colours: Colours) -> Figure | None:
    """A row of heat maps per run, a column per criterion; all on one scale from 0 to 100."""
    found = {name: matrices for name, matrices in comparison.matrices.items() if matrices}
    metrics = [name for name in KNOWN if any(name in matrices for matrices in found.values())]
    if not metrics:
        return None
    figure = Figure(figsize=(2.4 * len(metrics) + 1.2, 1.9 * len(found) + 0.5))
    grid = figure.subplots(len(found), len(metrics), squeeze=False)
    image = None
    for line, (run, matrices) in zip(grid, found.items(), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            title = words(metric) if axes in grid[0] else ""
            axes.set_title(title)
            if metric not in matrices:
                axes.set_axis_off()
                continue
            image = draw_matrix(axes, (100 * matrices[metric]).tolist())
        line[0].set_ylabel(run)
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=min(1.0, 3 / len(found)), aspect=30)
    return figure


def draw_matrix(axes: Axes, percent_ET: Sequence[Sequence[float]]) -> AxesImage:
    """Draws E rows of T numbers from 0 to 100; nothing where one is NaN."""
    evaluations, tasks = len(percent_ET), len(percent_ET[0])
    image = axes.imshow(percent_ET, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(tasks), [str(task + 1) for task in range(tasks)], fontsize=7)
    axes.set_yticks(range(evaluations), [str(row) for row in range(evaluations)], fontsize=7)
    axes.tick_params(length=0)
    if tasks <= MOST_NUMBERED:
        for row in range(evaluations):
            for task in range(tasks):
                value = percent_ET[row][task]
                if math.isnan(value):
                    continue
                ink = "white" if value < 55 else "black"
                axes.text(
                    task, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink
                )
    return image
