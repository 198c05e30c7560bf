"""The one evaluation: what is asked of a model under edits, and how the answers are counted.

What a probe carries decides what is measured: a target gives ``accuracy`` and ``exact``, a rival also
``preference`` and ``margin``; under ``locality`` and ``unrelated`` the unedited model is asked the same and
``agreement``, ``kl`` and ``drawdown`` follow. With several edits in force, what must stay for one of them and is
the prompt of another is not questions. With ``generate_tokens`` answers are also generated freely
(``wild_*``). Beside the mean over a case's probes stand ``any_*`` under ``multihop``, whether any wording of
the question is answered right, and ``all_*`` under ``hops``, whether every single step is.

Of ``text``, where some is given, ``perplexity`` is taken, and its ``perplexity_increase`` over the unedited
model's, as a share of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.modules import checks, metrics
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.statistics.corpus import Corpus

log = logging.getLogger(__name__)

UNMOVED = ("locality", "unrelated")  # criteria that ask whether something stayed as it was
COMPARED = ("efficacy", *UNMOVED)  # criteria on which the unedited model is asked as well

# How each measure is taken; the schedule adds when, e.g. "tf_exact@each".
PROTOCOLS = {
    "accuracy": "tf_tok",
    "exact": "tf_exact",
    "known_before": "tf_exact",
    "preference": "cf_prob",
    "margin": "cf_prob",
    "score": "cf_prob",
    "balance": "tf_exact",
    "agreement": "tf_tok",
    "kl": "kl",
    "drawdown": "tf_exact",
    "wild_exact": "wild",
    "wild_contains": "wild",
    "wild_prefix": "wild",
    "wild_f1": "wild",
    "wild_same": "wild",
    "auc": "pairs",
    "routed": "routing",
    "perplexity": "nll",
    "perplexity_increase": "nll",
}

# Criteria whose probes make one verdict per case, and the yes-or-no measures that it is made of.
VERDICTS: dict[str, tuple[str, type[metrics.CaseMetric], Callable[..., Tensor]]] = {
    "multihop": ("any", metrics.MultiHopAccuracy, metrics.any_right),
    "hops": ("all", metrics.HopAccuracy, metrics.all_right),
}
JUDGED = ("exact", "wild_exact", "wild_contains", "wild_prefix")
PROTOCOLS |= {f"{verdict}_{m}": PROTOCOLS[m] for verdict, *_ in VERDICTS.values() for m in JUDGED}

# Harmonic means of dataset means: the field's Score, and what learned editors are selected by.
SCORES = {
    "all/score": ("efficacy/preference", "generality/preference", "locality/preference"),
    "all/balance": ("efficacy/exact", "generality/exact", "locality/agreement"),
}


@dataclass
class CaseResult:
    """What one case's probes gave: case means by ``<criterion>/<measure>``, and every probe's answer."""

    case: EditCase
    metrics: dict[str, float] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As a line of ``cases.jsonl``."""
        edits = [{"text": e.text, "target_new": e.target_new} for e in self.case.edits]
        return {
            "case_id": self.case.case_id,
            "fingerprint": self.case.fingerprint,
            "edits": edits,
            "metrics": self.metrics,
            "probes": self.probes,
        }


@dataclass(frozen=True)
class _Questions:
    """The probes of some cases with a target, flattened: B questions."""

    case_B: list[int]
    criterion_B: list[str]
    probe_B: list[Probe]

    @classmethod
    def of(cls, cases: Sequence[EditCase], compared: bool, edited: Set[str]) -> _Questions:
        flat = [
            (c, criterion, probe)
            for c, case in enumerate(cases)
            for criterion, probes in case.probes.items()
            for probe in probes
            if probe.target and (criterion in COMPARED) == compared
            if criterion not in UNMOVED or probe.prompt not in edited
        ]
        return cls(*map(list, zip(*flat, strict=True))) if flat else cls([], [], [])

    def of_criteria(self, *criteria: str) -> list[int]:
        return [b for b, name in enumerate(self.criterion_B) if name in criteria]


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
        self._metrics: dict[str, metrics.CaseMetric] = {}
        self._text_means: dict[str, float] = {}
        self._base_perplexity: float | None = None

    # ------------------------------------------------------------------ Lightning

    def setup(self, stage: str) -> None:
        require_own_dtype(self.trainer)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        return None

    def training_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Trains nothing, but counts as a step: checkpoints and ``max_steps`` go by those."""
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()
        return None

    def on_validation_epoch_start(self) -> None:
        """Edits that stay in force for the whole evaluation already are: callbacks come first."""
        self._metrics.clear()
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
            self._count_again(self.measured.get(case.fingerprint, {}))
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
        running = sorted(self._of_all_processes().items())
        means = {name: float(metric.compute()) for name, metric in running}
        for name, parts in SCORES.items():
            values = [means[part] for part in parts if part in means]
            if len(values) == len(parts):
                means[name] = float(metrics.harmonic_score(*values))
        return means | self._text_means

    def _of_all_processes(self) -> dict[str, metrics.CaseMetric]:
        """The running metrics; where processes share the cases, empty ones for what only others have met.

        Each is summed over all processes when it is computed, so all must have the same.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._metrics
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, list(self._metrics))
        for name in dict.fromkeys(name for names in every for name in names):
            self._running(name)
        return {name: metric.to(self.device) for name, metric in self._metrics.items()}

    def _running(self, name: str) -> metrics.CaseMetric:
        """The metric over cases of ``<criterion>/<measure>``; an empty one where it is met first."""
        criterion, _, measure = name.rpartition("/")
        verdict, judge, _ = VERDICTS.get(criterion, ("", metrics.CaseMean, None))
        kind = judge if verdict and measure.startswith(f"{verdict}_") else metrics.CaseMean
        return self._metrics.setdefault(name, kind(PROTOCOLS[measure]))

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
            questions = _Questions.of(cases, compared, self._under.edited)
            if questions.probe_B:
                owners = [0] * len(questions.case_B) if shared else questions.case_B
                with self.lm.reuse.shared(layer):
                    self._ask(questions, results, deltas, owners, compared)
                if self.generate_tokens:
                    self._ask_freely(questions, results, deltas, owners)
        return results

    def _ask(
        self,
        questions: _Questions,
        results: list[CaseResult],
        deltas: Sequence[Delta] | None,
        owners: list[int],
        compared: bool,
    ) -> None:
        prompts = [probe.prompt for probe in questions.probe_B]
        targets = [str(probe.target) for probe in questions.probe_B]
        with_rival = [b for b, probe in enumerate(questions.probe_B) if probe.rival]
        both = self.lm.score(
            [*prompts, *(prompts[b] for b in with_rival)],
            [*targets, *(str(questions.probe_B[b].rival) for b in with_rival)],
            deltas,
            [*owners, *(owners[b] for b in with_rival)],
            full=compared,
        )
        after, rival = both[: len(prompts)], both[len(prompts) :]
        before = None
        if compared:
            with self.lm.pristine():
                before = self.lm.score(prompts, targets, full=True)
        table = _measure(after, before, rival, with_rival, questions)
        start = self._add_probes(questions, results, after)
        self._count(questions, results, table, start)

    def _add_probes(
        self, questions: _Questions, results: list[CaseResult], after: TargetScores
    ) -> list[dict]:
        """Every question and the greedy answer, under its case."""
        entries = []
        for b, (case, criterion, probe) in enumerate(
            zip(questions.case_B, questions.criterion_B, questions.probe_B, strict=True)
        ):
            answer = self.lm.tokens.decode(after.greedy_BM[b][after.mask_BM[b]]).strip()
            entry = {"criterion": criterion, "prompt": probe.prompt, "target": probe.target,
                     "rival": probe.rival, "prediction": answer}  # fmt: skip
            results[case].probes.append(entry)
            entries.append(entry)
        return entries

    def _count(
        self,
        questions: _Questions,
        results: list[CaseResult],
        table: dict[str, dict[int, float]],
        entries: list[dict] | None = None,
    ) -> None:
        """Adds probe values to the running metrics, to their case's means and to their entries."""
        for measure, value_of in table.items():
            for criterion in dict.fromkeys(questions.criterion_B):
                rows = [b for b in questions.of_criteria(criterion) if b in value_of]
                if not rows:
                    continue
                values_B = torch.tensor([value_of[b] for b in rows])
                case_B = torch.tensor([questions.case_B[b] for b in rows])
                for name, reduce in _reductions(criterion, measure):
                    self._running(name).update(values_B, case_B)
                    values_C = reduce(values_B, case_B, len(results))
                    for case in case_B.unique().tolist():
                        results[case].metrics[name] = values_C[case].item()
                for b, value in zip(rows, values_B.tolist(), strict=True):
                    if entries is not None:
                        entries[b][measure] = value if math.isfinite(value) else None

    def _count_again(self, means: dict[str, float | None]) -> None:
        """Adds a case's means as they were measured before; None stands for one that was infinite."""
        for name, value in means.items():
            value = math.inf if value is None else value
            self._running(name).update(torch.tensor([value]), torch.tensor([0]))

    def _ask_freely(
        self,
        questions: _Questions,
        results: list[CaseResult],
        deltas: Sequence[Delta] | None,
        owners: list[int],
    ) -> None:
        """Generates an answer to every question and compares it with the acceptable ones."""
        prompts = [probe.prompt for probe in questions.probe_B]
        after = self.lm.generate(prompts, self.generate_tokens, deltas, owners)
        table: dict[str, dict[int, float]] = {}
        measures = {
            "wild_exact": metrics.wild_exact,
            "wild_contains": metrics.wild_contains,
            "wild_prefix": metrics.wild_prefix,
            "wild_f1": metrics.wild_f1,
        }
        for b, (probe, text) in enumerate(zip(questions.probe_B, after, strict=True)):
            answers = [str(probe.target), *probe.aliases]
            for measure, compare in measures.items():
                table.setdefault(measure, {})[b] = compare(metrics.wild_answer(text), answers)
        local = questions.of_criteria(*UNMOVED)
        if local:
            with self.lm.pristine():
                before = self.lm.generate([prompts[b] for b in local], self.generate_tokens)
            table["wild_same"] = {
                b: float(after[b] == t) for b, t in zip(local, before, strict=True)
            }
        self._count(questions, results, table)


def _reductions(criterion: str, measure: str) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Names of what a case's values become, and how."""
    yield f"{criterion}/{measure}", metrics.case_means
    if criterion in VERDICTS and measure in JUDGED:
        verdict, _, reduce = VERDICTS[criterion]
        yield f"{criterion}/{verdict}_{measure}", reduce


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a state's tensors, the base model's left out."""
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith("lm.")}


SHOWN = ("efficacy/exact", "generality/exact", "locality/agreement")  # on the progress bar


def _measure(
    after: TargetScores,
    before: TargetScores | None,
    rival: TargetScores,
    with_rival: list[int],
    questions: _Questions,
) -> dict[str, dict[int, float]]:
    """Measure to probe index to value."""
    everything = range(len(questions.probe_B))
    answers = (after.greedy_BM, after.target_BM, after.mask_BM, after.logprob_BM)
    table = {
        "accuracy": _numbered(everything, metrics.token_accuracy(*answers)),
        "exact": _numbered(everything, metrics.exact_match(*answers)),
    }
    if with_rival:
        own = (after.logprob_BM[with_rival], after.mask_BM[with_rival])
        both = (*own, rival.logprob_BM, rival.mask_BM)
        table["preference"] = _numbered(with_rival, metrics.preference(*both))
        table["margin"] = _numbered(with_rival, metrics.margin(*both))
    local = questions.of_criteria(*UNMOVED)
    if before is None:
        return table
    exact_before_B = metrics.exact_match(
        before.greedy_BM, before.target_BM, before.mask_BM, before.logprob_BM
    )
    edited = questions.of_criteria("efficacy")
    table["known_before"] = _numbered(edited, exact_before_B[edited])
    if local:
        now, then = (scores[local] for scores in (after, before))
        same_B = metrics.agreement(now.greedy_BM, then.greedy_BM, now.mask_BM, now.logprob_BM)
        table["agreement"] = _numbered(local, same_B)
        full_then, full_now = (cast(Tensor, scores.full_BMV) for scores in (then, now))
        table["kl"] = _numbered(local, metrics.kl(full_then, full_now, now.mask_BM))
        exact_B = metrics.exact_match(now.greedy_BM, now.target_BM, now.mask_BM, now.logprob_BM)
        table["drawdown"] = _numbered(local, metrics.drawdown(exact_before_B[local], exact_B))
    return table


def _numbered(rows: Iterable[int], values_B: Tensor) -> dict[int, float]:
    return dict(zip(rows, values_B.tolist(), strict=True))
