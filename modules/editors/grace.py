"""GRACE: a codebook at one projection (Hartvigsen et al., 2023, arXiv 2211.11031).

A key is the projection's input q at a prompt's last token; a value replaces the projection's output there.
With the nearest key i at distance d = |q - k_i|

    output = v_i if d <= eps_i, else the projection's own

An edit that the model does not yet answer correctly is put into the codebook, and then its value is optimised:

    far (d > eps + eps_i)            a new key with radius eps
    near, another answer             a new key; the two radii become halves of d
    near, same answer, d > eps_i     eps_i grows to d
    inside, same answer              nothing; the value is learned again
    the same key, another answer     the newest edit counts

Departures from the authors' code: answers are compared token by token; a conflict never enlarges a radius; an
enlarged radius has a small margin for rounding; keys that are equal up to rounding are one key; values start from
the projection's own output; the values of one call are optimised together, each with its own Adam state and
stopping rule; the look-up reads the prompt, and its result holds for generated tokens too. The radius is a
multiple of the distance between unrelated prompts, unless it is given: a number in raw activations means nothing
in another model.

Shapes: J keys, I inputs, O outputs, M tokens of an answer; B rows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.adapters import Adapter, ModuleEditor
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import (
    distances,
    last_states,
    neighbour_distance,
    unrelated_prompts,
)
from corrigenda.modules.training.optimize import IndependentAdam
from corrigenda.modules.training.target_rows import TargetRows

log = logging.getLogger(__name__)

GAP = 1e-5  # between the radii of two keys with different answers
SLACK = 1e-3  # relative margin of an enlarged radius
SAME = 1e-4  # keys closer than this fraction of their norm are one key


class Codebook(Adapter):
    """Keys with radii, each with a value and the tokens of its answer.

    Args:
        sites: the projection.
        inputs: I.
        outputs: O.
        replace: where the value replaces the output: ``last``, at the prompt's last token; ``prompt``, at each
            of its tokens; ``all``, also at the tokens that follow.
    """

    key_JI: Tensor
    value_JO: Tensor
    radius_J: Tensor
    label_JM: Tensor

    def __init__(
        self,
        sites: Sequence[str],
        inputs: int,
        outputs: int,
        replace: Literal["last", "prompt", "all"],
    ) -> None:
        super().__init__(sites, inputs=inputs, outputs=outputs, replace=replace)
        self.replace = replace
        self.register_buffer("key_JI", torch.zeros(0, inputs))
        self.register_buffer("value_JO", torch.zeros(0, outputs))
        self.register_buffer("radius_J", torch.zeros(0))
        self.register_buffer("label_JM", torch.zeros(0, 0, dtype=torch.long))  # padded with -1

    def forward(self, site: str, x_BTI: Tensor, y_BTO: Tensor, batch: PromptBatch | None) -> Tensor:
        if batch is None or not len(self.radius_J):
            return y_BTO
        is_first = self not in batch.decided
        if is_first:
            rows = torch.arange(len(x_BTI), device=x_BTI.device)
            batch.decided[self] = self.lookup(x_BTI[rows, batch.last_B].float())
        key_B = batch.decided[self]
        width = y_BTO.shape[1]
        is_whole = is_first or width > batch.prompt_BT.shape[1]
        replaced_BT = self._replaced(batch, width, is_whole) & (key_B >= 0)[:, None]
        if not replaced_BT.any():
            return y_BTO
        value_BO = self.value_JO[key_B.clamp(min=0)].to(y_BTO.dtype)
        return torch.where(replaced_BT[..., None], value_BO[:, None], y_BTO)

    def _replaced(self, batch: PromptBatch, width: int, is_whole: bool) -> Tensor:
        """The tokens at which a value may replace the output; generated ones come alone or after the prompt."""
        all_BT = torch.ones_like(batch.prompt_BT[:, :1]).expand(-1, width)
        if self.replace == "all":
            return all_BT
        if not is_whole:
            return ~all_BT
        column_T = torch.arange(width, device=all_BT.device)
        if self.replace == "last":
            return column_T == batch.last_B[:, None]
        behind = width - batch.prompt_BT.shape[1]
        return torch.nn.functional.pad(batch.prompt_BT, (0, behind))

    def lookup(self, query_BI: Tensor) -> Tensor:
        """key_B: the nearest key, or -1 where the query is outside its radius."""
        distance_B, key_B = distances(query_BI, self.key_JI).min(1)
        return torch.where(distance_B <= self.radius_J[key_B], key_B, -1)

    @torch.no_grad()
    def place(self, query_I: Tensor, value_O: Tensor, label: list[int], radius: float) -> int:
        """Adds the query to the codebook by the table above; returns the key that answers it."""
        if not len(self.radius_J):
            return self._add(query_I, value_O, label, radius)
        distance, key = (t[0].item() for t in distances(query_I[None], self.key_JI).min(1))
        key = int(key)
        reach = self.radius_J[key].item()
        if distance > radius + reach:
            return self._add(query_I, value_O, label, radius)
        if label == self._label(key):
            if distance > reach:
                self.radius_J[key] = distance * (1 + SLACK)
            return key
        if distance <= SAME * query_I.norm().item():
            log.info("an earlier edit of the same prompt is replaced")
            self._answer(key, label)
            return key
        self.radius_J[key] = min(reach, distance / 2 - GAP)
        return self._add(query_I, value_O, label, min(radius, distance / 2))

    def _add(self, query_I: Tensor, value_O: Tensor, label: list[int], radius: float) -> int:
        self.key_JI = torch.cat([self.key_JI, query_I[None]])
        self.value_JO = torch.cat([self.value_JO, value_O[None]])
        self.radius_J = torch.cat([self.radius_J, self.radius_J.new_tensor([radius])])
        blank_1M = self.label_JM.new_full((1, self.label_JM.shape[1]), -1)
        self.label_JM = torch.cat([self.label_JM, blank_1M])
        self._answer(len(self.radius_J) - 1, label)
        return len(self.radius_J) - 1

    def _answer(self, key: int, label: list[int]) -> None:
        wider = max(0, len(label) - self.label_JM.shape[1])
        self.label_JM = torch.nn.functional.pad(self.label_JM, (0, wider), value=-1)
        self.label_JM[key] = -1
        self.label_JM[key, : len(label)] = self.label_JM.new_tensor(label)

    def _label(self, key: int) -> list[int]:
        return [token for token in self.label_JM[key].tolist() if token >= 0]


class GRACE(ModuleEditor):
    """Stores each answer in a codebook; on prompts outside every radius the model is bit-exactly the base model.

    Args:
        layer: block of the projection, from 0.
        projection: the MLP's output projection (``out``), or its input projection (``in``) if it has just one.
        epsilon: radius of a new key, in raw activations; calibrated if not given.
        scale: the calibrated radius is this multiple of the median distance between an unrelated prompt and
            its nearest neighbour.
        replace: where a value replaces the output: at the ``last`` token of the prompt, at each token of the
            ``prompt``, or at ``all`` tokens, including the answer's.
        steps: maximum number of optimisation steps of a value.
        lr: Adam's learning rate.
        stop_loss: the optimisation ends when the mean negative log-likelihood falls below this.
        parallel: values optimised together.
        corpus: text whose beginnings are the unrelated prompts; its ``tokens`` have no effect here.
        num_prompts: number of unrelated prompts.
    """

    def __init__(
        self,
        layer: int,
        projection: Literal["in", "out"] = "out",
        epsilon: float | None = None,
        scale: float = 0.3,
        replace: Literal["last", "prompt", "all"] = "last",
        steps: int = 100,
        lr: float = 1.0,
        stop_loss: float = 0.05,
        parallel: int = 16,
        corpus: Corpus = Corpus(),  # noqa: B008  frozen
        num_prompts: int = 256,
    ) -> None:
        checks.whole(0, layer=layer)
        checks.positive(epsilon=epsilon, scale=scale, lr=lr)
        checks.whole(1, steps=steps, parallel=parallel)
        checks.at_least(0, stop_loss=stop_loss)
        checks.whole(2, num_prompts=num_prompts)
        self.layer, self.projection, self.replace = layer, projection, replace
        self.given, self.scale = epsilon, scale
        self.steps, self.lr, self.stop_loss, self.parallel = steps, lr, stop_loss, parallel
        self.corpus, self.num_prompts = corpus, num_prompts
        self.epsilon = epsilon or 0.0
        self._prepared: str | None = None

    def site(self, lm: LanguageModel) -> str:
        return lm.structure.projection_name(self.layer, self.projection)

    def prepare(self, lm: LanguageModel) -> None:
        """The radius of new keys, once per model."""
        if self._prepared == lm.weights_hash:
            return
        site = self.site(lm)
        if self.given is None:
            prompts = unrelated_prompts(self.corpus, self.num_prompts, lm)
            self.epsilon = self.scale * neighbour_distance(lm, prompts, site)
            log.info("the radius of a new key is %.4g", self.epsilon)
        self._prepared = lm.weights_hash

    def empty(self, lm: LanguageModel) -> Codebook:
        site = self.site(lm)
        return Codebook([site], *sizes(lm.net.get_submodule(site)), self.replace)

    def learn(
        self, lm: LanguageModel, memory: Codebook, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        prompts, targets = [e.text for e in edits], [e.target_new for e in edits]
        right_N = lm.score(prompts, targets).exact_B.tolist()
        states = [last_states(lm, prompts, self.site(lm), output) for output in (False, True)]
        members: dict[int, list[int]] = {}
        for n, (query_I, value_O) in enumerate(zip(*states, strict=True)):
            if right_N[n]:
                continue
            rows = lm.tokens.rows(prompts[n : n + 1], targets[n : n + 1])
            label = rows.ids_BT[0, rows.start_B[0] :].tolist()
            key = memory.place(query_I, value_O, label, self.epsilon)
            same = [m for m in members.get(key, []) if targets[m] == targets[n]]
            members[key] = [*same, n]
        notes: list[dict[str, Any]] = [{"key": None} for _ in edits]
        keys = list(members)
        for begin in range(0, len(keys), self.parallel):
            part = keys[begin : begin + self.parallel]
            losses = self._search(lm, memory, part, [[edits[n] for n in members[k]] for k in part])
            for key, loss in zip(part, losses, strict=True):
                for n in members[key]:
                    notes[n] = {"key": key, "loss": loss}
                    if not loss <= 1:
                        log.warning("%r -> %r: the value search ended at NLL %.2f; the edit will likely fail",
                                    edits[n].text, edits[n].target_new, loss)  # fmt: skip
        return notes

    def _search(
        self, lm: LanguageModel, memory: Codebook, keys: list[int], groups: list[list[Edit]]
    ) -> list[float]:
        """Learns the values of some keys, each on its own edits, with the codebook active as it will be used."""
        edits = [edit for group in groups for edit in group]
        size_E = torch.tensor([len(group) for group in groups], device=lm.device)
        owner_R = torch.arange(len(groups), device=lm.device).repeat_interleave(size_E)
        rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        target_rows = TargetRows.of(lm, rows, owner_R, self.layer, "target")
        index_E = torch.tensor(keys, device=lm.device)
        frozen_JO = memory.value_JO
        value_EO = frozen_JO[index_E].requires_grad_()
        adam = IndependentAdam([value_EO], self.lr)
        loss_E = torch.zeros(len(groups), device=lm.device)
        active_E = torch.ones(len(groups), dtype=torch.bool, device=lm.device)
        for step in range(self.steps + 1):
            memory.value_JO = frozen_JO.index_copy(0, index_E, value_EO)
            share_R = target_rows.losses(lm) / size_E[target_rows.owner_R]
            now_E = loss_E.new_zeros(len(groups)).index_add(
                0, target_rows.owner_R, share_R.detach()
            )
            loss_E = torch.where(active_E, now_E, loss_E)
            active_E = active_E & (now_E >= self.stop_loss)  # False for NaN, too
            if step == self.steps or not active_E.any():
                break
            (gradient_EO,) = torch.autograd.grad(
                share_R.sum(), value_EO, allow_unused=True, materialize_grads=True
            )
            adam.step([gradient_EO], active_E)
            target_rows = target_rows.select(active_E) or target_rows
        memory.value_JO = memory.value_JO.detach()
        return loss_E.tolist()
