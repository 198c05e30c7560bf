"""What is said about a whole run: scores of means, forgetting, distances, intervals, protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from corrigenda.modules import checks

Value = TypeVar("Value", float, Tensor)


def harmonic_score(*values: float) -> float:
    """Harmonic mean of dataset means; 0 if any of them is, NaN if any is absent (NaN)."""
    if not values:
        raise ValueError("a harmonic score needs at least one value")
    if any(math.isnan(value) for value in values):
        return math.nan
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def drawdown(before: Value, after: Value) -> Value:
    """Accuracy out of scope that the edits cost: before minus after."""
    return before - after


def set_f1(predicted_ids: Sequence[int], gold_ids: Sequence[int]) -> float:
    """F1 of token ids in any order (GRACE, arXiv 2211.11031).

    An id shared is shared once, but the lengths count repetitions, so that a model which repeats
    the right token loses precision.
    """
    num_ids = len(predicted_ids) + len(gold_ids)
    return 2 * len({*predicted_ids} & {*gold_ids}) / num_ids if num_ids else 0.0


def facts_forgotten(held_N: Tensor, lost_N: Tensor, of_all: bool = False) -> float:
    """Share of the edits that held at first and were found lost at any later look.

    Sticky: a fact lost once stays counted, even when it comes back. 0 if no edit held.

    Args:
        held_N: per edit, whether it was right just after it was made.
        lost_N: per edit, whether any evaluation since has found it wrong.
        of_all: divide by all edits, not only by those that held.
    """
    held_N, lost_N = held_N.bool(), lost_N.bool()
    num_counted = held_N.numel() if of_all else int(held_N.sum())
    return int((held_N & lost_N).sum()) / num_counted if num_counted else 0.0


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it; absent ones (NaN) are skipped."""
    checks.whole(1, window=window)
    means = []
    for end in range(1, len(values) + 1):
        present = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(present) / len(present) if present else math.nan)
    return means


class WeightDistance(NamedTuple):
    """How far a weight has moved: Frobenius norm, per entry, and over the original's norm."""

    frobenius: float
    per_entry: float
    relative: float


def weight_distance(weight: Tensor, original: Tensor) -> WeightDistance:
    """Distance of an edited weight from its original; ``per_entry`` is D of arXiv 2401.07453.

    Raises ValueError for weights of different shapes or without entries; NaN in either makes all NaN.
    """
    if weight.shape != original.shape or not weight.numel():
        raise ValueError(
            f"a weight and its original need one shape with entries, got {tuple(weight.shape)} "
            f"and {tuple(original.shape)}"
        )
    norm, original_norm = _norm(weight.float() - original.float()), _norm(original.float())
    relative = norm / original_norm if original_norm else math.inf if norm else 0.0
    return WeightDistance(norm, norm / weight.numel(), relative)


def _norm(matrix: Tensor) -> float:
    # Row by row: summed in one go in float32, ten million squares are off by 0.1 % on CPU.
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=-1)).item()


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int, level: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean over cases; absent cases (NaN) left out.

    Args:
        values: one value per case.
        seed: of the resampling; the same seed gives the same interval.
        level: share of resampled means that lie inside.
        num_resamples: how many times as many cases are drawn with replacement.
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
    # Interpolating between resamples would turn infinite values (KL of a collapsed model) into NaN.
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

    A case absent (NaN) in either is left out of both.
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


def binomial_half_width(share: float, count: int, z: float = 1.96) -> float:
    """Half the width of a share's normal interval: z sqrt(share (1 - share) / count).

    NaN without observations (``count`` 0) or where the share is NaN; ValueError where it is no share.
    """
    checks.whole(0, count=count)
    if math.isnan(share):
        return math.nan
    checks.between(0, 1, share=share)
    return z * math.sqrt(share * (1 - share) / count) if count else math.nan
