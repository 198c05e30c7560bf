"""The same budget for every method: what a ``fit`` may spend on learning, and what it has spent."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from corrigenda.datamodules.tasks import TaskLoader
from corrigenda.modules import checks
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.lightning_internals import epochs_started
from corrigenda.pipeline.callbacks import EditCallback, edit_callback
from corrigenda.pipeline.cost import Stopwatch
from corrigenda.pipeline.tasks import tasks_of


class Budget(Callback):
    """Ends learning when its budget is spent. Evaluation, and preparing statistics, cost nothing.

    A sequence of tasks has an equal share of it for each task; what one task leaves is added to the next one's.
    The step during which the budget runs out is completed, and every task gets at least one.

    Args:
        seconds: time for editing or training; unlimited if not given.
        steps: forward and backward passes for editing or training; unlimited if not given.
    """

    def __init__(self, seconds: float | None = None, steps: int | None = None) -> None:
        checks.positive(seconds=seconds)
        checks.whole(1, steps=steps)
        self.seconds, self.steps = seconds, steps
        self._watch: Stopwatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" and (self.seconds or self.steps):
            raise ValueError(
                "a budget limits what fit learns, and validate learns nothing: leave --budget out"
            )
        if (self.seconds or self.steps) and not isinstance(pl_module, EditingModule):
            raise ValueError(
                f"a budget counts a language model's work, and {type(pl_module).__name__} trains without one: "
                "leave --budget out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        edit = edit_callback(trainer)
        self._add(edit)
        self._start(trainer, pl_module)
        tasks = tasks_of(trainer)
        share = 1.0 if tasks is None or tasks.joint else epochs_started(trainer) / tasks.number
        spent = any(
            limit is not None and used >= share * limit
            for limit, used in (
                (self.seconds, edit.cost.seconds),
                (self.steps, edit.cost.gradient_steps),
            )
        )
        if trainer.strategy.broadcast(spent):
            loader: Any = trainer.train_dataloader
            if isinstance(loader, TaskLoader):
                loader.end_task()
            else:
                trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add(edit_callback(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.state.fn == "fit":
            self._start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add(edit_callback(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._add(edit_callback(trainer))

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, EditingModule):
            return
        if edit_callback(trainer).schedule != "stream":  # whose edits are timed as they are made
            self._watch = Stopwatch(module.lm)

    def _add(self, edit: EditCallback) -> None:
        """Adds what training has spent since the watch was started."""
        if self._watch is not None:
            edit.cost += self._watch.stop()
            self._watch = None
