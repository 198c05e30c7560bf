"""How far edits have moved a model, what it has forgotten, and where it collapses.

Definitions follow arXiv 2401.07453 (distance, facts forgotten, disabling edits) and arXiv 2401.04700 (relative
change of weights). The detectors of collapse are this project's; they differ in what they watch, so all of them
are reported.

Shapes: N edits in the order in which they were made, K counts of edits at which something was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from corrigenda.modules import checks
from corrigenda.modules.metrics.summaries import facts_forgotten, trailing_mean

FACTOR = 20.0  # times the median step: a jump
LEAST_STEPS = 5  # before a step can be called a jump
TASK = "sst2"  # the first to be lost (arXiv 2401.07453)
LEAST_ENTROPY = 0.7  # of the words of a working model
LARGE_CHANGES = (0.077, 0.171)  # relative to the weight; thresholds of arXiv 2401.04700

Kind = Literal["gradual", "catastrophic"]


# ---------------------------------------------------------------------------- weights and states


def frobenius(before: Tensor, after: Tensor) -> float:
    """Frobenius norm of a weight's change; both of the same shape."""
    if before.shape != after.shape:
        raise ValueError(
            f"a change needs one shape, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    return (after.float() - before.float()).norm(dtype=torch.float64).item()


def weight_changes(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far a weight W has moved by dW.

    Args:
        before: W, any shape.
        after: W + dW, the same shape.

    Returns:
        ``distance``: ||dW||_F / number of entries (arXiv 2401.07453); ``frobenius``: ||dW||_F; ``relative``:
        ||dW||_F / ||W||_F; ``l1``: sum |dW|; ``share_077`` and ``share_171``: share of entries with |dW / W| above
        .077 and .171 (arXiv 2401.04700), where an entry that was 0 and is not any more counts as changed.
    """
    norm = frobenius(before, after)
    size = (after.float() - before.float()).abs()
    whole = before.float().norm(dtype=torch.float64).item()
    shares = {
        f"share_{1000 * threshold:03.0f}": (size > threshold * before.float().abs())
        .double()
        .mean()
        .item()
        for threshold in LARGE_CHANGES
    }
    return {
        "distance": norm / max(before.numel(), 1),
        "frobenius": norm,
        "relative": norm / whole if whole else math.inf if norm else 0.0,
        "l1": size.sum(dtype=torch.float64).item(),
        **shares,
    }


def drift(before: Tensor, after: Tensor) -> float:
    """Change of hidden states relative to the unedited model's, ||h' - h||_F / ||h||_F over all tokens."""
    return frobenius(before, after) / before.float().norm(dtype=torch.float64).item()


# ---------------------------------------------------------------------------- facts forgotten


def lost_by(
    held_at: Sequence[Sequence[float]], first_N: Sequence[float]
) -> list[tuple[float, float]]:
    """Facts forgotten at each of K counts: (share of the edits that were right when made, share of all edits).

    A fact forgotten once stays counted, also if it is recalled later. The share may still fall, because its
    denominator grows with the edits.

    Args:
        held_at: for each count, whether the edits made until then are right (1), in order.
        first_N: whether each edit was right just after it was made.
    """
    lost = torch.zeros(len(first_N), dtype=torch.bool)
    shares = []
    for held in held_at:
        made = len(held)
        lost[:made] |= torch.tensor(list(held)) < 1
        right = torch.tensor(list(first_N[:made])) >= 1
        gone = int((lost[:made] & right).sum())
        shares.append((facts_forgotten(right, lost[:made]), gone / made if made else 0.0))
    return shares


def forgetting_lengths(
    counts: Sequence[int], held_at: Sequence[Sequence[float]], first_N: Sequence[float]
) -> list[int]:
    """For each fact that was forgotten, how many edits later it first failed."""
    lengths = []
    for index, right in enumerate(first_N):
        later = [
            count
            for count, held in zip(counts, held_at, strict=True)
            if index < len(held) and held[index] < 1
        ]
        if right >= 1 and later:
            lengths.append(later[0] - (index + 1))
    return lengths


def age_matrix(counts: Sequence[int], held_at: Sequence[Sequence[float]]) -> list[list[float]]:
    """Retention by age, K x K: row k is measured after ``counts[k]`` edits, column b is of the edits made between
    counts b - 1 and b.

    The diagonal holds the newest edits, NaN stands above it.
    """
    bounds = [0, *counts]
    matrix = []
    for row, held in enumerate(held_at):
        parts = [held[bounds[b] : bounds[b + 1]] for b in range(row + 1)]
        means = [sum(part) / len(part) if part else math.nan for part in parts]
        matrix.append(means + [math.nan] * (len(counts) - row - 1))
    return matrix


# ---------------------------------------------------------------------------- detectors


def is_jump(step: float, earlier: Sequence[float], factor: float = FACTOR) -> bool:
    """Whether a step is more than ``factor`` times the median of at least 5 earlier ones, or not finite.

    Earlier steps of size 0 do not count: those edits changed other layers.
    """
    if not math.isfinite(step):
        return True
    sizes = [abs(one) for one in earlier if math.isfinite(one) and one]
    return len(sizes) >= LEAST_STEPS and step > factor * median(sizes)


def first_jump(distance_N: Sequence[float], factor: float = FACTOR) -> int | None:
    """T_dist of one layer: the first operation, from 1, by which the distance from the unedited weights jumps.

    Args:
        distance_N: the distance after each operation; before the first it is 0.
        factor: how many times the median of the earlier steps a jump is.
    """
    steps = np.diff([0.0, *distance_N]).tolist()
    jumps = (
        number
        for number, step in enumerate(steps, start=1)
        if is_jump(step, steps[: number - 1], factor)
    )
    return next(jumps, None)


def first_lost_task(
    counts: Sequence[int], scores: Sequence[float], share: float = 0.5
) -> int | None:
    """T_down: the first of two counts in a row at which a task's score is below ``share`` of the unedited model's.

    At the last count one low score is enough.

    Args:
        counts: numbers of edits, ascending; the first is 0, the unedited model.
        scores: the task's score at each of them; NaN counts as low.
        share: of the unedited model's score.
    """
    if not counts or counts[0] != 0:
        return None
    low = [not score >= share * scores[0] for score in scores]
    for index in range(1, len(low)):
        if low[index] and low[min(index + 1, len(low) - 1)]:
            return counts[index]
    return None


def first_forgotten(
    counts: Sequence[int], forgotten: Sequence[float], rise: float = 0.3
) -> int | None:
    """T_forget: the first count at which the share of facts forgotten has risen by more than ``rise`` since the
    count before; at first it is 0.
    """
    before = 0.0
    for count, share in zip(counts, forgotten, strict=True):
        if share - before > rise:
            return count
        before = share
    return None


def first_failing(right_N: Sequence[float], window: int = 50, least: float = 0.9) -> int | None:
    """T_edit: the first edit, from 1, at which less than ``least`` of the last ``window`` were right when made.

    None for fewer edits than the window.
    """
    means = trailing_mean(right_N, window)[window - 1 :]
    return next((n for n, mean in enumerate(means, start=window) if mean < least), None)


def inflection_point(
    counts: Sequence[int], retained: Sequence[float], fall: float = 0.3
) -> int | None:
    """The count at which slow forgetting turns into collapse: where retention bends down.

    Of all pairs of straight lines that meet at a measured count, the pair with the least squared error decides.
    None unless the second line falls at least twice as fast as the first and the curve by more than ``fall`` after
    that count, or for fewer than 4 counts.
    """
    x, y = np.asarray(counts, float), np.asarray(retained, float)
    if len(x) < 4:
        return None
    best, slope, change, error = 0, 0.0, 0.0, math.inf
    for bend in range(1, len(x) - 1):
        terms = np.stack([np.ones_like(x), x, np.maximum(0, x - x[bend])], 1)
        weight, *_ = np.linalg.lstsq(terms, y, rcond=None)
        missing = float(((terms @ weight - y) ** 2).sum())
        if missing < error - 1e-12:
            best, slope, change, error = bend, float(weight[1]), float(weight[2]), missing
    falls = change < min(slope, -1e-9) and y[best] - y[-1] > fall
    return int(counts[best]) if falls else None


def disabling_edits(
    norms: Sequence[float], entropies: Sequence[float | None], calibration: int = 200
) -> list[bool]:
    """Whether each single edit, made alone, breaks the model.

    It does if the norm of its update is not finite or more than 20 times the median of the first ``calibration``
    edits, or if the normalised entropy of its generated words is below .7.

    Args:
        norms: of the updates.
        entropies: see :func:`word_entropy`; None where nothing was generated.
        calibration: how many edits the median is taken of.
    """
    checks.whole(1, calibration=calibration)
    usual = [norm for norm in norms[:calibration] if math.isfinite(norm)]
    limit = FACTOR * median(usual) if usual else math.inf
    return [
        not norm <= limit or (entropy is not None and entropy < LEAST_ENTROPY)
        for norm, entropy in zip(norms, entropies, strict=True)
    ]


def kind_of_collapse(
    perplexity: float, before: float, base: float, jumped: bool, increase: float, factor: float
) -> Kind | None:
    """How a model has collapsed: by one operation (catastrophic) or by many (gradual); None if it has not.

    Args:
        perplexity: of a text, after the operation; not finite if the logits or the weights are not.
        before: before the operation.
        base: of the unedited model.
        jumped: whether the norm of a weight's change has jumped.
        increase: the largest relative increase over ``base`` that is no collapse.
        factor: by which one operation raises the perplexity if it is catastrophic.
    """
    if not math.isfinite(perplexity) or jumped or perplexity > factor * before:
        return "catastrophic"
    return "gradual" if perplexity > (1 + increase) * base else None


def detected(
    counts: Sequence[int],
    retained: Sequence[float],
    forgotten: Sequence[float],
    right_N: Sequence[float],
    operations: Sequence[int],
    distances: Mapping[str, Sequence[float]],
    tasks: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> dict[str, int | None]:
    """All detectors of a stream, as numbers of edits; None where one has not fired or has nothing to watch.

    Args:
        counts: numbers of edits at which earlier ones were scored.
        retained: mean of the edits right at each of them.
        forgotten: share of facts forgotten at each of them.
        right_N: whether each edit was right when it was made.
        operations: number of edits after each operation.
        distances: by layer, the distance from the unedited weights after each operation.
        tasks: by name of a task, counts and scores, see :func:`first_lost_task`. SST-2 decides if it is there.
    """
    jumps = [first_jump(values) for values in distances.values()]
    watched = [name for name in tasks if name.startswith(TASK)] or list(tasks)
    lost = [first_lost_task(*tasks[name]) for name in watched]
    jumped = min((n for n in jumps if n is not None), default=None)
    return {
        "T_dist": None if jumped is None else operations[jumped - 1],
        "T_down": min((n for n in lost if n is not None), default=None),
        "T_forget": first_forgotten(counts, forgotten),
        "T_edit": first_failing(right_N),
        "inflection": inflection_point(counts, retained),
    }
