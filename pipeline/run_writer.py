"""What a run leaves behind: every case as it is evaluated, what it goes on from, and a summary at the end."""

from __future__ import annotations

import json
import logging
import os
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from modules.evaluation import PROTOCOLS, CaseResult, EditingModule
from pipeline.callbacks import EditCallback, peak_gib, wandb_loggers
from pipeline.report.logs import read_training

log = logging.getLogger(__name__)

FORMAT = 1  # of summary.json and cases.jsonl
KEPT_EVERY = (
    60.0  # seconds, what may be lost of a run that is killed, or one step if that takes longer
)


class RunWriter(Callback):
    """Writes ``cases.jsonl`` as cases are evaluated and ``summary.json`` when all is done."""

    def __init__(self, run_dir: Path, verb: str, seed: int | None = None) -> None:
        self.folder, self.verb, self.seed = run_dir, verb, seed
        # Rows of this process's batches, where there are several processes.
        self._waiting: list[list[dict[str, Any]]] = []
        self._started = time.perf_counter()

    @property
    def _cases(self) -> Path:
        return self.folder / "cases.jsonl"

    def setup(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        if trainer.is_global_zero and self._cases.exists():
            self._end_last_line()
        trainer.strategy.barrier("cases.jsonl")
        if trainer.state.fn == TrainerFn.VALIDATING and self._cases.exists():
            lines = map(json.loads, self._cases.read_text("utf-8").splitlines())
            pl_module.measured = {line["fingerprint"]: line["metrics"] for line in lines}
            if trainer.is_global_zero:
                count = len(pl_module.measured)
                log.warning("%d cases in %s are taken over, not measured again", count, self._cases)

    def _end_last_line(self) -> None:
        """A run that was killed may have left half a line; what follows starts on a new one."""
        with open(self._cases, "rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                whole = self._cases.read_bytes()
                file.truncate(whole.rfind(b"\n") + 1)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: EditingModule,
        outputs: Any,  # noqa: ANN401
        *_: object,
    ) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, outputs["results"], "val")

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        """The edits of a stream's step have just been made and scored by the EditCallback before this one."""
        self._write(trainer, _edit_callback(trainer).current, "current")

    def _write(self, trainer: Trainer, results: list[CaseResult], phase: str) -> None:
        num_edits = _edit_callback(trainer).num_edits
        rows = [{"phase": phase, "num_edits": num_edits} | result.row() for result in results]
        if phase == "val" and trainer.world_size > 1:
            self._waiting.append(rows)
        else:  # a stream's edits are the same in every process
            self._append(trainer, rows)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """Gathers once, in the order of the data: processes had its batches in turn, some one batch less."""
        if trainer.world_size > 1 and not trainer.sanity_checking:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._waiting)
            turns = zip_longest(*gathered, fillvalue=[])
            self._append(trainer, [row for turn in turns for rows in turn for row in rows])
            self._waiting = []

    def _append(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if rows and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._cases, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if not trainer.interrupted:
            self._finish(trainer, pl_module)
            self._draw_learning_curves(trainer)

    def _draw_learning_curves(self, trainer: Trainer) -> None:
        """W&B gets the picture that a report draws."""
        boards = wandb_loggers(trainer)
        if not boards:
            return
        from pipeline.report.curves import learning_picture  # matplotlib takes a second

        for logger in trainer.loggers:
            logger.save()
        training = read_training(self.folder)
        picture = training and learning_picture(training)
        for board in boards if picture else ():
            board.log_image("learning curves", [picture])

    def _finish(self, trainer: Trainer, pl_module: EditingModule) -> None:
        summary = self._summary(trainer, pl_module)
        if trainer.is_global_zero:
            text = json.dumps(summary, indent=1, ensure_ascii=False)
            part = self.folder / "summary.json.part"
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(self.folder / "summary.json")

    def _summary(self, trainer: Trainer, module: EditingModule) -> dict[str, Any]:
        edit = _edit_callback(trainer)
        made, seconds, size, asked, asked_seconds, plain_seconds = edit.totals(trainer)
        means = {
            name: value if abs(value) < float("inf") else None
            for name, value in module.means.items()
        }
        return {
            "format": FORMAT,
            "run": self.folder.name,
            "verb": self.verb,
            "finished": True,
            "seed": self.seed,
            "editor": type(edit.editor).__name__ if edit.editor else module.method_name,
            **({} if module.trained is None else {"trained": module.trained}),
            "model": module.base_model["name"],
            "model_hash": module.base_model["hash"],
            "dataset": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
            "schedule": edit.schedule,
            "protocols": {
                name: f"{PROTOCOLS[name.rpartition('/')[2]]}@{edit.schedule}" for name in means
            },
            "means": means,
            "budget": {
                "num_edits": made or None,
                "seconds_per_edit": seconds / made if made else None,
                "prepare_seconds": edit.prepare_seconds or None,
                "peak_gib": peak_gib(),
                "parameters_touched": edit.touched or None,
                "bytes_per_edit": size / made if made else None,
                "seconds_per_query": asked_seconds / asked if asked else None,
                "query_overhead": asked_seconds / plain_seconds if asked else None,
                "training_seconds": getattr(module, "training_seconds", None),
                "run_seconds": time.perf_counter() - self._started,
            },
            "numbers": edit.editor.numbers() if edit.editor else {},
        }


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``, which an interrupted ``fit`` goes on from.

    It is of the last step, of the last evaluation, or at most a minute old. A step that is evaluated is kept
    after that: a run that went on from before would leave the evaluation out. To be called after all other
    callbacks, whose state it keeps. (Lightning's ModelCheckpoint keeps a step before its evaluation, and knows no
    time where optimization is manual, as a stream's is.)
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "checkpoints" / "last.ckpt"
        self._kept_at = time.monotonic()
        self._step = 0
        self._whole = False  # no gradients are being accumulated, which a checkpoint would lose

    def on_train_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._kept_at, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._whole, self._step = trainer.global_step != self._step, trainer.global_step
        loop = trainer.fit_loop
        if self._whole and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            late = time.monotonic() - self._kept_at >= KEPT_EVERY
            if trainer.strategy.broadcast(late):  # all processes save together
                self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._whole and not trainer.sanity_checking:
            self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
            self._kept_at = time.monotonic()


def _edit_callback(trainer: Trainer) -> EditCallback:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, EditCallback))
