"""The training of learned editors: on edits, their paraphrases and locality facts.

A training step makes each case's edit with the current editor, scores the edited models on a paraphrase with the
new answer, and compares their distribution on unrelated text with the base model's (Mitchell et al., 2022, arXiv
2110.11309):

    loss = c_edit * NLL(edited; paraphrase) + c_loc * KL(base || edited; unrelated)

Both are means over cases of means over a case's tokens.
"""

from __future__ import annotations

import logging
import math
import random
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.evaluation.measures import LOCALITY_CRITERIA
from corrigenda.modules.lightning_internals import reset_train_loader
from corrigenda.modules.model.delta import Delta, EditError, add_deltas
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.tail import Tail
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.modules.training.drift import drift
from corrigenda.modules.training.sharding import TrainedModule

log = logging.getLogger(__name__)


class LearnedEditor(TrainedModule, WeightEditor):
    """An editor with trainable weights of its own, trained by ``fit``.

    Args:
        lm: the language model to edit; it is never changed.
        c_edit: weight of the edit loss.
        c_loc: weight of the locality loss.
        scale: factor of updates when edits are made, not in training. Slightly below 1 it often improves locality
            at no cost in efficacy.
        together: training cases whose edits are summed into one update, as for a batch of edits.
        generate_tokens: length of freely generated answers; 0 leaves them out.
    """

    trains_on: ClassVar[str] = "train"
    names: list[str]  # paths of the edited matrices
    training_time: Tensor
    num_skipped: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        scale: float = 1.0,
        together: int = 1,
        generate_tokens: int = 0,
    ) -> None:
        super().__init__(lm, generate_tokens)
        checks.at_least(0, c_edit=c_edit, c_loc=c_loc)
        checks.positive(scale=scale)
        checks.whole(1, together=together)
        self.automatic_optimization = True
        self.save_hyperparameters(
            ignore="lm", logger=False
        )  # a checkpoint is enough to build the editor
        self.c_edit, self.c_loc, self.scale, self.together = c_edit, c_loc, scale, together
        self.register_buffer("training_time", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_skipped", torch.zeros((), dtype=torch.int64))
        self._step_started = 0.0
        self._seed = torch.initial_seed()  # of the run

    @property
    def training_seconds(self) -> float:
        """Time spent in training steps, including those before an interruption."""
        return float(self.training_time)

    @property
    def trained(self) -> bool:
        return self.training_seconds > 0

    # ------------------------------------------------------------------ to be implemented by a method

    @property
    @abstractmethod
    def lowest_layer(self) -> int:
        """The lowest block with an edited matrix; its inputs are cached during training."""

    @property
    def _joins(self) -> bool:
        """Whether a training update depends on several cases."""
        return self.together > 1

    @abstractmethod
    def deltas(self, tail: Tail, rows: Rows, owner_B: Tensor, num_edits: int) -> list[Delta]:
        """Each edit's update, differentiable in the editor's weights.

        Args:
            tail: the rows, with the lower blocks already run.
            rows: one row per edit text, with its target.
            owner_B: the index of the edit that each row belongs to.
            num_edits: number of edits, E.
        """

    # ------------------------------------------------------------------ editing

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        owners = [e for e, group in enumerate(edits) for _ in group]
        flat = [edit for group in edits for edit in group]
        rows = lm.tokens.rows([edit.text for edit in flat], [edit.target_new for edit in flat])
        owner_B = torch.tensor(owners, device=lm.device)
        with torch.no_grad():
            tail = lm.reuse.tail(rows.without_last(), self.lowest_layer)
        deltas = self.deltas(tail, rows, owner_B, len(edits))
        return [delta.detach().scaled(self.scale) for delta in deltas]

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return add_deltas(self.propose_each(lm, [edits]))

    def observe(self, cases: Sequence[EditCase]) -> None:
        """Computes statistics of training cases that the method needs before its first step; none by default."""

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["matrices"], checkpoint["editor"] = self.names, type(self).__name__

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        lm: LanguageModel | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """A trained editor with the settings of its training.

        Args:
            checkpoint_path: a file that ``fit`` has written.
            lm: the language model it was trained for; loaded by its name if not given.
            settings: constructor arguments that differ from those in the checkpoint.

        Raises EditError for a file of another kind, and ValueError for one of another base model.
        """
        found = read_checkpoint(checkpoint_path, "hyper_parameters", "editor", of=cls.__name__)
        kinds: list[type[LearnedEditor]] = [cls]
        for kind in kinds:
            kinds += kind.__subclasses__()
        named = {kind.__name__: kind for kind in kinds}
        if found["editor"] not in named:
            raise EditError(
                f"{checkpoint_path} is of a {found['editor']}, which is not a {cls.__name__} that is imported"
            )
        saved = {k: v for k, v in found["hyper_parameters"].items() if k != "lm" and k[0] != "_"}
        lm = lm or LanguageModel(found["base_model"]["name"], chat="chat" in found["base_model"])
        editor: Any = named[found["editor"]](lm, **(saved | settings))
        editor.on_load_checkpoint(found)
        editor.load_state_dict(found["state_dict"], strict=False)
        return editor.to(lm.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        matrices = checkpoint.get("matrices", self.names)
        if matrices != self.names:
            raise ValueError(
                f"this checkpoint edits {', '.join(matrices)}, this model {', '.join(self.names)}: "
                "use the same --model.layers and --model.projections"
            )

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self._joins and self.trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} combines several training cases in one update here, of which each process "
                "would see only some: train it with --trainer.devices 1"
            )

    def on_fit_start(self) -> None:
        if not self.is_sharded:  # or a pass would be left out by some processes only
            self.lm.reuse.keep(self.lowest_layer, self.lm.structure.num_layers)

    def on_fit_end(self) -> None:
        self.lm.reuse.drop()

    def on_train_start(self) -> None:
        """A new run computes its statistics and saves the untrained editor, to compare the trained one with."""
        if self.global_step > 0 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        cases = list(self.trainer.datamodule.cases("train"))  # type: ignore[attr-defined]
        random.Random(0).shuffle(cases)
        self.observe(cases)
        path = Path(self.trainer.default_root_dir) / "checkpoints" / "initial.ckpt"
        self.trainer.save_checkpoint(path, weights_only=False)

    def on_train_batch_start(self, batch: list[EditCase], batch_idx: int) -> None:
        self._step_started = time.perf_counter()

    def on_after_backward(self) -> None:
        """Also without a step, where gradients are accumulated."""
        super().on_after_backward()
        self._count_time()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Also counts the step's time: a checkpoint written right after it includes that."""
        super().optimizer_step(*args, **kwargs)
        self._count_time()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.training_time += now - self._step_started
        self._step_started = now

    def training_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """One step on a batch of independent edits; a step with a non-finite loss is skipped, counted and logged.

        Losses are means over cases, so several processes with equal parts of a batch make the same step as one
        process with the whole batch.
        """
        edit_loss, kl = self._losses(*self._choose(batch))
        loss = self.objective(edit_loss, kl)
        values = {"train/loss": loss, "train/edit_loss": edit_loss, "train/kl": kl}
        if torch.isfinite(loss) or self.trainer.world_size > 1:
            self.log_dict(values, batch_size=len(batch), sync_dist=True)
            self.log("train/skipped", self.num_skipped.float(), batch_size=len(batch))
        if torch.isfinite(loss):
            return loss
        if self.trainer.world_size > 1:  # makes the gradient non-finite in every process
            return loss * torch.nan
        self._skip("the loss")
        return None

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean over processes that train together."""
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="mean"))

    def _skip(self, what: str) -> None:
        self.num_skipped += 1
        log.warning("step %d: %s is not finite; the step is skipped (%d so far)",
                    self.global_step, what, int(self.num_skipped))  # fmt: skip

    def objective(self, edit_loss: Tensor, kl: Tensor) -> Tensor:
        """The training loss."""
        return self.c_edit * edit_loss + self.c_loc * kl

    def scheduled(
        self, optimizer: torch.optim.Optimizer, warm_up: int, floor: float = 0.05
    ) -> OptimizerLRScheduler:
        """The optimizer with a schedule: linear warm-up over ``warm_up`` steps, then cosine decay to ``floor``."""
        total = int(self.trainer.estimated_stepping_batches)
        reset_train_loader(self.trainer)  # which that has set up too early

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            share = min(1.0, (step - warm_up) / max(1, total - warm_up))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skips a step with a non-finite gradient."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._skip("a gradient")
            optimizer.zero_grad()

    def _choose(self, batch: list[EditCase]) -> tuple[list[Edit], list[Probe], list[Probe]]:
        """For each case its edit, one paraphrase (or the edit's own prompt) and one locality probe.

        The choice depends only on the run's seed, the epoch and the case, so it is the same in resumed runs and
        with several processes.
        """
        edits, outer, local = [], [], []
        for case in batch:
            draw = random.Random(f"{self._seed} {self.current_epoch} {case.case_id}")
            edits.append(case.edits[0])
            same, *others = case.phrasings
            outer.append(draw.choice(others) if others and draw.random() < 0.5 else same)
            probes = [
                probe
                for name in LOCALITY_CRITERIA
                for probe in case.probes.get(name, ())
                if probe.target
            ]
            local.append(draw.choice(probes or [self._other_prompt(case, draw)]))
        return edits, outer, local

    def _other_prompt(self, case: EditCase, draw: random.Random) -> Probe:
        """Another case's own prompt, for a case without locality probes."""
        cases: Sequence[EditCase] = self.trainer.datamodule.cases("train")  # type: ignore[attr-defined]
        others = [other for other in draw.sample(cases, min(2, len(cases))) if other is not case]
        edit = (others or [case])[0].edits[0]
        return Probe(edit.text, edit.target_true or edit.target_new)

    def _losses(
        self, edits: list[Edit], outer: list[Probe], local: list[Probe]
    ) -> tuple[Tensor, Tensor]:
        """(edit loss, locality KL); all three kinds of rows share one pass through the lower blocks."""
        count = len(edits)
        rows, tail = self._encoded(edits, outer, local)
        index = torch.arange(3 * count, device=self.lm.device)
        inner, scored = index[:count], index[count:]
        owner_E = inner // self.together
        num_updates = int(owner_E[-1]) + 1
        deltas = self.deltas(tail.select(inner).trimmed(), rows.select(inner), owner_E, num_updates)
        scored_rows, scored_tail = rows.select(scored), tail.select(scored).trimmed()
        answer_N, local_N = _training_positions(scored_rows, count)
        with self.lm.edits.side_by_side(deltas, torch.cat([owner_E, owner_E])):
            logits = scored_tail.logits(*torch.cat([answer_N, local_N], 1))
        answer_NV, local_NV = logits.split([answer_N.shape[1], local_N.shape[1]])
        with torch.no_grad():
            row_N, position_N = local_N
            local_tail = scored_tail.select(index[count : 2 * count])
            base_tail = self.lm.reuse.higher(local_tail, self.lm.structure.num_layers)
            base_NV = base_tail.logits(row_N - count, position_N)
        row_N, position_N = answer_N
        target_N = scored_rows.ids_BT[row_N, position_N + 1]
        nll_N = cross_entropy(answer_NV.float(), target_N, reduction="none")
        edit_loss = _mean_of_means(nll_N, row_N, count)
        return edit_loss, _mean_of_means(drift(base_NV, local_NV), local_N[0] - count, count)

    def _encoded(
        self, edits: list[Edit], outer: list[Probe], local: list[Probe]
    ) -> tuple[Rows, Tail]:
        """Rows of edits, paraphrases and locality probes, in this order, and their states above the lower blocks.

        Only the locality rows need logits at their last token.
        """
        prompts = [e.text for e in edits] + [p.prompt for p in (*outer, *local)]
        targets = [e.target_new for e in edits] + [str(p.target) for p in (*outer, *local)]
        rows = self.lm.tokens.rows(prompts, targets)
        tail = self.lm.reuse.tail(rows.without_last(2 * len(edits)), self.lowest_layer)
        return rows, tail


def chosen_blocks(lm: LanguageModel, layers: Sequence[int] | None, last: int) -> list[int]:
    """The given blocks in ascending order; by default the model's last ``last`` blocks."""
    checks.blocks(layers=layers)
    count = lm.structure.num_layers
    return list(range(max(0, count - last), count)) if layers is None else sorted(layers)


def mlp_matrices(
    lm: LanguageModel, layers: Sequence[int], projections: Literal["mlp", "out"]
) -> list[str]:
    """Paths of the MLP matrices of some blocks: all of them (``mlp``) or the output projections (``out``)."""
    structure = lm.structure
    if projections == "out":
        return [structure.out_name(layer) for layer in layers]
    return [name for layer in layers for name in structure.mlp_names(layer)]


def _training_positions(rows: Rows, count: int) -> tuple[Tensor, Tensor]:
    """(row, position) of the first ``count`` rows' target tokens, and of all tokens of the others; [2, N] each."""
    answer_N = torch.stack(rows.answer_positions())
    local_N = rows.mask_BT.bool().nonzero().T
    return answer_N[:, answer_N[0] < count], local_N[:, local_N[0] >= count]


def _mean_of_means(values_N: Tensor, row_N: Tensor, count: int) -> Tensor:
    """Mean over rows of each row's mean."""
    sums = values_N.new_zeros(count).index_add(0, row_N, values_N)
    return (sums / torch.bincount(row_N, minlength=count)).mean()
