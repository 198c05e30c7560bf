"""Looks for single edits that break the model: by the norm of their update, and by what the model then writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.files import write_text
from corrigenda.modules.metrics import word_entropy
from corrigenda.modules.metrics.collapse import disabling_edits
from corrigenda.modules.model.delta import Delta
from corrigenda.pipeline.callbacks import edit_callback
from corrigenda.pipeline.json_lines import JsonLines, as_json
from corrigenda.pipeline.report.records import parse

FORMAT = 1  # of screen.json
FILE = "screen.json"
PROMPTS = 4  # of a case, from which the edited model writes


class Screen(Callback):
    """Finds disabling edits (arXiv 2401.07453, 2403.07175) in a ``validate`` with the schedule ``each``.

    An edit is disabling if the norm of its update is not finite or more than 20 times the median, or if the
    normalised entropy of the words that the edited model writes is below .7. ``screen.json`` has both numbers for
    every case.

    Args:
        tokens: length of the texts that the edited model writes; by default nothing is screened.
        calibration: how many of the first edits the median is taken of.
    """

    def __init__(self, tokens: int | None = None, calibration: int = 200) -> None:
        checks.whole(1, tokens=tokens, calibration=calibration)
        self.tokens, self.calibration = tokens, calibration
        self._rows: JsonLines | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tokens is None:
            return
        edit = edit_callback(trainer)
        if stage == "fit" or edit.schedule != "each" or trainer.world_size > 1:
            raise ValueError(
                "single edits are screened by validate with --edit.schedule each, in one process: leave out "
                "--screen.tokens"
            )
        if not isinstance(edit.editor, WeightEditor):
            raise ValueError(
                "only updates of weights are screened, and this run makes none: leave out --screen.tokens"
            )
        self._rows = JsonLines(Path(trainer.default_root_dir) / "screen.jsonl")
        self._rows.drop_partial_line()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: list[EditCase], *_: object
    ) -> None:
        """The EditCallback, which comes before this one, has just computed the updates."""
        if self._rows is None or not isinstance(pl_module, EditingModule):
            return
        deltas = (pl_module.conditions and pl_module.conditions.case_deltas) or ()
        if not deltas:  # all of the batch was evaluated before an interruption
            return
        cases = pl_module.unmeasured(batch)
        entropies = self._entropies(pl_module, cases, deltas)
        self._rows.append(
            [
                {"case_id": case.case_id, "norm": _norm(delta), "entropy": entropy}
                for case, delta, entropy in zip(cases, deltas, entropies, strict=True)
            ]
        )

    @torch.no_grad()
    def _entropies(
        self, module: EditingModule, cases: Sequence[EditCase], deltas: Sequence[Delta]
    ) -> list[float]:
        """Entropy of the words that each edited model writes after its own prompts."""
        prompts = [_prompts(case) for case in cases]
        owners = [number for number, own in enumerate(prompts) for _ in own]
        texts = module.lm.generate(
            [prompt for own in prompts for prompt in own], self.tokens or 1, deltas, owners
        )
        return [
            word_entropy([text for text, owner in zip(texts, owners, strict=True) if owner == n])
            for n in range(len(cases))
        ]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rows is None or not self._rows.size:
            return
        lines = map(parse, self._rows.path.read_text("utf-8").splitlines())
        rows: dict[str, dict[str, Any]] = {row["case_id"]: row for row in lines}
        norms = [math.nan if row["norm"] is None else row["norm"] for row in rows.values()]
        entropies = [row["entropy"] for row in rows.values()]
        broken = disabling_edits(norms, entropies, self.calibration)
        content = {
            "format": FORMAT,
            "disabling": [name for name, bad in zip(rows, broken, strict=True) if bad],
            "cases": list(rows.values()),
        }
        write_text(self._rows.path.parent / FILE, as_json(content, indent=1) + "\n")


def _norm(delta: Delta) -> float:
    """The largest of the parameters' ||dW||_F / number of entries."""
    dense = (delta.dense(name) for name in delta.updates)
    return max(float(update.norm()) / update.numel() for update in dense)


def _prompts(case: EditCase) -> list[str]:
    """The prompts of a case's edits, and other wordings of them."""
    others = [probe.prompt for probe in case.probes.get("generality", ())]
    return list(dict.fromkeys([edit.text for edit in case.edits] + others))[:PROMPTS]
