"""The one evaluation that all methods go through, as a LightningModule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
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
from corrigenda.modules.evaluation.running_means import RunningMeans
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.statistics.corpus import Corpus

log = logging.getLogger(__name__)

SHOWN = ("efficacy/exact", "generality/exact", "locality/agreement")  # on the progress bar


@dataclass(frozen=True)
class Conditions:
    """What cases are evaluated under, beside the edits that are active on the model.

    Whoever edits (the EditCallback) hands one value of this to :attr:`EditingModule.conditions`; the module by
    itself evaluates everything on the model as it is.

    Attributes:
        case_deltas: one update per case of the batch, side by side.
        around_case: a context for each case of the batch, which are then evaluated one by one.
        only_cases: ids of the cases that are evaluated; None for all. A stream has not edited the others yet.
        edited: prompts of the active edits. A locality fact that is one of them is not evaluated.
    """

    case_deltas: Sequence[Delta] | None = None
    around_case: Callable[[EditCase], AbstractContextManager] | None = None
    only_cases: Set[str] | None = None
    edited: Set[str] = frozenset()


def require_own_dtype(trainer: Trainer) -> None:
    """Raises ValueError for a precision that would convert the model's weights."""
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"--trainer.precision {trainer.precision} would convert the model's weights, to which edits and "
            "checkpoints belong: leave it out and choose their type with --model.lm.dtype, or use bf16-mixed"
        )


def warn_untrained(module: LightningModule) -> None:
    log.warning("%s has not been trained, and its results say nothing: train it with fit, or give its checkpoint "
                "with --ckpt_path", type(module).__name__)  # fmt: skip


class EditingModule(LightningModule):
    """A language model under evaluation; edits are put in and taken out from outside.

    Runs every training-free method as it is. ``fit`` without training (a stream of edits) works: its
    ``training_step`` does nothing.

    Args:
        lm: the language model.
        generate_tokens: length of free-running answers; 0 leaves them out, they cost several times as much as
            all the rest.
        perplexity: plain text whose perplexity is taken in every evaluation, under the edits in force.
    """

    trains_on: ClassVar[str] = (
        "edits"  # which cases `fit` reads: "train" or the "edits" to evaluate
    )

    def __init__(
        self, lm: LanguageModel, generate_tokens: int = 0, perplexity: Corpus | None = None
    ) -> None:
        super().__init__()
        checks.whole(0, generate_tokens=generate_tokens)
        self.lm, self.generate_tokens, self.perplexity = lm, generate_tokens, perplexity
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave the base model out
        self.conditions: Conditions | None = None  # given by whoever edits
        self._told = False
        self.measured: dict[
            str, dict[str, float | None]
        ] = {}  # before an interruption, by fingerprint
        self.means: dict[str, float] = {}  # of the last finished evaluation
        self._running = RunningMeans()
        self._text_means: dict[str, float] = {}
        self._base_perplexity: float | None = None

    # ------------------------------------------------------------------ Lightning

    def setup(self, stage: str) -> None:
        require_own_dtype(self.trainer)
        limit = self.lm.max_length
        if limit is not None and self.generate_tokens >= limit:
            raise ValueError(
                f"generate_tokens is {self.generate_tokens}, and {self.lm.name!r} reads at most {limit} tokens at "
                "once, prompt included"
            )
        if self.perplexity is not None:
            self.perplexity.require_text()

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        return None

    def training_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Trains nothing, but counts as a step: checkpoints and ``max_steps`` go by those."""
        if batch:
            steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            steps.increment_ready()
            steps.increment_completed()
        return None

    def on_validation_epoch_start(self) -> None:
        """Edits that stay in force for the whole evaluation already are: callbacks come first."""
        self._running.clear()
        self._text_means = {}
        if self.perplexity is not None and not self.trainer.sanity_checking:
            self._text_means = self._read_text(self.perplexity)

    def on_validation_start(self) -> None:
        """Warns, once, where what is evaluated is hardly what was meant."""
        if self._told or self.trainer.state.fn != TrainerFn.VALIDATING:
            return
        self._told = True
        if self.trained is False:
            warn_untrained(self)
        edits = self.lm.handles or self.own_delta() is not None
        if not (self.conditions or edits):
            log.warning("the unedited model is evaluated, as nothing edits it: give the Trainer an EditCallback, "
                        "or edit the model before")  # fmt: skip

    def _read_text(self, corpus: Corpus) -> dict[str, float]:
        if self._base_perplexity is None:
            with self.lm.pristine():
                self._base_perplexity = self.lm.perplexity(corpus.texts(self.lm), corpus.tokens)
            if math.isinf(self._base_perplexity):
                self.lm.refuse_not_finite()
        own = self.own_delta()
        found = self._base_perplexity
        if own or self.lm.handles:
            found = self.lm.perplexity(corpus.texts(self.lm), corpus.tokens, own)
        increase = found / self._base_perplexity - 1
        return {"text/perplexity": found, "text/perplexity_increase": increase}

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Evaluates a batch of cases; its results are the ``results`` of the output."""
        if self._under.only_cases is not None:
            batch = [case for case in batch if case.case_id in self._under.only_cases]
        for case in batch:
            self._running.add_case(self.measured.get(case.fingerprint, {}))
        return {"results": self.evaluate(self.unmeasured(batch))}

    @property
    def _under(self) -> Conditions:
        return self.conditions or Conditions()

    def unmeasured(self, cases: Sequence[EditCase]) -> list[EditCase]:
        """Those that were not measured before an interruption."""
        return [case for case in cases if case.fingerprint not in self.measured]

    def on_validation_epoch_end(self) -> None:
        self.means = self.compute_means()
        for name, value in self.means.items():
            self.log(f"val/{name}", value, prog_bar=name in SHOWN, sync_dist=False)

    def compute_means(self) -> dict[str, float]:
        """Dataset means of everything evaluated since the epoch began, and the harmonic scores."""
        return self._running.compute(self.device) | self._text_means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trainable parts, the name and weights of their base model, and what was measured last."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("lm.")}
        checkpoint["base_model"], checkpoint["means"] = self.base_model, self.means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = checkpoint.get("base_model")
        if base is None:
            raise ValueError(
                "this checkpoint does not name its base model: it is not one of this project's"
            )
        if base["hash"] != self.lm.weights_hash:
            raise ValueError(
                f"this checkpoint was trained for {base['name']!r} with weights {base['hash']}, not for "
                f"{self.lm.name!r} with weights {self.lm.weights_hash}: set --model.lm.name and dtype as then"
            )
        saved, own = _shapes(checkpoint["state_dict"]), _shapes(self.state_dict())
        if saved != own:  # strict loading is off, so Lightning would leave out what does not fit
            name = min(saved.items() ^ own.items())[0]
            raise ValueError(
                f"this checkpoint's {name} has shape {saved.get(name)}, that of {type(self).__name__} as it is "
                f"set up here {own.get(name)}: choose the class and the settings it was trained with"
            )
        self.means = checkpoint.get("means", {})

    # ------------------------------------------------------------------ asking

    @property
    def base_model(self) -> dict[str, str]:
        """Name and weights of what is evaluated or trained, for summaries and checkpoints."""
        return {"name": self.lm.name, "hash": self.lm.weights_hash}

    @property
    def method_name(self) -> str | None:
        """What this module itself has done to the model, for summaries; nothing by default."""
        return None

    @property
    def trained(self) -> bool | None:
        """Whether what this module learns has been learned; None where it learns nothing."""
        return None

    def own_delta(self) -> Delta | None:
        """The update that this module itself has learned and that is evaluated; none by default."""
        return None

    @torch.no_grad()
    def known(self, cases: Sequence[EditCase]) -> list[bool]:
        """Whether the unedited model gives the true answer to each case's edit prompts, token for token."""
        edits = [edit for case in cases for edit in case.edits]
        if any(edit.target_true is None for edit in edits):
            raise ValueError("known_only needs edits with a true answer, and this dataset has none")
        with self.lm.pristine():
            right = iter(
                self.lm.score([e.text for e in edits], [str(e.target_true) for e in edits])
                .exact_B.tolist()
            )  # fmt: skip
        return [all([next(right) for _ in case.edits]) for case in cases]

    @torch.no_grad()
    def evaluate(self, cases: Sequence[EditCase]) -> list[CaseResult]:
        """Asks every probe of every case under the edits in force and adds to the running metrics."""
        if self._under.around_case is not None:
            results = []
            for case in cases:
                with self._under.around_case(case):
                    results += self._evaluate([case])
            return results
        return self._evaluate(cases)

    def _evaluate(self, cases: Sequence[EditCase]) -> list[CaseResult]:
        results = [CaseResult(case) for case in cases]
        own = self.own_delta()
        each = self._under.case_deltas
        deltas = each if each is not None else [own] if own else None
        shared = each is None
        layer = self.lm.edits.lowest_layer(deltas or ())
        for compared in (True, False):
            probes = ProbeBatch.of(cases, compared, self._under.edited)
            if probes.probe_B:
                owners = [0] * len(probes.case_B) if shared else probes.case_B
                with self.lm.reuse.shared(layer):
                    self._ask(probes, results, deltas, owners, compared)
                if self.generate_tokens:
                    self._ask_freely(probes, results, deltas, owners)
        return results

    def _ask(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        deltas: Sequence[Delta] | None,
        owners: list[int],
        compared: bool,
    ) -> None:
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
            with self.lm.pristine():
                before = self.lm.score(prompts, targets, full=True)
        table = measure_probes(after, before, rival, with_rival, probes)
        start = self._add_probes(probes, results, after)
        self._count(probes, results, table, start)

    def _add_probes(
        self, probes: ProbeBatch, results: list[CaseResult], after: TargetScores
    ) -> list[dict]:
        """Every question and the greedy answer, under its case."""
        entries = []
        for b, (case, criterion, probe) in enumerate(
            zip(probes.case_B, probes.criterion_B, probes.probe_B, strict=True)
        ):
            answer = self.lm.tokens.decode(after.greedy_BM[b][after.mask_BM[b]]).strip()
            entry = {"criterion": criterion, "prompt": probe.prompt, "target": probe.target,
                     "rival": probe.rival, "prediction": answer}  # fmt: skip
            results[case].probes.append(entry)
            entries.append(entry)
        return entries

    def _count(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        table: dict[str, dict[int, float]],
        entries: list[dict] | None = None,
    ) -> None:
        """Adds probe values to the running metrics, to their case's means and to their entries."""
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
                    if entries is not None:
                        entries[b][measure] = value if math.isfinite(value) else None

    def _ask_freely(
        self,
        probes: ProbeBatch,
        results: list[CaseResult],
        deltas: Sequence[Delta] | None,
        owners: list[int],
    ) -> None:
        """Generates an answer to every question and compares it with the acceptable ones."""
        prompts = [probe.prompt for probe in probes.probe_B]
        after = self.lm.generate(prompts, self.generate_tokens, deltas, owners)
        local = probes.of_criteria(*LOCALITY_CRITERIA)
        before: list[str] = []
        if local:
            with self.lm.pristine():
                before = self.lm.generate([prompts[b] for b in local], self.generate_tokens)
        table = measure_generated(after, dict(zip(local, before, strict=True)), probes)
        self._count(probes, results, table)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a state's tensors, the base model's left out."""
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith("lm.")}
