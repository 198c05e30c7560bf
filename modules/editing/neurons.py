"""Extra neurons beside the MLPs of a network, as T-Patcher and CaliNET add them.

    MLP'(h) = MLP(h) + sum over p of relu(k_p h + b_p) v_p

with h the MLP's own input. They have no gate, even if the MLP has one, so that a neuron that does not fire adds
exactly zero.

Shapes: P neurons, D residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from corrigenda.modules.editing.adapters import Adapter
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.model.lm import LanguageModel


class SideNeurons(Adapter):
    """Neurons beside the MLPs of some blocks.

    Args:
        sites: for each block, its MLP's first input projection and its output projection.
        layers: the blocks.
        width: D.
    """

    key_PD: Tensor
    bias_P: Tensor
    value_PD: Tensor
    layer_P: Tensor

    def __init__(self, sites: Sequence[str], layers: Sequence[int], width: int) -> None:
        super().__init__(sites, layers=list(layers), width=width)
        self.register_buffer("key_PD", torch.zeros(0, width))
        self.register_buffer("bias_P", torch.zeros(0))
        self.register_buffer("value_PD", torch.zeros(0, width))
        self.register_buffer("layer_P", torch.zeros(0, dtype=torch.long))
        self._layer_of = dict(
            zip(sites, [n for layer in layers for n in (layer, layer)], strict=True)
        )
        self._ends = set(sites[1::2])
        self._input: Tensor | None = None  # of the MLP that is running

    @classmethod
    def beside(cls, lm: LanguageModel, layers: Sequence[int]) -> Self:
        """A memory without neurons yet, beside the MLPs of these blocks."""
        sites = [
            site
            for n in layers
            for site in (lm.structure.mlp_names(n)[0], lm.structure.out_name(n))
        ]
        return cls(sites, layers, lm.structure.width)

    def forward(self, site: str, x_BTI: Tensor, y_BTO: Tensor, batch: PromptBatch | None) -> Tensor:
        if site not in self._ends:
            self._input = x_BTI
            return y_BTO
        h_BTD, self._input = self._input, None
        here_P = self.layer_P == self._layer_of[site]
        if h_BTD is None or not here_P.any():
            return y_BTO
        before_BTP = h_BTD.to(self.key_PD.dtype) @ self.key_PD[here_P].T + self.bias_P[here_P]
        return y_BTO + (before_BTP.relu() @ self.value_PD[here_P]).to(y_BTO.dtype)

    def replace(self, key_PD: Tensor, bias_P: Tensor, value_PD: Tensor) -> None:
        """Replaces the newest neurons, as many as are given."""
        old = len(self.bias_P) - len(bias_P)
        self.key_PD = torch.cat([self.key_PD[:old].detach(), key_PD])
        self.bias_P = torch.cat([self.bias_P[:old].detach(), bias_P])
        self.value_PD = torch.cat([self.value_PD[:old].detach(), value_PD])

    def grow(self, layer_P: Sequence[int]) -> None:
        """Adds one neuron per entry, in that block, all zero."""
        count, width = len(layer_P), self.key_PD.shape[1]
        self.key_PD = torch.cat([self.key_PD, self.key_PD.new_zeros(count, width)])
        self.bias_P = torch.cat([self.bias_P, self.bias_P.new_zeros(count)])
        self.value_PD = torch.cat([self.value_PD, self.value_PD.new_zeros(count, width)])
        self.layer_P = torch.cat([self.layer_P, self.layer_P.new_tensor(list(layer_P))])
