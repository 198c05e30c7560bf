"""Watches a stream of edits for collapse, and may stop it or undo the operation that caused it."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.editing.weight_patch import edited_weights
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.metrics import collapse
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.pipeline.board import Axes, log_beside
from corrigenda.pipeline.callbacks import edit_callback
from corrigenda.pipeline.json_lines import JsonLines
from corrigenda.pipeline.run_folder import continues

log = logging.getLogger(__name__)

FILE = "guard.jsonl"
DECISIONS = {"stop": "stopped", "go_on": "kept", "roll_back": "rolled_back"}


class Guard(Callback):
    """Looks at the model after every operation (edit or batch) of a stream, and decides whether it stays.

    The model has collapsed if its logits or edited weights are not finite, if the perplexity of a text has risen
    by more than ``increase`` over the unedited model's, or if the norm of an operation's change of a weight is
    more than 20 times the median of those before (from the sixth on). Collapse is catastrophic where one operation
    causes it, and gradual where the perplexity has risen slowly. Every decision is a row of ``guard.jsonl``.

    Edits in context (IKE, SERAC) change neither weights nor plain text, so they never collapse.

    Args:
        action: what to do when the model has collapsed: ``stop`` the stream; ``go_on``, which only records it;
            ``roll_back``, which removes the operation, bit-exactly, and goes on without it. By default nothing is
            watched.
        text: the text whose perplexity is watched.
        increase: largest relative increase of the perplexity over the unedited model's.
        factor: an operation that multiplies the perplexity by more than this is catastrophic.
    """

    def __init__(
        self,
        action: Literal["stop", "go_on", "roll_back"] | None = None,
        text: Corpus = Corpus(tokens=256),  # noqa: B008  frozen
        increase: float = 0.1,
        factor: float = 2.0,
    ) -> None:
        checks.positive(increase=increase)
        checks.number("above 1", lambda x: x > 1, factor=factor)
        self.action, self.text, self.increase, self.factor = action, text, increase, factor
        self._base: float | None = None  # perplexity of the unedited model
        self._before = math.nan  # before the present operation
        self._norms: dict[str, list[float]] = {}  # of the changes by each operation that stayed
        self._stops = False
        self._texts: list[str] = []
        self._size: int | None = None  # of the file, when the checkpoint was written
        self._rows: JsonLines | None = None
        self._axes = Axes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.action is None:
            return
        if not isinstance(pl_module, EditingModule) or edit_callback(trainer).schedule != "stream":
            raise ValueError(
                "the guard watches a stream of edits: set --edit.schedule stream, or leave out --guard.action"
            )
        self.text.require_text()
        self._rows = JsonLines(Path(trainer.default_root_dir) / FILE)
        edit_callback(trainer).accepts = partial(self._accepts, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run drops the rows written after its checkpoint, because it repeats those operations."""
        size, self._size = self._size, None
        if self._rows and trainer.is_global_zero and continues(trainer, self._rows.path.parent):
            self._rows.drop_partial_line()
            self._rows.truncate(size or 0)

    # ------------------------------------------------------------------ every operation

    def _accepts(self, trainer: Trainer, module: EditingModule, cases: list[EditCase]) -> bool:
        """Whether the newest edit stays; called before it becomes one with the earlier ones."""
        seen = self._look(module.lm)
        decision = DECISIONS[str(self.action)] if seen["collapse"] else "kept"
        self._stops = decision == "stopped"
        stays = decision != "rolled_back"
        if stays:
            self._before = seen["perplexity"]
            for name, norm in seen["norms"].items():
                self._norms.setdefault(name, []).append(norm)
        if seen["collapse"]:
            log.warning("%s collapse at %s: %s, %s", seen["collapse"], seen["where"],
                        "; ".join(case.case_id for case in cases[:3]), decision)  # fmt: skip
        self._write(trainer, cases, {**seen, "decision": decision})
        return stays

    def _look(self, lm: LanguageModel) -> dict[str, Any]:
        """What the newest edit has done to the model."""
        if self._base is None:
            with lm.pristine():
                self._base = self._perplexity(lm)
            self._before = self._base
        changed = edited_weights(lm, newest=1)
        norms = {name: collapse.frobenius(*weights) for name, weights in changed.items()}
        finite = all(bool(now.isfinite().all()) for _, now in changed.values())
        perplexity = self._perplexity(lm) if finite else math.inf
        jumped = [n for n, norm in norms.items() if collapse.is_jump(norm, self._norms.get(n, []))]
        kind = collapse.kind_of_collapse(
            perplexity, self._before, self._base, bool(jumped), self.increase, self.factor
        )
        suspects = jumped or list(norms)
        return {
            "perplexity": perplexity,
            "increase": perplexity / self._base - 1,
            "finite": math.isfinite(perplexity),
            "norms": norms,
            "jumped": jumped,
            "collapse": kind,
            "where": max(suspects, key=lambda name: norms[name], default=None) if kind else None,
        }

    def _perplexity(self, lm: LanguageModel) -> float:
        if not self._texts:
            self._texts = lm.tokens.first_texts(self.text.texts(lm), self.text.tokens)
        return lm.perplexity(self._texts, self.text.tokens)

    def _write(self, trainer: Trainer, cases: list[EditCase], seen: dict[str, Any]) -> None:
        if not trainer.is_global_zero or self._rows is None:
            return
        stays = seen["decision"] != "rolled_back"
        made = edit_callback(trainer).num_edits + (len(cases) if stays else 0)
        ids = [case.case_id for case in cases]
        self._rows.append([{"step": trainer.global_step, "num_edits": made, "cases": ids, **seen}])
        values = {
            "guard/perplexity": seen["perplexity"],
            "guard/perplexity_increase": seen["increase"],
            "guard/collapsed": float(seen["collapse"] is not None),
            "guard/rolled_back": float(not stays),
        }
        log_beside(trainer, self._axes, values, made)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if self._stops:
            trainer.should_stop = True

    # ------------------------------------------------------------------ interruption

    def state_dict(self) -> dict[str, Any]:
        if self._rows is None:
            return {}
        return {
            "base": self._base,
            "before": self._before,
            "norms": self._norms,
            "size": self._rows.size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._base, self._before = state_dict["base"], state_dict["before"]
            self._norms, self._size = dict(state_dict["norms"]), state_dict["size"]
