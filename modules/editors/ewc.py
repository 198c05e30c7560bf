"""EWC: elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796), and online EWC.

    L(theta) = L_task(theta) + lambda / 2 * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2

with a pair (F_k, theta*_k) for every past task k: theta* are the parameters at its end, and F the diagonal of the
empirical Fisher information there: the mean over the task's edits of the squared gradient of log p(target |
prompt). The gradient is squared edit by edit; the square of a batch's mean gradient is another, smaller number.

A sum of parabolas is a parabola. The penalties of all past tasks are kept as one, with F = sum_k F_k and
theta* = sum_k F_k theta*_k / F. It differs from their sum by a constant, which no gradient shows (Huszar, 2018,
arXiv 1712.03847), and memory does not grow with the number of tasks.

Online EWC (Schwarz et al., 2018, arXiv 1805.06370): F <- gamma F + F_new, and theta* is where the last task ended.

theta are the numbers that are learned: those of the update, so that with LoRA they are its factors. Fisher
information of an edit that has been learned well is small, since its gradient is: lambda is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.kept import Kept
from corrigenda.modules.training.target_rows import TargetRows
from corrigenda.modules.training.tuning import FineTune


class EWC(FineTune):
    """Fine-tunes with a penalty on moving parameters that mattered for earlier tasks.

    Args:
        lm: the language model.
        method: the parameters to learn and their loss.
        strength: lambda.
        gamma: online EWC: what earlier Fisher information is multiplied by when a task ends. None: one penalty per
            task.
        **rest: further settings, of FineTune.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        strength: float = 1e4,
        gamma: float | None = None,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(lm, method, **rest)
        checks.at_least(0, strength=strength)
        checks.between(0, 1, gamma=gamma)
        self.strength, self.gamma = strength, gamma
        self.fisher, self.anchor = Kept(), Kept()

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        fisher, anchor = self.fisher.tensors, self.anchor.tensors
        if not fisher:
            return None
        terms = [
            (fisher[name] * (leaf - anchor[name]) ** 2).sum() for name, leaf in self.leaves.items()
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def end_task(self, cases: Sequence[EditCase]) -> None:
        """Adds the task's Fisher information, and moves the anchor."""
        new = self.information([edit for case in cases for edit in case.edits])
        here = {name: leaf.detach() for name, leaf in self.leaves.items()}
        old, anchor = self.fisher.tensors, self.anchor.tensors
        if old and self.gamma is not None:
            new = {name: f + self.gamma * old[name] for name, f in new.items()}
        elif old:
            total = {name: f + old[name] for name, f in new.items()}
            here = {
                name: anchor[name] + _share(new[name], total[name]) * (leaf - anchor[name])
                for name, leaf in here.items()
            }
            new = total
        self.fisher.put(new)
        self.anchor.put(here)

    def information(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        """The mean over edits of the squared gradient of log p(target | prompt), by name of what is learned."""
        leaves = self.leaves
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for edit in edits:
            rows = self.target_rows([edit.text], [edit.target_new])
            nll = (rows.losses(self.lm, [self.update()]) * rows.length_R).sum()
            for name, gradient in zip(
                leaves, torch.autograd.grad(nll, list(leaves.values())), strict=True
            ):
                total[name] += gradient**2 / len(edits)
        return total


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 where both are 0."""
    return torch.where(whole > 0, part / whole, 1.0)
