"""What a method against forgetting keeps of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Kept(nn.Module):
    """Tensors by the names of parameters, saved and restored with the module that holds them; none at first."""

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps copies of these tensors, in place of those of the same names."""
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers()}

    def make_room(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes the names and shapes that a checkpoint has under ``prefix``, so that it can be loaded."""
        names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        for name in names:
            saved = state[prefix + name]
            self.register_buffer(name, torch.zeros_like(saved))
