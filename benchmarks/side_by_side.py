"""Times two computations of the same result in turn, in one process."""

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
    reference: Callable[[], object],
    ours: Callable[[], object],
    rounds: int,
    times: int = 1,
) -> str:
    """A table row: both are timed in turn; the median and the range of the rounds' ratios.

    Both should have run before, to warm up, which a check of their results does. If ``reference`` would take too
    long, it computes one of ``times`` equal parts, and its time is multiplied.
    """
    pairs = [(times * seconds(reference), seconds(ours)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    median_reference, median_ours = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    return (
        f"| {name} | {_short(median_reference)} | {_short(median_ours)} | {statistics.median(ratios):.1f} "
        f"| {min(ratios):.1f} to {max(ratios):.1f} |"
    )


def _short(time: float) -> str:
    return f"{time:.2f}" if time >= 0.1 else f"{time:.4f}"


def corpus(lm: LanguageModel) -> Corpus:
    """The text for second moments, with ten tokens per key dimension."""
    return Corpus("facts", max(20_000, 10 * lm.structure.inner_width))


def difference(a: Sequence[Delta], b: Sequence[Delta]) -> float:
    """The largest relative difference between two lists of updates."""
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        for name in left.updates:
            x, y = left.dense(name), right.dense(name)
            worst = max(worst, ((x - y).norm() / x.norm()).item())
    return worst


def require_close(lm: LanguageModel, found: float, limit: float) -> None:
    """Raises AssertionError for a difference above the limit; only float32 is precise enough to check it."""
    if lm.net.dtype == torch.float32 and not found <= limit:
        raise AssertionError(f"the results differ by {found:.1e}, more than {limit:.0e}")
