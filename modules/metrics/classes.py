"""Means over cases, and what a stream has forgotten, as torchmetrics classes, which add up over processes.

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

from corrigenda.modules.metrics import probes, summaries


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


class CaseMean(EditMetric):
    """Mean over cases of the mean over a case's probes.

    All of a case's probes must come in one ``update``: a case met in two updates counts twice.

    Args:
        protocol: how the values were measured.
    """

    protocol = "tf_exact"
    reduce: Callable[[Tensor, Tensor, int], Tensor] = staticmethod(probes.case_means)
    total: Tensor
    count: Tensor

    def __init__(self, protocol: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(protocol, **kwargs)
        # In double precision the order in which processes add up does not show.
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values_B: Tensor, case_B: Tensor) -> None:
        """Add whole cases."""
        values_B = values_B.to(self.device)
        cases, index_B = case_B.to(self.device).unique(return_inverse=True)
        values_C = self.reduce(values_B, index_B, len(cases))
        self.total = self.total + values_C.double().sum()
        self.count = self.count + values_C.numel()

    def compute(self) -> Tensor:
        """Mean over the cases seen; NaN before the first."""
        return self.total / self.count


class MultiHopAccuracy(CaseMean):
    """Share of cases with any wording of their multi-hop question right (arXiv 2305.14795); see `any_right`."""

    reduce = staticmethod(probes.any_right)


class HopAccuracy(CaseMean):
    """Share of cases with every single hop right (instance-wise, arXiv 2305.14795); see `all_right`."""

    reduce = staticmethod(probes.all_right)


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
