"""Means over all cases of an evaluation, accumulated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from corrigenda.modules import metrics, processes
from corrigenda.modules.evaluation.measures import PROTOCOLS, VERDICTS

# Harmonic means of dataset means: the Score of the literature, and what learned editors are selected by.
SCORES = {
    "all/score": ("efficacy/preference", "generality/preference", "locality/preference"),
    "all/balance": ("efficacy/exact", "generality/exact", "locality/agreement"),
}


class RunningMeans:
    """A metric per ``<criterion>/<measure>``, created when it is first updated."""

    def __init__(self) -> None:
        self.metrics: dict[str, metrics.CaseMean] = {}

    def clear(self) -> None:
        self.metrics.clear()

    def update(self, name: str, values_B: Tensor, case_B: Tensor) -> None:
        """Adds whole cases."""
        self._metric(name).update(values_B, case_B)

    def add_case(self, means: Mapping[str, float | None]) -> None:
        """Adds a case from its means; None stands for an infinite one."""
        for name, value in means.items():
            value = math.inf if value is None else value
            self.update(name, torch.tensor([value]), torch.tensor([0]))

    def compute(self, device: torch.device) -> dict[str, float]:
        """Dataset means over the cases of all processes, and the harmonic scores."""
        if processes.are_several():
            # Computing a metric sums it over all processes, so all of them need the same metrics.
            names = [name for names in processes.gather(list(self.metrics)) for name in names]
            for name in dict.fromkeys(names):
                self._metric(name)
            self.metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        means = {name: float(metric.compute()) for name, metric in sorted(self.metrics.items())}
        for name, parts in SCORES.items():
            values = [means[part] for part in parts if part in means]
            if len(values) == len(parts):
                means[name] = float(metrics.harmonic_score(*values))
        return means

    def _metric(self, name: str) -> metrics.CaseMean:
        criterion, _, measure = name.rpartition("/")
        verdict, judge = VERDICTS.get(criterion, ("", metrics.CaseMean))
        kind = judge if verdict and measure.startswith(f"{verdict}_") else metrics.CaseMean
        return self.metrics.setdefault(name, kind(PROTOCOLS[measure]))
