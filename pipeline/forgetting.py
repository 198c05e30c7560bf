"""What a stream of edits does to a model: facts forgotten, weights moved, and where the model collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from corrigenda.modules import checks
from corrigenda.modules.editing.weight_patch import edited_weights
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.evaluation.retention import retained
from corrigenda.modules.files import write_text
from corrigenda.modules.metrics import collapse, trailing_mean
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import block_outputs
from corrigenda.pipeline.board import Axes, log_beside
from corrigenda.pipeline.callbacks import EditCallback, edit_callback
from corrigenda.pipeline.json_lines import as_json
from corrigenda.pipeline.report.abilities import read_abilities

FORMAT = 1  # of forgetting.json
FILE = "forgetting.json"
WINDOWS = (5, 50)  # edits in a trailing mean
SHOWN = ("exact", "preference", "agreement")  # measures of the current edit that are kept
RIGHT = "efficacy/exact"


class Forgetting(Callback):
    """Measures a stream at chosen counts of edits and writes ``forgetting.json`` into the run folder.

    At every count: whether all earlier edits still hold, how far the edited weights have moved, and how far hidden
    states of a fixed text have. After every operation: the norm of all changes, and whether its edits hold.

    Args:
        at: counts of edits at which to measure, and always at the end; by default nothing is measured. Where a
            batch passes a count, the measurement follows the batch.
        text: the text whose hidden states are compared with the unedited model's.
    """

    def __init__(
        self,
        at: list[int] | None = None,
        text: Corpus = Corpus(tokens=256),  # noqa: B008  frozen
    ) -> None:
        if at is not None and not at:
            raise ValueError("at names no count of edits: give some, such as [1, 10, 100]")
        for count in at or ():
            checks.whole(1, **{"each count of at": count})
        self.at, self.text = sorted(at or ()), text
        self._current: list[dict[str, float]] = []  # measures of each edit when it was made
        self._operations: list[int] = []  # number of edits after each operation
        self._norms: dict[
            str, list[float]
        ] = {}  # of all changes, by parameter, after each operation
        self._measured: list[dict[str, Any]] = []  # at each count
        self._axes = Axes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.at:
            return
        if not isinstance(pl_module, EditingModule) or edit_callback(trainer).schedule != "stream":
            raise ValueError(
                "forgetting is measured in a stream of edits: set --edit.schedule stream, or leave out "
                "--forgetting.at"
            )
        self.text.require_text()

    # ------------------------------------------------------------------ measuring

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if not self.at or not isinstance(pl_module, EditingModule):
            return
        edit = edit_callback(trainer)
        if edit.current:
            self._add_operation(pl_module.lm, edit)
        before = self._counts[-1] if self._measured else 0
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if any(before < count <= edit.num_edits for count in self.at) or (
            ends and edit.num_edits > before
        ):
            self._measure(trainer, pl_module.lm, edit)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A stream may also be ended by others, such as a limit of time; tasks may have been scored since."""
        if not self.at or not isinstance(pl_module, EditingModule):
            return
        edit = edit_callback(trainer)
        if edit.num_edits > (self._counts[-1] if self._measured else 0):
            self._measure(trainer, pl_module.lm, edit)
        self._write(trainer, edit)

    def _add_operation(self, lm: LanguageModel, edit: EditCallback) -> None:
        self._current += [
            {name: value for name, value in one.metrics.items() if name.endswith(SHOWN)}
            for one in edit.current
        ]
        self._operations.append(edit.num_edits)
        for name, weights in edited_weights(lm).items():
            norms = self._norms.setdefault(name, [0.0] * (len(self._operations) - 1))
            norms.append(collapse.frobenius(*weights))

    def _measure(self, trainer: Trainer, lm: LanguageModel, edit: EditCallback) -> None:
        every = trainer.datamodule.evaluation_cases()  # type: ignore[attr-defined]
        cases = {case.case_id: case for case in every}
        held, preferred = retained(lm, [cases[case_id] for case_id in edit.done])
        row = {
            "num_edits": edit.num_edits,
            "held": held,
            "preferred": preferred,
            "weights": {n: collapse.weight_changes(*w) for n, w in edited_weights(lm).items()},
            "drift": self._drift(lm),
        }
        self._measured.append(row)
        self._write(trainer, edit)
        log_beside(trainer, self._axes, self._to_log(row), edit.num_edits)

    def _drift(self, lm: LanguageModel) -> dict[str, float]:
        """Drift after each edited block and the last one; empty if no edit changes the network."""
        layers = {h.lowest_layer for h in lm.handles if h.changes_network}
        layers |= {lm.structure.layer_of(name) for name in edited_weights(lm)}
        if not layers:
            return {}
        blocks = sorted(layers | {lm.structure.num_layers - 1})
        texts = lm.tokens.first_texts(self.text.texts(lm), self.text.tokens)
        now = block_outputs(lm, texts, self.text.tokens, blocks)
        with lm.pristine():
            unedited = block_outputs(lm, texts, self.text.tokens, blocks)
        return {str(block): collapse.drift(unedited[block], now[block]) for block in blocks}

    # ------------------------------------------------------------------ results

    @property
    def _counts(self) -> list[int]:
        return [row["num_edits"] for row in self._measured]

    def _to_log(self, row: dict[str, Any]) -> dict[str, float]:
        """Values of one count, for the loggers."""
        (sticky, of_all), *_ = reversed(self._forgotten())
        values = {"retention": _mean(row["held"]), "retention_preference": _mean(row["preferred"]),
                  "forgotten": sticky, "forgotten_of_all": of_all}  # fmt: skip
        for window in WINDOWS:
            recent = self._current[-window:]
            values |= {
                f"current_{window}/{n}": _mean([c.get(n) for c in recent]) for n in recent[-1]
            }
        values |= {f"drift/{block}": value for block, value in row["drift"].items()}
        for name, changes in row["weights"].items():
            values |= {f"{name}/{measure}": value for measure, value in changes.items()}
        return {f"forgetting/{n}": value for n, value in values.items() if math.isfinite(value)}

    def _forgotten(self) -> list[tuple[float, float]]:
        return collapse.lost_by([_numbers(row["held"]) for row in self._measured], self._right)

    @property
    def _right(self) -> list[float]:
        """Whether each edit was right when it was made."""
        return [current.get(RIGHT, math.nan) for current in self._current]

    def _write(self, trainer: Trainer, edit: EditCallback) -> None:
        if not trainer.is_global_zero or not self._operations:
            return
        folder = Path(trainer.default_root_dir)
        write_text(folder / FILE, as_json(self._content(edit, folder)) + "\n")

    def _content(self, edit: EditCallback, folder: Path) -> dict[str, Any]:
        held = [_numbers(row["held"]) for row in self._measured]
        forgotten = self._forgotten()
        lengths = collapse.forgetting_lengths(self._counts, held, self._right)
        retention = {
            "exact": [_mean(row["held"]) for row in self._measured],
            "preference": [_mean(row["preferred"]) for row in self._measured],
        }
        tasks = {
            name: (list(scores), [score.value for score in scores.values()])
            for name, scores in read_abilities(folder).items()
        }
        names = dict.fromkeys(name for current in self._current for name in current)
        current = {name: [one.get(name, math.nan) for one in self._current] for name in names}
        return {
            "format": FORMAT,
            "order": edit.done,
            "operations": self._operations,
            "counts": self._counts,
            "retention": retention,
            "forgotten": [sticky for sticky, _ in forgotten],
            "forgotten_of_all": [share for _, share in forgotten],
            "forgetting_lengths": {
                "lengths": lengths,
                "mean": fmean(lengths) if lengths else None,
                "sd": pstdev(lengths) if lengths else None,
            },
            "by_age": collapse.age_matrix(self._counts, held),
            "held": [row["held"] for row in self._measured],
            "preferred": [row["preferred"] for row in self._measured],
            "current": current,
            "trailing": {
                str(window): {name: trailing_mean(values, window) for name, values in current.items()}
                for window in WINDOWS
            },
            "norms": self._norms or None,
            "weights": [row["weights"] or None for row in self._measured],
            "drift": [row["drift"] or None for row in self._measured],
            "detected": collapse.detected(
                self._counts, retention["exact"], [sticky for sticky, _ in forgotten], self._right,
                self._operations, self._norms, tasks,
            ),
        }  # fmt: skip

    # ------------------------------------------------------------------ interruption

    def state_dict(self) -> dict[str, Any]:
        if not self._operations:
            return {}
        return {
            "current": self._current,
            "operations": self._operations,
            "norms": self._norms,
            "measured": self._measured,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._current = list(state_dict["current"])
            self._operations = list(state_dict["operations"])
            self._norms = {name: list(norms) for name, norms in state_dict["norms"].items()}
            self._measured = list(state_dict["measured"])


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean(values: Sequence[float | None]) -> float:
    """Mean of the values that are there; NaN if none is."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(present) if present else math.nan
