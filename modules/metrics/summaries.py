"""Summaries of a whole run: harmonic score, forgetting, trailing means, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from corrigenda.modules import checks

Value = TypeVar("Value", float, Tensor)


def harmonic_score(*values: float) -> float:
    """Harmonic mean of dataset means; 0 if any of them is 0, NaN if any is absent (NaN)."""
    if not values:
        raise ValueError("a harmonic score needs at least one value")
    if any(math.isnan(value) for value in values):
        return math.nan
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def drawdown(before: Value, after: Value) -> Value:
    """Loss of accuracy outside the scope of the edits: before minus after."""
    return before - after


def facts_forgotten(held_N: Tensor, lost_N: Tensor) -> float:
    """Share of the initially successful edits that failed in any later evaluation; 0 if no edit succeeded.

    A forgotten fact stays counted even if later evaluations are successful again.

    Args:
        held_N: per edit, whether it was right just after it was made.
        lost_N: per edit, whether it was wrong in any later evaluation.
    """
    held_N, lost_N = held_N.bool(), lost_N.bool()
    num_held = int(held_N.sum())
    return int((held_N & lost_N).sum()) / num_held if num_held else 0.0


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 values before it; absent values (NaN) are skipped."""
    checks.whole(1, window=window)
    means = []
    for end in range(1, len(values) + 1):
        present = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(present) / len(present) if present else math.nan)
    return means


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` cases, which also holds near 0 and 1; NaN without cases."""
    if not count or math.isnan(share):
        return math.nan, math.nan
    spread = 1.96**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = 1.96 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int, level: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean over cases; absent cases (NaN) are left out.

    Args:
        values: one value per case.
        seed: random seed of the resampling; the same seed gives the same interval.
        level: share of resampled means inside the interval.
        num_resamples: number of samples drawn with replacement, each as large as the data.
    """
    checks.number("strictly between 0 and 1", lambda x: 0 < x < 1, level=level)
    checks.whole(1, num_resamples=num_resamples)
    present = np.asarray(values, dtype=np.float64)
    present = present[~np.isnan(present)]
    if not present.size:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [rng.choice(present, size=present.size).mean() for _ in range(num_resamples)]
    tail = (1 - level) / 2
    # Interpolation would turn infinite values (the KL of a collapsed model) into NaN.
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    level: float = 0.95,
    num_resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of a - b over the same cases, and its bootstrap interval: (mean, low, high).

    Cases that are absent (NaN) in either are left out.
    """
    if len(a) != len(b):
        raise ValueError(
            f"a paired difference needs the same cases on both sides, got {len(a)} and {len(b)}"
        )
    with np.errstate(invalid="ignore"):
        differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    differences = differences[~np.isnan(differences)]
    mean = float(differences.mean()) if differences.size else math.nan
    return mean, *bootstrap_interval(differences, seed, level, num_resamples)
