"""The checkpoint that an interrupted ``fit`` resumes from."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.interrupts import uninterrupted
from corrigenda.modules.lightning_internals import (
    accumulates_gradients,
    validation_is_due,
    values_to_log,
)
from corrigenda.pipeline.run_folder import last_checkpoint
from corrigenda.pipeline.signals import end_at_once

SAVE_EVERY = 60.0  # seconds between checkpoints; a step that takes longer is saved when it ends
NEEDED_TO_RESUME = {"loops", "optimizer_states", "lr_schedulers", "callbacks"}  # of a checkpoint


class LastCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt``, from which an interrupted ``fit`` resumes.

    The file holds the last step, the last validation, or a state at most a minute old. A step that is followed by
    a validation is saved after it, because a run resumed from before would skip the validation. This callback must
    come after all others, whose state it saves. (Lightning's ModelCheckpoint saves before the validation, and has
    no time interval where optimization is manual, as in a stream.)

    The last step is saved like any other, within its epoch, so a run that ended with ``max_steps`` and is given
    more continues with the next batch.

    Ctrl-C and SIGTERM are delayed until the current training step ends and is saved; there is no state to resume
    from within a step. During a validation they end the run immediately, and a second Ctrl-C ends the process.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = last_checkpoint(run_dir)
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._is_complete = (
            False  # no accumulated gradients are pending, which a checkpoint would lose
        )
        self._signals = _UntilStepEnds()
        self._at_epoch_end = False  # the last epoch's last step is saved when the epoch has ended
        # Step and values that are logged after the step's checkpoint was saved.
        self._to_log: tuple[int, dict[str, float]] = (0, {})

    def on_train_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._saved_at = time.monotonic()
        self._log_restored(trainer)
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve() == self.path.resolve():
            self._saved_step = trainer.global_step
        self._hold_signals(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._is_complete = not accumulates_gradients(trainer)
        if self._is_complete and not validation_is_due(trainer):
            late = time.monotonic() - self._saved_at >= SAVE_EVERY
            is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
            due = late or is_last or self._signals.is_held
            due = trainer.strategy.broadcast(due)  # all processes save together
            ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
            self._at_epoch_end = due and ends and trainer.max_steps != trainer.global_step
            if due and not self._at_epoch_end:
                self._to_log = values_to_log(trainer)
                self._save(trainer)
                self._to_log = 0, {}
        if self._signals.is_held and not self._at_epoch_end:
            self._deliver_signals()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """Saves the last epoch's last step, as Lightning miscounts the epochs of a run extended from within it."""
        if self._at_epoch_end:
            self._at_epoch_end = False
            self._save(trainer)
        if self._signals.is_held:
            self._deliver_signals()

    def on_validation_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._deliver_signals()

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._is_complete and not trainer.sanity_checking:
            self._save(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._hold_signals(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._deliver_signals()

    def teardown(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        """A run that resumes from its last step never reaches on_train_start."""
        if stage == TrainerFn.FITTING:
            self._log_restored(trainer)

    def _log_restored(self, trainer: Trainer) -> None:
        """Logs the values of the step that this run resumes from, in case the interrupted process did not."""
        step, values = self._to_log
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step)
        self._to_log = 0, {}

    def on_exception(self, *_: object) -> None:
        self._signals.drop()

    def _hold_signals(self, trainer: Trainer) -> None:
        self._deliver_signals()
        if trainer.world_size == 1:  # with several processes, some may not have received the signal
            self._signals = _UntilStepEnds()
            self._signals.__enter__()

    def _deliver_signals(self) -> None:
        self._signals.__exit__(None)

    def state_dict(self) -> dict[str, Any]:
        step, values = self._to_log
        return {"step": step, "values": values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._to_log = state_dict["step"], state_dict["values"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: EditingModule, checkpoint: dict[str, Any]
    ) -> None:
        lacking = sorted(NEEDED_TO_RESUME - checkpoint.keys())
        if trainer.state.fn == TrainerFn.FITTING and lacking:
            raise ValueError(f"training cannot resume from the checkpoint {trainer.ckpt_path}, which has no "
                             f"{', '.join(lacking)}: give one that fit has written")  # fmt: skip

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


class _UntilStepEnds(uninterrupted):
    """Delays a signal until the step ends; a further Ctrl-C ends the process immediately."""

    @property
    def is_held(self) -> bool:
        return bool(self._held)

    def drop(self) -> None:
        """Ends without delivering the signal, because the run ends anyway."""
        self._held.clear()
        self._end()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            os.write(
                2, b"corrigenda: stopping after this step; a second Ctrl-C stops immediately\n"
            )
            self._held.append(number)
        elif number == signal.SIGINT:
            end_at_once()
