"""Fine-tuning a few MLP projections on the edit itself: FT, FT-L and FT-M.

    FT    FT(layers, loss="prompt_last")                       one layer, no constraint
    FT-L  FT(layers, loss="prompt_last", norm_constraint=eps)  Zhu et al., 2020, arXiv 2012.00363
    FT-M  FT(layers, loss="target")                            Zhang et al., 2024, arXiv 2401.01286

FT and FT-L are the baselines of Meng et al., 2022 (arXiv 2202.05262). Their loss predicts all target
tokens from one position, and their "norm" constraint is a box: every entry of the update stays
within [-eps, eps]. Adam's first step is lr in every entry, so with eps <= lr the update is in a
corner of the box from then on.

Departures from the authors' code: prompt and target are encoded together; every independent edit
has its own stopping rule; weight decay pulls towards the base weights, not towards zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from corrigenda.modules import checks
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.learned import mlp_matrices
from corrigenda.modules.training.target_rows import Loss


class FT(GradientEditor):
    """Dense updates of MLP projections: the weight and, if there is one, the bias.

    Args:
        layers: blocks whose projections are tuned, from 0.
        projections: ``out`` is the MLP's output projection, ``mlp`` all of its projections.
        norm_constraint: largest absolute value of the update's entries (FT-L); unlimited if not given.
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
        weight_decay: L2 decay of the weights towards the base's.
        loss: ``target`` is the mean negative log-likelihood of the target's tokens, each given the
            ones before it (FT-M); ``prompt_last`` predicts all of them at the one position after the
            prompt (FT, FT-L).
        parallel: independent edits learned together; fewer if their updates are large.
    """

    def __init__(
        self,
        layers: list[int],
        projections: Literal["out", "mlp"] = "out",
        norm_constraint: float | None = None,
        steps: int = 25,
        lr: float = 5e-4,
        stop_loss: float = 1e-2,
        weight_decay: float = 0.0,
        loss: Loss = "target",
        parallel: int = 8,
    ) -> None:
        super().__init__(steps, lr, stop_loss, weight_decay, loss, parallel)
        checks.blocks(layers=layers)
        checks.positive(norm_constraint=norm_constraint)
        self.layers, self.projections = sorted(layers), projections
        self.norm_constraint = norm_constraint

    def lowest_layer(self, lm: LanguageModel) -> int:
        return self.layers[0]

    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        leaves = {}
        for name in mlp_matrices(lm, self.layers, self.projections):
            module = lm.net.get_submodule(name)
            inputs, outputs = sizes(module)
            leaves[f"{name}.weight"] = torch.zeros(count, outputs, inputs, device=lm.device)
            if getattr(module, "bias", None) is not None:
                leaves[f"{name}.bias"] = torch.zeros(count, outputs, device=lm.device)
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        each = zip(*(leaf.unbind() for leaf in leaves.values()), strict=True)
        return [Delta(dict(zip(leaves, updates, strict=True))) for updates in each]

    def project(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> None:
        if self.norm_constraint is not None:
            for leaf in leaves.values():
                leaf.data.clamp_(-self.norm_constraint, self.norm_constraint)
