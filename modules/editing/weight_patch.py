"""Active weight updates: :class:`WeightPatch`.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corrigenda.modules import files
from corrigenda.modules.interrupts import uninterrupted
from corrigenda.modules.model import placement
from corrigenda.modules.model.delta import Delta, EditError, add_deltas
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import (
    exchange,
    is_quantised,
    read_weight,
    sizes,
    to_storage,
    with_weight,
)

log = logging.getLogger(__name__)


def require_base(lm: LanguageModel, metadata: dict[str, Any], kind: str) -> None:
    base = metadata.get("base")
    if base is not None and base != lm.weights_hash:
        raise EditError(
            f"this {kind} belongs to a model with weights {base}, not to {lm.name!r} with weights "
            f"{lm.weights_hash}: load the model it was made for, with its dtype and quantization"
        )


class WeightPatch(EditHandle):
    """A delta written into the weights; original tensors are kept and swapped back, never recomputed.

    A quantised linear layer is replaced as a whole, by a floating-point one or, with ``lm.requantize``, by one
    quantised the same way. The relative error of quantising again, |written - wanted| / |update|, goes into the
    metadata by parameter, under ``requantized``.

    Args:
        lm: the language model.
        delta: the update.
        edited: edited parameters that are already known, as :meth:`state` gives them.
    """

    def __init__(
        self, lm: LanguageModel, delta: Delta, edited: Mapping[str, Tensor] | None = None
    ) -> None:
        require_base(lm, delta.metadata, "delta")
        self.lm, self.delta = lm, delta
        self.lowest_layer = min((lm.structure.layer_of(name) for name in delta.updates), default=0)
        self._lost: dict[str, float] = {}
        written = _named_once(lm, delta)
        self._spare = {name: self._edited(lm, name, written) for name in written.updates}
        for name, known in (edited or {}).items():
            module = lm.net.get_submodule(name.rpartition(".")[0])
            whole = isinstance(self._spare[name], nn.Module)
            self._spare[name] = with_weight(module, known, lm.requantize) if whole else known
        if self._lost:
            self.delta = Delta(delta.updates, delta.metadata | {"requantized": [self._lost]})
        super().__init__(lm)

    def _edited(self, lm: LanguageModel, name: str, delta: Delta) -> Tensor | nn.Module:
        """What replaces the parameter: its data with the update added, or a whole module."""
        module_name, _, kind = name.rpartition(".")
        try:
            module = lm.net.get_submodule(module_name)
            parameter = getattr(module, kind)
        except AttributeError:
            parameter = None
        if parameter is None:  # also a bias that the module does not have
            raise EditError(f"the model {lm.name!r} has no parameter {name}")
        quantised = kind == "weight" and is_quantised(module)
        values = placement.read(module, kind)
        update = to_storage(module, delta.dense(name).to(values.device))
        shape = sizes(module)[::-1] if quantised else tuple(parameter.shape)
        if tuple(update.shape) != shape:
            raise EditError(
                f"the update of {name} has shape {tuple(update.shape)}, the parameter {shape}"
            )
        if quantised:
            return self._edited_module(lm, name, module, update)
        return (values.double() + update).to(parameter.dtype)

    def _edited_module(
        self, lm: LanguageModel, name: str, module: nn.Module, update_OI: Tensor
    ) -> nn.Module:
        """The edited linear layer that replaces a quantised one."""
        weight_OI = read_weight(module)
        wanted_OI = weight_OI.double() + update_OI
        if not lm.requantize:
            return with_weight(module, wanted_OI.to(lm.net.dtype), requantize=False)
        edited = with_weight(module, wanted_OI.to(weight_OI.dtype), requantize=True)
        missing = (read_weight(edited).double() - wanted_OI).norm() / update_OI.norm()
        self._lost[name] = missing.item()
        log.info("%s: quantised again, which changed the update by %.2f of its norm", name, missing)
        return edited

    @torch.no_grad()
    def swap(self) -> None:
        with uninterrupted():
            for name, spare in self._spare.items():
                self._spare[name] = exchange(self.lm.net, name, spare)

    @property
    def num_parameters(self) -> int:
        return self.delta.num_parameters

    @property
    def num_bytes(self) -> int:
        return self.delta.num_bytes

    def save(self, path: Path) -> None:
        self.delta.save(path)

    def state(self) -> dict[str, Any]:
        """Tensors and JSON from which :meth:`restore` activates the same edit again, bit-exactly.

        Of a layer that was quantised again they hold the dequantised weight.
        """
        edited = {name: self._written(name) for name in self._spare}
        return {
            "edited": edited,
            "delta": self.delta.tensors(),
            "metadata": json.dumps(self.delta.metadata),
        }

    def digest(self) -> str:
        """That of the update: the weights under it are the same everywhere."""
        return files.digest({name: tensor.cpu() for name, tensor in self.delta.tensors().items()})

    def _written(self, name: str) -> Tensor:
        """The parameter as this patch left it: active, or kept by the next patch that changed it."""
        for later in self.lm.handles[self.lm.handles.index(self) + 1 :]:
            if isinstance(later, WeightPatch) and name in later._spare:
                return _values(later._spare[name])
        return _present(self.lm, name)

    @classmethod
    def restore(cls, lm: LanguageModel, state: dict[str, Any]) -> WeightPatch:
        """Activates the edit that :meth:`state` described, on a model without it."""
        tensors = {name: tensor.to(lm.device) for name, tensor in state["delta"].items()}
        delta = Delta.from_tensors(tensors, json.loads(state["metadata"]))
        return cls(lm, delta, state["edited"])

    def can_absorb(self, newer: EditHandle) -> bool:
        return isinstance(newer, WeightPatch) and self.lm.handles[-2:] == [self, newer]

    def absorb(self, newer: WeightPatch) -> None:
        """Merges the newer patch into this one: one removal undoes both, with one original kept per matrix."""
        if not self.can_absorb(newer):
            raise EditError("only the newest edit can be absorbed, by the one before it")
        delta = add_deltas([self.delta, newer.delta])
        with uninterrupted():
            for name, original in newer._spare.items():
                self._spare.setdefault(name, original)
            self.lowest_layer = min(self.lowest_layer, newer.lowest_layer)
            self.delta = delta
            self.lm.handles.pop()


def edited_weights(
    lm: LanguageModel, newest: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(before, now) of every parameter that active edits have changed, by name, both of one shape.

    Empty where no edit changes weights, as with memories. Quantised weights are dequantised.

    Args:
        lm: the language model.
        newest: only what the newest handles, so many, have changed; by default all, so before is unedited.
    """
    unedited: dict[str, Tensor | nn.Module] = {}
    for handle in lm.handles[-newest if newest else 0 :]:
        if isinstance(handle, WeightPatch):
            for name, spare in handle._spare.items():
                unedited.setdefault(name, spare)
    before = {name: _values(spare) for name, spare in unedited.items()}
    return {name: (old, _present(lm, name).to(old.device)) for name, old in before.items()}


def _values(spare: Tensor | nn.Module) -> Tensor:
    return read_weight(spare) if isinstance(spare, nn.Module) else spare


def _present(lm: LanguageModel, name: str) -> Tensor:
    """The parameter as the model has it now."""
    module = lm.net.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and is_quantised(module):
        return read_weight(module)
    return placement.read(module, name.rpartition(".")[2])


def _named_once(lm: LanguageModel, delta: Delta) -> Delta:
    """The delta with every tied parameter under the one name that the network lists."""
    first = placement.first_names(lm.net)
    return add_deltas(
        [Delta({first.get(name, name): update}) for name, update in delta.updates.items()]
    )
