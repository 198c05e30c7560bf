"""Lightning's checkpoint writer and CSV logger, replaced by ones that lose nothing when the process is killed.

They override private methods, each for the reason in its docstring; other internals of Lightning are in
:mod:`corrigenda.modules.lightning_internals`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from corrigenda.modules.files import replacing
from corrigenda.modules.training.checkpoints import read_checkpoint


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them without executing anything in them.

    Lightning writes a checkpoint into the system's temporary folder and moves it into place. Across file systems
    that is a plain copy, and a killed process leaves the temporary file behind.
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
        """The checkpoint, on the CPU; raises EditError if it was not written by this project."""
        return read_checkpoint(path)


class WholeLog(CSVLogger):
    """Lightning's metrics.csv, whose rows survive a kill at any time.

    When a new column appears, Lightning truncates the file before it writes the rows again.
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
