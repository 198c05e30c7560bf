"""``corrigenda report --check true``: published numbers beside those of the runs, and whether they agree.

The numbers are in ``configs/published``, a file for each paper. A row names the experiment: model, dataset,
editor, schedule, and settings by their place in ``config.yaml``. It is compared with runs of the same editor; what
else differs is why the two cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corrigenda.pipeline.fit import CONFIGS
from corrigenda.pipeline.report.abilities import read_abilities
from corrigenda.pipeline.report.comparison import Comparison, Estimate
from corrigenda.pipeline.report.runs import Run
from corrigenda.pipeline.report.tables import ABSENT, Table
from corrigenda.pipeline.trust import read_yaml

FOLDER = CONFIGS / "published"
TOLERANCE = 3.0  # percentage points; published numbers differ by as much between implementations
NOTE = (
    "×100. A published number is a match if it is at most 3 points outside our 95 % interval. Numbers of another "
    "model, dataset or setting are not comparable."
)


@dataclass(frozen=True)
class Published:
    """An experiment of a paper: ``values`` by metric, ``tasks`` by task and number of edits, both ×100."""

    paper: str
    model: str
    dataset: str
    editor: str
    schedule: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def published_rows() -> list[Published]:
    """All rows of ``configs/published``."""
    rows = []
    for file in sorted(FOLDER.glob("*.yaml")):
        content = read_yaml(file)
        rows += [Published(content["paper"], **row) for row in content["rows"]]
    return rows


def published_table(comparison: Comparison, rows: Sequence[Published]) -> Table:
    """A line for every published number of an editor that a run has used."""
    lines = []
    for run in comparison.runs:
        papers = [paper for paper in rows if paper.editor == run.summary.get("editor")]
        config = _config(run) if papers else {}
        for paper in papers:
            differences = _differences(run, config, paper)
            for experiment, name, value, found in _pairs(comparison, run, paper):
                verdict = _verdict(value, found, differences)
                start = [run.name, paper.paper, experiment, name, f"{value:.1f}"]
                lines.append([*start, *_ours(found), verdict])
    header = ["run", "paper", "experiment", "number", "published", "ours", "interval", "verdict"]
    note = NOTE if lines else "No number of these editors is on record in configs/published."
    return Table("Published numbers", header, lines, note)


def _pairs(
    comparison: Comparison, run: Run, paper: Published
) -> Iterator[tuple[str, str, float, Estimate | None]]:
    """(experiment, number, published value, ours) for each number of a paper's experiment."""
    experiment = f"{paper.model}, {paper.dataset}, {paper.schedule}"
    for metric, value in paper.values.items():
        yield experiment, metric, value, comparison.estimates[run.name].get(metric)
    scores = read_abilities(run.path) if paper.tasks else {}
    for task, by_count in paper.tasks.items():
        for count, value in by_count.items():
            found = scores.get(task, {}).get(count)
            spread = 1.96 * found.error if found else math.nan
            ours = found and Estimate(found.value, found.value - spread, found.value + spread)
            yield experiment, f"{task} after {count} edits", value, ours


def _ours(found: Estimate | None) -> list[str]:
    if found is None:
        return [ABSENT, ABSENT]
    return [f"{100 * found.mean:.1f}", f"[{100 * found.low:z.1f}, {100 * found.high:z.1f}]"]


def _verdict(value: float, found: Estimate | None, differences: Sequence[str]) -> str:
    if differences:
        return f"not comparable: {', '.join(differences)}"
    if found is None:
        return "not comparable: not measured"
    low, high = (found.mean if math.isnan(end) else end for end in (found.low, found.high))
    is_near = 100 * low - TOLERANCE <= value <= 100 * high + TOLERANCE
    return "match" if is_near else "miss"


def _differences(run: Run, config: Mapping[str, Any], paper: Published) -> list[str]:
    """What the run does differently from the paper's experiment."""
    found = []
    for name in ("model", "dataset", "schedule"):
        ours = str(run.summary.get(name)).rpartition("/")[2].lower()
        if ours != getattr(paper, name).lower():
            found.append(f"{name} {run.summary.get(name)}")
    for place, value in paper.settings.items():
        if (ours_too := _at(config, place)) != value:
            found.append(f"{place.rpartition('.')[2]} {ours_too}")
    return found


def _config(run: Run) -> Mapping[str, Any]:
    file = run.path / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def _at(config: Any, place: str) -> Any:  # noqa: ANN401
    """The value at a dotted place; ``init_args`` between the names may be left out."""
    for name in place.split("."):
        if not isinstance(config, dict):
            return None
        config = {**config, **(config.get("init_args") or {})}.get(name)
    return config
