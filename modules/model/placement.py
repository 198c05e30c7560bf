"""Where the weights of a network are: on one device, on several, or offloaded.

accelerate places the blocks of a model that is larger than one device (``device_map``): on several devices and, if
those are full, in the CPU's memory or in the model's own file. An offloaded weight is on the ``meta`` device,
without values, except while its module runs. Weights are therefore read and replaced through this file.

Everything outside the network (token ids, updates, adapters, statistics) is on one device, that of the embedding:
the model's own. :func:`at_home` brings what hooks see there, so that no editor knows of several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import send_to_device
from torch import Tensor, nn

DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str]
Hook = Callable[[nn.Module, tuple, Any], Any]

# Modules that do not run on their model's own device, with that device and their own.
_away: WeakKeyDictionary[nn.Module, tuple[torch.device, torch.device]] = WeakKeyDictionary()


def check_map(device_map: DeviceMap, device: str | None, quantised: bool) -> None:
    """Raises ValueError for a ``device_map`` that this machine or these settings do not allow."""
    if device is not None:
        raise ValueError(
            f"device {device!r} and device_map {device_map!r} both say where the model is: give one of them"
        )
    if isinstance(device_map, str):
        return
    for name, place in device_map.items():
        if place not in ("cpu", "disk") and not _exists(place):
            raise ValueError(
                f"device_map places {name or 'the model'!r} on {place!r}, which this machine does not have: it "
                f"has {', '.join(['cpu', 'disk', *_accelerators()])}"
            )
    places = set(device_map.values())
    if quantised and {"cpu", "disk"} & places and places != {"cpu"}:
        raise ValueError(
            "device_map offloads a part of the model to cpu or disk, and quantised weights cannot be offloaded: "
            "place all of it on devices, or leave out quantization"
        )


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator()
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())] if kind else []


def _exists(place: int | str) -> bool:
    try:
        device = torch.device(place)
    except RuntimeError:
        return False
    return device.type == "cpu" or f"{device.type}:{device.index or 0}" in _accelerators()


def settle(net: nn.Module) -> None:
    """Notes which modules of a placed network run elsewhere than the embedding, see :func:`at_home`."""
    home = device_of(cast(Any, net).get_input_embeddings())
    for module in net.modules():
        if (device := _runs_on(module)) is not None and device != home:
            _away[module] = home, device


def at_home(module: nn.Module, hook: Hook) -> Hook:
    """The forward hook, with inputs and output on the model's own device wherever the module runs."""
    if module not in _away:
        return hook
    home, away = _away[module]

    def moved(module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ANN401
        new = hook(module, *send_to_device((args, output), home))
        return None if new is None else send_to_device(new, away)

    return moved


def beside(module: nn.Module, other: nn.Module) -> nn.Module:
    """The other module, which is to take this one's place and is on its device."""
    if module in _away:
        _away[other] = _away[module]
    return other


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module runs."""
    return _runs_on(module) or next(module.parameters()).device


def devices(net: nn.Module) -> list[torch.device]:
    """All devices on which a network runs."""
    found = {_runs_on(module) for module in net.modules()} - {None}
    return sorted(cast("set[torch.device]", found) or {next(net.parameters()).device}, key=str)


def is_placed(net: nn.Module) -> bool:
    """Whether accelerate has placed the network's modules, which then stay where they are."""
    return _runs_on(net) is not None


def is_offloaded(net: nn.Module) -> bool:
    """Whether some weights are on their device only while their module runs."""
    return any(parameter.is_meta for parameter in net.parameters())


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """What accelerate does before and after the module runs."""
    hook = getattr(module, "_hf_hook", None)
    every = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in every if isinstance(hook, AlignDevicesHook)]


def _runs_on(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module; None if it has not placed it."""
    found = [hook.execution_device for hook in _hooks(module) if hook.execution_device is not None]
    return torch.device(found[-1]) if found else None


# ---------------------------------------------------------------------------- weights


def first_names(net: nn.Module) -> dict[str, str]:
    """Every parameter's name to the first name of the same weight, which a tied one has several of."""
    ties = cast(Any, net).all_tied_weights_keys if is_placed(net) else {}
    first: dict[object, str] = {}
    return {
        name: first.setdefault(ties.get(name, name) if is_placed(net) else id(parameter), name)
        for name, parameter in net.named_parameters(remove_duplicate=False)
    }


def weights(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its first name, with its values."""
    for name, same in first_names(net).items():
        if name == same:
            module, _, kind = name.rpartition(".")
            yield name, read(net.get_submodule(module), kind)


def read(module: nn.Module, kind: str) -> Tensor:
    """The values of a parameter of this module, as it is stored."""
    parameter = cast(nn.Parameter, getattr(module, kind))
    return _stored(module).weights_map[kind] if parameter.is_meta else parameter.data


def replace(module: nn.Module, kind: str, values: Tensor) -> Tensor:
    """Gives a parameter other values; returns the old ones, so that replacing them again is exact."""
    parameter = cast(nn.Parameter, getattr(module, kind))
    old = read(module, kind)
    if (
        parameter.is_meta
    ):  # accelerate reads what is in the memory before what is in the model's file
        store = cast(Any, _stored(module).weights_map)
        store.dataset.state_dict[store.prefix + kind] = values.cpu()
        return old.cpu()
    parameter.data = values.to(old.device)
    return old


def _stored(module: nn.Module) -> Any:  # noqa: ANN401
    """accelerate's hook that has the values of a module's offloaded weights."""
    return next(hook for hook in _hooks(module) if hook.offload)
