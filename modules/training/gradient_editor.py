"""Editors that learn an update by gradient descent on the edits' loss.

Subclasses define the update's parameters (a dense matrix, two factors) and its constraints. This module optimises
many independent edits side by side. The network's weights are never written: the update runs as a side branch, and
blocks below the lowest tuned one run once.

Shapes: E independent problems, R rows (one per edit), N target tokens.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.training.optimize import IndependentAdam
from corrigenda.modules.training.target_rows import Loss, TargetRows

log = logging.getLogger(__name__)

MAX_ELEMENTS = 2**26  # learned together; gradient and Adam's moments take three times as much again
CHUNK_TOKENS = 2048  # padded tokens of one forward and backward pass


class GradientEditor(WeightEditor):
    """Learns an update with Adam, initialised to no change.

    Args:
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
        weight_decay: L2 decay of the learned update towards zero, so of the weights towards the base model's.
        loss: ``target`` is the mean negative log-likelihood of the target's tokens, each given the previous ones.
            ``prompt_last`` is that of the published FT and FT-L: every target token is predicted at the last
            position of the prompt. With m different tokens it cannot fall below log m, and it does not depend on
            their order.
        parallel: independent edits learned together; fewer if their updates are large.
    """

    def __init__(
        self,
        steps: int,
        lr: float,
        stop_loss: float,
        weight_decay: float = 0.0,
        loss: Loss = "target",
        parallel: int = 8,
    ) -> None:
        checks.whole(1, steps=steps, parallel=parallel)
        checks.positive(lr=lr)
        checks.at_least(0, stop_loss=stop_loss, weight_decay=weight_decay)
        self.steps, self.lr, self.stop_loss = steps, lr, stop_loss
        self.weight_decay, self.loss, self.parallel = weight_decay, loss, parallel

    @abstractmethod
    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        """The initial parameters by name, E = ``count`` copies of an update of zero; [E, ...], float32.

        Random ones differ from one ``task`` to the next.
        """

    @abstractmethod
    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        """The E updates parametrised by the leaves, differentiable in them."""

    @abstractmethod
    def lowest_layer(self, lm: LanguageModel) -> int:
        """The lowest block that is changed."""

    def project(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Projects the leaves onto the allowed set, in place; called after each step."""

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One update for all edits, learned on their mean loss."""
        return self._learn(lm, [edits])[0]

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        size = sum(leaf.numel() for leaf in self.start(lm, 1).values())
        count = max(1, min(self.parallel, MAX_ELEMENTS // size))
        starts = range(0, len(edits), count)
        return [d for start in starts for d in self._learn(lm, edits[start : start + count])]

    def _learn(self, lm: LanguageModel, groups: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per group, each independent of the other groups."""
        leaves = self.start(lm, len(groups))
        problems = Problems.of(self, lm, groups)
        adam = IndependentAdam(list(leaves.values()), self.lr, weight_decay=self.weight_decay)
        loss_E = torch.zeros(len(groups), device=lm.device)
        updates_E = torch.zeros(len(groups), dtype=torch.long, device=lm.device)
        active_E = torch.ones(len(groups), dtype=torch.bool, device=lm.device)
        for _ in range(self.steps):
            now_E, gradients = problems.gradients(leaves)
            loss_E = torch.where(active_E, now_E, loss_E)
            unfinished_E = active_E & (now_E >= self.stop_loss)  # also False for NaN
            if not unfinished_E.any():
                break
            if not torch.equal(unfinished_E, active_E):
                active_E, problems = unfinished_E, problems.select(unfinished_E)
            adam.step(gradients, active_E)
            updates_E += active_E
            self.project(lm, leaves)
        deltas = [delta.detach() for delta in self.deltas(lm, leaves)]
        for delta, group, loss, updates in zip(
            deltas, groups, loss_E.tolist(), updates_E.tolist(), strict=True
        ):
            delta.metadata["notes"] = [{"loss": loss, "updates": updates}]
            if not math.isfinite(loss):
                log.warning("%r: the edit has failed, its loss is %s after %d steps; try a smaller lr",
                            group[0].text, loss, updates)  # fmt: skip
        return deltas


# ---------------------------------------------------------------------------- independent problems


@dataclass(frozen=True)
class Problems:
    """The losses of E groups of edits, each a function of its own update alone.

    Attributes:
        size_E: number of edits in each group, whose losses are averaged.
        chunks: the rows, in chunks that fit into memory.
    """

    editor: GradientEditor
    lm: LanguageModel
    size_E: Tensor
    chunks: list[TargetRows]

    @classmethod
    def of(
        cls, editor: GradientEditor, lm: LanguageModel, groups: Sequence[Sequence[Edit]]
    ) -> Problems:
        edits = [edit for group in groups for edit in group]
        rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        size_E = torch.tensor([len(group) for group in groups], device=lm.device)
        owner_R = torch.arange(len(groups), device=lm.device).repeat_interleave(size_E)
        layer = editor.lowest_layer(lm)
        chunks = [
            TargetRows.of(lm, rows.select(index), owner_R[index], layer, editor.loss)
            for index in _chunk_indices(rows)
        ]
        return cls(editor, lm, size_E, chunks)

    def gradients(self, leaves: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(loss_E, gradients of the sum of losses in the leaves); each leaf belongs to one problem."""
        loss_E = torch.zeros(len(self.size_E), device=self.lm.device)
        total: list[Tensor] = []
        for chunk in self.chunks:
            loss_R = chunk.losses(self.lm, self.editor.deltas(self.lm, leaves))
            share_R = loss_R / self.size_E[chunk.owner_R]
            part = torch.autograd.grad(share_R.sum(), list(leaves.values()))
            total = [a + b for a, b in zip(total, part, strict=True)] if total else list(part)
            loss_E = loss_E.index_add(0, chunk.owner_R, share_R.detach())
        return loss_E, total

    def select(self, active_E: Tensor) -> Problems:
        """Without the rows of finished problems; the other problems keep their indices."""
        chunks = [part for chunk in self.chunks if (part := chunk.select(active_E)) is not None]
        return Problems(self.editor, self.lm, self.size_E, chunks)


def _chunk_indices(rows: Rows) -> Iterator[Tensor]:
    """Row indices, longest first, in chunks of at most CHUNK_TOKENS padded tokens."""
    order = rows.length_B.argsort(descending=True, stable=True)
    while len(order):
        count = max(1, CHUNK_TOKENS // int(rows.length_B[order[0]]))
        yield order[:count]
        order = order[count:]
