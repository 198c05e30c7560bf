"""When edits are applied and removed, and which runs a schedule is possible in."""

from __future__ import annotations

from typing import Literal

from corrigenda.datamodules.tasks import Tasks
from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.evaluation.module import EditingModule

Schedule = Literal["each", "batch", "epoch", "stream"]
INDEPENDENT = ("each", "batch")  # every process makes edits of its own; otherwise all make the same


def require_possible(
    schedule: Schedule, editor: Editor | None, module: EditingModule, fitting: bool
) -> None:
    """Raises ValueError if the schedule cannot be used with this editor and module, or in this command."""
    if editor and schedule in INDEPENDENT and module.perplexity:
        raise ValueError(
            f"perplexity needs edits that stay active during the whole evaluation, which the schedule "
            f"{schedule!r} does not have: set --edit.schedule epoch or stream, or leave out "
            "--model.perplexity"
        )
    if schedule != "stream":
        if fitting and not module.trains:
            raise ValueError(f"fit has nothing to train with the schedule {schedule!r}: run validate, "
                             "or set --edit.schedule stream")  # fmt: skip
        return
    if not fitting:
        raise ValueError("the schedule 'stream' edits step by step: run fit")
    if editor is None:
        raise ValueError("the schedule 'stream' needs an editor: set --edit.editor")
    if module.trains_on != "edits":
        raise ValueError("the schedule 'stream' does not train: use --model EditingModule, with the "
                         "trained editor as --edit.editor")  # fmt: skip


def require_one_pass(tasks: Tasks) -> None:
    """Raises ValueError for tasks whose cases a stream would edit several times."""
    if tasks.passes > 1:
        raise ValueError(
            "the schedule 'stream' edits each case once: leave out --data.tasks.passes"
        )
