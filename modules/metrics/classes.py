"""torchmetrics classes, which sum over processes: means over cases, and the facts that a stream has forgotten.

Shapes as in `corrigenda.modules.metrics.probes`. ``case_B`` holds one integer per probe that identifies its case,
such as the case's index in the batch.
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

from corrigenda.modules.metrics import probes, summaries


class EditMetric(Metric):
    """A metric with the name of its protocol; NaN, without a warning, while it is empty."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    protocol: str

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if protocol is not None:
            self.protocol = protocol
        # MetricCollection merges metrics whose states are equal after one batch, which a perfect first batch
        # causes. A state with a name of its own prevents that.
        self.add_state(f"{type(self).__name__}_{self.protocol}", torch.tensor(0), "sum")

    def _wrap_compute(self, compute: Callable) -> Callable:
        wrapped = super()._wrap_compute(compute)

        def quiet() -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                return wrapped()

        return quiet


class CaseMean(EditMetric):
    """Mean over cases of the mean over a case's probes.

    All probes of a case must be in one ``update``; a case in two updates counts twice.

    Args:
        protocol: how the values were measured.
    """

    protocol = "tf_exact"
    reduce: Callable[[Tensor, Tensor, int], Tensor] = staticmethod(probes.case_means)
    total: Tensor
    count: Tensor

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(protocol, **kwargs)
        # In double precision the order of summation over processes has no visible effect.
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values_B: Tensor, case_B: Tensor) -> None:
        """Adds whole cases."""
        values_B = values_B.to(self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        values_C = self.reduce(values_B, index_B, len(cases))
        self.total = self.total + values_C.double().sum()
        self.count = self.count + values_C.numel()

    def compute(self) -> Tensor:
        """Mean over the cases so far; NaN before the first."""
        return self.total / self.count


class MultiHopAccuracy(CaseMean):
    """Share of cases with any phrasing of their multi-hop question right (arXiv 2305.14795); see `any_right`."""

    reduce = staticmethod(probes.any_right)


class HopAccuracy(CaseMean):
    """Share of cases with every single hop right (instance-wise, arXiv 2305.14795); see `all_right`."""

    reduce = staticmethod(probes.all_right)


class FactsForgotten(EditMetric):
    """Share of the initially successful edits that failed in any later evaluation; see `facts_forgotten`.

    Its state is saved in checkpoints and must last as long as the edits. Log the value of ``compute``, not the
    object, which Lightning would reset after each epoch.

    Args:
        protocol: how edits are judged.
    """

    protocol = "tf_exact"
    higher_is_better = False
    edited: list[Tensor]
    held: list[Tensor]
    lost: list[Tensor]

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(protocol, **kwargs)
        for name in ("edited", "held", "lost"):
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)

    def update(
        self, case_ids: Sequence[str], ok_B: Tensor, phase: Literal["current", "retention"]
    ) -> None:
        """Adds an evaluation of some edits.

        Args:
            case_ids: their cases; for ``retention`` only those that have been edited.
            ok_B: 1 where the edit is right (`exact_match`).
            phase: ``current`` just after these edits were made, ``retention`` at any later time.
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
        # The list always has one tensor, because an empty list would be gathered as float.
        setattr(self, name, [torch.cat([*getattr(self, name), keys]).unique()])

    def compute(self) -> Tensor:
        """The share so far; NaN before the first edit."""
        if not len(self.edited) or not dim_zero_cat(self.edited).numel():
            return torch.tensor(math.nan, device=self.device)
        edited, held, lost = (dim_zero_cat(s) for s in (self.edited, self.held, self.lost))
        edited = edited.unique()
        share = summaries.facts_forgotten(torch.isin(edited, held), torch.isin(edited, lost))
        return torch.tensor(share, device=self.device)


def _key(case_id: str) -> int:
    """A number for a case id, the same in all processes, which cannot gather strings."""
    digest = hashlib.blake2b(str(case_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
