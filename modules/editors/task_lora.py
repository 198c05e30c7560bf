"""One low-rank adapter per task, and O-LoRA (Wang et al., 2023, arXiv 2310.14152).

Every task learns a fresh adapter while those of earlier tasks are frozen, and the model is the sum of all:

    W' = W + sum_k s B_k A_k

O-LoRA also keeps the new adapter's input directions apart from those of the earlier ones, by the penalty

    lambda * sum_{k < t} |A_k A_t^T|_1

(peft's ``olora`` is something else: an initialisation of A and B.)

Departures from the authors' code: no penalty on the norm of the new adapter, whose published weight is 0 in most
tasks; every adapter is evaluated with all others, also before its task has ended.
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


class TaskLoRA(FineTune):
    """Learns a fresh update for every task; those of earlier tasks are frozen and added.

    ``method`` is LoRA; each task starts from its own draw of A.
    """

    def __init__(self, lm: LanguageModel, method: GradientEditor, **rest: Any) -> None:  # noqa: ANN401
        super().__init__(lm, method, **rest)
        self.past = Kept()  # the sum of the earlier tasks' updates

    @property
    def earlier(self) -> Delta:
        """The sum of the updates of earlier tasks."""
        return Delta.from_tensors(self.past.tensors, {})

    def update(self) -> Delta:
        return add_deltas([self.earlier, super().update()])

    def end_task(self, cases: Sequence[EditCase]) -> None:
        """Freezes the task's update. The fresh one that follows is zero, so the model stays the same."""
        self.past.put(self.own_delta().tensors())
        fresh = self.method.start(self.lm, 1, self._ended + 1)
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(fresh[name])


class OLoRA(TaskLoRA):
    """O-LoRA: adapters whose input directions are orthogonal to those of earlier tasks.

    Args:
        lm: the language model.
        method: the adapter, LoRA.
        strength: lambda, of the penalty on overlap.
        **rest: further settings, of FineTune.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        strength: float = 0.5,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(lm, method, **rest)
        checks.at_least(0, strength=strength)
        self.strength = strength

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        new, terms = FineTune.update(self).updates, []
        for name, old in self.earlier.updates.items():
            update = new[name]
            if isinstance(old, LowRank) and isinstance(update, LowRank):
                terms.append((old.right_rI @ update.right_rI.T).abs().sum())
        return self.strength * torch.stack(terms).sum() if terms else None
