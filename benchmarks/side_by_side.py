"""Two ways to the same result, timed in turn in one process: what every benchmark here is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus

HEADER = "| | reference, s | ours, s | ratio | range |\n| --- | --- | --- | --- | --- |\n"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(
    name: str,
    plain: Callable[[], object],
    ours: Callable[[], object],
    rounds: int,
    times: int = 1,
) -> str:
    """One table row: both in turn; the median of the rounds' ratios and their range.

    Neither is warmed up here: whoever checks first that both give the same result has done that. Where ``plain``
    would take too long it does one part of ``times`` equal ones, and its time is multiplied.
    """
    pairs = [(times * seconds(plain), seconds(ours)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    median_plain, median_ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return (
        f"| {name} | {_short(median_plain)} | {_short(median_ours)} | {statistics.median(ratios):.1f} "
        f"| {min(ratios):.1f} to {max(ratios):.1f} |"
    )


def _short(time: float) -> str:
    return f"{time:.2f}" if time >= 0.1 else f"{time:.4f}"


def corpus(lm: LanguageModel) -> Corpus:
    """The text of the second moments, ten times as long as keys are wide."""
    return Corpus("facts", max(20_000, 10 * lm.structure.inner_width))


def difference(a: Sequence[Delta], b: Sequence[Delta]) -> float:
    """Largest relative difference between the updates of two ways."""
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        for name in left.updates:
            x, y = left.dense(name), right.dense(name)
            worst = max(worst, ((x - y).norm() / x.norm()).item())
    return worst


def require_close(lm: LanguageModel, found: float, limit: float) -> None:
    """A faster wrong answer is a failure. Less precise weights than float32 round more than any limit allows."""
    if lm.net.dtype == torch.float32 and not found <= limit:
        raise AssertionError(f"the two ways differ by {found:.1e}, more than {limit:.0e}")
