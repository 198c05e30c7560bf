"""General abilities while edits are made: at chosen counts of a stream, or with all edits of a validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules import checks
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.pipeline.abilities.answers import AnswerFiles
from corrigenda.pipeline.abilities.questions import Questions, model_id
from corrigenda.pipeline.board import Axes, log_beside
from corrigenda.pipeline.callbacks import edit_callback

LOGGED = ("score", "stderr", "invalid")


class Abilities(Callback):
    """Evaluates tasks of lm-evaluation-harness while edits are active; see docs/abilities.md.

    Args:
        tasks: names of tasks; none by default.
        at: numbers of edits after which a stream is evaluated; 0 is the unedited model, and the last number always
            counts. Where a batch passes one of them, the evaluation follows the batch.
        **rest: which questions, see Questions.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        at: list[int] | None = None,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        self.at = [0] if at is None else at
        for count in self.at:
            checks.whole(0, at=count)
        self.questions = Questions(tasks, **rest) if tasks else None
        self._passed = 0  # edits of the stream that need no further questions
        self._files: AnswerFiles | None = None
        self._axes = Axes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.questions is None:
            return
        wanted = "stream" if trainer.state.fn == TrainerFn.FITTING else "epoch"
        if not isinstance(pl_module, EditingModule) or edit_callback(trainer).schedule != wanted:
            raise ValueError(
                "abilities need edits that stay active: fit with --edit.schedule stream, or validate with "
                "--edit.schedule epoch, or leave --abilities.tasks out"
            )
        self._files = AnswerFiles(Path(trainer.default_root_dir))
        if trainer.is_global_zero:
            _ = self.questions.tasks  # rows that are missing end a run before its first edit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if 0 in self.at:
            self._evaluate_unedited(trainer, pl_module)
        self._evaluate_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._evaluate_if_due(trainer, pl_module, is_last=trainer.should_stop)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The EditCallback, which comes before this one, has made the edits."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            if 0 in self.at:
                self._evaluate_unedited(trainer, pl_module)
            self._evaluate(trainer, pl_module, edit_callback(trainer).num_edits)

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self._passed} if self.questions else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._passed = int(state_dict.get("passed", 0))

    # ------------------------------------------------------------------ evaluation

    def _evaluate_unedited(self, trainer: Trainer, module: LightningModule) -> None:
        if self.questions and isinstance(module, EditingModule):
            with module.lm.pristine():
                self._evaluate(trainer, module, 0)

    def _evaluate_if_due(
        self, trainer: Trainer, module: LightningModule, is_last: bool = False
    ) -> None:
        if self.questions is None:
            return
        count = edit_callback(trainer).num_edits
        if is_last or any(self._passed < each <= count for each in self.at):
            self._evaluate(trainer, module, count)
        self._passed = count

    def _evaluate(self, trainer: Trainer, module: LightningModule, count: int) -> None:
        """The first process evaluates; with several, the others wait."""
        if self.questions is None or self._files is None:
            return
        if trainer.is_global_zero:
            lm: Any = module.lm
            name = model_id(lm, [handle.digest() for handle in lm.handles] if count else ())
            for row in self.questions.evaluate(lm, self._files, count, name):
                values = {f"abilities/{row['task']}/{measure}": row[measure] for measure in LOGGED}
                values["abilities/perplexity"] = row["perplexity"]
                log_beside(trainer, self._axes, values, count)
        trainer.strategy.barrier("abilities")
