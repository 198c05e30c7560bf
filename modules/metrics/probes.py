"""Teacher-forced measures of single probes, and their means over cases.

Every measure of success is 0 for a probe whose log-probabilities are not finite (a collapsed model) or that has no
target token; the KL divergence is infinite there. Nothing raises on NaN.

Shapes: B probes, M target tokens (padded), N rival tokens (padded), V vocabulary, C cases.
Masks are true at real tokens; values at padded positions are ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _require_same_shape(what: str, one: Tensor, other: Tensor) -> None:
    """Raises ValueError for different shapes, which broadcasting would hide."""
    if one.shape != other.shape:
        raise ValueError(f"{what} need one shape, got {tuple(one.shape)} and {tuple(other.shape)}")


def masked_mean(values_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean over the real tokens of each probe, [B]; NaN for a probe without tokens."""
    _require_same_shape("values and mask", values_BM, mask_BM)
    mask_BM = mask_BM.bool()
    return torch.where(mask_BM, values_BM.float(), 0.0).sum(-1) / mask_BM.sum(-1)


def token_accuracy(
    greedy_BM: Tensor, target_BM: Tensor, mask_BM: Tensor, logprob_BM: Tensor | None = None
) -> Tensor:
    """Share of target tokens that are the argmax, [B].

    Args:
        greedy_BM: argmax ids at the positions that predict the target.
        target_BM: the target's ids.
        mask_BM: true at the target's tokens.
        logprob_BM: the target's log-probabilities. Positions where they are not finite count as wrong, because the
            argmax of NaN logits is an ordinary id.
    """
    _require_same_shape("ids", greedy_BM, target_BM)
    hits_BM = greedy_BM == target_BM
    if logprob_BM is not None:
        _require_same_shape("ids and log-probabilities", greedy_BM, logprob_BM)
        hits_BM = hits_BM & logprob_BM.isfinite()
    return masked_mean(hits_BM, mask_BM).nan_to_num(0.0)


def exact_match(
    greedy_BM: Tensor, target_BM: Tensor, mask_BM: Tensor, logprob_BM: Tensor | None = None
) -> Tensor:
    """1 where every target token is the argmax, else 0, [B]; arguments of `token_accuracy`."""
    return (token_accuracy(greedy_BM, target_BM, mask_BM, logprob_BM) == 1).float()


def agreement(
    after_greedy_BM: Tensor,
    before_greedy_BM: Tensor,
    mask_BM: Tensor,
    after_logprob_BM: Tensor | None = None,
) -> Tensor:
    """Share of positions whose argmax is the same before and after the edit, [B]."""
    return token_accuracy(after_greedy_BM, before_greedy_BM, mask_BM, after_logprob_BM)


def mean_logprob(logprob_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean log-probability of the target's tokens, [B]; -inf where it is not finite."""
    mean_B = masked_mean(logprob_BM, mask_BM)
    return torch.where(mean_B.isfinite(), mean_B, -torch.inf)


def preference(
    target_logprob_BM: Tensor,
    target_mask_BM: Tensor,
    rival_logprob_BN: Tensor,
    rival_mask_BN: Tensor,
) -> Tensor:
    """1 where the target is more likely than its rival, by mean log-probability of their tokens, else 0, [B].

    Args:
        target_logprob_BM: log-probabilities of the target's tokens.
        target_mask_BM: true at them.
        rival_logprob_BN: log-probabilities of the rival's tokens.
        rival_mask_BN: true at them.
    """
    target_B = mean_logprob(target_logprob_BM, target_mask_BM)
    rival_B = mean_logprob(rival_logprob_BN, rival_mask_BN)
    return ((target_B > rival_B) & rival_B.isfinite()).float()


def margin(
    target_logprob_BM: Tensor,
    target_mask_BM: Tensor,
    rival_logprob_BN: Tensor,
    rival_mask_BN: Tensor,
) -> Tensor:
    """Token probability of the target minus that of its rival (geometric means), [B]."""
    target_B = mean_logprob(target_logprob_BM, target_mask_BM)
    rival_B = mean_logprob(rival_logprob_BN, rival_mask_BN)
    is_finite_B = target_B.isfinite() & rival_B.isfinite()
    return torch.where(is_finite_B, target_B.exp() - rival_B.exp(), 0.0)


def kl(before_logprob_BMV: Tensor, after_logprob_BMV: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean over tokens of KL(before || after) in nats, [B]; +inf where it is not defined.

    Args:
        before_logprob_BMV: log-softmax of the unedited model's logits.
        after_logprob_BMV: the same of the edited model's.
        mask_BM: true at the positions compared.
    """
    _require_same_shape("log-probabilities", before_logprob_BMV, after_logprob_BMV)
    before_BMV, after_BMV = before_logprob_BMV.float(), after_logprob_BMV.float()
    terms_BMV = before_BMV.exp() * (before_BMV - after_BMV)
    # Some models set unused ids of the vocabulary to -inf: 0 log 0 is 0, not NaN.
    terms_BMV = torch.where(before_BMV == -torch.inf, 0.0, terms_BMV)
    kl_BM = terms_BMV.sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    mean_B = masked_mean(kl_BM.clamp(min=0), mask_BM)
    return mean_B.nan_to_num(nan=torch.inf, posinf=torch.inf)


def case_means(values_B: Tensor, case_B: Tensor, num_cases: int) -> Tensor:
    """Mean over each case's probes, [C]; NaN (absent) for a case without any.

    Args:
        values_B: one value per probe.
        case_B: index of the probe's case, from 0 to num_cases - 1.
        num_cases: C.
    """
    if values_B.shape != case_B.shape:
        raise ValueError(
            f"values and case indices must have the same shape, got {tuple(values_B.shape)} values "
            f"and {tuple(case_B.shape)} indices"
        )
    values_B, case_B = values_B.float(), case_B.to(values_B.device)
    totals_C = values_B.new_zeros(num_cases).index_add_(0, case_B, values_B)
    return totals_C / torch.bincount(case_B, minlength=num_cases)


def any_right(values_B: Tensor, case_B: Tensor, num_cases: int) -> Tensor:
    """1 if at least one of the case's probes is right (has the value 1), else 0, [C]; NaN where absent.

    Arguments of `case_means`.
    """
    means_C = case_means((values_B >= 1).float(), case_B, num_cases)
    return torch.where(means_C.isnan(), means_C, (means_C > 0).float())


def all_right(values_B: Tensor, case_B: Tensor, num_cases: int) -> Tensor:
    """1 if all of the case's probes are right (have the value 1), else 0, [C]; NaN where absent.

    Arguments of `case_means`.
    """
    return 1 - any_right((~(values_B >= 1)).float(), case_B, num_cases)
