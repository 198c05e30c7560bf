"""Attributes of Lightning's loops that have no public interface, each with the reason why it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DDPStrategy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def count_step(trainer: Trainer) -> None:
    """Counts a training step that runs no optimizer.

    ``global_step``, and with it ``max_steps``, checkpoints and the logged step, counts optimizer steps only. A
    stream of edits has none.
    """
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    steps.increment_ready()
    steps.increment_completed()


def leave_unwrapped(trainer: Trainer) -> None:
    """Makes Lightning use the module as it is in several processes.

    It would wrap it in a ``DistributedDataParallel``, which refuses a module without trainable parameters. A
    stream of edits has none: every process makes the same edits.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass


def processed_batches(trainer: Trainer) -> int:
    """Training batches of this epoch whose step has finished.

    A data loader only knows how many batches were requested, and Lightning requests one ahead.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed


def reset_train_loader(trainer: Trainer) -> None:
    """Makes Lightning set up the training data again when training starts.

    ``estimated_stepping_batches`` sets it up before a checkpoint is read. Lightning would then not do so again,
    and the position in the epoch, which the checkpoint holds, would be lost.
    """
    trainer.fit_loop._combined_loader = None


def values_to_log(trainer: Trainer) -> tuple[int, dict[str, float]]:
    """The step and the values that Lightning is about to log for the training step that has just ended.

    It logs them after ``on_train_batch_end``, the last hook in which a checkpoint of the step can be saved; a run
    resumed from that checkpoint would never log them.
    """
    connector = trainer._logger_connector
    loop = trainer.fit_loop.epoch_loop
    values: Mapping[str, Any] = connector.metrics["log"] if connector.should_update_logs else {}
    numbers = {name: float(value) for name, value in values.items()}
    return loop._batches_that_stepped, numbers and numbers | {"epoch": trainer.current_epoch}


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the training step that has just ended.

    A checkpoint of that step is saved after the validation, or a resumed run would leave it out.
    """
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]


def epochs_started(trainer: Trainer) -> int:
    """Training epochs that have started, including the present one; 0 before the first.

    ``current_epoch`` is 0 both before and during the first epoch.
    """
    return trainer.fit_loop.epoch_progress.current.ready


def validate_before_training(trainer: Trainer) -> None:
    """Runs a validation within ``fit`` before the first training step, with all its hooks and logs.

    Lightning's sanity check runs there, but discards its results.
    """
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def accumulates_gradients(trainer: Trainer) -> bool:
    """Whether the training step that has just ended left gradients for the next one, which a checkpoint lacks.

    ``global_step`` does not tell: it also stays the same after a batch without a loss, which leaves none.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()
