"""Fine-tuning with ``fit``: one loss and one loop for every method, on all edits or task by task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules.evaluation.requirements import require_unsharded
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.substitution import needs_substitution
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.kept import Kept
from corrigenda.modules.training.sharding import TrainedModule
from corrigenda.modules.training.target_rows import TargetRows


class FineTune(TrainedModule):
    """Trains one update of a :class:`GradientEditor` on all edits with ``fit``, or on one task after the other.

    The base weights are never written: validation runs the learned update beside them, so locality compares with
    the base model itself, and checkpoints hold the learned tensors only.

    A step minimises the mean loss of the batch's edits plus :meth:`penalty`. Methods against forgetting are
    subclasses that override the penalty and what happens when a task begins (:meth:`begin_task`) and ends
    (:meth:`end_task`). Every task starts with a fresh optimizer and schedule. What a method keeps between tasks is
    in its checkpoints, so that a run can be interrupted at any step.

    Args:
        lm: the language model.
        method: defines the parameters to learn and their loss. Its ``steps`` and ``parallel`` have no effect here,
            because the Trainer decides when to stop; nor has ``stop_loss`` without tasks.
        optimizer: by default Adam with the method's ``lr`` and ``weight_decay``.
        generate_tokens: length of freely generated answers; 0 leaves them out, as they take several times as long
            as all other measures.
        scheduler: changes the learning rate after every step; by default it is constant.
        perplexity: plain text whose perplexity is computed in every evaluation.
    """

    trains_on = "edits"
    ends_targets: ClassVar[bool] = False
    """Whether a target is followed by the end-of-text token."""

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        optimizer: OptimizerCallable | None = None,
        generate_tokens: int = 0,
        scheduler: LRSchedulerCallable | None = None,
        perplexity: Corpus | None = None,
    ) -> None:
        super().__init__(lm, generate_tokens, perplexity)
        self.automatic_optimization = True
        self.method, self.optimizer, self.scheduler = method, optimizer, scheduler
        self._started = self._ended = 0  # tasks
        self._pass = [0.0, 0.0]  # sum of the losses of this pass over the task, number of edits
        # Parameter names contain dots, which keys of a ParameterDict may not.
        self.learned = nn.ParameterDict(
            {name.replace(".", "/"): leaf.detach() for name, leaf in method.start(lm, 1).items()}
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if needs_substitution(self.lm.net, [self.own_delta()]):
            require_unsharded(self.trainer, self.method_name)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): leaf for name, leaf in self.learned.items()}

    @property
    def method_name(self) -> str:
        own, method = type(self).__name__, type(self.method).__name__
        return method if type(self) is FineTune else f"{own} ({method})"

    @property
    def trained(self) -> bool:
        return any(
            bool(u.left_Or.any() and u.right_rI.any() if isinstance(u, LowRank) else u.any())
            for u in self.own_delta().updates.values()
        )

    def update(self) -> Delta:
        """The update as it is now, differentiable in what is learned."""
        return self.method.deltas(self.lm, self.leaves)[0]

    def own_delta(self) -> Delta:
        return self.update().detach()

    def delta(self, edits: Sequence[Edit] = ()) -> Delta:
        """The learned update with base model and ``edits`` in its metadata, as it is saved."""
        return copy.deepcopy(self.method.stamp(self.lm, self.own_delta(), edits))

    # ------------------------------------------------------------------ one loss

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor | None:
        """The loss of a batch's edits; None, which makes no step, for a batch without any."""
        edits = [edit for case in batch for edit in case.edits]
        loss = None
        if edits:
            loss = self.loss([e.text for e in edits], [e.target_new for e in edits])
            total, count = self._pass
            self._pass = [total + len(edits) * loss.item(), count + len(edits)]
        passes, rest = divmod(batch_idx + 1, self.batches_per_pass)
        if rest == 0:
            self._end_pass(passes if self.tasks else self.current_epoch + 1)
        return loss

    def loss(self, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Mean loss of the targets after their prompts under the current update, plus the penalty; both logged."""
        rows = self.target_rows(prompts, targets)
        row_K, position_K = self.also_read(rows)
        row_N, position_N = rows.answers_N
        places = torch.cat([row_N, row_K]), torch.cat([position_N, position_K])
        logits = rows.logits(self.lm, [self.update()], *places)
        loss = rows.nll(logits[: len(row_N)]).mean()
        self.log("train/loss", loss, batch_size=len(prompts), prog_bar=True)
        penalty = self.penalty(rows, logits[len(row_N) :])
        if penalty is None:
            return loss
        self.log("train/penalty", penalty, batch_size=len(prompts))
        return loss + penalty

    def target_rows(self, prompts: Sequence[str], targets: Sequence[str]) -> TargetRows:
        """Rows of prompts with their targets, and where their loss is read."""
        rows = self.lm.tokens.rows(prompts, targets, self.ends_targets)
        owner_R = torch.zeros(len(prompts), dtype=torch.long, device=self.lm.device)
        layer = self.method.lowest_layer(self.lm)
        return TargetRows.of(self.lm, rows, owner_R, layer, self.method.loss)

    def also_read(self, rows: TargetRows) -> tuple[Tensor, Tensor]:
        """(row_K, position_K) whose logits the penalty needs; none by default."""
        return rows.row_N[:0], rows.position_N[:0]

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        """What a step's loss has besides that of the batch; nothing by default.

        Args:
            rows: the batch's rows.
            logits_KV: those after the positions of :meth:`also_read`, under the current update.
        """
        return None

    # ------------------------------------------------------------------ tasks

    def begin_task(self, cases: Sequence[EditCase]) -> None:
        """Called before the first step on a task; once, also if the run is interrupted."""

    def end_task(self, cases: Sequence[EditCase]) -> None:
        """Called after the last step on a task, at the latest before the next task. It may not change what the
        model answers: the task has been evaluated."""

    @property
    def tasks(self) -> list[list[EditCase]]:
        """The cases of each task, which is an epoch of the trainer; empty if there are no tasks."""
        stream = getattr(self.trainer.datamodule, "tasks", None)  # type: ignore[attr-defined]
        loader: Any = self.trainer.train_dataloader
        return loader.tasks if stream else []

    @property
    def batches_per_pass(self) -> int:
        """Batches in one pass over a task; without tasks an epoch is a pass."""
        loader: Any = self.trainer.train_dataloader
        return loader.batches_per_pass if self.tasks else int(self.trainer.num_training_batches)

    def _end_pass(self, passes: int) -> None:
        """Leaves out the rest of the task, or without tasks that of the training, if it is learned."""
        total, count = self._pass
        self._pass = [0.0, 0.0]
        if not self.is_learned(passes, total / max(count, 1)):
            return
        loader: Any = self.trainer.train_dataloader
        if self.tasks:
            loader.end_task()
        else:
            self.trainer.should_stop = True

    def is_learned(self, passes: int, loss: float) -> bool:
        """Whether to stop after so many passes, the last of which had this mean loss."""
        return bool(self.tasks) and loss < self.method.stop_loss

    def on_train_batch_start(self, batch: list[EditCase], batch_idx: int) -> None:
        """Not when an epoch starts: Lightning leaves that out in a run that goes on after an evaluation."""
        now, tasks = self.current_epoch, self.tasks
        if self._started > now or now >= len(tasks):
            return
        self._end_tasks(now)
        if now > 0:
            self.trainer.strategy.setup_optimizers(self.trainer)
        self.begin_task(tasks[now])
        self._started = now + 1

    def on_train_epoch_end(self) -> None:
        self._end_tasks(self.current_epoch + 1)

    def _end_tasks(self, count: int) -> None:
        """Ends the first ``count`` tasks, those that have not ended."""
        for cases in self.tasks[self._ended : count]:
            with torch.enable_grad():
                self.end_task(cases)
            self._ended += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._started:
            checkpoint["tasks"] = {"started": self._started, "ended": self._ended}
        checkpoint["pass"] = self._pass

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, part in self.named_children():
            if isinstance(part, Kept):
                part.make_room(checkpoint["state_dict"], f"{name}.")
        super().on_load_checkpoint(checkpoint)
        progress = checkpoint.get("tasks", {"started": 0, "ended": 0})
        self._started, self._ended = progress["started"], progress["ended"]
        self._pass = list(checkpoint.get("pass", self._pass))

    # ------------------------------------------------------------------ one loop

    def configure_optimizers(self) -> OptimizerLRScheduler:
        learned = self.learned.parameters()
        optimizer = (
            torch.optim.Adam(learned, lr=self.method.lr, weight_decay=self.method.weight_decay)
            if self.optimizer is None
            else self.optimizer(learned)
        )
        if self.scheduler is None:
            return optimizer
        schedule: Any = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Projects as part of the step, so a checkpoint written right after it satisfies the constraints."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.method.project(self.lm, self.leaves)
