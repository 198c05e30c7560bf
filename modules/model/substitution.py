"""Updates of parameters of any kind, embeddings and norms among them: the sum takes the parameter's place.

:func:`~corrigenda.modules.model.delta.side_branches` adds updates at the outputs of linear layers, row by row.
Embeddings and norms have no such branch, so an update of all parameters is added to them for as long as it
applies, for all rows alike. The parameters themselves are never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from corrigenda.modules.interrupts import Reversible
from corrigenda.modules.model.delta import Delta, EditError, LowRank
from corrigenda.modules.model.structure import is_linear, to_storage


def needs_substitution(net: nn.Module, deltas: Sequence[Delta]) -> bool:
    """Whether a delta updates parameters outside linear layers."""
    modules = {name.rpartition(".")[0] for delta in deltas for name in delta.updates}
    return not all(is_linear(net.get_submodule(name)) for name in modules)


def substituted(net: nn.Module, delta: Delta) -> Reversible:
    """Inside, the network runs with ``parameter + update`` for every updated parameter.

    The sum is made in the update's precision and rounded to the parameter's. Gradients reach the update. Wherever
    a tied parameter is used, the sum is.
    """
    used_at: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for kind, parameter in module._parameters.items():
            used_at.setdefault(id(parameter), []).append((module, kind))
    changes: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
    for name, update in delta.updates.items():
        owner, parameter = net.get_submodule(name.rpartition(".")[0]), net.get_parameter(name)
        if parameter.is_meta:
            raise EditError(
                f"{name} is offloaded, and an update beside it would not be: write it with WeightPatch, or give "
                "--model.lm.device_map devices alone"
            )
        dense = update.dense(update.left_Or.dtype) if isinstance(update, LowRank) else update
        total = (parameter.detach() + to_storage(owner, dense)).to(parameter.dtype)
        changes += [(module, kind, parameter, total) for module, kind in used_at[id(parameter)]]

    def put() -> None:
        for module, kind, _, total in changes:
            module._parameters[kind] = cast(nn.Parameter, total)  # as torch.func does

    def put_back() -> None:
        for module, kind, parameter, _ in changes:
            module._parameters[kind] = parameter

    return Reversible(put, put_back)
