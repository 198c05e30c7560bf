"""Parts of Lightning that lose something when a process is killed, replaced by ones that do not.

Everything that relies on Lightning's internals for resuming is here, each with its reason.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from corrigenda.modules.files import replacing
from corrigenda.modules.training.checkpoints import read_checkpoint


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without running anything in them.

    Lightning writes a checkpoint into the system's temporary folder and moves it from there, which is a plain
    copy where the run folder lies on another disk, and leaves the temporary file when it is killed.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        """The checkpoint, on the CPU; raises EditError where it is none of this project's."""
        return read_checkpoint(path)


class WholeLog(CSVLogger):
    """Lightning's metrics.csv, whose rows survive a kill at any time.

    When a new column appears Lightning empties the file before it writes the rows again.
    """

    @property
    def experiment(self) -> Any:  # noqa: ANN401
        if self._experiment is None and isinstance(super().experiment, ExperimentWriter):
            self._experiment = _Rows(self.log_dir)
        return super().experiment


class _Rows(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


def values_to_log(trainer: Trainer) -> tuple[int, dict[str, float]]:
    """The logged step and the values that Lightning is about to log of the training step that has just ended.

    It does so after ``on_train_batch_end``, the last hook in which a checkpoint of the step can be kept; a run
    that goes on from that checkpoint never logs them.
    """
    connector = trainer._logger_connector
    loop = trainer.fit_loop.epoch_loop
    values: Mapping[str, Any] = connector.metrics["log"] if connector.should_update_logs else {}
    numbers = {name: float(value) for name, value in values.items()}
    return loop._batches_that_stepped, numbers and numbers | {"epoch": trainer.current_epoch}


def evaluates_now(trainer: Trainer) -> bool:
    """Whether an evaluation follows the training step that has just ended."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]


def epochs_begun(trainer: Trainer) -> int:
    """Training epochs that have begun, the present one included; 0 before the first, unlike ``current_epoch``."""
    return trainer.fit_loop.epoch_progress.current.ready


def evaluate_now(trainer: Trainer) -> None:
    """Evaluates within ``fit`` before the first training step, with all hooks and logs of an evaluation.

    Lightning itself only checks there that an evaluation works, and drops what it finds.
    """
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first
