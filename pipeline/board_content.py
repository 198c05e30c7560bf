"""What a run shows on Weights & Biases besides its metrics: configuration, tags, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.pipeline.board import Board
from corrigenda.pipeline.callbacks import edit_callback

HEADLINE, CASES, PICTURES = "headline", "cases", "pictures"
COLUMNS = ("case", "relation", "criterion", "question", "expected", "before", "after")
VERDICTS = ("correct", "unchanged")
COST = ("seconds_per_edit", "peak_gib", "bytes_per_edit", "training_seconds")


class BoardContent(Callback):
    """Describes the run when it starts, and shows its results when it has ended.

    Offline and online alike. The group, by which W&B puts the runs of a study together, is set by ``compare``.
    Must come after the RunWriter, whose files it reads.

    Args:
        folder: the run's folder.
        config: the configuration, as YAML.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    def on_fit_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        self._describe(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._describe(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: EditingModule) -> None:
        if not trainer.interrupted:
            self._show(trainer)

    def _describe(self, trainer: Trainer, module: EditingModule) -> None:
        edit = edit_callback(trainer)
        method = type(edit.editor).__name__ if edit.editor else module.method_name
        data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
        tags = [method or "unedited", module.base_model["name"], data, edit.schedule]
        for board in _boards(trainer):
            board.describe(yaml.safe_load(self.config), tags)

    def _show(self, trainer: Trainer) -> None:
        boards = _boards(trainer)
        if not boards or not (self.folder / "summary.json").exists():
            return
        for board in boards:
            board.guarded(lambda board=board: self._show_on(board))

    def _show_on(self, board: Board) -> None:
        """Reads the finished run as a report does; a run without evaluated cases has nothing to show."""
        if not (self.folder / "cases.jsonl").exists():
            return
        from corrigenda.pipeline.report.answers import cases  # matplotlib takes a second
        from corrigenda.pipeline.report.comparison import join
        from corrigenda.pipeline.report.figures import drawings
        from corrigenda.pipeline.report.runs import read_run

        comparison = join([run := read_run(self.folder)], None)
        estimates = comparison.estimates[run.name]
        means = {metric: 100 * estimates[metric].mean for metric in comparison.metrics()}
        cost = {key: run.budget.get(key) for key in COST}
        row = [run.name, run.summary.get("editor"), *means.values(), *cost.values()]
        board.log_table(HEADLINE, ["run", "editor", *means, *cost], [row])
        board.log_table(CASES, [*COLUMNS, *VERDICTS], list(_rows(cases(comparison))))
        for name, caption, figure in drawings(comparison):
            board.log_image(f"{PICTURES}/{name}", [figure], caption=[caption])
        numbers = {f"cost/{key}": value for key, value in cost.items() if value is not None}
        board.experiment.summary.update(numbers)


def _boards(trainer: Trainer) -> list[Board]:
    """The W&B loggers; none in processes that do not write."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, Board)]
    return boards if trainer.is_global_zero else []


def _rows(cases: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    for case in cases:
        for probe in case["probes"]:
            (answer,) = probe["answers"]
            before = [probe[key] for key in ("criterion", "prompt", "expected", "before")]
            after = [answer[key] for key in ("text", *VERDICTS)]
            yield [case["id"], case["relation"], *before, *after]
