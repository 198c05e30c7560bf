"""LoRA: low-rank adaptation (Hu et al., 2021, arXiv 2106.09685), trained on the edit itself.

    W' = W + (alpha / r) B A,   A [r, in] Kaiming-uniform, B [out, r] zero at the start

The product is a low-rank update like any other: merging it means writing it, and removing it is
exact.

Departures from common practice: no dropout, which on one example only adds noise. All edits start
from the same A. The defaults are those published for models with billions of parameters; a model of
135 million then answers everything with the target: tune a single block there, and stop earlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from corrigenda.modules import checks
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import is_linear, sizes
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.target_rows import Loss

BETWEEN_TASKS = 1_000_003  # between the seeds of one task and the next


class LoRA(GradientEditor):
    """Low-rank updates of attention or MLP layers.

    Args:
        layers: blocks that are tuned, from 0; all if not given.
        targets: ``attention``: the query and value projections (or the layer that fuses them);
            ``mlp``: all MLP projections; ``all``: every linear layer of both.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
        weight_decay: L2 decay of the factors.
        loss: ``target`` is the mean negative log-likelihood of the target's tokens, each given the
            ones before it; ``prompt_last`` predicts all of them at the one position after the prompt.
        seed: random seed of A's initialisation.
        parallel: independent edits learned together.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        targets: Literal["attention", "mlp", "all"] = "attention",
        rank: int = 8,
        alpha: float = 32.0,
        steps: int = 40,
        lr: float = 5e-3,
        stop_loss: float = 1e-2,
        weight_decay: float = 0.0,
        loss: Loss = "target",
        seed: int = 0,
        parallel: int = 8,
    ) -> None:
        super().__init__(steps, lr, stop_loss, weight_decay, loss, parallel)
        checks.blocks(layers=layers)
        checks.whole(1, rank=rank)
        checks.positive(alpha=alpha)
        checks.seeds(seed=seed)
        self.layers = None if layers is None else sorted(layers)
        self.targets, self.rank, self.scale, self.seed = targets, rank, alpha / rank, seed

    def lowest_layer(self, lm: LanguageModel) -> int:
        return self.layers[0] if self.layers else 0

    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + BETWEEN_TASKS * task)
        leaves = {}
        for layer in self.layers if self.layers is not None else range(lm.structure.num_layers):
            for name in self._names(lm, layer):
                inputs, outputs = sizes(lm.net.get_submodule(name))
                a_rI = torch.empty(self.rank, inputs)
                nn.init.kaiming_uniform_(a_rI, a=math.sqrt(5), generator=generator)
                leaves[f"{name}.A"] = a_rI.to(lm.device).repeat(count, 1, 1)
                leaves[f"{name}.B"] = torch.zeros(count, outputs, self.rank, device=lm.device)
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        deltas: list[Delta] = [Delta({}) for _ in next(iter(leaves.values()))]
        for name in [leaf.removesuffix(".A") for leaf in leaves if leaf.endswith(".A")]:
            left_EOr, right_ErI = self.scale * leaves[f"{name}.B"], leaves[f"{name}.A"]
            for delta, left_Or, right_rI in zip(
                deltas, left_EOr.unbind(), right_ErI.unbind(), strict=True
            ):
                delta.updates[f"{name}.weight"] = LowRank(left_Or, right_rI)
        return deltas

    def _names(self, lm: LanguageModel, layer: int) -> list[str]:
        """Paths of the tuned linear layers of one block."""
        mlp = list(lm.structure.mlp_names(layer))
        if self.targets == "mlp":
            return mlp
        inside = _attention_layers(lm, layer)
        return inside + mlp if self.targets == "all" else _query_and_value(lm, inside)


def _attention_layers(lm: LanguageModel, layer: int) -> list[str]:
    """Every linear layer of a block except the MLP's; attention may differ from block to block."""
    block, mlp = lm.structure.block_name(layer), lm.structure.mlp_names(layer)
    inside = lm.net.get_submodule(block).named_modules()
    names = [f"{block}.{name}" for name, module in inside if is_linear(module)]
    return [name for name in names if name not in mlp]


def _query_and_value(lm: LanguageModel, names: list[str]) -> list[str]:
    """Layers with a q or v in their name (``q_proj``, ``query_key_value``), else the wide (fused) ones."""
    named = [name for name in names if {*name.rpartition(".")[2].lower()} & {"q", "v"}]
    if named:
        return named
    wide = [name for name in names if sizes(lm.net.get_submodule(name))[1] > lm.structure.width]
    if not wide:
        raise ValueError(f"no query or value projection among {names}: use targets 'mlp' or 'all'")
    return wide
