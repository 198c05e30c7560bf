"""Continual learning: every task evaluated before the first and after each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.tasks import Tasks
from corrigenda.modules import processes
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.files import write_text
from corrigenda.modules.lightning_internals import epochs_started, validate_before_training
from corrigenda.modules.metrics import continual

FORMAT = 1  # of tasks.json
FILE = "tasks.json"


def tasks_of(trainer: Trainer) -> Tasks | None:
    """The tasks that a run learns one after the other; None where its cases are one set."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.tasks if isinstance(data, EditDataModule) else None


class TaskMatrices(Callback):
    """Evaluates all tasks before the first and after each, and writes ``tasks.json`` into the run folder.

    Does nothing where the data are not dealt to tasks. The values of every case are kept, so that intervals can
    be taken over cases; the matrix R[i, j] of a metric is their mean over the cases of task j after task i.
    """

    def __init__(self) -> None:
        self._learned: list[int] = []  # tasks learned before each evaluation
        self._values: list[dict[str, dict[str, float]]] = []  # of each: case id to metric to value
        self._current: dict[str, dict[str, float]] = {}

    def setup(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        tasks = tasks_of(trainer)
        if tasks is None:
            return
        if stage != "fit":
            raise ValueError(
                "--data.tasks are learned one after the other: run fit, or leave them out"
            )
        trainer.fit_loop.max_epochs = 1 if tasks.joint else tasks.number
        trainer.check_val_every_n_epoch, trainer.val_check_interval = 1, 1.0

    def on_train_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if tasks_of(trainer) is not None and not self._learned:
            validate_before_training(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._current = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: EditingModule,
        outputs: Any,  # noqa: ANN401
        *_: object,
    ) -> None:
        self._current |= {result.case.case_id: result.metrics for result in outputs["results"]}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        tasks = tasks_of(trainer)
        if tasks is None or trainer.sanity_checking:
            return
        found: dict[str, dict[str, float]] = {}
        for part in processes.gather(self._current):
            found |= part
        started = epochs_started(trainer)
        self._learned.append(tasks.number if tasks.joint and started else started)
        self._values.append(found)
        if trainer.is_global_zero:
            self._write(tasks, Path(trainer.default_root_dir))
        for name, value in self._scores(tasks).items():
            pl_module.log(f"tasks/{name}", value)

    def _scores(self, tasks: Tasks) -> dict[str, float]:
        """Accuracy on and forgetting of the tasks learned so far."""
        number = self._learned[-1]
        after_TT = _matrix(self._values[1:], tasks, "efficacy/exact")
        if not number or after_TT is None:
            return {}
        scores = {"accuracy": float(after_TT[-1, :number].mean())}
        if number > 1 and not tasks.joint:
            scores["forgetting"] = float(continual.forgetting(after_TT[:number, :number]))
        return scores

    def _write(self, tasks: Tasks, folder: Path) -> None:
        ids = [[case.case_id for case in task] for task in tasks.cases]
        order = [case_id for task in ids for case_id in task]
        names = sorted({name for found in self._values for row in found.values() for name in row})
        content = {
            "format": FORMAT,
            "tasks": [{"name": n, "cases": c} for n, c in zip(tasks.names, ids, strict=True)],
            "learned": self._learned,
            "metrics": {
                name: [
                    [_finite(found.get(case_id, {}).get(name)) for case_id in order]
                    for found in self._values
                ]
                for name in names
            },
        }
        write_text(folder / FILE, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"learned": self._learned, "values": self._values} if self._learned else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict:
            self._learned, self._values = list(state_dict["learned"]), list(state_dict["values"])


def _matrix(values: list[dict[str, dict[str, float]]], tasks: Tasks, name: str) -> Tensor | None:
    """[evaluations, T]: a metric's mean over each task's cases; None if a task has no such value."""
    rows = []
    for found in values:
        parts = [
            [found[case.case_id][name] for case in task if name in found.get(case.case_id, {})]
            for task in tasks.cases
        ]
        if not all(parts):
            return None
        rows.append([sum(part) / len(part) for part in parts])
    return torch.tensor(rows) if rows else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
