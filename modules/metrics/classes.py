"""The measures as torchmetrics classes: pure function, then probe to case to dataset, never pooled.

Shapes as in `corrigenda.modules.metrics.probes`. ``case_B`` holds one integer per probe that tells cases
apart, such as the case's place in the batch.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from corrigenda.modules.metrics import probes, summaries, texts


class EditMetric(Metric):
    """A metric that names its protocol and is NaN, without a warning, as long as it is empty."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    protocol: str

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if protocol is not None:
            self.protocol = protocol
        # MetricCollection makes metrics share states that are equal after one batch, and a perfect
        # first batch makes most of ours equal. A state of its own name keeps each apart.
        self.add_state(f"{type(self).__name__}_{self.protocol}", torch.tensor(0), "sum")

    def _wrap_compute(self, compute: Callable) -> Callable:
        wrapped = super()._wrap_compute(compute)

        def quiet() -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                return wrapped()

        return quiet


class CaseMetric(EditMetric):
    """Mean over cases of the mean over a case's probes.

    All of a case's probes must come in one ``update``: a case met in two updates counts twice.
    """

    total: Tensor
    count: Tensor

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(protocol, **kwargs)
        # In double precision the order in which processes add up does not show.
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values_B: Tensor | Sequence[float], case_B: Tensor) -> None:
        values_B = torch.as_tensor(values_B, dtype=torch.float32, device=self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        self._add_means(probes.case_means(values_B, index_B, len(cases)))

    def _add_means(self, means_C: Tensor) -> None:
        self.total = self.total + means_C.double().sum()
        self.count = self.count + means_C.numel()

    def compute(self) -> Tensor:
        """Mean over the cases seen; NaN before the first."""
        return self.total / self.count


class CaseMean(CaseMetric):
    """Mean over cases of probe values that have been worked out already.

    Args:
        protocol: how they were measured.
    """

    def update(self, values_B: Tensor, case_B: Tensor) -> None:
        """Add whole cases."""
        self._add(values_B, case_B)


class TokenAccuracy(CaseMetric):
    """Share of target tokens predicted, teacher forced; see `token_accuracy`."""

    protocol = "tf_tok"

    def update(
        self,
        greedy_BM: Tensor,
        target_BM: Tensor,
        mask_BM: Tensor,
        case_B: Tensor,
        logprob_BM: Tensor | None = None,
    ) -> None:
        """Add whole cases."""
        self._add(probes.token_accuracy(greedy_BM, target_BM, mask_BM, logprob_BM), case_B)


class ExactMatch(CaseMetric):
    """Share of targets predicted token for token, teacher forced; see `exact_match`."""

    protocol = "tf_exact"

    def update(
        self,
        greedy_BM: Tensor,
        target_BM: Tensor,
        mask_BM: Tensor,
        case_B: Tensor,
        logprob_BM: Tensor | None = None,
    ) -> None:
        """Add whole cases."""
        self._add(probes.exact_match(greedy_BM, target_BM, mask_BM, logprob_BM), case_B)


class Agreement(CaseMetric):
    """Share of positions whose argmax the edit left alone; see `agreement`."""

    protocol = "tf_tok"

    def update(
        self,
        after_greedy_BM: Tensor,
        before_greedy_BM: Tensor,
        mask_BM: Tensor,
        case_B: Tensor,
        after_logprob_BM: Tensor | None = None,
    ) -> None:
        """Add whole cases."""
        values_B = probes.agreement(after_greedy_BM, before_greedy_BM, mask_BM, after_logprob_BM)
        self._add(values_B, case_B)


class Preference(CaseMetric):
    """Share of probes whose target is likelier than its rival; see `preference`.

    Args:
        normalise: compare means over tokens; False compares sums, under protocol ``cf_prob_sum``.
    """

    protocol = "cf_prob"

    def __init__(self, normalise: bool = True, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(None if normalise else "cf_prob_sum", **kwargs)
        self.normalise = normalise

    def update(
        self,
        target_logprob_BM: Tensor,
        target_mask_BM: Tensor,
        rival_logprob_BN: Tensor,
        rival_mask_BN: Tensor,
        case_B: Tensor,
    ) -> None:
        """Add whole cases."""
        target, rival = (target_logprob_BM, target_mask_BM), (rival_logprob_BN, rival_mask_BN)
        self._add(probes.preference(*target, *rival, normalise=self.normalise), case_B)


class Margin(CaseMetric):
    """Token probability of the target minus that of its rival; see `margin`."""

    protocol = "cf_prob"

    def update(
        self,
        target_logprob_BM: Tensor,
        target_mask_BM: Tensor,
        rival_logprob_BN: Tensor,
        rival_mask_BN: Tensor,
        case_B: Tensor,
    ) -> None:
        """Add whole cases."""
        target, rival = (target_logprob_BM, target_mask_BM), (rival_logprob_BN, rival_mask_BN)
        self._add(probes.margin(*target, *rival), case_B)


class KLDivergence(CaseMetric):
    """KL(before || after) per token; one collapsed case makes it infinite; see `kl`."""

    protocol = "kl"
    higher_is_better = False

    def update(
        self,
        before_logprob_BMV: Tensor,
        after_logprob_BMV: Tensor,
        mask_BM: Tensor,
        case_B: Tensor,
    ) -> None:
        """Add whole cases."""
        self._add(probes.kl(before_logprob_BMV, after_logprob_BMV, mask_BM), case_B)


class _Wild(CaseMetric):
    """A comparison of free-running answers with acceptable ones.

    Args:
        stop: where an answer ends: ``strict`` (`wild_answer`) or ``paper`` (`paper_answer`, under
            protocol ``wild_paper``).
    """

    protocol = "wild"
    compare: Callable[[str, Sequence[str]], float]

    def __init__(self, stop: Literal["strict", "paper"] = "strict", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(None if stop == "strict" else "wild_paper", **kwargs)
        self.cut = texts.wild_answer if stop == "strict" else texts.paper_answer

    def update(
        self, generated_B: Sequence[str], answers_B: Sequence[Sequence[str]], case_B: Tensor
    ) -> None:
        """Add whole cases.

        Args:
            generated_B: what the model wrote after each prompt, uncut.
            answers_B: each probe's acceptable answers.
            case_B: which case the probe belongs to.
        """
        pairs = zip(generated_B, answers_B, strict=True)
        self._add([self.compare(self.cut(text), answers) for text, answers in pairs], case_B)


class WildExact(_Wild):
    """Share of generated answers equal to an acceptable one; see `wild_exact`."""

    compare = staticmethod(texts.wild_exact)


class WildContains(_Wild):
    """Share of generated answers that contain an acceptable one; see `wild_contains`."""

    compare = staticmethod(texts.wild_contains)


class WildPrefix(_Wild):
    """Share of generated answers that begin with an acceptable one; see `wild_prefix`."""

    compare = staticmethod(texts.wild_prefix)


class WildF1(_Wild):
    """Word F1 of generated answers; see `wild_f1`."""

    compare = staticmethod(texts.wild_f1)


class WildSame(CaseMetric):
    """Share of generations that the edit left identical, character for character."""

    protocol = "wild"

    def update(self, before_B: Sequence[str], after_B: Sequence[str], case_B: Tensor) -> None:
        """Add whole cases."""
        pairs = zip(before_B, after_B, strict=True)
        self._add([float(before == after) for before, after in pairs], case_B)


class Drawdown(CaseMetric):
    """Accuracy out of scope that the edits cost; see `drawdown`.

    Args:
        protocol: how the two accuracies were measured.
    """

    protocol = "tf_exact"
    higher_is_better = False

    def update(self, before_B: Tensor, after_B: Tensor, case_B: Tensor) -> None:
        """Add whole cases, with each probe's accuracy before and after."""
        self._add(summaries.drawdown(before_B.float(), after_B.float()), case_B)


class Portability(CaseMetric):
    """Mean over cases of the mean over a case's kinds of probes; see `two_level_means`.

    Args:
        protocol: how the values were measured.
    """

    protocol = "tf_tok"

    def update(self, values_B: Tensor, kinds_B: Sequence[str], case_B: Tensor) -> None:
        """Add whole cases, with each probe's value and kind."""
        values_B = values_B.to(self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        self._add_means(probes.two_level_means(values_B, kinds_B, index_B, len(cases)))


class _Verdict(CaseMetric):
    """Share of cases that are right as a whole, of probe values that have been worked out already.

    Args:
        protocol: how they were measured.
    """

    protocol = "wild"
    judge: Callable[[Tensor, Tensor, int], Tensor]

    def update(self, values_B: Tensor, case_B: Tensor) -> None:
        """Add whole cases."""
        values_B = values_B.to(self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        self._add_means(self.judge(values_B, index_B, len(cases)))


class MultiHopAccuracy(_Verdict):
    """Share of cases with any wording of their multi-hop question right (arXiv 2305.14795); see `any_right`."""

    judge = staticmethod(probes.any_right)


class HopAccuracy(_Verdict):
    """Share of cases with every single hop right (instance-wise, arXiv 2305.14795); see `all_right`."""

    judge = staticmethod(probes.all_right)


class HarmonicScore(EditMetric):
    """Harmonic mean of the dataset means of several criteria; NaN while one of them is empty.

    Args:
        criteria: what the score is made of.
        protocol: how the values were measured.
    """

    protocol = "cf_prob"
    totals: Tensor
    counts: Tensor

    def __init__(
        self,
        criteria: Sequence[str] = ("efficacy", "generality", "locality"),
        protocol: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(protocol, **kwargs)
        self.criteria = tuple(criteria)
        self.add_state("totals", torch.zeros(len(criteria)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(criteria), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, criterion: str, values_B: Tensor, case_B: Tensor) -> None:
        """Add whole cases' values of one criterion; other criteria are none of the score's."""
        if criterion not in self.criteria:
            return
        index = torch.tensor([self.criteria.index(criterion)], device=self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        means_C = probes.case_means(values_B.to(self.device), index_B, len(cases))
        self.totals = self.totals.index_add(0, index, means_C.sum()[None])
        self.counts = self.counts.index_add(0, index, torch.full_like(index, len(cases)))

    def compute(self) -> Tensor:
        """The score of the means so far."""
        means_K = self.totals / self.counts
        return torch.tensor(summaries.harmonic_score(*means_K.tolist()), device=self.device)


class FactsForgotten(EditMetric):
    """Share of the edits that held at first and were ever found lost since; see `facts_forgotten`.

    Its states are kept in checkpoints and must live as long as the edits do: log what ``compute``
    returns, not the object, which Lightning would reset after each epoch.

    Args:
        of_all: divide by all edits, not only by those that held.
        protocol: how it was decided whether an edit is right.
    """

    protocol = "tf_exact"
    higher_is_better = False
    edited: list[Tensor]
    held: list[Tensor]
    lost: list[Tensor]

    def __init__(self, of_all: bool = False, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(protocol, **kwargs)
        self.of_all = of_all
        for name in ("edited", "held", "lost"):
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)

    def update(
        self, case_ids: Sequence[str], ok_B: Tensor, phase: Literal["current", "retention"]
    ) -> None:
        """Add one look at some edits.

        Args:
            case_ids: whose edits; for ``retention`` only edits that have been made.
            ok_B: 1 where the edit is right (`exact_match`).
            phase: ``current`` just after these edits were made, ``retention`` at any later look.
        """
        if phase not in ("current", "retention"):
            raise ValueError(f"phase must be 'current' or 'retention', got {phase!r}")
        keys_B = torch.tensor([_key(case_id) for case_id in case_ids], dtype=torch.long)
        keys_B, is_ok_B = keys_B.to(self.device), ok_B.to(self.device) >= 1
        is_current = phase == "current"
        self._extend("edited", keys_B if is_current else keys_B[:0])
        self._extend("held", keys_B[is_ok_B] if is_current else keys_B[:0])
        self._extend("lost", keys_B[:0] if is_current else keys_B[~is_ok_B])

    def _extend(self, name: str, keys: Tensor) -> None:
        # Always leaves one tensor in the list: an empty one would be gathered as float.
        setattr(self, name, [torch.cat([*getattr(self, name), keys]).unique()])

    def compute(self) -> Tensor:
        """The share so far; NaN before the first edit."""
        if not len(self.edited) or not dim_zero_cat(self.edited).numel():
            return torch.tensor(math.nan, device=self.device)
        edited, held, lost = (dim_zero_cat(s) for s in (self.edited, self.held, self.lost))
        edited = edited.unique()
        share = summaries.facts_forgotten(
            torch.isin(edited, held), torch.isin(edited, lost), self.of_all
        )
        return torch.tensor(share, device=self.device)


def _key(case_id: str) -> int:
    """A number for a case id, the same in every process: ranks cannot gather strings."""
    digest = hashlib.blake2b(str(case_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
