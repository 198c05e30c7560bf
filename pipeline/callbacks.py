"""When edits are applied and removed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import processes
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.editor import Editor, WeightEditor, editing_mode
from corrigenda.modules.editing.memory import MemoryEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.evaluation.measures import CaseResult
from corrigenda.modules.evaluation.module import Conditions, EditingModule
from corrigenda.modules.files import file_name
from corrigenda.modules.lightning_internals import epochs_started
from corrigenda.modules.metrics import FactsForgotten
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.handle import EditHandle
from corrigenda.pipeline.board import Axes
from corrigenda.pipeline.cost import Cost, Stopwatch, peak_gib, query_cost
from corrigenda.pipeline.schedules import INDEPENDENT, Schedule, require_one_pass, require_possible
from corrigenda.pipeline.tasks import tasks_of

log = logging.getLogger(__name__)


class EditCallback(Callback):
    """Applies edits before they are evaluated and removes them afterwards.

    Args:
        editor: the method; by default the LightningModule itself if it is an editor, else none.
        schedule: ``each``: every case of a validation batch independently, side by side. ``batch``: the cases of
            a validation batch together. ``epoch``: all cases together, once per validation. ``stream`` (with
            ``fit``): the cases of a training batch per step, never removed; validation covers all cases edited
            so far.
        save_edits: save every edit as a file in the run folder.
    """

    def __init__(
        self,
        editor: Editor | None = None,
        schedule: Schedule = "each",
        save_edits: bool = True,
    ) -> None:
        self.editor, self.schedule, self.save_edits = editor, schedule, save_edits
        self.num_edits = 0  # active on the evaluated model
        self.cost = Cost()  # of this process, and of those before it was interrupted
        self.current: list[CaseResult] = []  # results of the stream's last step
        self.accepts: Callable[[list[EditCase]], bool] = lambda _: (
            True
        )  # decides on a stream's step
        self.undone: list[EditCase] = []  # cases of the stream's last step, if it was not accepted
        self._num_undone = 0
        self._handles: list[EditHandle] = []
        self._done: dict[str, None] = {}  # case ids edited so far, in order
        self._edited: frozenset[str] = frozenset()  # their prompts
        self._forgotten = FactsForgotten()
        self._axes = Axes()
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        pl_module.conditions = Conditions()
        if self.editor is None and isinstance(pl_module, Editor):
            self.editor = pl_module
        if self.editor:
            self.editor.check(pl_module.lm)  # before known_only scores the cases
        fitting = trainer.state.fn == TrainerFn.FITTING
        require_possible(self.schedule, self.editor, pl_module, fitting)
        if self.schedule == "stream":
            tasks = tasks_of(trainer)
            if tasks is None:
                pl_module.conditions = Conditions(only_cases=self._done.keys())
                # Without a limit Lightning would start further epochs and repeat all edits.
                trainer.fit_loop.max_epochs = 1
            else:
                require_one_pass(tasks)

    def on_fit_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        try:
            self._restore(pl_module, trainer.is_global_zero)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise EditError(f"{trainer.ckpt_path}: its edits cannot be restored: the file is damaged or was "
                            f"written by another program ({error})") from error  # fmt: skip

    def _prepare(self, pl_module: EditingModule) -> Editor:
        """The editor with its statistics computed, timed separately from the edits."""
        editor = cast(Editor, self.editor)
        with Stopwatch(pl_module.lm) as watch, editing_mode():
            editor.prepare(pl_module.lm)
        self.cost += Cost(prepare_seconds=watch.stop().seconds)
        return editor

    # ------------------------------------------------------------------ each

    def _propose_each(self, trainer: Trainer, module: EditingModule, batch: list[EditCase]) -> None:
        editor = self._prepare(module)
        # The loss of requantising is only visible where weights are written.
        if not isinstance(editor, WeightEditor) or module.lm.requantize:
            module.conditions = Conditions(
                around_case=lambda case: self._active(trainer, module, case)
            )
            return
        for case in batch:
            editor.check_edits(case.edits)
        with Stopwatch(module.lm) as watch, editing_mode():
            deltas = editor.propose_each(module.lm, [case.edits for case in batch])
        self.cost += watch.stop() + Cost(made=len(batch))
        stamped = [
            editor.stamp(module.lm, delta, case.edits)
            for delta, case in zip(deltas, batch, strict=True)
        ]
        module.conditions = Conditions(case_deltas=stamped)
        for delta, case in zip(stamped, batch, strict=True):
            self.cost += Cost(touched=delta.num_parameters, bytes=delta.num_bytes)
            self._save(trainer, delta, case.case_id)

    @contextmanager
    def _active(self, trainer: Trainer, module: EditingModule, case: EditCase) -> Iterator[None]:
        handle = self._edit(trainer, module, [case], case.case_id)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------ together

    def _edit(
        self, trainer: Trainer, module: EditingModule, cases: list[EditCase], name: str
    ) -> EditHandle:
        handle = self._make(module, cases, name)
        self._save(trainer, handle, name)
        return handle

    def _make(self, module: EditingModule, cases: list[EditCase], name: str) -> EditHandle:
        editor = self._prepare(module)
        edits = [edit for case in cases for edit in case.edits]
        with Stopwatch(module.lm) as watch, editing_mode():
            handle = editor.edit(module.lm, edits)
        size = Cost(made=len(cases), touched=handle.num_parameters, bytes=handle.num_bytes)
        self.cost += watch.stop() + size + query_cost(module.lm, edits)
        if not self._differ:
            processes.require_alike(handle.digest(), f"the edit {name!r}")
        return handle

    @property
    def _differ(self) -> bool:
        """Whether every process makes edits of its own; otherwise all make the same."""
        return self.schedule in INDEPENDENT

    def _save(self, trainer: Trainer, edit: Delta | EditHandle, name: str) -> None:
        if self.save_edits and (self._differ or trainer.is_global_zero):
            edit.save(Path(trainer.default_root_dir) / "edits" / f"{file_name(name)}.safetensors")

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if trainer.sanity_checking:
            return
        is_tuned = pl_module.method_name is not None and pl_module.trains_on == "edits"
        tasks = tasks_of(trainer)
        if self.schedule != "epoch" and not is_tuned and tasks is None:
            return
        cases = trainer.datamodule.val_dataloader().cases  # type: ignore[attr-defined]
        pl_module.conditions = Conditions(edited=_prompts(cases))
        if tasks is not None and self.schedule != "stream":
            self.num_edits = tasks.learned(epochs_started(trainer))
        elif self.schedule == "epoch" if self.editor else is_tuned:
            self.num_edits = len(cases)  # a fine-tuned model has every edit that it was trained on
            if self.editor:
                self._handles = [self._edit(trainer, pl_module, cases, "all")]

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: EditingModule,
        batch: list[EditCase],
        batch_idx: int,
        *_: object,
    ) -> None:
        if self.schedule == "batch":
            pl_module.conditions = Conditions(edited=_prompts(batch))
        if self.editor is None or trainer.sanity_checking:
            return
        left = pl_module.unmeasured(batch)
        if self.schedule == "each":
            self.num_edits = 1
            if left:
                self._propose_each(trainer, pl_module, left)
        elif self.schedule == "batch":
            self.num_edits = len(batch)
            if left:
                name = f"batch-{batch_idx * trainer.world_size + trainer.global_rank:06d}"
                self._handles = [self._edit(trainer, pl_module, batch, name)]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: EditingModule,
        outputs: Any,  # noqa: ANN401
        *_: object,
    ) -> None:
        if self.schedule == "batch":
            self._remove()
        elif self.schedule == "each":
            pl_module.conditions = Conditions()
        elif self.schedule == "stream" and not trainer.sanity_checking:
            done = [result for result in outputs["results"] if result.case.case_id in self._done]
            self._track_forgetting(done, "retention")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if self.schedule == "epoch":
            self._remove()
        if self.editor is None or trainer.sanity_checking:
            return
        pl_module.log("edit/num_edits", float(self.num_edits))
        pl_module.log("edit/seconds", self.cost.seconds / max(self.cost.made, 1))
        pl_module.log("edit/peak_gib", max(peak_gib(), self.cost.peak_gib))
        if self.schedule == "stream":
            pl_module.log("val/efficacy/forgotten", self._forgotten.compute())

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._axes.choose(trainer, self.schedule == "stream", trainer.callback_metrics)

    @property
    def done(self) -> list[str]:
        """Ids of the cases that a stream has edited so far, in order."""
        return list(self._done)

    @property
    def accepted(self) -> float | None:
        """Share of a stream's edits that were accepted; None without a stream."""
        made = len(self._done) + self._num_undone
        return len(self._done) / made if self.schedule == "stream" and made else None

    @property
    def active(self) -> list[EditHandle]:
        """Handles of the edits that this callback has made and not removed."""
        return list(self._handles)

    def total_cost(self) -> Cost:
        """What edits and queries have cost so far, over all processes and including interrupted ones before.

        Every process must call this, because processes that share the cases add up their costs.
        """
        cost = replace(self.cost, peak_gib=max(peak_gib(), self.cost.peak_gib))
        if processes.are_several() and self._differ:
            every = processes.gather(cost)
            cost = replace(sum(every, Cost()), prepare_seconds=cost.prepare_seconds)
        return replace(cost, counts=dict(self.editor.counts) if self.editor else {})

    def add_cost(self, earlier: Cost, is_global_zero: bool = True) -> None:
        """Adds the cost of an interrupted run; where processes add up their costs, to the first one only."""
        if is_global_zero or not self._differ:
            self.cost += earlier
            if self.editor:
                self.editor.counts.update(earlier.counts)
        else:
            self.cost += Cost(touched=earlier.touched, peak_gib=earlier.peak_gib)

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # ------------------------------------------------------------------ stream

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: EditingModule, batch: list[EditCase], batch_idx: int
    ) -> None:
        self.current, self.undone = [], []
        if self.schedule != "stream" or not batch:  # a task may have fewer batches than others
            return
        name = f"step-{trainer.global_step:06d}"
        new = self._make(pl_module, batch, name)
        if not self.accepts(batch):  # before it becomes one with the earlier ones
            new.remove()
            self.undone = batch
            self._num_undone += len(batch)
            return
        self._save(trainer, new, name)
        last = self._handles[-1] if self._handles else None
        if last is not None and last.can_absorb(new):
            last.absorb(new)
        else:
            self._handles.append(new)
        self._done |= {case.case_id: None for case in batch}
        self.num_edits = len(self._done)
        self._edited |= _prompts(batch)
        pl_module.conditions = self._stream_conditions(trainer)
        self.current = pl_module.evaluate(batch)
        self._track_forgetting(self.current, "current")
        names = {name for result in self.current for name in result.metrics}
        for name in sorted(names):
            values = [r.metrics[name] for r in self.current if name in r.metrics]
            pl_module.log(f"current/{name}", fmean(values), batch_size=len(batch))
        pl_module.log("edit/num_edits", float(self.num_edits), batch_size=len(batch))

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """All edits are evaluated after a stream's last step, whatever the validation interval."""
        is_last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.schedule == "stream" and (is_last or trainer.global_step == trainer.max_steps):
            trainer.should_stop = True
        self._axes.choose(trainer, self.schedule == "stream", trainer.callback_metrics)

    def _stream_conditions(self, trainer: Trainer) -> Conditions:
        """Of tasks all cases are evaluated, and always the same probes of them."""
        if (tasks := tasks_of(trainer)) is not None:
            return Conditions(edited=_prompts([case for task in tasks.cases for case in task]))
        return Conditions(only_cases=self._done.keys(), edited=self._edited)

    def _track_forgetting(
        self, results: list[CaseResult], phase: Literal["current", "retention"]
    ) -> None:
        ids = [r.case.case_id for r in results if "efficacy/exact" in r.metrics]
        right = [r.metrics["efficacy/exact"] for r in results if "efficacy/exact" in r.metrics]
        if ids:
            self._forgotten.update(ids, torch.tensor(right), phase)

    # ------------------------------------------------------------------ interruption

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: costs so far, and a stream's edits (bit-exact) and forgotten facts."""
        state = self.total_cost().state()
        if self.schedule != "stream":
            return state
        patches = [handle.state() for handle in self._handles]
        return state | {
            "patches": patches,
            "done": list(self._done),
            "undone": self._num_undone,
            "forgotten": self._forgotten.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _restore(self, pl_module: EditingModule, is_global_zero: bool = True) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        self.add_cost(Cost.from_state(state), is_global_zero)
        if self.schedule != "stream" or "patches" not in state:
            return
        self._handles = [self._restored_patch(pl_module, patch) for patch in state["patches"]]
        self._done = dict.fromkeys(state["done"])
        self.num_edits, self._num_undone = len(self._done), state.get("undone", 0)
        self._forgotten.load_state_dict(state["forgotten"])
        if self._done:
            cases = pl_module.trainer.datamodule.evaluation_cases()  # type: ignore[attr-defined]
            self._edited = _prompts([case for case in cases if case.case_id in self._done])
            pl_module.conditions = self._stream_conditions(pl_module.trainer)

    def _restored_patch(self, pl_module: EditingModule, state: dict[str, Any]) -> EditHandle:
        if "edited" in state:
            return WeightPatch.restore(pl_module.lm, state)
        if "adapter" in state:
            return ModulePatch.restore(pl_module.lm, state)
        return cast(MemoryEditor, self._prepare(pl_module)).recall(pl_module.lm, state)

    def on_exception(
        self, trainer: Trainer, pl_module: EditingModule, exception: BaseException
    ) -> None:
        """Restores the model for further use in the same process."""
        if isinstance(pl_module, EditingModule):  # SERAC's scope classifier has no language model
            pl_module.conditions = Conditions()
            pl_module.lm.reuse.drop()
        if self.schedule != "stream":
            self._remove()


def edit_callback(trainer: Trainer) -> EditCallback:
    """The trainer's EditCallback."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, EditCallback))


def _prompts(cases: Sequence[EditCase]) -> frozenset[str]:
    return frozenset(edit.text for case in cases for edit in case.edits)
