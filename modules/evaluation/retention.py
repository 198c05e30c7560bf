"""Whether a model still gives the answers that it was edited to give."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import metrics
from corrigenda.modules.model.lm import LanguageModel


@torch.no_grad()
def retained(
    lm: LanguageModel, cases: Sequence[EditCase]
) -> tuple[list[float | None], list[float | None]]:
    """(exact, preference) of each case's efficacy probes under the active edits, as in an evaluation.

    Only these two are measured, which takes a fraction of a whole evaluation. None for a case without such probes,
    or, of the preference, whose probes have no rival.
    """
    probes = [
        (c, probe)
        for c, case in enumerate(cases)
        for probe in case.probes.get("efficacy", ())
        if probe.target
    ]
    with_rival = [b for b, (_, probe) in enumerate(probes) if probe.rival]
    exact: list[float | None] = [None] * len(cases)
    preferred = list(exact)
    if not probes:
        return exact, preferred
    prompts = [probe.prompt for _, probe in probes]
    targets = [str(probe.target) for _, probe in probes]
    rivals = [str(probes[b][1].rival) for b in with_rival]
    with lm.reuse.shared(lm.edits.lowest_layer()):
        both = lm.score([*prompts, *(prompts[b] for b in with_rival)], [*targets, *rivals])
    own, rival = both[: len(prompts)], both[len(prompts) :]
    right_B = metrics.exact_match(own.greedy_BM, own.target_BM, own.mask_BM, own.logprob_BM)
    _fill(exact, [c for c, _ in probes], right_B)
    if with_rival:
        mine = own.logprob_BM[with_rival], own.mask_BM[with_rival]
        preferred_B = metrics.preference(*mine, rival.logprob_BM, rival.mask_BM)
        _fill(preferred, [probes[b][0] for b in with_rival], preferred_B)
    return exact, preferred


def _fill(values: list[float | None], case_B: list[int], value_B: torch.Tensor) -> None:
    """Sets the means of the cases that have a value."""
    means_C = metrics.case_means(value_B.cpu(), torch.tensor(case_B), len(values))
    for case in set(case_B):
        values[case] = float(means_C[case])
