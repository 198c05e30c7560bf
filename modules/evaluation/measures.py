"""The measures of the evaluation: how probes of an edited model are scored.

The fields of a probe decide what is measured. A target gives ``accuracy`` and ``exact``, a rival also gives
``preference`` and ``margin``. Probes of ``locality`` and ``unrelated`` are also scored on the unedited model,
which gives ``agreement``, ``kl`` and ``drawdown``. When several edits are active, a locality probe whose prompt is
itself edited is left out. With ``generate_tokens`` answers are also generated freely (``wild_*``). In addition to
the mean over a case's probes there are ``any_*`` under ``multihop`` (any wording of the question is answered
correctly) and ``all_*`` under ``hops`` (every step is).

If a text is given, its ``perplexity`` is computed, and ``perplexity_increase`` relative to the unedited model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.modules import metrics
from corrigenda.modules.model.rows import TargetScores

LOCALITY_CRITERIA = ("locality", "unrelated")  # which measure whether an answer has stayed the same
COMPARED = ("efficacy", *LOCALITY_CRITERIA)  # criteria that are also scored on the unedited model

# How each measure is computed; the schedule is appended, as in "tf_exact@each".
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

# Criteria whose probes give one verdict per case, and the binary measures that it is computed from.
VERDICTS: dict[str, tuple[str, type[metrics.CaseMean]]] = {
    "multihop": ("any", metrics.MultiHopAccuracy),
    "hops": ("all", metrics.HopAccuracy),
}
GENERATED: dict[str, Callable[[str, Sequence[str]], float]] = {
    "wild_exact": metrics.wild_exact,
    "wild_contains": metrics.wild_contains,
    "wild_prefix": metrics.wild_prefix,
    "wild_f1": metrics.wild_f1,
}
JUDGED = ("exact", "wild_exact", "wild_contains", "wild_prefix")
PROTOCOLS |= {f"{verdict}_{m}": PROTOCOLS[m] for verdict, _ in VERDICTS.values() for m in JUDGED}


@dataclass
class CaseResult:
    """The results of one case: means by ``<criterion>/<measure>``, and the answer to every probe."""

    case: EditCase
    metrics: dict[str, float] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The content of its line in ``cases.jsonl``."""
        edits = [
            {"text": e.text, "target_new": e.target_new, "relation": e.relation}
            for e in self.case.edits
        ]
        return {
            "case_id": self.case.case_id,
            "fingerprint": self.case.fingerprint,
            "edits": edits,
            "metrics": self.metrics,
            "probes": self.probes,
        }


@dataclass(frozen=True)
class ProbeBatch:
    """All probes with a target of some cases, flattened: B probes."""

    case_B: list[int]
    criterion_B: list[str]
    probe_B: list[Probe]

    @classmethod
    def of(cls, cases: Sequence[EditCase], compared: bool, edited: Set[str]) -> ProbeBatch:
        flat = [
            (c, criterion, probe)
            for c, case in enumerate(cases)
            for criterion, probes in case.probes.items()
            for probe in probes
            if probe.target and (criterion in COMPARED) == compared
            if criterion not in LOCALITY_CRITERIA or probe.prompt not in edited
        ]
        return cls(*map(list, zip(*flat, strict=True))) if flat else cls([], [], [])

    def of_criteria(self, *criteria: str) -> list[int]:
        return [b for b, name in enumerate(self.criterion_B) if name in criteria]


def measure_probes(
    after: TargetScores,
    before: TargetScores | None,
    rival: TargetScores,
    with_rival: list[int],
    probes: ProbeBatch,
) -> dict[str, dict[int, float]]:
    """The value of every probe, by measure and probe index."""
    everything = range(len(probes.probe_B))
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
    local = probes.of_criteria(*LOCALITY_CRITERIA)
    if before is None:
        return table
    exact_before_B = metrics.exact_match(
        before.greedy_BM, before.target_BM, before.mask_BM, before.logprob_BM
    )
    edited = probes.of_criteria("efficacy")
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


def measure_generated(
    texts: Sequence[str], pristine: Mapping[int, str], probes: ProbeBatch
) -> dict[str, dict[int, float]]:
    """The value of every freely generated answer, by measure and probe index.

    Args:
        texts: the evaluated model's answer to every probe.
        pristine: the unedited model's answers, by probe index.
        probes: the probes.
    """
    table: dict[str, dict[int, float]] = {name: {} for name in GENERATED}
    for b, (probe, text) in enumerate(zip(probes.probe_B, texts, strict=True)):
        answers = [str(probe.target), *probe.aliases]
        for name, compare in GENERATED.items():
            table[name][b] = compare(metrics.wild_answer(text), answers)
    if pristine:
        table["wild_same"] = {b: float(texts[b] == text) for b, text in pristine.items()}
    return table


def reductions(criterion: str, measure: str) -> Iterator[tuple[str, type[metrics.CaseMean]]]:
    """The metrics that a measure contributes to: name and class."""
    yield f"{criterion}/{measure}", metrics.CaseMean
    if criterion in VERDICTS and measure in JUDGED:
        verdict, kind = VERDICTS[criterion]
        yield f"{criterion}/{verdict}_{measure}", kind
