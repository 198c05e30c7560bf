"""The checkpoint that an interrupted ``fit`` goes on from."""

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
from corrigenda.pipeline.lightning_parts import evaluates_now, values_to_log
from corrigenda.pipeline.run_folder import last_checkpoint
from corrigenda.pipeline.signals import end_at_once

SAVE_EVERY = 60.0  # seconds between checkpoints; a step that takes longer is saved when it ends
NEEDED_TO_RESUME = {"loops", "optimizer_states", "lr_schedulers", "callbacks"}  # of a checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``, which an interrupted ``fit`` goes on from.

    It is of the last step, of the last evaluation, or at most a minute old. A step that is evaluated is kept
    after that: a run that went on from before would leave the evaluation out. To be called after all other
    callbacks, whose state it keeps. (Lightning's ModelCheckpoint keeps a step before its evaluation, and knows no
    time where optimization is manual, as a stream's is.)

    The last step is kept like any other, within its epoch: a run that was ended by ``max_steps`` and is given
    more goes on with the next batch.

    Ctrl-C and SIGTERM wait for the end of a training step, which is then kept: within a step there is no state to
    go on from. During an evaluation they end the run at once, and a second Ctrl-C ends the process.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = last_checkpoint(run_dir)
        self._kept_at = time.monotonic()
        self._kept_step = -1
        self._step = 0
        self._whole = False  # no gradients are being accumulated, which a checkpoint would lose
        self._signals = _UntilStepEnds()
        self._at_epoch_end = False  # the last epoch's last step is kept when the epoch has ended
        self._to_log: tuple[int, dict[str, float]] = (
            0,
            {},
        )  # what is logged of the step after it is kept

    def on_train_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._kept_at, self._step = time.monotonic(), trainer.global_step
        self._log_kept(trainer)
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve() == self.path.resolve():
            self._kept_step = trainer.global_step
        self._hold_signals(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._whole, self._step = trainer.global_step != self._step, trainer.global_step
        if self._whole and not evaluates_now(trainer):
            late = time.monotonic() - self._kept_at >= SAVE_EVERY
            is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
            due = late or is_last or self._signals.is_held
            due = trainer.strategy.broadcast(due)  # all processes save together
            ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
            self._at_epoch_end = due and ends and trainer.max_steps != trainer.global_step
            if due and not self._at_epoch_end:
                self._to_log = values_to_log(trainer)
                self._keep(trainer)
                self._to_log = 0, {}
        if self._signals.is_held and not self._at_epoch_end:
            self._deliver_signals()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """Lightning counts epochs wrongly in a run that is extended from its last epoch's last step."""
        if self._at_epoch_end:
            self._at_epoch_end = False
            self._keep(trainer)
        if self._signals.is_held:
            self._deliver_signals()

    def on_validation_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._deliver_signals()

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._whole and not trainer.sanity_checking:
            self._keep(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._hold_signals(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._kept_step != trainer.global_step:
            self._keep(trainer)
        self._deliver_signals()

    def teardown(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        """Where the last step had been kept, training did not start again."""
        if stage == TrainerFn.FITTING:
            self._log_kept(trainer)

    def _log_kept(self, trainer: Trainer) -> None:
        """Logs the values of the step that this run goes on from, which the process before may not have logged."""
        step, values = self._to_log
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step)
        self._to_log = 0, {}

    def on_exception(self, *_: object) -> None:
        self._signals.drop()

    def _hold_signals(self, trainer: Trainer) -> None:
        self._deliver_signals()
        if trainer.world_size == 1:  # of several processes only some may have got the signal
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
            raise ValueError(f"the checkpoint {trainer.ckpt_path} cannot be trained on, it has no "
                             f"{', '.join(lacking)}: give one of this project's fit")  # fmt: skip

    def _keep(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
            self._kept_at, self._kept_step = time.monotonic(), trainer.global_step


class _UntilStepEnds(uninterrupted):
    """Holds a signal back until the step ends; a further Ctrl-C ends the process at once."""

    @property
    def is_held(self) -> bool:
        return bool(self._held)

    def drop(self) -> None:
        """Ends without delivering anything, because the run ends anyway."""
        self._held.clear()
        self._end()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            os.write(2, b"corrigenda: stopping after this step; Ctrl-C once more stops at once\n")
            self._held.append(number)
        elif number == signal.SIGINT:
            end_at_once()
