"""Memories beside the network: :class:`Adapter`, :class:`ModulePatch`, :class:`ModuleEditor`.

An adapter sees the outputs of some modules and may replace them; no weight changes. Those that decide by prompt
are told by the language model where each row's prompt ends (:class:`PromptBatch`).

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

MEMORY_FORMAT = "corrigenda-memory-1"


class Adapter(nn.Module, ABC):
    """A memory beside the network that has a say in the outputs of some of its modules.

    What it knows is in its buffers, of whatever length; what it is, in its settings. Both together
    are written to files, and rebuild it.

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
        """How many numbers it holds."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def num_bytes(self) -> int:
        """What those take."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def is_kin(self, other: Adapter) -> bool:
        """Whether the other is an earlier or later state of the same memory."""
        return type(self) is type(other) and self.settings == other.settings

    @classmethod
    def path(cls) -> str:
        """What files call the class."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def description(self) -> str:
        """Class and settings as JSON, from which, with the buffers, :meth:`rebuild` makes it again."""
        return json.dumps({"class": self.path(), "settings": self.settings})

    @staticmethod
    def rebuild(description: str, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter of :meth:`description` and its ``state_dict``; raises EditError if it is not one."""
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
                wanted not in (0, size)  # 0 is what grows with the edits
                for wanted, size in zip(empty[key].shape, tensor.shape, strict=True)
            ):
                raise EditError(f"{found['class']}: {key} has the shape {tuple(tensor.shape)}")
            setattr(adapter, key, tensor)
        return adapter


def _known(path: object) -> type[Adapter] | None:
    """The class that files call ``path``: of the project's own methods or of modules that have been imported.

    A name from a file is compared with those of the classes that there are, and nothing is imported by it.
    """
    package = importlib.import_module("corrigenda.modules.editors")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    kinds: list[type[Adapter]] = [Adapter]  # type: ignore[type-abstract]
    for kind in kinds:
        kinds += kind.__subclasses__()
    named = {kind.path(): kind for kind in kinds[1:]}
    if isinstance(path, str) and path.startswith(
        "modules."
    ):  # of version 0.1: by the class's own name
        ours = {name.rpartition(".")[2]: name for name in named if name.startswith("corrigenda.")}
        path = ours.get(path.rpartition(".")[2])
    return named.get(path) if isinstance(path, str) else None


class ModulePatch(EditHandle):
    """A memory in force: an adapter hooked to modules of the network; no weight changes.

    A patch holds the whole memory and takes the place of its kin that was in force before it: an
    editor that is called again copies that memory, extends the copy, and puts it in force. Taking the
    newer patch out puts the older one, which nobody has touched, back in force.
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
        """The newest patch on the model whose memory is kin to ``adapter``."""
        patches = [h for h in lm.handles if isinstance(h, ModulePatch)]
        return next((p for p in reversed(patches) if p.adapter.is_kin(adapter)), None)

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
            self._hooks.append(module.register_forward_hook(self._at(site)))

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
        """How many numbers the memory has grown by."""
        return self.adapter.size - (self.older.adapter.size if self.older else 0)

    @property
    def num_bytes(self) -> int:
        """How many bytes the memory has grown by."""
        return self.adapter.num_bytes - (self.older.adapter.num_bytes if self.older else 0)

    def can_absorb(self, newer: EditHandle) -> bool:
        last = self.lm.handles[-2:] == [self, newer]
        return last and isinstance(newer, ModulePatch) and newer.older is self

    def absorb(self, newer: ModulePatch) -> None:
        """Takes over the memory of the newest patch, which extends this one's: one undo for both."""
        if not self.can_absorb(newer):
            raise EditError("only the newest edit can be absorbed, by the one it extends")
        with uninterrupted():
            newer._unhook()
            self.lm.handles.pop()
            self.adapter, self.metadata = newer.adapter, newer.metadata
            self._hook()

    # ------------------------------------------------------------------ kept

    def state(self) -> dict[str, Any]:
        """Tensors and JSON from which :meth:`restore` puts the same memory in force again."""
        return {
            "adapter": self.adapter.description(),
            "tensors": dict(self.adapter.state_dict()),
            "metadata": json.dumps(self.metadata),
        }

    @classmethod
    def restore(cls, lm: LanguageModel, state: dict[str, Any]) -> ModulePatch:
        """The memory of :meth:`state`, in force."""
        adapter = Adapter.rebuild(state["adapter"], state["tensors"])
        return cls(lm, adapter, json.loads(state["metadata"]))

    def save(self, path: str | Path) -> None:
        """Writes the whole memory into one safetensors file, in one step."""
        header = {"format": MEMORY_FORMAT, "adapter": self.adapter.description()}
        metadata = {"metadata": json.dumps(self.metadata)}
        write_tensors(Path(path), dict(self.adapter.state_dict()), header | metadata)

    @classmethod
    def load(cls, lm: LanguageModel, path: str | Path) -> ModulePatch:
        """Puts a memory that :meth:`save` wrote in force; raises EditError for another model's."""
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
    """A method whose product is a memory beside the network, which every further call extends."""

    @abstractmethod
    def empty(self, lm: LanguageModel) -> Adapter:
        """A memory without edits."""

    @abstractmethod
    def learn(self, lm: LanguageModel, memory: Any, edits: Sequence[Edit]) -> list[dict[str, Any]]:  # noqa: ANN401
        """Extends ``memory`` (an :meth:`empty` one or a later state of it), which is in force, in place.

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
