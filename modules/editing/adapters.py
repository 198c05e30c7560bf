"""Adapters: :class:`Adapter`, :class:`ModulePatch`, :class:`ModuleEditor`.

An adapter receives the outputs of some modules and may replace them; no weight changes. To adapters that depend on
the prompt, the language model announces where each row's prompt ends (:class:`PromptBatch`).

Shapes: B rows, T tokens, I inputs and O outputs of a module.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import Editor, editing_mode
from corrigenda.modules.editing.weight_patch import require_base
from corrigenda.modules.files import write_tensors
from corrigenda.modules.interrupts import uninterrupted
from corrigenda.modules.model.delta import EditError, read_origin, read_tensors, require_finite
from corrigenda.modules.model.handle import EditHandle, PromptBatch
from corrigenda.modules.model.hooks import Hook, remove_all
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.placement import at_home

MEMORY_FORMAT = "corrigenda-memory-1"


class Adapter(nn.Module, ABC):
    """A memory that can replace the outputs of some modules.

    What it has learned is in its buffers, which may grow; how it works is in its settings. Files hold both, and
    :meth:`rebuild` makes the adapter from them.

    Args:
        sites: paths of the modules whose outputs it sees.
        settings: the subclass's own arguments, JSON values.
    """

    def __init__(self, sites: Sequence[str], **settings: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.sites = tuple(sites)
        self.settings = {"sites": list(sites), **settings}

    @abstractmethod
    def forward(self, site: str, x_BTI: Tensor, y_BTO: Tensor, batch: PromptBatch | None) -> Tensor:
        """The output of module ``site`` for input ``x``, whose own output is ``y``.

        Returns ``y`` itself where nothing changes. ``batch`` is None in passes that were not announced
        with :meth:`ActiveEdits.announce`; adapters that decide by prompt leave those alone.
        """

    @property
    def size(self) -> int:
        """How many numbers its buffers hold."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def num_bytes(self) -> int:
        """How many bytes its buffers take."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def same_memory(self, other: Adapter) -> bool:
        """Whether the other is an earlier or later state of this memory."""
        return type(self) is type(other) and self.settings == other.settings

    @classmethod
    def path(cls) -> str:
        """The class's name in files."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def description(self) -> str:
        """Class and settings as JSON; with the buffers, all that :meth:`rebuild` needs."""
        return json.dumps({"class": self.path(), "settings": self.settings})

    @staticmethod
    def rebuild(description: str, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter with this :meth:`description` and ``state_dict``; raises EditError if they do not fit."""
        found = json.loads(description)
        kind = _known(found["class"])
        if kind is None:
            raise EditError(
                f"there is no adapter {found['class']}: it is neither of this project nor of a module that has "
                "been imported"
            )
        sites = found["settings"]["sites"]
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise EditError(f"{found['class']}: its sites are not a list of module names")
        adapter = kind(**found["settings"])
        empty = adapter.state_dict()
        if missing := empty.keys() ^ tensors.keys():
            raise EditError(f"{found['class']}: tensors {sorted(missing)} do not fit this version")
        for key, tensor in tensors.items():
            if tensor.dim() != empty[key].dim() or any(
                wanted not in (0, size)  # 0 is a dimension that grows with the edits
                for wanted, size in zip(empty[key].shape, tensor.shape, strict=True)
            ):
                raise EditError(f"{found['class']}: {key} has the shape {tuple(tensor.shape)}")
            setattr(adapter, key, tensor)
        return adapter


def _known(path: object) -> type[Adapter] | None:
    """The adapter class that a file names: one of this project's methods or of modules that have been imported.

    The name is only compared with those of existing classes; it never imports anything.
    """
    package = importlib.import_module("corrigenda.modules.editors")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    kinds: list[type[Adapter]] = [Adapter]  # type: ignore[type-abstract]
    for kind in kinds:
        kinds += kind.__subclasses__()
    named = {kind.path(): kind for kind in kinds[1:]}
    # Version 0.1 wrote other module paths; its classes are found by their own name.
    if isinstance(path, str) and path.startswith("modules."):
        ours = {name.rpartition(".")[2]: name for name in named if name.startswith("corrigenda.")}
        path = ours.get(path.rpartition(".")[2])
    return named.get(path) if isinstance(path, str) else None


class ModulePatch(EditHandle):
    """An active memory: an adapter hooked to modules of the network; no weight changes.

    A patch holds the whole memory and replaces the older patch of the same memory: an editor that is called
    again copies the active memory, extends the copy and activates that. Removing the newer patch activates the
    older one again, which has not changed in the meantime.
    """

    needs_whole_rows = True

    def __init__(
        self, lm: LanguageModel, adapter: Adapter, metadata: dict[str, Any] | None = None
    ) -> None:
        self.lm, self.metadata = lm, metadata or {}
        require_base(lm, self.metadata, "memory")
        for site in adapter.sites:
            try:
                lm.net.get_submodule(site)
            except AttributeError:
                raise EditError(f"the model {lm.name!r} has no module {site}") from None
        self.adapter = adapter.to(lm.device)
        self.older = ModulePatch.newest(lm, adapter)
        self.lowest_layer = min((lm.structure.layer_of(s) for s in adapter.sites), default=0)
        self._hooks: list[RemovableHandle] = []
        super().__init__(lm)

    @staticmethod
    def newest(lm: LanguageModel, adapter: Adapter) -> ModulePatch | None:
        """The newest patch on the model that holds a state of the same memory as ``adapter``."""
        patches = [h for h in lm.handles if isinstance(h, ModulePatch)]
        return next((p for p in reversed(patches) if p.adapter.same_memory(adapter)), None)

    def swap(self) -> None:
        with uninterrupted():
            if self._hooks:
                self._unhook()
                if self.older is not None:
                    self.older._hook()
            else:
                if self.older is not None:
                    self.older._unhook()
                self._hook()

    def _hook(self) -> None:
        for site in self.adapter.sites:
            module = self.lm.net.get_submodule(site)
            hook = at_home(module, self._at(site))
            self._hooks.append(module.register_forward_hook(hook))

    def _unhook(self) -> None:
        remove_all(self._hooks)

    def _at(self, site: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            batch, x, y = self.lm.edits.batch, args[0], output
            if any(buffer.device != y.device for buffer in self.adapter.buffers()):
                self.adapter.to(y.device)
            if batch is not None and x.dim() == 2:  # rows and tokens flattened
                x, y = (t.view(len(batch.prompt_BT), -1, t.shape[-1]) for t in (x, y))
            new = self.adapter(site, x, y, batch)
            return output if new is y else new.reshape(output.shape)

        return hook

    @property
    def num_parameters(self) -> int:
        """Number of values by which this patch extends the older one."""
        return self.adapter.size - (self.older.adapter.size if self.older else 0)

    @property
    def num_bytes(self) -> int:
        """Number of bytes by which this patch extends the older one."""
        return self.adapter.num_bytes - (self.older.adapter.num_bytes if self.older else 0)

    def can_absorb(self, newer: EditHandle) -> bool:
        last = self.lm.handles[-2:] == [self, newer]
        return last and isinstance(newer, ModulePatch) and newer.older is self

    def absorb(self, newer: ModulePatch) -> None:
        """Takes over the memory of the newest patch, which extends this one; one removal undoes both."""
        if not self.can_absorb(newer):
            raise EditError("only the newest edit can be absorbed, by the one it extends")
        with uninterrupted():
            newer._unhook()
            self.lm.handles.pop()
            self.adapter, self.metadata = newer.adapter, newer.metadata
            self._hook()

    # ------------------------------------------------------------------ files and checkpoints

    def state(self) -> dict[str, Any]:
        """Tensors and JSON from which :meth:`restore` activates the same memory again."""
        return {
            "adapter": self.adapter.description(),
            "tensors": dict(self.adapter.state_dict()),
            "metadata": json.dumps(self.metadata),
        }

    @classmethod
    def restore(cls, lm: LanguageModel, state: dict[str, Any]) -> ModulePatch:
        """Activates the memory that :meth:`state` described."""
        adapter = Adapter.rebuild(state["adapter"], state["tensors"])
        return cls(lm, adapter, json.loads(state["metadata"]))

    def save(self, path: str | Path) -> None:
        """Writes the whole memory to one safetensors file, atomically."""
        header = {"format": MEMORY_FORMAT, "adapter": self.adapter.description()}
        metadata = {"metadata": json.dumps(self.metadata)}
        write_tensors(Path(path), dict(self.adapter.state_dict()), header | metadata)

    @classmethod
    def load(cls, lm: LanguageModel, path: str | Path) -> ModulePatch:
        """Activates a memory that :meth:`save` wrote; raises EditError for another model's."""
        tensors, header = read_tensors(path, MEMORY_FORMAT, "memory")
        try:
            require_finite(tensors)
            adapter = Adapter.rebuild(header["adapter"], tensors)
            metadata = read_origin(header["metadata"])
        except EditError as error:
            raise EditError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise EditError(f"{path}: a damaged memory file ({error})") from None
        return cls(lm, adapter, metadata)


class ModuleEditor(Editor):
    """A method that stores edits in an adapter; every further edit extends it."""

    @abstractmethod
    def empty(self, lm: LanguageModel) -> Adapter:
        """A memory without edits."""

    @abstractmethod
    def learn(self, lm: LanguageModel, memory: Any, edits: Sequence[Edit]) -> list[dict[str, Any]]:  # noqa: ANN401
        """Extends the active ``memory`` (an :meth:`empty` one or a later state of it) in place.

        Returns a note (JSON values) for each edit.
        """

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> ModulePatch:
        self.check(lm)
        self.check_edits(edits)
        with editing_mode():
            self.prepare(lm)
            memory = self.empty(lm)
            older = ModulePatch.newest(lm, memory)
            if older is not None:
                memory = copy.deepcopy(older.adapter)
            with lm.edits.provisional():
                ModulePatch(lm, memory)
                notes = self.learn(lm, memory, edits)
            metadata = self.origin(lm, edits) | {"notes": notes}
            if older is not None:
                for key in ("edits", "notes"):
                    metadata[key] = older.metadata.get(key, []) + metadata[key]
            return ModulePatch(lm, memory, metadata)
