"""The evaluation, the same for all methods, as a LightningModule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.evaluation.measures import (
    LOCALITY_CRITERIA,
    CaseResult,
    ProbeBatch,
    measure_generated,
    measure_probes,
    reductions,
)
from corrigenda.modules.evaluation.requirements import require_own_dtype, require_place
from corrigenda.modules.evaluation.running_means import RunningMeans
from corrigenda.modules.evaluation.unedited import UneditedScores
from corrigenda.modules.lightning_internals import count_step, leave_unwrapped
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.statistics.corpus import Corpus

log = logging.getLogger(__name__)

STOP = ("\n",)  # besides the end token, where a freely generated answer ends
SHOWN = ("efficacy/exact", "generality/exact", "locality/agreement")  # on the progress bar


@dataclass(frozen=True)
class Conditions:
    """The conditions of an evaluation, in addition to the edits that are active on the model.

    The EditCallback sets them as :attr:`EditingModule.conditions`. Without them every case is evaluated on the
    model as it is.

    Attributes:
        case_deltas: one update per case of the batch, applied side by side.
        around_case: a context manager for each case of the batch; cases are then evaluated one by one.
        only_cases: ids of the cases to evaluate; None for all. A stream has not edited the others yet.
        edited: prompts of the active edits. Locality probes with one of these prompts are left out.
    """

    case_deltas: Sequence[Delta] | None = None
    around_case: Callable[[EditCase], AbstractContextManager] | None = None
    only_cases: Set[str] | None = None
    edited: Set[str] = frozenset()


def warn_untrained(module: LightningModule) -> None:
    log.warning("%s has not been trained, so its results are meaningless: train it with fit, or give its "
                "checkpoint with --ckpt_path", type(module).__name__)  # fmt: skip


class EditingModule(LightningModule):
    """A language model under evaluation; the EditCallback applies and removes edits.

    Evaluates every training-free method. ``fit`` (for a stream of edits) trains nothing: ``training_step`` only
    counts the step.

    Args:
        lm: the language model.
        generate_tokens: length of freely generated answers; 0 leaves them out, as they take several times as long
            as all other measures.
        perplexity: a corpus whose perplexity is computed in every evaluation, under the active edits.
    """

    trains_on: ClassVar[str] = (
        "edits"  # the cases `fit` reads: "train", or "edits", those evaluated
    )

    def __init__(
        self, lm: LanguageModel, generate_tokens: int = 0, perplexity: Corpus | None = None
    ) -> None:
        super().__init__()
        checks.whole(0, generate_tokens=generate_tokens)
        self.lm, self.generate_tokens, self.perplexity = lm, generate_tokens, perplexity
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave the base model out
        self.conditions: Conditions | None = None  # set by the EditCallback
        self._has_warned = False
        # Case means from before an interruption, by fingerprint.
        self.measured: dict[str, dict[str, float | None]] = {}
        self.means: dict[str, float] = {}  # of the last finished evaluation
        self._running = RunningMeans()
        self._text_means: dict[str, float] = {}
        self._base_perplexity: float | None = None
        self._unedited = UneditedScores(lm)

    # ------------------------------------------------------------------ Lightning

    def setup(self, stage: str) -> None:
        require_own_dtype(self.trainer)
        require_place(self.trainer, self.lm.net, type(self).__name__, self.trains)
        if not self.trains:
            leave_unwrapped(self.trainer)
        limit = self.lm.max_length
        if limit is not None and self.generate_tokens >= limit:
            raise ValueError(
                f"generate_tokens is {self.generate_tokens}, but {self.lm.name!r} has a context of {limit} "
                "tokens, prompt included"
            )
        if self.perplexity is not None:
            self.perplexity.require_text()

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        return None

    def training_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Trains nothing, but counts as a step for checkpoints and ``max_steps``."""
        if batch:
            count_step(self.trainer)
        return None

    def on_validation_epoch_start(self) -> None:
        """Edits of the whole evaluation are already active, because callbacks' hooks run before the module's."""
        self._running.clear()
        self._text_means = {}
        if self.perplexity is not None and not self.trainer.sanity_checking:
            self._text_means = self._perplexity(self.perplexity)

    def on_validation_start(self) -> None:
        """Warns once about an untrained editor, or if nothing edits the model."""
        self._unedited.stores = self.trainer.state.fn == TrainerFn.FITTING
        if self._has_warned or self.trainer.state.fn != TrainerFn.VALIDATING:
            return
        self._has_warned = True
        if self.trained is False:
            warn_untrained(self)
        edits = self.lm.handles or self.own_delta() is not None
        if not (self.conditions or edits):
            log.warning("evaluating the unedited model: to evaluate edits, give the Trainer an EditCallback or "
                        "edit the model first")  # fmt: skip

    def on_validation_end(self) -> None:
        self._unedited.stores = False

    def _perplexity(self, corpus: Corpus) -> dict[str, float]:
        if self._base_perplexity is None:
            with self.lm.pristine():
                self._base_perplexity = self.lm.perplexity(corpus.texts(self.lm), corpus.tokens)
            if math.isinf(self._base_perplexity):
                self.lm.refuse_not_finite()
        own = self.own_delta()
        edited = self._base_perplexity
        if own or self.lm.handles:
            edited = self.lm.perplexity(corpus.texts(self.lm), corpus.tokens, own)
        increase = edited / self._base_perplexity - 1
        return {"text/perplexity": edited, "text/perplexity_increase": increase}

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Evaluates a batch of cases; returns their results under ``results``."""
        only = self._active_conditions.only_cases
        if only is not None:
            batch = [case for case in batch if case.case_id in only]
        for case in batch:
            self._running.add_case(self.measured.get(case.fingerprint, {}))
        return {"results": self.evaluate(self.unmeasured(batch))}

    @property
    def _active_conditions(self) -> Conditions:
        return self.conditions or Conditions()

    def unmeasured(self, cases: Sequence[EditCase]) -> list[EditCase]:
        """The cases that were not evaluated before an interruption."""
        return [case for case in cases if case.fingerprint not in self.measured]

    def on_validation_epoch_end(self) -> None:
        self.means = self.compute_means()
        for name, value in self.means.items():
            self.log(f"val/{name}", value, prog_bar=name in SHOWN, sync_dist=False)

    def compute_means(self) -> dict[str, float]:
        """Dataset means of all cases evaluated since the epoch started, and the harmonic scores."""
        return self._running.compute(self.device) | self._text_means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves trainable parts, name and weight hash of their base model, and the last evaluation's means."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("lm.")}
        checkpoint["base_model"], checkpoint["means"] = self.base_model, self.means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = checkpoint.get("base_model")
        if base is None:
            raise ValueError(
                "this checkpoint does not name its base model: it was not written by this project"
            )
        if base["hash"] != self.lm.weights_hash:
            raise ValueError(
                f"this checkpoint was trained for {base['name']!r} with weights {base['hash']}, not for "
                f"{self.lm.name!r} with weights {self.lm.weights_hash}: use the same --model.lm.name and dtype"
            )
        if base.get("chat") != self.lm.chat_note.get("chat"):
            raise ValueError(
                "this checkpoint was trained with another form of prompts: set --model.lm.chat as then, and use "
                "the same chat template"
            )
        saved, own = _shapes(checkpoint["state_dict"]), _shapes(self.state_dict())
        if saved != own:  # strict loading is off, so Lightning would ignore what does not fit
            name = min(saved.items() ^ own.items())[0]
            raise ValueError(
                f"{name} has shape {saved.get(name)} in the checkpoint and {own.get(name)} in this "
                f"{type(self).__name__}: use the class and the settings that it was trained with"
            )
        self.means = checkpoint.get("means", {})

    # ------------------------------------------------------------------ evaluation

    @property
    def base_model(self) -> dict[str, str]:
        """Name and weight hash of the base model, for summaries and checkpoints."""
        return {"name": self.lm.name, "hash": self.lm.weights_hash, **self.lm.chat_note}

    @property
    def method_name(self) -> str | None:
        """The method by which this module itself edits the model, for summaries; none by default."""
        return None

    @property
    def trains(self) -> bool:
        """Whether ``fit`` trains something; a stream of edits does not."""
        return type(self).training_step is not EditingModule.training_step

    @property
    def trained(self) -> bool | None:
        """Whether this module has been trained; None if it has nothing to train."""
        return None

    def own_delta(self) -> Delta | None:
        """The update that this module itself has learned, which is evaluated; none by default."""
        return None

    @torch.no_grad()
    def known(self, cases: Sequence[EditCase]) -> list[bool]:
        """Whether the unedited model predicts every token of the true answer to each case's edit prompts."""
        edits = [edit for case in cases for edit in case.edits]
        if any(edit.target_true is None for edit in edits):
            raise ValueError("known_only needs edits with a true answer, which this dataset lacks")
        with self.lm.pristine():
            right = iter(
                self.lm.score([e.text for e in edits], [str(e.target_true) for e in edits])
                .exact_B.tolist()
            )  # fmt: skip
        return [all([next(right) for _ in case.edits]) for case in cases]

    @torch.no_grad()
    def evaluate(self, cases: Sequence[EditCase]) -> list[CaseResult]:
        """Scores every probe of every case under the active edits and updates the running means."""
        around_case = self._active_conditions.around_case
        if around_case is None:
            return self._evaluate(cases)
        results = []
        for case in cases:
            with around_case(case):
                results += self._evaluate([case])
        return results

    def _evaluate(self, cases: Sequence[EditCase]) -> list[CaseResult]:
        results = [CaseResult(case) for case in cases]
        own = self.own_delta()
        conditions = self._active_conditions
        each = conditions.case_deltas
        deltas = each if each is not None else [own] if own else None
        shared = each is None
        layer = self.lm.edits.lowest_layer(deltas or ())
        for compared in (True, False):
            probes = ProbeBatch.of(cases, compared, conditions.edited)
            if probes.probe_B:
                owners = [0] * len(probes.case_B) if shared else probes.case_B
                with self.lm.reuse.shared(layer):
                    entries = self._score(probes, results, deltas, owners, compared)
                if self.generate_tokens:
                    self._generate(probes, results, entries, deltas, owners, compared)
        return results

    def _score(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        deltas: Sequence[Delta] | None,
        owners: list[int],
        compared: bool,
    ) -> list[dict]:
        """Scores the probes; returns their entries."""
        prompts = [probe.prompt for probe in probes.probe_B]
        targets = [str(probe.target) for probe in probes.probe_B]
        with_rival = [b for b, probe in enumerate(probes.probe_B) if probe.rival]
        both = self.lm.score(
            [*prompts, *(prompts[b] for b in with_rival)],
            [*targets, *(str(probes.probe_B[b].rival) for b in with_rival)],
            deltas,
            [*owners, *(owners[b] for b in with_rival)],
            full=compared,
        )
        after, rival = both[: len(prompts)], both[len(prompts) :]
        before = None
        if compared:
            before = self._unedited.score(prompts, targets)
        table = measure_probes(after, before, rival, with_rival, probes)
        entries = self._add_entries(probes, results, after)
        self._add_values(probes, results, table, entries)
        return entries

    def _add_entries(
        self, probes: ProbeBatch, results: list[CaseResult], after: TargetScores
    ) -> list[dict]:
        """Adds an entry with every probe's greedy answer to its case's results; returns the entries."""
        entries = []
        for b, (case, criterion, probe) in enumerate(
            zip(probes.case_B, probes.criterion_B, probes.probe_B, strict=True)
        ):
            answer = self.lm.tokens.decode(after.greedy_BM[b][after.mask_BM[b]]).strip()
            entry = {"criterion": criterion, "prompt": probe.prompt, "target": probe.target,
                     "rival": probe.rival, "prediction": answer,
                     "target_tokens": int(after.mask_BM[b].sum())}  # fmt: skip
            results[case].probes.append(entry)
            entries.append(entry)
        return entries

    def _add_values(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        table: dict[str, dict[int, float]],
        entries: list[dict],
    ) -> None:
        """Adds the probes' values to the running means, to their case's means and to their entries."""
        for measure, value_of in table.items():
            for criterion in dict.fromkeys(probes.criterion_B):
                rows = [b for b in probes.of_criteria(criterion) if b in value_of]
                if not rows:
                    continue
                values_B = torch.tensor([value_of[b] for b in rows])
                case_B = torch.tensor([probes.case_B[b] for b in rows])
                for name, kind in reductions(criterion, measure):
                    self._running.update(name, values_B, case_B)
                    values_C = kind.reduce(values_B, case_B, len(results))
                    for case in case_B.unique().tolist():
                        results[case].metrics[name] = values_C[case].item()
                for b, value in zip(rows, values_B.tolist(), strict=True):
                    entries[b][measure] = value if math.isfinite(value) else None

    def _generate(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        entries: list[dict],
        deltas: Sequence[Delta] | None,
        owners: list[int],
        compared: bool,
    ) -> None:
        """Generates an answer to every probe, up to a line break, and compares it with the acceptable ones.

        Probes that the unedited model is scored on are answered by it, too. In a chat the turn ends an answer.
        """
        prompts = [probe.prompt for probe in probes.probe_B]
        stop = () if self.lm.tokens.template else STOP
        after = self.lm.generate(prompts, self.generate_tokens, deltas, owners, stop=stop)
        before: list[str] = []
        if compared:
            with self.lm.pristine():
                before = self.lm.generate(prompts, self.generate_tokens, stop=stop)
        for entry, text in zip(entries, after, strict=True):
            entry["answer"] = text.strip()
        for entry, text in zip(entries, before, strict=False):
            entry["answer_before"] = text.strip()
        local = {b: before[b] for b in probes.of_criteria(*LOCALITY_CRITERIA)}
        self._add_values(probes, results, measure_generated(after, local, probes), entries)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a state's tensors, without the base model's."""
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith("lm.")}
