"""What a run writes: every case as it is evaluated, the state to resume from, and a summary at the end."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules import processes
from corrigenda.modules.evaluation.measures import PROTOCOLS, CaseResult
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.files import write_text
from corrigenda.pipeline.board import wandb_loggers
from corrigenda.pipeline.callbacks import EditCallback, edit_callback
from corrigenda.pipeline.cost import Cost
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.json_lines import JsonLines, as_json
from corrigenda.pipeline.report.logs import read_training
from corrigenda.pipeline.report.records import parse
from corrigenda.pipeline.run_folder import continues, read_progress, require_same
from corrigenda.pipeline.tasks import tasks_of

log = logging.getLogger(__name__)

FORMAT = 1  # of summary.json and cases.jsonl


class RunWriter(Callback):
    """Writes ``cases.jsonl`` as cases are evaluated and ``summary.json`` when all is done."""

    def __init__(
        self,
        run_dir: Path,
        verb: str,
        seed: int | None = None,
        depends_on: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.verb, self.seed = run_dir, verb, seed
        self._cases = JsonLines(run_dir / "cases.jsonl")
        # What results depend on; weights and cases are added once they are known.
        self._depends_on = dict(depends_on or {})
        # With several processes: rows of this process by batch, gathered when the evaluation ends.
        self._pending: list[list[dict[str, Any]]] = []
        self._started = time.perf_counter()
        self._seconds_before = 0.0  # spent by this run before it was interrupted
        self._restored: dict[str, Any] = {}
        self._first_step: int | None = None  # at which training starts in this process
        self._was_finished = False

    @property
    def _run_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def setup(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        self._was_finished = (self.folder / "summary.json").exists()
        if trainer.is_global_zero:
            self._cases.drop_partial_line()
        trainer.strategy.barrier("cases.jsonl")

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed ``fit`` needs: the size of cases.jsonl in bytes, and what the run depends on."""
        return {
            "cases": self._cases.size,
            "run_seconds": self._run_seconds,
            "depends_on": self._depends_on,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """A resumed run drops the rows written after its checkpoint, because it repeats those steps."""
        state, self._restored = self._restored, {}
        if not state or not continues(trainer, self.folder):
            return
        require_same(self.folder, state["depends_on"], self._depends_on, code=False)
        self._seconds_before = state["run_seconds"]
        if trainer.is_global_zero:
            self._cases.truncate(state["cases"])

    def on_train_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._first_step = trainer.global_step
        if trainer.is_global_zero and edit_callback(trainer).schedule == "stream":
            cases = trainer.datamodule.evaluation_cases()  # type: ignore[attr-defined]
            write_text(self.folder / "order.json", as_json([case.case_id for case in cases]) + "\n")

    def on_validation_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """A resumed validation reuses the cases that were evaluated before."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        cases = trainer.datamodule.evaluation_cases()  # type: ignore[attr-defined]
        text = "".join(case.fingerprint for case in cases)
        self._depends_on |= {
            "the model's weights": pl_module.lm.weights_hash,
            "the form of prompts": pl_module.lm.tokens.form,
            "the set of cases": hashlib.sha256(text.encode()).hexdigest()[:16],
        }
        if self._cases.size:
            self._reuse_cases(trainer, pl_module)
        self._write_progress(trainer)

    def _reuse_cases(self, trainer: Trainer, pl_module: EditingModule) -> None:
        progress = read_progress(self.folder)
        require_same(self.folder, progress.get("depends_on"), self._depends_on)
        if trainer.is_global_zero:
            self._cases.truncate(progress["cases"])
        trainer.strategy.barrier("cases.jsonl")
        pl_module.measured = self._measured()
        log.warning("%d cases in %s were evaluated before and are not evaluated again",
                    len(pl_module.measured), self._cases.path)  # fmt: skip
        budget = progress["budget"]
        self._seconds_before = budget["run_seconds"]
        edit = edit_callback(trainer)
        if trainer.is_global_zero and edit.schedule != "epoch":  # which makes all edits again
            edit.add_cost(Cost.from_state(budget))

    def _measured(self) -> dict[str, dict[str, float | None]]:
        """Case means in cases.jsonl, by fingerprint; None where one was not finite."""
        measured = {}
        for number, line in enumerate(self._cases.path.read_text("utf-8").splitlines(), start=1):
            try:
                row = parse(line)
                values = {
                    str(k): None if v is None else float(v) for k, v in row["metrics"].items()
                }
                measured[str(row["fingerprint"])] = values
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self._cases.path}:{number}: this version cannot read the row: remove the line, "
                                "or choose another --run_dir") from None  # fmt: skip
        return measured

    def _write_progress(self, trainer: Trainer) -> None:
        """Writes what an interrupted validation needs to resume: what it depends on, and its cost so far."""
        budget = edit_callback(trainer).total_cost().state() | {"run_seconds": self._run_seconds}
        if trainer.is_global_zero:
            progress = {"depends_on": self._depends_on, "budget": budget, "cases": self._cases.size}
            write_text(self.folder / "progress.json", as_json(progress, indent=1))

    # ------------------------------------------------------------------ cases

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
        """The EditCallback, which runs before this one, has just made and scored the edits of a stream's step."""
        edit = edit_callback(trainer)
        self._write(trainer, edit.current, "current")
        self._write(trainer, [CaseResult(case) for case in edit.undone], "rolled_back")

    def _write(self, trainer: Trainer, results: list[CaseResult], phase: str) -> None:
        num_edits = edit_callback(trainer).num_edits
        rows = [{"phase": phase, "num_edits": num_edits} | result.row() for result in results]
        if phase == "val" and trainer.world_size > 1:
            self._pending.append(rows)
        elif rows:  # every process has made the same edits of a stream
            self._append(trainer, rows)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        """Gathers all rows in the order of the data, whose batches the processes have taken in turn."""
        if trainer.world_size > 1 and not trainer.sanity_checking:
            turns = zip_longest(*processes.gather(self._pending), fillvalue=[])
            self._append(trainer, [row for turn in turns for rows in turn for row in rows])
            self._pending = []

    def _append(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if trainer.is_global_zero:
            self._cases.append(rows)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write_progress(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self._was_finished and self._first_step in (None, trainer.global_step):
            raise UserError(
                f"{self.folder} holds a finished run of {trainer.global_step} steps, so there is nothing left to "
                "do: increase --trainer.max_steps or --trainer.max_epochs, or choose another --run_dir"
            )
        if not trainer.interrupted:
            self._finish(trainer, pl_module)
            self._log_pictures(trainer)

    def _log_pictures(self, trainer: Trainer) -> None:
        """Logs the figures of a single run that a report draws to W&B: learning curves, forgetting."""
        boards = wandb_loggers(trainer)
        if not boards:
            return
        from corrigenda.pipeline.report.curves import learning_picture  # matplotlib takes a second
        from corrigenda.pipeline.report.forgetting import stream_pictures

        for logger in trainer.loggers:
            logger.save()
        training = read_training(self.folder)
        pictures = stream_pictures(self.folder, self.folder.name)
        if training and (learned := learning_picture(training)):
            pictures["learning curves"] = learned
        for board in boards:
            for title, picture in pictures.items():
                board.log_image(title, [picture])

    def _finish(self, trainer: Trainer, pl_module: EditingModule) -> None:
        summary = self._summary(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_text(self.folder / "summary.json", as_json(summary, indent=1))

    def _summary(self, trainer: Trainer, module: EditingModule) -> dict[str, Any]:
        edit = edit_callback(trainer)
        cost = edit.total_cost()
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
            "protocols": _protocols(module, "tasks" if tasks_of(trainer) else edit.schedule),
            "means": module.means,
            "budget": {
                **cost.row(),
                **_kept(module, edit),
                "training_seconds": getattr(module, "training_seconds", None),
                "run_seconds": self._run_seconds,
            },
            "numbers": edit.editor.numbers() if edit.editor else {},
            **({} if edit.accepted is None else {"accepted": edit.accepted}),
        }


def _protocols(module: EditingModule, schedule: str) -> dict[str, str]:
    """How each measure was computed, and on which edits; prompts in a chat are other prompts."""
    by_name = {name: PROTOCOLS[name.rpartition("/")[2]] for name in module.means}
    chat = "+chat" if "chat" in module.base_model else ""
    return {
        name: f"{how}{'' if how == PROTOCOLS['perplexity'] else chat}@{schedule}"
        for name, how in by_name.items()
    }


def _kept(module: EditingModule, edit: EditCallback) -> dict[str, float | None]:
    """What is left at the end of ``fit``: bytes of the active edits, or of what the module has learned."""
    if handles := edit.active:
        return {"bytes_kept": sum(handle.num_bytes for handle in handles)}
    learned = [
        (name, value)
        for name, value in module.state_dict().items()
        if not name.startswith("lm.") and isinstance(value, torch.Tensor)
    ]
    if not learned:
        return {"bytes_kept": None}
    kept: dict[str, float | None] = {"bytes_kept": sum(value.nbytes for _, value in learned)}
    trained = sum(part.numel() for part in module.parameters() if part.requires_grad)
    if trained and not edit.cost.touched:  # else it says what an edit touches
        kept["parameters_touched"] = trained
    return kept
