"""MELO: LoRA blocks, at most one of which is active, chosen by the prompt (Yu et al., 2023, arXiv 2312.11795).

Each batch of edits gets a block b of low-rank factors at projections above a routing projection:

    W_b x = W x + scale * B_b A_b x

The routing projection's output at a prompt's last token is the query. Edits form clusters with equal answers; if
the query is within the radius of the nearest cluster, the block of that cluster's nearest point is active, else
none is.

    far (d > eps + eps_c)      a new cluster with radius eps
    near, the same answer      joins: the centre becomes the mean, the radius reaches every point, at least eps
    near, another answer       a new cluster; radii become halves of d, and points outside are forgotten

Departures from the authors' code: there are as many blocks as needed; answers are compared token by token; a
conflict never enlarges a radius; editing a prompt again replaces its old point; the scale of a block is given
directly, not as a product of ranks; the radius is a multiple of the distance between unrelated prompts unless it
is given; the block chosen on the prompt is also used for generated tokens.

Shapes: C clusters, P points, H width of the query, K blocks, r rank, M tokens of an answer; B rows, T tokens.
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
from corrigenda.modules.training.target_rows import TargetRows

log = logging.getLogger(__name__)

GAP = 1e-5  # between the radii of two clusters with different answers
SLACK = 1e-3  # relative margin of a radius beyond its farthest point, for rounding
SAME = 1e-4  # points closer than this fraction of their norm are one point


class Blocks(Adapter):
    """Low-rank factors in blocks, and the clusters of prompts that choose the active one.

    Args:
        sites: the routing projection, then those with factors, all of which run after it.
        query: H.
        shapes: (inputs, outputs) of every projection with factors.
        rank: r.
        scale: factor of a block's output.
    """

    centre_CH: Tensor
    radius_C: Tensor
    label_CM: Tensor
    point_PH: Tensor
    cluster_P: Tensor
    block_P: Tensor

    def __init__(
        self,
        sites: Sequence[str],
        query: int,
        shapes: Sequence[Sequence[int]],
        rank: int,
        scale: float,
    ) -> None:
        plain = [list(shape) for shape in shapes]
        super().__init__(sites, query=query, shapes=plain, rank=rank, scale=scale)
        self.scale = scale
        self.register_buffer("centre_CH", torch.zeros(0, query))
        self.register_buffer("radius_C", torch.zeros(0))
        self.register_buffer("label_CM", torch.zeros(0, 0, dtype=torch.long))  # padded with -1
        self.register_buffer("point_PH", torch.zeros(0, query))
        self.register_buffer("cluster_P", torch.zeros(0, dtype=torch.long))
        self.register_buffer("block_P", torch.zeros(0, dtype=torch.long))
        for n, (inputs, outputs) in enumerate(shapes):
            self.register_buffer(f"down{n}_KrI", torch.zeros(0, rank, inputs))
            self.register_buffer(f"up{n}_KOr", torch.zeros(0, outputs, rank))
        self.forced: int | None = None  # the block that all rows use while it is learned

    def factors(self) -> list[tuple[str, str]]:
        """Names of the buffers (down, up) of every projection with factors."""
        return [(f"down{n}_KrI", f"up{n}_KOr") for n in range(len(self.sites) - 1)]

    def forward(self, site: str, x_BTI: Tensor, y_BTO: Tensor, batch: PromptBatch | None) -> Tensor:
        if batch is None:
            return y_BTO
        if site == self.sites[0]:
            if self not in batch.decided:
                batch.decided[self] = self._decide(y_BTO, batch)
            return y_BTO
        block_B = batch.decided[self]
        rows = (block_B >= 0).nonzero()[:, 0]
        if not len(rows):
            return y_BTO
        down, up = self.factors()[self.sites.index(site) - 1]
        down_RrI, up_ROr = (getattr(self, name)[block_B[rows]] for name in (down, up))
        x_RTI = x_BTI[rows].to(down_RrI.dtype)
        added_RTO = self.scale * (x_RTI @ down_RrI.transpose(1, 2)) @ up_ROr.transpose(1, 2)
        return y_BTO.index_add(0, rows, added_RTO.to(y_BTO.dtype))

    def _decide(self, y_BTH: Tensor, batch: PromptBatch) -> Tensor:
        rows = torch.arange(len(y_BTH), device=y_BTH.device)
        if self.forced is not None:
            return torch.full_like(rows, self.forced)
        return self.lookup(y_BTH[rows, batch.last_B].float())

    def lookup(self, query_BH: Tensor) -> Tensor:
        """block_B: that of the nearest point of the nearest cluster, -1 outside its radius."""
        if not len(self.point_PH):
            return torch.full((len(query_BH),), -1, device=query_BH.device)
        distance_B, cluster_B = distances(query_BH, self.centre_CH).min(1)
        away_BP = distances(query_BH, self.point_PH)
        away_BP = away_BP.masked_fill(self.cluster_P != cluster_B[:, None], float("inf"))
        nearest_B, point_B = away_BP.min(1)
        inside_B = (distance_B <= self.radius_C[cluster_B]) & nearest_B.isfinite()
        return torch.where(inside_B, self.block_P[point_B], -1)

    # ------------------------------------------------------------------ clusters

    @torch.no_grad()
    def place(self, query_H: Tensor, label: list[int], radius: float, block: int) -> None:
        """Adds the query as a point of some cluster, by the table above."""
        if not len(self.radius_C):
            return self._add(query_H, label, radius, block)
        distance, nearest = (t[0].item() for t in distances(query_H[None], self.centre_CH).min(1))
        c = int(nearest)
        if distance > radius + self.radius_C[c].item():
            return self._add(query_H, label, radius, block)
        if label == self._label(c):
            return self._join(query_H, c, radius, block)
        away_P = distances(query_H[None], self.point_PH)[0]
        same_P = (self.cluster_P == c) & (away_P <= SAME * query_H.norm())
        if same_P.any():
            log.info("an earlier edit of the same prompt is replaced")
        shrunk = min(self.radius_C[c].item(), max(distance / 2 - GAP, 0.0))
        self.radius_C = self.radius_C.clone()
        self.radius_C[c] = shrunk
        outside_P = distances(self.centre_CH[c : c + 1], self.point_PH)[0] > shrunk
        self._forget(same_P | ((self.cluster_P == c) & outside_P))
        if not (self.cluster_P == c).any():  # an empty cluster is never the nearest
            self.radius_C[c] = -1.0
            self.centre_CH = self.centre_CH.clone()
            self.centre_CH[c] = float("inf")
        return self._add(
            query_H, label, radius if same_P.any() else min(radius, distance / 2), block
        )

    def _add(self, query_H: Tensor, label: list[int], radius: float, block: int) -> None:
        self.centre_CH = torch.cat([self.centre_CH, query_H[None]])
        self.radius_C = torch.cat([self.radius_C, self.radius_C.new_tensor([radius])])
        width = max(self.label_CM.shape[1], len(label))
        label_CM = torch.nn.functional.pad(
            self.label_CM, (0, width - self.label_CM.shape[1]), value=-1
        )
        row = [*label, *[-1] * (width - len(label))]
        self.label_CM = torch.cat([label_CM, label_CM.new_tensor([row])])
        self._point(query_H, len(self.radius_C) - 1, block)

    def _join(self, query_H: Tensor, c: int, radius: float, block: int) -> None:
        self._forget(
            (self.cluster_P == c)
            & (distances(query_H[None], self.point_PH)[0] <= SAME * query_H.norm())
        )
        self._point(query_H, c, block)
        member_pH = self.point_PH[self.cluster_P == c]
        self.centre_CH, self.radius_C = self.centre_CH.clone(), self.radius_C.clone()
        self.centre_CH[c] = member_pH.mean(0)
        reach = distances(self.centre_CH[c : c + 1], member_pH).max().item()
        self.radius_C[c] = max(reach * (1 + SLACK), radius)

    def _point(self, query_H: Tensor, c: int, block: int) -> None:
        self.point_PH = torch.cat([self.point_PH, query_H[None]])
        self.cluster_P = torch.cat([self.cluster_P, self.cluster_P.new_tensor([c])])
        self.block_P = torch.cat([self.block_P, self.block_P.new_tensor([block])])

    def _forget(self, gone_P: Tensor) -> None:
        self.point_PH, self.cluster_P, self.block_P = (
            t[~gone_P] for t in (self.point_PH, self.cluster_P, self.block_P)
        )

    def _label(self, c: int) -> list[int]:
        return [token for token in self.label_CM[c].tolist() if token >= 0]


class MELO(ModuleEditor):
    """Learns a LoRA block per batch of edits; on prompts outside every cluster it is bit-exactly the base model.

    Args:
        layer: block of the routing projection, from 0.
        layers: blocks with factors, all above ``layer``.
        projection: the MLP's output projection (``out``), or its input projection (``in``) if it has just one;
            for routing and for the factors.
        epsilon: radius of a new cluster, in raw activations; calibrated if not given.
        epsilon_scale: the calibrated radius is this multiple of the median distance between an unrelated
            prompt and its nearest neighbour.
        rank: rank of a block.
        scale: factor of a block's output.
        edits_per_block: edits of one call that share a block.
        steps: maximum number of optimisation steps of a block.
        lr: Adam's learning rate.
        halve_every: number of steps after which the step size is halved.
        stop_loss: the optimisation of a block ends when its mean loss falls below this.
        seed: random seed of the factors' initialisation.
        corpus: text whose beginnings are the unrelated prompts; its ``tokens`` have no effect here.
        num_prompts: number of unrelated prompts.
    """

    def __init__(
        self,
        layer: int,
        layers: list[int],
        projection: Literal["in", "out"] = "out",
        epsilon: float | None = None,
        epsilon_scale: float = 0.5,
        rank: int = 2,
        scale: float = 1.0,
        edits_per_block: int = 4,
        steps: int = 50,
        lr: float = 1e-2,
        halve_every: int = 20,
        stop_loss: float = 0.05,
        seed: int = 0,
        corpus: Corpus = Corpus(),  # noqa: B008  frozen
        num_prompts: int = 256,
    ) -> None:
        checks.whole(0, layer=layer)
        checks.blocks(layers=layers)
        if min(layers) <= layer:
            raise ValueError(
                f"layers must name blocks above the routing block {layer}, got {layers}: a block is chosen "
                "before it is used"
            )
        checks.whole(1, rank=rank, edits_per_block=edits_per_block, steps=steps)
        checks.whole(1, halve_every=halve_every)
        checks.positive(epsilon=epsilon, epsilon_scale=epsilon_scale, scale=scale, lr=lr)
        checks.at_least(0, stop_loss=stop_loss)
        checks.seeds(seed=seed)
        checks.whole(2, num_prompts=num_prompts)
        self.layer, self.layers, self.projection = layer, sorted(layers), projection
        self.given, self.epsilon_scale = epsilon, epsilon_scale
        self.rank, self.scale, self.edits_per_block = rank, scale, edits_per_block
        self.steps, self.lr, self.halve_every = steps, lr, halve_every
        self.stop_loss, self.seed = stop_loss, seed
        self.corpus, self.num_prompts = corpus, num_prompts
        self.epsilon = epsilon or 0.0
        self._prepared: str | None = None

    def _sites(self, lm: LanguageModel) -> list[str]:
        names = (
            lm.structure.projection_name(n, self.projection) for n in (self.layer, *self.layers)
        )
        return list(names)

    def prepare(self, lm: LanguageModel) -> None:
        """The radius of new clusters, once per model."""
        if self._prepared == lm.weights_hash:
            return
        site = self._sites(lm)[0]
        if self.given is None:
            prompts = unrelated_prompts(self.corpus, self.num_prompts, lm)
            distance = neighbour_distance(lm, prompts, site, output=True)
            self.epsilon = self.epsilon_scale * distance
            log.info("the radius of a new cluster is %.4g", self.epsilon)
        self._prepared = lm.weights_hash

    def empty(self, lm: LanguageModel) -> Blocks:
        sites = self._sites(lm)
        shapes = [sizes(lm.net.get_submodule(site)) for site in sites]
        return Blocks(sites, shapes[0][1], shapes[1:], self.rank, self.scale)

    def learn(
        self, lm: LanguageModel, memory: Blocks, edits: Sequence[Edit]
    ) -> list[dict[str, Any]]:
        notes: list[dict[str, Any]] = []
        for begin in range(0, len(edits), self.edits_per_block):
            part = edits[begin : begin + self.edits_per_block]
            queries = last_states(lm, [e.text for e in part], memory.sites[0], output=True)
            block = self._learn(lm, memory, part, notes)
            for edit, query_H in zip(part, queries, strict=True):
                rows = lm.tokens.rows([edit.text], [edit.target_new])
                label = rows.ids_BT[0, rows.start_B[0] :].tolist()
                memory.place(query_H, label, self.epsilon, block)
        return notes

    def _learn(
        self, lm: LanguageModel, memory: Blocks, edits: Sequence[Edit], notes: list[dict[str, Any]]
    ) -> int:
        """Learns a new block on some edits together; returns its index."""
        block = len(getattr(memory, memory.factors()[0][0]))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        leaves: dict[str, Tensor] = {}
        for down, up in memory.factors():
            (_, rank, inputs), (_, outputs, _) = (getattr(memory, n).shape for n in (down, up))
            drawn_rI = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
            leaves[down] = drawn_rI.to(lm.device).requires_grad_()
            leaves[up] = torch.zeros(outputs, rank, device=lm.device, requires_grad=True)
        frozen = {name: getattr(memory, name) for name in leaves}
        rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        owner_R = torch.arange(len(edits), device=lm.device)
        target_rows = TargetRows.of(lm, rows, owner_R, self.layer, "target")
        adam = torch.optim.Adam(leaves.values(), self.lr)
        halving = torch.optim.lr_scheduler.StepLR(adam, self.halve_every, 0.5)
        memory.forced = block
        try:
            for step in range(self.steps + 1):
                for name, leaf in leaves.items():
                    setattr(memory, name, torch.cat([frozen[name], leaf[None]]))
                loss_R = target_rows.losses(lm)
                if step == self.steps or not loss_R.mean().item() >= self.stop_loss:
                    break
                adam.zero_grad()
                loss_R.mean().backward()
                adam.step()
                halving.step()
        finally:
            memory.forced = None
        for name in leaves:
            setattr(memory, name, getattr(memory, name).detach())
        for edit, loss in zip(edits, loss_R.tolist(), strict=True):
            notes.append({"block": block, "loss": loss, "steps": step})
            if not loss <= 1:
                log.warning("%r -> %r: learning ended at NLL %.2f; the edit will likely fail",
                            edit.text, edit.target_new, loss)  # fmt: skip
        return block
