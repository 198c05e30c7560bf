"""Fine-tuning as an editor: an update learned by gradient descent on the edits' loss.

Subclasses define the update's parameters (a dense matrix, two factors) and its constraints. This module holds the
loss and the optimisation of many independent edits side by side. The network's weights are never written: the
update runs as a side branch, and blocks below the lowest tuned one run once.

Shapes: E independent problems, R rows (one per edit), N target tokens.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.evaluation.requirements import require_unsharded
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.substitution import needs_substitution
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.kept import Kept
from corrigenda.modules.training.optimize import IndependentAdam
from corrigenda.modules.training.sharding import TrainedModule
from corrigenda.modules.training.target_rows import Loss, TargetRows

log = logging.getLogger(__name__)

MAX_ELEMENTS = 2**26  # learned together; gradient and Adam's moments take three times as much again
CHUNK_TOKENS = 2048  # padded tokens of one forward and backward pass


class GradientEditor(WeightEditor):
    """Learns an update with Adam, initialised to no change.

    Args:
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
        weight_decay: L2 decay of the learned update towards zero, so of the weights towards the base model's.
        loss: ``target`` is the mean negative log-likelihood of the target's tokens, each given the previous ones.
            ``prompt_last`` is that of the published FT and FT-L: every target token is predicted at the last
            position of the prompt. With m different tokens it cannot fall below log m, and it does not depend on
            their order.
        parallel: independent edits learned together; fewer if their updates are large.
    """

    def __init__(
        self,
        steps: int,
        lr: float,
        stop_loss: float,
        weight_decay: float = 0.0,
        loss: Loss = "target",
        parallel: int = 8,
    ) -> None:
        checks.whole(1, steps=steps, parallel=parallel)
        checks.positive(lr=lr)
        checks.at_least(0, stop_loss=stop_loss, weight_decay=weight_decay)
        self.steps, self.lr, self.stop_loss = steps, lr, stop_loss
        self.weight_decay, self.loss, self.parallel = weight_decay, loss, parallel

    @abstractmethod
    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        """The initial parameters by name, E = ``count`` copies of an update of zero; [E, ...], float32.

        Random ones differ from one ``task`` to the next.
        """

    @abstractmethod
    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        """The E updates parametrised by the leaves, differentiable in them."""

    @abstractmethod
    def lowest_layer(self, lm: LanguageModel) -> int:
        """The lowest block that is changed."""

    def project(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Projects the leaves onto the allowed set, in place; called after each step."""

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One update for all edits, learned on their mean loss."""
        return self._learn(lm, [edits])[0]

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        size = sum(leaf.numel() for leaf in self.start(lm, 1).values())
        count = max(1, min(self.parallel, MAX_ELEMENTS // size))
        deltas: list[Delta] = []
        for begin in range(0, len(edits), count):
            deltas += self._learn(lm, edits[begin : begin + count])
        return deltas

    def _learn(self, lm: LanguageModel, groups: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per group, each independent of the other groups."""
        leaves = self.start(lm, len(groups))
        problems = Problems.of(self, lm, groups)
        adam = IndependentAdam(list(leaves.values()), self.lr, weight_decay=self.weight_decay)
        loss_E = torch.zeros(len(groups), device=lm.device)
        updates_E = torch.zeros(len(groups), dtype=torch.long, device=lm.device)
        active_E = torch.ones(len(groups), dtype=torch.bool, device=lm.device)
        for _ in range(self.steps):
            now_E, gradients = problems.gradients(leaves)
            loss_E = torch.where(active_E, now_E, loss_E)
            unfinished_E = active_E & (now_E >= self.stop_loss)  # also False for NaN
            if not unfinished_E.any():
                break
            if not torch.equal(unfinished_E, active_E):
                active_E, problems = unfinished_E, problems.select(unfinished_E)
            adam.step(gradients, active_E)
            updates_E += active_E
            self.project(lm, leaves)
        deltas = [delta.detach() for delta in self.deltas(lm, leaves)]
        for delta, group, loss, updates in zip(
            deltas, groups, loss_E.tolist(), updates_E.tolist(), strict=True
        ):
            delta.metadata["notes"] = [{"loss": loss, "updates": updates}]
            if not math.isfinite(loss):
                log.warning("%r: the edit has failed, its loss is %s after %d steps; try a smaller lr",
                            group[0].text, loss, updates)  # fmt: skip
        return deltas


# ---------------------------------------------------------------------------- independent problems


@dataclass(frozen=True)
class Problems:
    """The losses of E groups of edits, each a function of its own update alone.

    Attributes:
        size_E: number of edits in each group, whose losses are averaged.
        chunks: the rows, in chunks that fit into memory.
    """

    editor: GradientEditor
    lm: LanguageModel
    size_E: Tensor
    chunks: list[TargetRows]

    @classmethod
    def of(
        cls, editor: GradientEditor, lm: LanguageModel, groups: Sequence[Sequence[Edit]]
    ) -> Problems:
        edits = [edit for group in groups for edit in group]
        rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        size_E = torch.tensor([len(group) for group in groups], device=lm.device)
        owner_R = torch.arange(len(groups), device=lm.device).repeat_interleave(size_E)
        layer = editor.lowest_layer(lm)
        chunks = [
            TargetRows.of(lm, rows.select(index), owner_R[index], layer, editor.loss)
            for index in _chunk_indices(rows)
        ]
        return cls(editor, lm, size_E, chunks)

    def gradients(self, leaves: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(loss_E, gradients of the sum of losses in the leaves); each leaf belongs to one problem."""
        loss_E = torch.zeros(len(self.size_E), device=self.lm.device)
        total: list[Tensor] = []
        for chunk in self.chunks:
            loss_R = chunk.losses(self.lm, self.editor.deltas(self.lm, leaves))
            share_R = loss_R / self.size_E[chunk.owner_R]
            part = torch.autograd.grad(share_R.sum(), list(leaves.values()))
            total = [a + b for a, b in zip(total, part, strict=True)] if total else list(part)
            loss_E = loss_E.index_add(0, chunk.owner_R, share_R.detach())
        return loss_E, total

    def select(self, active_E: Tensor) -> Problems:
        """Without the rows of finished problems; the other problems keep their indices."""
        chunks = [part for chunk in self.chunks if (part := chunk.select(active_E)) is not None]
        return Problems(self.editor, self.lm, self.size_E, chunks)


def _chunk_indices(rows: Rows) -> Iterator[Tensor]:
    """Row indices, longest first, in chunks of at most CHUNK_TOKENS padded tokens."""
    order = rows.length_B.argsort(descending=True, stable=True)
    while len(order):
        count = max(1, CHUNK_TOKENS // int(rows.length_B[order[0]]))
        yield order[:count]
        order = order[count:]


# ---------------------------------------------------------------------------- training with fit


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
        method: defines the parameters to learn and their loss. Its ``steps``, ``stop_loss`` and ``parallel`` have
            no effect here, because the Trainer decides when to stop.
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
        if not edits:
            return None
        return self.loss([e.text for e in edits], [e.target_new for e in edits])

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

    def stop_task(self) -> None:
        """Leaves out the rest of this task; without tasks, that of the training."""
        loader: Any = self.trainer.train_dataloader
        if self.tasks:
            loader.end_task()
        else:
            self.trainer.should_stop = True

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, part in self.named_children():
            if isinstance(part, Kept):
                part.make_room(checkpoint["state_dict"], f"{name}.")
        super().on_load_checkpoint(checkpoint)
        progress = checkpoint.get("tasks", {"started": 0, "ended": 0})
        self._started, self._ended = progress["started"], progress["ended"]

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
