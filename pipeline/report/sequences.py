"""Runs that learned a sequence of tasks: ``tasks.json`` in, accuracy, transfer and forgetting out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from corrigenda.modules.metrics import continual
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.records import parse
from corrigenda.pipeline.report.runs import Run

FILE = "tasks.json"
RESAMPLES = 2000
MAIN = "efficacy/exact"  # the metric of which transfer and forgetting are reported
KNOWN = (MAIN, "generality/exact", "locality/agreement", "unrelated/agreement")


class Interval(NamedTuple):
    """A number and the 95 % interval of it over resampled cases."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskRun:
    """One run's values of every case at every evaluation: E evaluations, T tasks, N cases.

    Attributes:
        sizes: cases per task, in the order of the cases.
        learned: tasks learned before each evaluation, E numbers.
        values: metric to [E, N]; NaN where a case has no such value.
    """

    sizes: Sequence[int]
    learned: Sequence[int]
    values: Mapping[str, Tensor]

    @property
    def is_sequence(self) -> bool:
        """Whether every task was followed by an evaluation; joint training has only one."""
        return list(self.learned) == list(range(len(self.sizes) + 1))

    def matrix(self, metric: str, weight_SN: Tensor | None = None) -> Tensor:
        """[S, E, T]: means over the cases of each task, weighted; of all cases alike, S is 1."""
        value_EN = self.values[metric]
        if weight_SN is None:
            weight_SN = torch.ones(1, value_EN.shape[1], dtype=torch.float64)
        present_EN = value_EN.isfinite()
        parts = []
        for cases in torch.arange(value_EN.shape[1]).split(list(self.sizes)):
            weight_Sn, there_En = weight_SN[:, cases], present_EN[:, cases].double()
            total_SE = weight_Sn @ value_EN[:, cases].nan_to_num(0.0, 0.0, 0.0).T
            parts.append(total_SE / (weight_Sn @ there_En.T))
        return torch.stack(parts, dim=-1)

    def resampled(self, seed: int) -> Tensor:
        """weight_SN: how often each case is drawn, with replacement and within its task."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for size in self.sizes:
            drawn_Sn = torch.randint(size, (RESAMPLES, size), generator=generator)
            counts_Sn = torch.zeros(RESAMPLES, size, dtype=torch.float64)
            parts.append(counts_Sn.scatter_add_(1, drawn_Sn, torch.ones_like(counts_Sn)))
        return torch.cat(parts, dim=1)


def read_tasks(folder: Path) -> TaskRun | None:
    """The ``tasks.json`` of a run folder; None if it has none. Raises UserError for a damaged one."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
        sizes = [len(task["cases"]) for task in content["tasks"]]
        learned = [int(number) for number in content["learned"]]
        values = {
            str(name): torch.tensor(
                [[torch.nan if value is None else float(value) for value in row] for row in rows],
                dtype=torch.float64,
            )
            for name, rows in content["metrics"].items()
        }
        wanted = (len(learned), sum(sizes))
        if not all(sizes) or any(tuple(found.shape) != wanted for found in values.values()):
            raise ValueError(
                f"expected {wanted[0]} evaluations of {wanted[1]} cases in every metric"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, or repeat the run") from None
    return TaskRun(sizes, learned, values)


def of_run(run: Run) -> list[TaskRun]:
    """What the run found under each of its seeds; empty if it learned no tasks under one of them."""
    found = [read_tasks(one.path) for one in run.seeds or [run]]
    return [part for part in found if part is not None] if all(found) else []


Statistic = Callable[[Tensor], Tensor]  # of a matrix [S, E, T]

LATER: Mapping[str, Statistic] = {  # defined where every task was followed by an evaluation
    "incremental": lambda matrix: continual.incremental_accuracy(matrix[:, 1:]),
    "backward transfer": lambda matrix: continual.backward_transfer(matrix[:, 1:]),
    "forgetting": lambda matrix: continual.forgetting(matrix[:, 1:]),
    "forward transfer": lambda matrix: continual.forward_transfer(matrix[:, 1:], matrix[:, 0]),
}


def statistics(parts: Sequence[TaskRun]) -> dict[str, Interval]:
    """Every number that a run's tasks have, by column: over seeds the mean."""
    return {
        name: _interval([_sampled(part, seed, metric, get) for seed, part in enumerate(parts)])
        for name, metric, get in _columns(parts)
    }


def differences(parts: Sequence[TaskRun], others: Sequence[TaskRun]) -> dict[str, Interval]:
    """The same for one run minus another, case by case; only columns that both have.

    Empty if the two did not learn tasks of the same sizes under the same number of seeds.
    """
    if [p.sizes for p in parts] != [p.sizes for p in others]:
        return {}
    shared = {name for name, *_ in _columns(others)}
    found = {}
    for name, metric, get in _columns(parts):
        if name in shared:
            pairs = enumerate(zip(parts, others, strict=True))
            found[name] = _interval(
                [
                    tuple(
                        a - b
                        for a, b in zip(
                            _sampled(part, seed, metric, get),
                            _sampled(other, seed, metric, get),
                            strict=True,
                        )
                    )
                    for seed, (part, other) in pairs
                ]
            )
    return found


def _columns(parts: Sequence[TaskRun]) -> list[tuple[str, str, Statistic]]:
    """Name of a column, its metric, and the statistic of that metric's matrix."""
    present = [metric for metric in KNOWN if all(metric in part.values for part in parts)]
    columns: list[tuple[str, str, Statistic]] = [
        (f"{metric.replace('/', ' ')}", metric, lambda matrix: continual.final_accuracy(matrix))
        for metric in present
    ]
    if MAIN in present and all(part.is_sequence and len(part.sizes) > 1 for part in parts):
        columns += [(name, MAIN, get) for name, get in LATER.items()]
    return columns


def _sampled(part: TaskRun, seed: int, metric: str, get: Statistic) -> tuple[Tensor, Tensor]:
    """A statistic of all cases [1], and of the resamples [S]."""
    return get(part.matrix(metric)), get(part.matrix(metric, part.resampled(seed)))


def _interval(samples: Sequence[tuple[Tensor, ...]]) -> Interval:
    """The mean over seeds, and the interval of that mean over resamples."""
    value = torch.stack([one for one, _ in samples]).mean()
    means_S = torch.stack([many_S for _, many_S in samples]).mean(0)
    low, high = means_S.nanquantile(torch.tensor([0.025, 0.975], dtype=means_S.dtype))
    return Interval(float(value), float(low), float(high))


def mean_matrices(parts: Sequence[TaskRun]) -> dict[str, Tensor]:
    """Metric to [E, T], over seeds the mean; without metrics of which the seeds have other shapes."""
    found = {}
    for metric in KNOWN:
        matrices = [part.matrix(metric)[0] for part in parts if metric in part.values]
        if len(matrices) == len(parts) and len({matrix.shape for matrix in matrices}) == 1:
            found[metric] = torch.stack(matrices).mean(0)
    return found
