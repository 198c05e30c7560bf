"""Full fine-tuning: an update of every parameter, embeddings and norms among them.

The update is added to the weights for each forward pass, so that the base stays what it is and locality compares
with it. Training needs memory for six copies of the parameters: base, update, their sum, its gradient, and Adam's
two moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import to_storage
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.target_rows import Loss


class FullFT(GradientEditor):
    """Dense updates of all parameters.

    Args:
        steps: maximum number of optimisation steps.
        lr: Adam's learning rate.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
        weight_decay: L2 decay of the weights towards the base's.
        loss: ``target`` is the mean negative log-likelihood of the target's tokens, each given the
            ones before it; ``prompt_last`` predicts all of them at the one position after the prompt.
    """

    def __init__(
        self,
        steps: int = 25,
        lr: float = 1e-5,
        stop_loss: float = 1e-2,
        weight_decay: float = 0.0,
        loss: Loss = "target",
    ) -> None:
        super().__init__(steps, lr, stop_loss, weight_decay, loss, parallel=1)

    def lowest_layer(self, lm: LanguageModel) -> int:
        return 0

    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        leaves = {}
        for name, parameter in lm.net.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"full fine-tuning adds to every weight, and {name} is quantised: load the model without "
                    "--model.lm.quantization, or tune LoRA on it"
                )
            if parameter.is_meta:
                raise ValueError(
                    f"full fine-tuning adds to every weight, and {name} is offloaded: give --model.lm.device_map "
                    "devices alone, or tune LoRA on it"
                )
            module = lm.net.get_submodule(name.rpartition(".")[0])
            shape = to_storage(module, parameter).shape
            leaves[name] = torch.zeros(count, *shape, device=parameter.device, requires_grad=True)
        return leaves

    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        each = zip(*(leaf.unbind() for leaf in leaves.values()), strict=True)
        return [Delta(dict(zip(leaves, updates, strict=True))) for updates in each]
