"""LocFT: fine-tuning one well-chosen matrix breadth first (Yang et al., 2025, arXiv 2509.22072, there LocFT-BF).

All edits of a task are learned together, in mini-batches over passes, where FT-M learns one edit after the other
until each is right. As published: one MLP output projection, Adam with step size 5e-4, at most 25 passes; a batch
whose loss is below 0.01 makes no step; training ends with the first pass whose mean loss is below 0.01; the target
is followed by the end-of-text token.

Departures from the authors' code: prompt and target are encoded together; a projection's bias, if there is one, is
tuned with it; a skipped batch counts as one of the trainer's steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.tuning import FineTune, GradientEditor


class LocFT(FineTune):
    """Fine-tunes a method's parameters, FT of one layer as published, until a whole pass has a low loss.

    Of ``method`` the ``steps`` are the most passes over a task, and ``stop_loss`` is the loss below which a batch
    is skipped and a task ends. Without tasks an epoch is a pass.

    Args:
        lm: the language model.
        method: the parameters to learn and their loss.
        **rest: further settings, of FineTune.
    """

    ends_targets = True
    pass_loss: Tensor

    def __init__(self, lm: LanguageModel, method: GradientEditor, **rest: Any) -> None:  # noqa: ANN401
        super().__init__(lm, method, **rest)
        # Sum of the losses of this pass, and the number of edits.
        self.register_buffer("pass_loss", torch.zeros(2, dtype=torch.float64))

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if loss is not None:
            count = sum(len(case.edits) for case in batch)
            self.pass_loss += torch.stack([count * loss.detach(), loss.new_tensor(count)])
        passes, rest = divmod(batch_idx + 1, self.batches_per_pass)
        if rest == 0:
            self._end_pass(passes if self.tasks else self.current_epoch + 1)
        return None if loss is None or loss < self.method.stop_loss else loss

    def _end_pass(self, passes: int) -> None:
        """Ends the task when the mean loss is low or the passes are used up."""
        total, count = self.pass_loss.tolist()
        self.pass_loss.zero_()
        if total / max(count, 1) < self.method.stop_loss or passes >= self.method.steps:
            self.stop_task()
