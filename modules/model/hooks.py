"""Capture and replace inputs and outputs of modules, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrigenda.modules.interrupts import Reversible
from corrigenda.modules.model.placement import Hook, at_home


class _Stop(Exception):  # noqa: N818  control flow, not an error
    """Raised inside a forward pass once everything needed has been captured."""


def hooked(
    pairs: Iterable[tuple[nn.Module, Hook]],
    prepend: bool = False,
    value: object = None,
    ends: type[BaseException] | None = None,
) -> Reversible:
    """Forward hooks on modules; a hook that returns something other than None replaces the output.

    With ``prepend`` they run before the hooks that are already there, else after them. ``value`` and ``ends``
    are those of :class:`Reversible`.
    """
    pairs = list(pairs)
    handles: list[RemovableHandle] = []

    def add() -> None:
        for module, hook in pairs:
            hook = at_home(module, hook)
            handles.append(module.register_forward_hook(hook, prepend=prepend))

    return Reversible(add, lambda: remove_all(handles), value, ends)


def remove_all(handles: list[RemovableHandle]) -> None:
    """Removes the hooks and empties the list of their handles."""
    while handles:
        handles.pop().remove()


def stop_forward(*_: object) -> None:
    """A hook that ends the forward pass; the pass must run inside :func:`until_stopped`."""
    raise _Stop


def until_stopped() -> suppress:
    """Inside, :func:`stop_forward` ends the block."""
    return suppress(_Stop)


def capture(modules: dict[str, nn.Module], stop: bool = False) -> Reversible:
    """``{name: (input, output)}`` of the given modules, filled by forward passes inside.

    With ``stop`` the pass ends as soon as every module has run.
    """
    seen: dict[str, tuple[Tensor, Any]] = {}

    def keep(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401
            seen[name] = (args[0], output)
            if stop and len(seen) == len(modules):
                raise _Stop

        return hook

    pairs = [(module, keep(name)) for name, module in modules.items()]
    return hooked(pairs, value=seen, ends=_Stop if stop else None)


def first(output: Any) -> Tensor:  # noqa: ANN401
    """The hidden states in a block's output, which is a tensor in some families and a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def replace_first(output: Any, hidden: Tensor) -> Any:  # noqa: ANN401
    """A block's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
