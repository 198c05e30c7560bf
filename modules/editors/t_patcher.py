"""T-Patcher: one extra neuron per mistake in the last MLP (Huang et al., 2023, arXiv 2301.09785).

    MLP'(h) = MLP(h) + sum over p of relu(k_p h + b_p) v_p

Every target token that the model gets wrong gets a neuron of its own, at the position that predicts it,
whose key starts at h_p / |h_p|^2. With a = k h + b before the relu, keys and values are learned from

    L = NLL + m * (mean exp(a_mem - a_p + 3) + mean exp(a_mem + 3))

over the largest terms, where a_mem are the activations on inputs that must not fire it (the "memory"): ordinary
text and all earlier edits.

Departures from the authors' code: an ungated relu in every model, so that a neuron that does not fire adds exactly
zero; the bias is not free but keeps a_p at 1, its initial value, because a relu that the memory has silenced on
its own input gets no gradient any more (so their loss on a_p is not needed); both margins also for question
answering; values start at zero, so that the patch starts without effect; keys are updated in units of 1 / |h_p|,
so that a step size means the same in every model; an edit has finished when its loss is small and no input of the
memory fires its neurons; the edit's own inputs are left out of the memory.

Shapes: P neurons of one edit, D residual width, M inputs in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit, prompt_end
from corrigenda.modules import checks
from corrigenda.modules.editing.adapters import ModuleEditor
from corrigenda.modules.editing.neurons import SideNeurons
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import distances, read_states
from corrigenda.modules.training.optimize import IndependentAdam
from corrigenda.modules.training.target_rows import TargetRows

log = logging.getLogger(__name__)

BELOW_EDIT, BELOW_ZERO = (
    3.0,
    3.0,
)  # margins of the memory's activations below the edit's, and below zero
OWN_ACTIVATION = 1.0  # of a neuron on the input it was made for
NUM_WORST = 1000  # largest terms that count in the loss
VALUE_SCALE = 10.0  # step size of values relative to that of keys
SAME = 1e-3  # an input this close to an edit's own, as a fraction of its norm, is the same


class Patches(SideNeurons):
    """Neurons, and the MLP's inputs on the edits they were made for."""

    seen_MD: Tensor

    def __init__(self, sites: Sequence[str], layers: Sequence[int], width: int) -> None:
        super().__init__(sites, layers, width)
        self.register_buffer("seen_MD", torch.zeros(0, width))


class TPatcher(ModuleEditor):
    """Adds neurons that fire on an edit's own tokens and nowhere on ordinary text.

    Args:
        layer: block of the MLP, from 0; the last if not given.
        max_neurons: neurons per edit at most; further mistakes are ignored.
        steps: maximum number of optimisation steps per edit.
        lr: Adam's learning rate.
        stop_loss: the mean negative log-likelihood below which an edit has finished, if no other input
            fires its neurons.
        memory_weight: weight m of the losses on the memory.
        corpus: the ordinary text; so many of its tokens are in the memory.
    """

    def __init__(
        self,
        layer: int | None = None,
        max_neurons: int = 5,
        steps: int = 500,
        lr: float = 1e-2,
        stop_loss: float = 0.1,
        memory_weight: float = 10.0,
        corpus: Corpus = Corpus(tokens=20_000),  # noqa: B008  frozen
    ) -> None:
        checks.whole(0, layer=layer)
        checks.whole(1, max_neurons=max_neurons, steps=steps)
        checks.positive(lr=lr)
        checks.at_least(0, stop_loss=stop_loss, memory_weight=memory_weight)
        self.layer, self.max_neurons, self.steps, self.lr = layer, max_neurons, steps, lr
        self.stop_loss, self.memory_weight, self.corpus = stop_loss, memory_weight, corpus
        self._prepared: str | None = None

    def _layer(self, lm: LanguageModel) -> int:
        return lm.structure.num_layers - 1 if self.layer is None else self.layer

    def prepare(self, lm: LanguageModel) -> None:
        """The MLP's inputs on ordinary text, once per model."""
        if self._prepared == lm.weights_hash:
            return
        texts, count = [], 0
        for text in self.corpus.texts(lm):
            texts.append(text)
            count += len(lm.tokens.encode([text])[0])
            if count >= self.corpus.tokens:
                break
        with lm.pristine():
            ids = [
                row[: lm.max_length]
                for row in lm.tokens.encode([prompt_end(text) for text in texts])
            ]
            rows = lm.tokens.pad(ids, [len(row) for row in ids])
            self._ordinary_MD = _inputs(lm, rows, self.empty(lm).sites[0])[: self.corpus.tokens]
        self._prepared = lm.weights_hash

    def empty(self, lm: LanguageModel) -> Patches:
        return Patches.beside(lm, [self._layer(lm)])

    def learn(
        self, lm: LanguageModel, memory: Patches, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        """One edit after the other, each on the model that the earlier ones left."""
        notes = []
        for edit in edits:
            notes.append(self._learn(lm, memory, edit))
            ids = lm.tokens.rows([edit.text], [edit.target_new]).unpadded()
            rows = lm.tokens.pad(ids, [len(row) for row in ids])
            seen_MD = _inputs(lm, rows, memory.sites[0])
            memory.seen_MD = torch.cat([memory.seen_MD, seen_MD])
        return notes

    def _learn(self, lm: LanguageModel, memory: Patches, edit: Edit) -> dict[str, Any]:
        rows = lm.tokens.rows([edit.text], [edit.target_new])
        owner_R = torch.zeros(1, dtype=torch.long, device=lm.device)
        target_rows = TargetRows.of(lm, rows, owner_R, self._layer(lm), "target")
        with torch.no_grad(), lm.edits.announce(target_rows.prompt_RT):
            answer_N = target_rows.tail.logits(target_rows.row_N, target_rows.position_N).argmax(-1)
        position_P = target_rows.position_N[answer_N != target_rows.target_N][: self.max_neurons]
        if not len(position_P):
            return {"neurons": 0}
        ((_, states_RTD),) = read_states(lm, rows, memory.sites[0])
        own_PD = states_RTD[0, position_P]
        others_MD = torch.cat([self._ordinary_MD, memory.seen_MD])
        near_M = distances(others_MD, own_PD).min(1).values
        others_MD = others_MD[near_M > SAME * own_PD.norm(dim=1).mean()]
        memory.grow([self._layer(lm)] * len(position_P))
        size_P1 = own_PD.norm(dim=1, keepdim=True)
        parts = [own_PD / size_P1, torch.zeros_like(own_PD)]
        adam = IndependentAdam([part.requires_grad_() for part in parts], self.lr)
        every_P = torch.ones(len(own_PD), dtype=torch.bool, device=lm.device)
        for step in range(self.steps + 1):
            key_PD, value_PD = parts[0] / size_P1, VALUE_SCALE * parts[1]
            bias_P = OWN_ACTIVATION - (own_PD * key_PD).sum(1)
            memory.replace(key_PD, bias_P, value_PD)
            nll = target_rows.losses(lm).mean()
            fired_MP = others_MD @ key_PD.T + bias_P
            loss = nll + self.memory_weight * scope_loss(fired_MP)
            quiet = not (fired_MP > 0).any()
            if step == self.steps or (nll.item() < self.stop_loss and quiet):
                break
            adam.step(torch.autograd.grad(loss, parts), every_P)
        memory.replace(key_PD.detach(), bias_P.detach(), value_PD.detach())
        if not nll.item() <= 1:
            log.warning("%r -> %r: learning ended at NLL %.2f; the edit will likely fail",
                        edit.text, edit.target_new, nll.item())  # fmt: skip
        firing = int((fired_MP > 0).any(1).sum())
        return {"neurons": len(own_PD), "nll": nll.item(), "steps": step, "fired_by": firing}


def scope_loss(others_MP: Tensor) -> Tensor:
    """The loss that keeps neurons silent on the memory, given their activations before the relu."""
    if not others_MP.numel():
        return others_MP.new_zeros(())
    worst_n = others_MP.flatten().topk(min(NUM_WORST, others_MP.numel())).values
    below_edit = (worst_n - OWN_ACTIVATION + BELOW_EDIT).exp().mean()
    return below_edit + (worst_n + BELOW_ZERO).exp().mean()


def _inputs(lm: LanguageModel, rows: Rows, site: str) -> Tensor:
    """states_MD: the input of module ``site`` at every token of some texts."""
    parts = [s[rows.select(row_R).prompt_BT] for row_R, s in read_states(lm, rows, site)]
    return torch.cat(parts)
