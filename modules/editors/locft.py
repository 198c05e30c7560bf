"""LocFT: fine-tuning one well-chosen matrix breadth first (Yang et al., 2025, arXiv 2509.22072, there LocFT-BF).

All edits of a task are learned together, in mini-batches over passes, where FT-M learns one edit after the other
until each is right. As published: one MLP output projection, Adam with step size 5e-4, at most 25 passes; a batch
whose loss is below 0.01 makes no step; training ends with the first pass whose mean loss is below 0.01; the target
is followed by the end-of-text token.

Departures from the authors' code: prompt and target are encoded together; a projection's bias, if there is one, is
tuned with it; a skipped batch counts as one of the trainer's steps.
"""

from __future__ import annotations

from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules.training.tuning import FineTune


class LocFT(FineTune):
    """Fine-tunes a method's parameters, FT of one layer as published, until a whole pass has a low loss.

    Of ``method`` the ``steps`` are the most passes over a task, and ``stop_loss`` is the loss below which a batch
    is skipped and a task ends. Without tasks an epoch is a pass.
    """

    ends_targets = True

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if loss is None or loss < self.method.stop_loss else loss

    def is_learned(self, passes: int, loss: float) -> bool:
        return loss < self.method.stop_loss or passes >= self.method.steps
