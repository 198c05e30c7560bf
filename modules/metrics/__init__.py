"""Measures of edits: pure functions of tensors and strings, and torchmetrics classes over them.

`probes`: teacher forced; `texts`: freely generated; `summaries`: of whole runs; `collapse`: of streams of edits;
`classes`: with state.
"""

from corrigenda.modules.metrics.classes import (
    CaseMean,
    FactsForgotten,
    HopAccuracy,
    MultiHopAccuracy,
)
from corrigenda.modules.metrics.probes import (
    agreement,
    all_right,
    any_right,
    case_means,
    exact_match,
    kl,
    margin,
    mean_logprob,
    preference,
    token_accuracy,
)
from corrigenda.modules.metrics.summaries import (
    bootstrap_interval,
    drawdown,
    facts_forgotten,
    harmonic_score,
    paired_difference,
    share_interval,
    trailing_mean,
)
from corrigenda.modules.metrics.texts import (
    normalise_answer,
    wild_answer,
    wild_contains,
    wild_exact,
    wild_f1,
    wild_prefix,
    word_entropy,
)

__all__ = [
    "CaseMean",
    "FactsForgotten",
    "HopAccuracy",
    "MultiHopAccuracy",
    "agreement",
    "all_right",
    "any_right",
    "bootstrap_interval",
    "case_means",
    "drawdown",
    "exact_match",
    "facts_forgotten",
    "harmonic_score",
    "kl",
    "margin",
    "mean_logprob",
    "normalise_answer",
    "paired_difference",
    "preference",
    "share_interval",
    "token_accuracy",
    "trailing_mean",
    "wild_answer",
    "wild_contains",
    "wild_exact",
    "wild_f1",
    "wild_prefix",
    "word_entropy",
]
