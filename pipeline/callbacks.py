"""When edits go in and out."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules import processes
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.editor import Editor, WeightEditor, editing_mode
from corrigenda.modules.editing.memory import MemoryEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.evaluation.measures import CaseResult
from corrigenda.modules.evaluation.module import Conditions, EditingModule
from corrigenda.modules.files import file_name
from corrigenda.modules.metrics import FactsForgotten
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.handle import EditHandle
from corrigenda.pipeline.cost import Cost
from corrigenda.pipeline.lightning_parts import epochs_begun
from corrigenda.pipeline.tasks import tasks_of

log = logging.getLogger(__name__)

QUERIES_TIMED = 8  # of the edits made together


class EditCallback(Callback):
    """Puts edits in before they are evaluated and takes them out afterwards.

    Args:
        editor: the method; without one, the LightningModule itself if it is an editor, else none.
        schedule: ``each``: every case of a validation batch on its own, side by side. ``batch``: a validation
            batch's cases together. ``epoch``: all cases together, once per validation. ``stream`` (with
            ``fit``): a training batch's cases per step, never taken out; its validation epochs ask all cases
            edited so far.
        save_edits: keep every edit as a file in the run folder.
    """

    def __init__(
        self,
        editor: Editor | None = None,
        schedule: Literal["each", "batch", "epoch", "stream"] = "each",
        save_edits: bool = True,
    ) -> None:
        self.editor, self.schedule, self.save_edits = editor, schedule, save_edits
        self.num_edits = 0  # in force on the model that is evaluated
        self.cost = Cost()  # of this process, and of those before an interruption
        self.current: list[CaseResult] = []  # of the stream's last step
        self._handles: list[EditHandle] = []
        self._done: dict[str, None] = {}  # case ids edited so far, in order
        self._edited: frozenset[str] = frozenset()  # their prompts
        self._forgotten = FactsForgotten()
        self._on_an_axis: set[str] = set()  # metrics whose x axis W&B knows
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: Trainer, pl_module: EditingModule, stage: str) -> None:
        pl_module.conditions = Conditions()
        if self.editor is None and isinstance(pl_module, Editor):
            self.editor = pl_module
        if self.editor:
            self.editor.check(pl_module.lm)  # before the model is asked what it knows
        if self.editor and self.schedule in ("each", "batch") and pl_module.perplexity:
            raise ValueError(
                f"the schedule {self.schedule!r} has no edits in force over the whole evaluation, of which a "
                "text's perplexity could be taken: set --edit.schedule epoch or stream, or leave out "
                "--model.perplexity"
            )
        trains = type(pl_module).training_step is not EditingModule.training_step
        if self.schedule != "stream" and trainer.state.fn == TrainerFn.FITTING and not trains:
            raise ValueError(f"fit with the schedule {self.schedule!r} has nothing to train: run validate, "
                             "or set --edit.schedule stream")  # fmt: skip
        if self.schedule == "stream":
            if trainer.state.fn != TrainerFn.FITTING:
                raise ValueError("the schedule 'stream' edits step by step: run it with fit")
            if self.editor is None:
                raise ValueError("the schedule 'stream' needs an editor: set --edit.editor")
            if pl_module.trains_on != "edits":
                raise ValueError("the schedule 'stream' does not train: evaluate the trained editor with "
                                 "--model EditingModule and --edit.editor")  # fmt: skip
            tasks = tasks_of(trainer)
            if tasks is None:
                pl_module.conditions = Conditions(only_cases=self._done.keys())
                # Without a limit Lightning would make the same edits again and again.
                trainer.fit_loop.max_epochs = 1
            elif tasks.passes > 1:
                raise ValueError(
                    "the schedule 'stream' edits each case once: leave out --data.tasks.passes"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        try:
            self._restore(pl_module, trainer.is_global_zero)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise EditError(f"{trainer.ckpt_path}: its edits cannot be restored: it was made by "
                            f"another program or is damaged ({error})") from error  # fmt: skip

    def _prepare(self, pl_module: EditingModule) -> Editor:
        """The editor with its statistics and the like, whose time is not the edits' own."""
        editor = cast(Editor, self.editor)
        start = time.perf_counter()
        with editing_mode():
            editor.prepare(pl_module.lm)
        self.cost += Cost(prepare_seconds=time.perf_counter() - start)
        return editor

    # ------------------------------------------------------------------ each

    def _propose_each(self, trainer: Trainer, module: EditingModule, batch: list[EditCase]) -> None:
        editor = self._prepare(module)
        # What packing weights again loses shows only where they are written.
        if not isinstance(editor, WeightEditor) or module.lm.requantize:
            module.conditions = Conditions(
                around_case=lambda case: self._in_force(trainer, module, case)
            )
            return
        for case in batch:
            editor.check_edits(case.edits)
        with self._timed(len(batch)), editing_mode():
            deltas = editor.propose_each(module.lm, [case.edits for case in batch])
        stamped = [
            editor.stamp(module.lm, delta, case.edits)
            for delta, case in zip(deltas, batch, strict=True)
        ]
        module.conditions = Conditions(case_deltas=stamped)
        for delta, case in zip(stamped, batch, strict=True):
            self.cost += Cost(touched=delta.num_parameters, bytes=delta.num_bytes)
            self._save(trainer, delta, case.case_id)

    @contextmanager
    def _in_force(self, trainer: Trainer, module: EditingModule, case: EditCase) -> Iterator[None]:
        handle = self._edit(trainer, module, [case], case.case_id)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------ together

    def _edit(
        self, trainer: Trainer, module: EditingModule, cases: list[EditCase], name: str
    ) -> EditHandle:
        editor = self._prepare(module)
        edits = [edit for case in cases for edit in case.edits]
        with self._timed(len(cases)), editing_mode():
            handle = editor.edit(module.lm, edits)
        self._time_queries(module, edits)
        self.cost += Cost(touched=handle.num_parameters, bytes=handle.num_bytes)
        self._save(trainer, handle, name)
        return handle

    def _time_queries(self, module: EditingModule, edits: list[Edit]) -> None:
        """Asks for a few of the edits that have just been made, and asks the unedited model the same."""
        some = edits[:QUERIES_TIMED]
        prompts, targets = [edit.text for edit in some], [edit.target_new for edit in some]
        start = _now()
        module.lm.score(prompts, targets)
        middle = _now()
        with module.lm.pristine():
            module.lm.score(prompts, targets)
        self.cost += Cost(
            queries=len(some), query_seconds=middle - start, base_query_seconds=_now() - middle
        )

    @contextmanager
    def _timed(self, count: int) -> Iterator[None]:
        start = _now()
        yield
        self.cost += Cost(made=count, seconds=_now() - start)

    def _save(self, trainer: Trainer, edit: Delta | EditHandle, name: str) -> None:
        # Several processes edit different cases under these two schedules, else all the same.
        own = self.schedule in ("each", "batch")
        if self.save_edits and (own or trainer.is_global_zero):
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
            self.num_edits = tasks.learned(epochs_begun(trainer))
        elif self.schedule == "epoch" if self.editor else is_tuned:
            self.num_edits = len(cases)  # a fine-tuned model bears all that it was trained on
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
            self._remember(done, "retention")

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
        self._choose_axes(trainer)

    def _choose_axes(self, trainer: Trainer) -> None:
        """W&B draws a stream over its edits, everything else over the trainer's steps.

        Metrics are named one by one: which of several patterns holds differs between its versions.
        """
        boards = wandb_loggers(trainer)
        new = set(trainer.callback_metrics) - self._on_an_axis if boards else set()
        self._on_an_axis |= new
        for name in sorted(new):
            counted = self.schedule == "stream" and name.startswith(("val/", "current/"))
            axis = "edit/num_edits" if counted else "trainer/global_step"
            for board in boards:
                with suppress(Exception):  # the logger tells by itself that it has failed
                    board.experiment.define_metric(name, step_metric=axis)

    def total_cost(self) -> Cost:
        """What edits and queries have cost so far, of all processes and of all runs before an interruption.

        Every process calls this: those that share the cases add up what they have spent.
        """
        cost = replace(self.cost, peak_gib=max(peak_gib(), self.cost.peak_gib))
        if processes.are_several() and self.schedule in ("each", "batch"):
            every = processes.gather(cost)  # each has made edits of its own
            cost = replace(sum(every, Cost()), prepare_seconds=cost.prepare_seconds)
        return replace(cost, counts=dict(self.editor.counts) if self.editor else {})

    def add_cost(self, earlier: Cost, is_global_zero: bool = True) -> None:
        """Adds what was spent before an interruption, in the first of processes that add up."""
        if is_global_zero or self.schedule not in ("each", "batch"):
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
        self.current = []
        if self.schedule != "stream" or not batch:  # a task may have fewer batches than others
            return
        new = self._edit(trainer, pl_module, batch, f"step-{trainer.global_step:06d}")
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
        self._remember(self.current, "current")
        names = {name for result in self.current for name in result.metrics}
        for name in sorted(names):
            values = [r.metrics[name] for r in self.current if name in r.metrics]
            pl_module.log(f"current/{name}", fmean(values), batch_size=len(batch))
        pl_module.log("edit/num_edits", float(self.num_edits), batch_size=len(batch))

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """After a stream's last step all its edits are evaluated, whatever the interval."""
        is_last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.schedule == "stream" and (is_last or trainer.global_step == trainer.max_steps):
            trainer.should_stop = True
        self._choose_axes(trainer)

    def _stream_conditions(self, trainer: Trainer) -> Conditions:
        """Of tasks all cases are evaluated, and always the same probes of them."""
        if (tasks := tasks_of(trainer)) is not None:
            return Conditions(edited=_prompts([case for task in tasks.cases for case in task]))
        return Conditions(only_cases=self._done.keys(), edited=self._edited)

    def _remember(self, results: list[CaseResult], phase: Literal["current", "retention"]) -> None:
        ids = [r.case.case_id for r in results if "efficacy/exact" in r.metrics]
        right = [r.metrics["efficacy/exact"] for r in results if "efficacy/exact" in r.metrics]
        if ids:
            self._forgotten.update(ids, torch.tensor(right), phase)

    # ------------------------------------------------------------------ interruption

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on: its budget, and of a stream its edits, bit-exact, and what was lost."""
        state = self.total_cost().state()
        if self.schedule != "stream" or not self._handles:
            return state
        patches = [handle.state() for handle in self._handles]
        return state | {
            "patches": patches,
            "done": list(self._done),
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
        self.num_edits = len(self._done)
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
        """Leaves the model as it was for whoever goes on with it in the same process."""
        pl_module.conditions = Conditions()
        pl_module.lm.reuse.drop()
        if self.schedule != "stream":
            self._remove()


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Loggers to W&B, in the process that writes."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    return boards if trainer.is_global_zero else []


def _now() -> float:
    """Seconds, with what an accelerator still has to do finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompts(cases: Sequence[EditCase]) -> frozenset[str]:
    return frozenset(edit.text for case in cases for edit in case.edits)


def peak_gib() -> float:
    """Largest memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
