"""CaliNET: calibration slots beside the MLPs of some blocks (Dong et al., 2022, arXiv 2210.03329).

    MLP'(h) = MLP(h) + W_o relu(W_i h)

A few slots are trained on all edits of one call together; nothing else is trained. A further call leaves these
slots as they are and trains new ones beside them.

Departures from the authors' code: the whole base is frozen, not parameters by name; W_o starts at zero, so that
the slots have no effect until they are trained; prompts follow texts sampled from the model instead of being
paraphrased by hand; Adam instead of Adafactor. The caller has to know which facts are wrong.

Shapes: S slots of a block, D residual width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.adapters import ModuleEditor
from corrigenda.modules.editing.neurons import SideNeurons
from corrigenda.modules.editors.key_value import sample_contexts
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.target_rows import TargetRows

log = logging.getLogger(__name__)


class CaliNET(ModuleEditor):
    """Trains calibration slots on all edits together.

    Args:
        layers: blocks that get slots, from 0.
        slots: number of slots in each of them.
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        batch_size: rows of a step; a row is an edit's prompt after one context.
        stop_loss: training ends after a pass over all rows in which every step's loss was below this.
        contexts: pairs of (tokens, number of texts) of the sampled texts before a prompt.
        seed: random seed of the sampled texts, the slots' initialisation and the order of rows.
    """

    def __init__(
        self,
        layers: list[int],
        slots: int = 64,
        steps: int = 200,
        lr: float = 1e-3,
        batch_size: int = 32,
        stop_loss: float = 0.05,
        contexts: list[tuple[int, int]] = [(5, 4)],  # noqa: B006  never changed
        seed: int = 0,
    ) -> None:
        checks.blocks(layers=layers)
        checks.whole(1, slots=slots, steps=steps, batch_size=batch_size)
        checks.positive(lr=lr)
        checks.at_least(0, stop_loss=stop_loss)
        checks.contexts(contexts=contexts)
        checks.seeds(seed=seed)
        self.layers, self.slots, self.steps, self.lr = sorted(layers), slots, steps, lr
        self.batch_size, self.stop_loss = batch_size, stop_loss
        self.contexts, self.seed = contexts, seed
        self._prepared: str | None = None

    def prepare(self, lm: LanguageModel) -> None:
        """Contexts, once per model."""
        if self._prepared == lm.weights_hash:
            return
        self._contexts = sample_contexts(lm, self.contexts, self.seed)
        self._prepared = lm.weights_hash

    def empty(self, lm: LanguageModel) -> SideNeurons:
        return SideNeurons.beside(lm, self.layers)

    def learn(
        self, lm: LanguageModel, memory: SideNeurons, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        if not edits:
            return []
        generator = torch.Generator().manual_seed(self.seed + len(memory.bias_P))
        memory.grow([layer for layer in self.layers for _ in range(self.slots)])
        shape = self.slots * len(self.layers), lm.structure.width
        key_PD = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        key_PD = key_PD.to(lm.device).requires_grad_()
        value_PD = torch.zeros(shape, device=lm.device, requires_grad=True)
        bias_P = torch.zeros(shape[0], device=lm.device)
        adam = torch.optim.Adam([key_PD, value_PD], self.lr)
        batches = self._batches(lm, edits, generator)
        losses: list[float] = []
        for step in range(self.steps):
            batch = batches[step % len(batches)]
            memory.replace(key_PD, bias_P, value_PD)
            loss = batch.losses(lm).mean()
            losses.append(loss.item())
            if len(losses) >= len(batches) and max(losses[-len(batches) :]) < self.stop_loss:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
        memory.replace(key_PD.detach(), bias_P, value_PD.detach())
        mean = sum(losses[-len(batches) :]) / min(len(losses), len(batches))
        if not mean <= 1:
            log.warning(
                "training ended at NLL %.2f after %d steps; edits will likely fail",
                mean,
                len(losses),
            )
        return [{"nll": mean, "steps": len(losses)} for _ in edits]

    def _batches(
        self, lm: LanguageModel, edits: Sequence[Edit], generator: torch.Generator
    ) -> list[TargetRows]:
        """The edits' prompts after every context, shuffled, in batches whose lower blocks are run once."""
        pairs = [(c + e.text, e.target_new) for e in edits for c in self._contexts]
        order = torch.randperm(len(pairs), generator=generator).tolist()
        batches = []
        for begin in range(0, len(order), self.batch_size):
            part = [pairs[i] for i in order[begin : begin + self.batch_size]]
            rows = lm.tokens.rows([prompt for prompt, _ in part], [target for _, target in part])
            owner_R = torch.arange(len(part), device=lm.device)
            batches.append(TargetRows.of(lm, rows, owner_R, self.layers[0], "target"))
        return batches
