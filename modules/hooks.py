"""Capture and replace what modules take in and give out, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple, Any], Any]


class _Stop(Exception):  # noqa: N818  control flow, not an error
    """Raised inside a forward pass once everything wanted has been seen."""


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Hook]], ahead: bool = False) -> Iterator[None]:
    """Forward hooks on modules; a hook that returns something other than None replaces the output.

    With ``ahead`` they run before the hooks that are there already, else after them.
    """
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook, prepend=ahead).remove)
        yield


def stop_forward(*_: object) -> None:
    """A hook that ends the forward pass here; run the pass under :func:`until_stopped`."""
    raise _Stop


@contextmanager
def until_stopped() -> Iterator[None]:
    """Swallows the end that :func:`stop_forward` brings about."""
    with suppress(_Stop):
        yield


@contextmanager
def capture(modules: dict[str, nn.Module], stop: bool = False) -> Iterator[dict[str, tuple]]:
    """``{name: (input, output)}`` of the given modules, filled by the forward passes inside.

    With ``stop`` the pass ends as soon as every module has run (a truncated forward).
    """
    seen: dict[str, tuple[Tensor, Any]] = {}

    def keep(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401
            seen[name] = (args[0], output)
            if stop and len(seen) == len(modules):
                raise _Stop

        return hook

    with hooked([(module, keep(name)) for name, module in modules.items()]):
        if stop:
            with until_stopped():
                yield seen
        else:
            yield seen


def first(output: Any) -> Tensor:  # noqa: ANN401
    """The hidden states of a block output, which is a tensor in some families and a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def replace_first(output: Any, hidden: Tensor) -> Any:  # noqa: ANN401
    """The same kind of output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
