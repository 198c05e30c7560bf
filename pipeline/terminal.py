"""What ``fit`` and ``validate`` show: what is loaded, the progress of training, the table at the end.

All of it fits into 80 columns.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from corrigenda.pipeline.report.comparison import Estimate, join
from corrigenda.pipeline.report.runs import read_run

BAR = 8  # columns
VALIDATED = ("val/efficacy/exact", "val/generality/exact", "val/locality/agreement")


class StepProgressBar(RichProgressBar):
    """The progress of ``fit`` over all of its steps, not epoch by epoch, with loss and speed."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [
            TextColumn("{task.description}"),
            BarColumn(BAR),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(compact=True),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The loss, and efficacy, generality and locality of the last validation, in per cent."""
        logged: Mapping[str, Any] = trainer.callback_metrics
        last = [f"{100 * float(logged[name]):.0f}" for name in VALIDATED if name in logged]
        loss = {"loss": f"{float(logged['train/loss']):.3g}"} if "train/loss" in logged else {}
        return loss | ({"eff/gen/loc": "/".join(last)} if len(last) == len(VALIDATED) else {})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object
    ) -> None:
        self._show_steps(trainer)
        self._update_metrics(trainer, pl_module)

    def _show_steps(self, trainer: Trainer) -> None:
        if self.progress is None or self.is_disabled:
            return
        steps = trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) and steps > 0 else None
        if self.train_progress_bar_id is None:
            self.train_progress_bar_id = self.progress.add_task(f"{'step':<10}", total=total)
        self.progress.update(
            self.train_progress_bar_id, total=total, completed=trainer.global_step, visible=True
        )
        self.refresh()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g}/s" if task.speed else "")


@rank_zero_only
def say_loading(config: Namespace, folder: Path) -> None:
    """Says which model is loaded, and where the run is written."""
    lm = config.get("model.init_args.lm")
    given = lm.get("init_args", lm) if isinstance(lm, Namespace) else None
    name = given.get("name") if given else config.get("model.init_args.encoder")
    kind = f" ({given.get('quantization') or given.get('dtype')})" if given else ""
    what = f"loading {name}{kind}" if name else "starting"
    sys.stdout.write(f"{what}; this run is written to {folder}\n")
    sys.stdout.flush()


@rank_zero_only
def print_result(folder: Path) -> None:
    """Prints a finished run: its headline measures, ×100 with intervals as in a report, and the cost."""
    if not (folder / "summary.json").is_file():
        return
    run = read_run(folder)
    comparison = join([run], None)
    found, total = comparison.estimates[run.name], len(comparison.case_ids)
    names = comparison.metrics() or sorted(found)
    lines = [_line(name, found[name], total) for name in names]
    lines += [f"{'score':<24}{100 * score:6.1f}" for score in comparison.scores.values()]
    seconds, memory = (run.budget.get(key) for key in ("seconds_per_edit", "peak_gib"))
    cost = f"{seconds:.3g} s per edit, " if seconds is not None and run.is_edited else ""
    peak = f"{memory:.2f} GiB at most" if memory else ""
    about = f"×100, mean over {total} case{'s' * (total != 1)} with 95 % interval"
    end = [*comparison.notes, cost + peak, f"all measures: {folder / 'summary.json'}"]
    sys.stdout.write("\n".join(["", about, "", *lines, "", *filter(None, end)]) + "\n")


def _line(name: str, estimate: Estimate, total: int) -> str:
    if not estimate.n:  # one value for the whole run, such as perplexity
        return f"{name.replace('/', ' '):<24}{estimate.mean:8.3g}"
    low, mean, high = (
        f"{100 * value:z.1f}" for value in (estimate.low, estimate.mean, estimate.high)
    )
    fewer = f"  over {estimate.n}" if estimate.n < total else ""
    return f"{name.replace('/', ' '):<24}{mean:>6}  [{low}, {high}]{fewer}"
