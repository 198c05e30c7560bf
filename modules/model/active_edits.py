"""A frozen network and the edits that are active on it.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from corrigenda.modules.interrupts import Reversible, replaced
from corrigenda.modules.model.delta import Delta, side_branches
from corrigenda.modules.model.handle import Answering, EditHandle, PromptBatch
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.model.placement import device_of
from corrigenda.modules.model.structure import Structure, find_structure
from corrigenda.modules.model.substitution import needs_substitution, substituted


class ActiveEdits:
    """The edits on one network, oldest first, and what they mean for a forward pass.

    Args:
        net: a causal network.
    """

    def __init__(self, net: Any) -> None:  # noqa: ANN401  a PreTrainedModel, whose types say too little
        self.net = net
        self.structure: Structure = find_structure(net)
        self.handles: list[EditHandle] = []
        self.batch: PromptBatch | None = None  # while one runs
        self._suspended = False  # see :meth:`pristine`

    @property
    def device(self) -> torch.device:
        return device_of(self.net.get_input_embeddings())

    @cached_property
    def weights_hash(self) -> str:
        """Hash of every unedited weight: the identity of the base model."""
        with self.pristine():
            return hash_weights(self.net)

    # ------------------------------------------------------------------ on and off

    def pristine(self) -> AbstractContextManager:
        """Inside, no edit is active; afterwards all are again, bit-exactly. Nesting has no effect."""
        if self._suspended:
            return nullcontext()
        swapped: list[EditHandle] = []

        def suspend() -> None:
            self._suspended = True
            for handle in reversed(self.handles):
                handle.swap()
                swapped.append(handle)

        def resume() -> None:
            while swapped:
                swapped.pop().swap()
            self._suspended = False

        return Reversible(suspend, resume)

    def provisional(self) -> Reversible:
        """Edits made inside are removed at the end."""
        count = len(self.handles)

        def remove() -> None:
            while len(self.handles) > count:
                self.handles[-1].remove()

        return Reversible(lambda: None, remove)

    def side_by_side(
        self, deltas: Sequence[Delta] | None, owner_B: Tensor | None
    ) -> AbstractContextManager:
        """Inside, row b runs through the model edited by ``deltas[owner_B[b]]``."""
        if not deltas:
            return nullcontext()
        if needs_substitution(self.net, deltas):
            if len(deltas) > 1:
                raise ValueError(
                    f"{len(deltas)} updates of embeddings or norms cannot run side by side: evaluate them one "
                    "by one (--data.batch_size 1)"
                )
            return substituted(self.net, deltas[0])
        if owner_B is None:
            if len(deltas) > 1:
                raise ValueError("several deltas need owner_B, the delta of each row")
            owner_B = torch.zeros(1, dtype=torch.long)
        return side_branches(self.net, deltas, owner_B)

    def announce(self, prompt_BT: Tensor) -> Reversible:
        """Inside, one batch runs, and these are its prompt tokens: adapters that decide by prompt need them.

        In forward passes that are not announced those adapters are inactive.
        """
        return replaced(self, batch=PromptBatch(prompt_BT))

    # ------------------------------------------------------------------ what the edits change

    @property
    def any_active(self) -> bool:
        """Whether any edit is active now."""
        return bool(self.handles) and not self._suspended

    @property
    def need_whole_rows(self) -> bool:
        """Whether an adapter decides by prompt, so that rows must be neither cut nor merged."""
        return any(handle.needs_whole_rows for handle in self.handles)

    @property
    def change_network(self) -> bool:
        """Whether any edit changes what the network computes, not only prompts or outputs."""
        return any(handle.changes_network for handle in self.handles)

    @property
    def answering(self) -> Answering | None:
        """The newest edit that scores and generates in the model's place."""
        found = [handle.answering for handle in reversed(self.handles)]
        return next((edit for edit in found if edit is not None), None)

    def lowest_layer(self, deltas: Sequence[Delta] = ()) -> int:
        """The lowest block that any edit changes; below it edited and unedited model are the same."""
        layers = [handle.lowest_layer for handle in self.handles]
        layers += [self.structure.layer_of(name) for delta in deltas for name in delta.updates]
        return min(layers, default=self.structure.num_layers - 1)

    def all_above(self, layer: int) -> bool:
        """Whether every edit is at or above a block, so that its input is the unedited model's."""
        return all(handle.lowest_layer >= layer for handle in self.handles)
