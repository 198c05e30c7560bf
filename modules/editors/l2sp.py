"""L2-SP: a penalty on the distance from where training started (Li et al., 2018, arXiv 1802.01483).

    L(theta) = L_task(theta) + alpha / 2 |W - W_base|^2 + beta / 2 |W - W_last|^2

W_base are the unedited weights, W_last those at the end of the last task. Distances are those of the weights,
however the update is made of factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.model.delta import Delta, LowRank, add_deltas
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.kept import Kept
from corrigenda.modules.training.target_rows import TargetRows
from corrigenda.modules.training.tuning import FineTune


class L2SP(FineTune):
    """Fine-tunes with a penalty on the distance to the base weights and to those of the last task.

    Args:
        lm: the language model.
        method: the parameters to learn and their loss.
        to_base: alpha, of the distance to the base.
        to_last: beta, of the distance to the end of the last task; the first task has none.
        **rest: further settings, of FineTune.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        to_base: float = 0.0,
        to_last: float = 1.0,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(lm, method, **rest)
        checks.at_least(0, to_base=to_base, to_last=to_last)
        self.to_base, self.to_last = to_base, to_last
        self.last = Kept()

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        update = self.update()
        penalty = self.to_base / 2 * squared_norm(update)
        if last := self.last.tensors:
            moved = add_deltas([update, Delta.from_tensors(last, {}).scaled(-1)])
            penalty = penalty + self.to_last / 2 * squared_norm(moved)
        return penalty

    def end_task(self, cases: Sequence[EditCase]) -> None:
        self.last.put(self.own_delta().tensors())


def squared_norm(delta: Delta) -> Tensor:
    """The squared Frobenius norm of an update; low-rank factors are not multiplied out."""
    terms = [
        ((u.left_Or.T @ u.left_Or) * (u.right_rI @ u.right_rI.T)).sum()
        if isinstance(u, LowRank)
        else (u**2).sum()
        for u in delta.updates.values()
    ]
    return torch.stack(terms).sum()
