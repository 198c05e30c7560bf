"""WISE: side memories of one projection and a router (Wang et al., 2024, arXiv 2405.14768).

The projection W has updates D_s beside it ("side memories", W_s = W + D_s), each learned within a random mask.
The activation of memory s on a prompt x with inputs k_t is

    a_s(x) = mean over the prompt's tokens of |D_s k_t|

and a prompt runs through the memory with the largest a_s among those with a_s >= tau_s; if there is none it runs
through W alone. An edit is learned through its memory at every token, with

    L = NLL + max(0, a(out) - alpha) + max(0, beta - a(in)) + max(0, gamma - (a(in) - a(out)))

where ``in`` are the edit's prompts and ``out`` unrelated ones; tau_s is a fraction of the smallest a(in) of its
edits. Once a memory is full a new one with another mask is started; from time to time all are merged into one by
TIES (arXiv 2306.01708).

Departures from the authors' code: a(x) is the paper's, without an activation function on the outputs, and its unit
is the projection's typical output, so that margins carry over between models (``unit: 1`` for raw ones); only
prompts are routed, row by row, and generated tokens follow their prompt; the unrelated prompts are texts of a
corpus, and all of them count in every step; no replay and no decay.

Shapes: S memories, O outputs, I inputs, B rows, T tokens, U unrelated prompts, N edits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.adapters import Adapter, ModuleEditor
from corrigenda.modules.editors.key_value import sample_contexts
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import read_states, unrelated_prompts
from corrigenda.modules.training.target_rows import TargetRows

log = logging.getLogger(__name__)


class SideMemories(Adapter):
    """Updates of one projection, each with its routing threshold and its number of edits.

    Args:
        sites: the projection.
        inputs: I.
        outputs: O.
    """

    delta_SOI: Tensor
    threshold_S: Tensor
    count_S: Tensor
    num_begun: Tensor
    num_merged: Tensor

    def __init__(self, sites: Sequence[str], inputs: int, outputs: int) -> None:
        super().__init__(sites, inputs=inputs, outputs=outputs)
        self.register_buffer("delta_SOI", torch.zeros(0, outputs, inputs))
        self.register_buffer("threshold_S", torch.zeros(0))
        self.register_buffer("count_S", torch.zeros(0, dtype=torch.long))
        # The names of these two are part of the file format.
        self.register_buffer("num_begun", torch.zeros((), dtype=torch.long))  # memories, in total
        self.register_buffer("num_merged", torch.zeros((), dtype=torch.long))  # edits, so far
        self.forced_OI: Tensor | None = None  # applied to every row while it is learned

    def forward(self, site: str, x_BTI: Tensor, y_BTO: Tensor, batch: PromptBatch | None) -> Tensor:
        if self.forced_OI is not None:
            return y_BTO + _times(x_BTI, self.forced_OI).to(y_BTO.dtype)
        if batch is None or not len(self.count_S):
            return y_BTO
        if self not in batch.decided:
            batch.decided[self] = self.route(x_BTI, batch.prompt_BT)
        memory_B = batch.decided[self]
        if (memory_B < 0).all():
            return y_BTO
        out_BTO = y_BTO.clone()
        for s in memory_B[memory_B >= 0].unique().tolist():
            rows = (memory_B == s).nonzero()[:, 0]
            out_BTO[rows] += _times(x_BTI[rows], self.delta_SOI[s]).to(y_BTO.dtype)
        return out_BTO

    def route(self, x_BTI: Tensor, prompt_BT: Tensor) -> Tensor:
        """memory_B: the memory with the largest activation at or above its threshold, -1 if there is none."""
        active_BS = torch.stack([activation(d, x_BTI, prompt_BT) for d in self.delta_SOI], 1)
        passes_BS = active_BS >= self.threshold_S
        best_B = active_BS.masked_fill(~passes_BS, -1.0).argmax(1)
        return torch.where(passes_BS.any(1), best_B, -1)

    def add_memory(self) -> None:
        """Adds a memory without edits."""
        blank_1OI = self.delta_SOI.new_zeros(1, *self.delta_SOI.shape[1:])
        self.delta_SOI = torch.cat([self.delta_SOI, blank_1OI])
        self.threshold_S = torch.cat([self.threshold_S, self.threshold_S.new_tensor([math.inf])])
        self.count_S = torch.cat([self.count_S, self.count_S.new_zeros(1)])
        self.num_begun = self.num_begun + 1

    def write(self, delta_OI: Tensor, threshold: Tensor, num_edits: int) -> None:
        """Replaces the newest memory's update, which now holds further edits with this threshold."""
        lower = torch.minimum(self.threshold_S[-1], threshold)
        self.delta_SOI = torch.cat([self.delta_SOI[:-1], delta_OI[None]])
        self.threshold_S = torch.cat([self.threshold_S[:-1], lower[None]])
        self.count_S = self.count_S.clone()
        self.count_S[-1] += num_edits

    def merge(self, density: float) -> None:
        """Merges all memories into one, with the lowest threshold."""
        self.delta_SOI = ties(self.delta_SOI, density)[None]
        self.threshold_S = self.threshold_S.min()[None]
        self.count_S = self.count_S.sum()[None]
        self.num_merged = self.count_S[0].clone()


@dataclass(frozen=True)
class PromptInputs:
    """What the projection reads of some prompts, padded on the right."""

    x_BTI: Tensor
    prompt_BT: Tensor

    @classmethod
    def read(cls, lm: LanguageModel, prompts: Sequence[str], site: str) -> PromptInputs:
        rows = lm.tokens.rows(prompts)
        module = lm.net.get_submodule(site)
        x_BTI = torch.zeros(*rows.ids_BT.shape, sizes(module)[0], device=lm.device)
        for row_R, states_RTI in read_states(lm, rows, site):
            x_BTI[row_R, : states_RTI.shape[1]] = states_RTI
        return cls(x_BTI, rows.prompt_BT)

    def activation(self, delta_OI: Tensor) -> Tensor:
        """activation_B of an update on each prompt."""
        return activation(delta_OI, self.x_BTI, self.prompt_BT)


class WISE(ModuleEditor):
    """Learns edits in side memories of one projection and routes only prompts about them there.

    Args:
        layer: block of the projection, from 0.
        projection: the MLP's output projection (``out``), or its input projection (``in``) if it has just one.
        margins: alpha, beta and gamma, in units: unrelated prompts activate a memory by less than alpha, an edit's
            prompts by more than beta, and the two are at least gamma apart.
        unit: unit of the margins, in raw activations; if not given, the median norm of the projection's output
            on unrelated prompts.
        act_ratio: the routing threshold, as a fraction of the smallest activation by an edit's prompt.
        mask_ratio: fraction of the matrix that a memory may change.
        norm_constraint: largest absolute value of an update's entries.
        steps: maximum number of optimisation steps per edit.
        lr: learning rate of gradient descent.
        stop_loss: the optimisation of an edit ends when its total loss falls below this.
        together: edits that are learned together.
        save_freq: edits in one memory.
        merge_freq: edits after which all memories are merged into one.
        density: fraction of each memory's entries that a merge keeps.
        contexts: pairs of (tokens, number of texts) of the sampled texts before the prompt.
        seed: random seed of the masks and the sampled texts.
        corpus: text whose beginnings are the unrelated prompts; its ``tokens`` have no effect here.
        num_prompts: number of unrelated prompts.
    """

    def __init__(
        self,
        layer: int,
        projection: Literal["in", "out"] = "out",
        margins: tuple[float, float, float] = (0.25, 1.0, 0.5),
        unit: float | None = None,
        act_ratio: float = 0.88,
        mask_ratio: float = 0.2,
        norm_constraint: float = 1.0,
        steps: int = 70,
        lr: float = 1.0,
        stop_loss: float = 0.02,
        together: int = 1,
        save_freq: int = 500,
        merge_freq: int = 1000,
        density: float = 0.53,
        contexts: list[tuple[int, int]] = [(5, 5), (10, 5)],  # noqa: B006  never changed
        seed: int = 0,
        corpus: Corpus = Corpus(),  # noqa: B008  frozen
        num_prompts: int = 32,
    ) -> None:
        checks.whole(0, layer=layer)
        if not isinstance(margins, list | tuple) or len(margins) != 3:
            raise ValueError(f"margins must be three numbers, got {margins!r}")
        for margin in margins:
            checks.number("three numbers of at least 0", lambda x: x >= 0, margins=margin)
        if margins[0] >= margins[1]:
            raise ValueError(f"margins must begin with alpha below beta, got {margins}")
        checks.share(act_ratio=act_ratio, mask_ratio=mask_ratio, density=density)
        checks.whole(1, steps=steps, together=together, save_freq=save_freq, merge_freq=merge_freq)
        checks.positive(unit=unit, lr=lr, norm_constraint=norm_constraint)
        checks.at_least(0, stop_loss=stop_loss)
        checks.contexts(contexts=contexts)
        checks.seeds(seed=seed)
        checks.whole(2, num_prompts=num_prompts)
        self.layer, self.projection, self.margins, self.given = layer, projection, margins, unit
        self.act_ratio, self.mask_ratio = act_ratio, mask_ratio
        self.norm_constraint = norm_constraint
        self.steps, self.lr, self.stop_loss, self.together = steps, lr, stop_loss, together
        self.save_freq, self.merge_freq, self.density = save_freq, merge_freq, density
        self.contexts, self.seed = contexts, seed
        self.corpus, self.num_prompts = corpus, num_prompts
        self._prepared: str | None = None

    def site(self, lm: LanguageModel) -> str:
        return lm.structure.projection_name(self.layer, self.projection)

    def prepare(self, lm: LanguageModel) -> None:
        """Contexts, and the projection's inputs on unrelated prompts, once per model."""
        if self._prepared == lm.weights_hash:
            return
        site = self.site(lm)
        self._contexts = sample_contexts(lm, self.contexts, self.seed)
        prompts = unrelated_prompts(self.corpus, self.num_prompts, lm)
        with lm.pristine():
            self._unrelated = PromptInputs.read(lm, prompts, site)
            rows = lm.tokens.rows(prompts)
            outputs = [
                states_RTO[rows.select(row_R).prompt_BT]
                for row_R, states_RTO in read_states(lm, rows, site, output=True)
            ]
        self.unit = self.given or vector_norm(torch.cat(outputs), dim=-1).median().item()
        self._prepared = lm.weights_hash

    def empty(self, lm: LanguageModel) -> SideMemories:
        site = self.site(lm)
        return SideMemories([site], *sizes(lm.net.get_submodule(site)))

    def learn(
        self, lm: LanguageModel, memory: SideMemories, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        notes: list[dict[str, Any]] = []
        left = list(edits)
        while left:
            if not len(memory.count_S) or memory.count_S[-1] >= self.save_freq:
                memory.add_memory()
            room = self.save_freq - int(memory.count_S[-1])
            now, left = left[: min(self.together, room)], left[min(self.together, room) :]
            notes += self._learn(lm, memory, now)
            if int(memory.count_S.sum() - memory.num_merged) >= self.merge_freq:
                memory.merge(self.density)
        return notes

    def _learn(
        self, lm: LanguageModel, memory: SideMemories, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        """Writes some edits into the newest memory together."""
        prompts = [context + edit.text for edit in edits for context in self._contexts]
        targets = [edit.target_new for edit in edits for _ in self._contexts]
        inside = PromptInputs.read(lm, prompts, self.site(lm))
        rows = lm.tokens.rows(prompts, targets)
        owner_R = torch.arange(len(rows.ids_BT), device=lm.device)
        target_rows = TargetRows.of(lm, rows, owner_R, self.layer, "target")
        mask_OI = self._mask(memory)
        delta_OI = memory.delta_SOI[-1].clone().requires_grad_()
        for step in range(self.steps + 1):
            memory.forced_OI = delta_OI
            try:
                nll = target_rows.losses(lm).mean()
            finally:
                memory.forced_OI = None
            loss = nll + self._margins(delta_OI, inside)
            if step == self.steps or not loss.item() >= self.stop_loss:  # also where it is NaN
                break
            (gradient_OI,) = torch.autograd.grad(loss, delta_OI)
            with torch.no_grad():
                delta_OI -= self.lr * gradient_OI * mask_OI
                delta_OI.clamp_(-self.norm_constraint, self.norm_constraint)
        delta_OI = delta_OI.detach()
        active_N = inside.activation(delta_OI).view(len(edits), -1)[:, 0]
        memory.write(delta_OI, self.act_ratio * active_N.min(), len(edits))
        if not nll.item() <= 1:
            log.warning("%r -> %r: learning ended at NLL %.2f; the edit will likely fail",
                        edits[0].text, edits[0].target_new, nll.item())  # fmt: skip
        return [
            {"nll": nll.item(), "loss": loss.item(), "concern": value}
            for value in active_N.tolist()
        ]

    def _margins(self, delta_OI: Tensor, inside: PromptInputs) -> Tensor:
        """The loss of the activations by the edits' prompts and by unrelated ones; in raw activations.

        In units its gradient would be smaller by the same factor, and an edit would be learned long before the
        router can tell its prompts from others.
        """
        alpha, beta, gamma = (self.unit * margin for margin in self.margins)
        in_R, out_U = inside.activation(delta_OI), self._unrelated.activation(delta_OI)
        return (
            (out_U - alpha).relu().mean()
            + (beta - in_R).relu().mean()
            + (gamma - (in_R - out_U.mean())).relu().mean()
        )

    def _mask(self, memory: SideMemories) -> Tensor:
        """The entries that the newest memory may change; drawn for each memory, reproducible by the seed."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(memory.num_begun))
        drawn_OI = torch.rand(memory.delta_SOI.shape[1:], generator=generator)
        return (drawn_OI < self.mask_ratio).to(memory.delta_SOI.device)


def activation(delta_OI: Tensor, x_BTI: Tensor, prompt_BT: Tensor) -> Tensor:
    """activation_B: the mean over each prompt's tokens of the norm of what the update adds to the output."""
    prompt_BT = torch.nn.functional.pad(prompt_BT, (0, x_BTI.shape[1] - prompt_BT.shape[1]))
    size_BT = vector_norm(_times(x_BTI, delta_OI), dim=-1)
    return (size_BT * prompt_BT).sum(1) / prompt_BT.sum(1)


def ties(delta_SOI: Tensor, density: float) -> Tensor:
    """Merges updates: each trimmed to its largest entries, then the mean of those with the prevailing sign."""
    flat_Sn = delta_SOI.flatten(1)
    count = max(1, math.ceil(density * flat_Sn.shape[1]))
    least_S1 = flat_Sn.abs().topk(count, dim=1).values[:, -1:]
    trimmed_Sn = torch.where(flat_Sn.abs() >= least_S1, flat_Sn, 0.0)
    agrees_Sn = (trimmed_Sn != 0) & (trimmed_Sn.sign() == trimmed_Sn.sum(0).sign())
    mean_n = (trimmed_Sn * agrees_Sn).sum(0) / agrees_Sn.sum(0).clamp(min=1)
    return mean_n.view(delta_SOI.shape[1:])


def _times(x_BTI: Tensor, delta_OI: Tensor) -> Tensor:
    return x_BTI.to(delta_OI.dtype) @ delta_OI.T
