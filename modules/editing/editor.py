"""Edits in force and who makes them: :class:`EditHandle`, :class:`Editor`.

Three seams, one handle each: :class:`WeightPatch` (parameters), :class:`ModulePatch` (outputs of modules, through
a memory beside the network) and :class:`TextPatch` (what the model is asked).
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corrigenda.datamodules.records import Edit
from corrigenda.modules.interrupts import Reversible, uninterrupted
from corrigenda.modules.model.delta import Delta, EditError, add_deltas
from corrigenda.modules.model.structure import (
    exchange,
    is_quantised,
    read_weight,
    sizes,
    to_storage,
    with_weight,
)

if TYPE_CHECKING:
    from corrigenda.modules.model.lm import LanguageModel
    from corrigenda.modules.model.rows import TargetScores

log = logging.getLogger(__name__)


class EditHandle(ABC):
    """An edit in force on a language model. Handles come off in reverse order of going in."""

    lowest_layer: int = 0  # nothing below this block is changed

    def __init__(self, lm: LanguageModel) -> None:
        """Makes the edit active: the last thing a subclass does, once :meth:`swap` has all it needs."""
        self.lm = lm
        with uninterrupted():
            self.swap()
            lm.handles.append(self)

    @property
    def num_parameters(self) -> int:
        """How many numbers the edit touches in the network or adds beside it."""
        return 0

    @property
    def num_bytes(self) -> int:
        """What has to be kept for the edit to stay in force."""
        return 0

    @abstractmethod
    def swap(self) -> None:
        """Exchanges edited and original; twice is a no-op."""

    def save(self, path: Path) -> None:  # noqa: B027  optional
        """Writes what the edit consists of into one safetensors file; nothing, unless the class does."""

    def remove(self) -> None:
        """Takes the edit out for good, bit-exactly; raises EditError while later edits stand on it."""
        if self not in self.lm.handles:
            raise EditError("this edit has already been removed")
        later = len(self.lm.handles) - 1 - self.lm.handles.index(self)
        if later:
            raise EditError(
                f"{later} later edit(s) stand on this one: remove them first, newest first"
            )
        with uninterrupted():
            self.swap()
            self.lm.handles.pop()


def require_base(lm: LanguageModel, metadata: dict[str, Any], kind: str) -> None:
    base = metadata.get("base")
    if base is not None and base != lm.weights_hash:
        raise EditError(
            f"this {kind} belongs to a model with weights {base}, not to {lm.name!r} with weights "
            f"{lm.weights_hash}: load the model it was made for, with its dtype and quantization"
        )


class WeightPatch(EditHandle):
    """A delta written into the weights; the original tensors are kept and exchanged, never recomputed.

    A packed map is exchanged as a whole, for a plain one or, with ``lm.requantize``, for one packed
    the same way. How far what is written then is from the update goes into the metadata, under
    ``requantized``: |written - wanted| / |wanted| by parameter. ``edited`` holds edited parameters that are
    known already, as :meth:`state` gives them.
    """

    def __init__(
        self, lm: LanguageModel, delta: Delta, edited: Mapping[str, Tensor] | None = None
    ) -> None:
        require_base(lm, delta.metadata, "delta")
        self.delta = delta
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
        """What takes the parameter's place: its data with the update added, or a whole module."""
        module_name, _, kind = name.rpartition(".")
        try:
            module = lm.net.get_submodule(module_name)
            parameter = getattr(module, kind)
        except AttributeError:
            parameter = None
        if parameter is None:  # also a bias that the module goes without
            raise EditError(f"the model {lm.name!r} has no parameter {name}")
        packed = kind == "weight" and is_quantised(module)
        update = to_storage(module, delta.dense(name).to(parameter.device))
        shape = sizes(module)[::-1] if packed else tuple(parameter.shape)
        if tuple(update.shape) != shape:
            raise EditError(
                f"the update of {name} has shape {tuple(update.shape)}, the parameter {shape}"
            )
        if packed:
            return self._repacked(lm, name, module, update)
        return (parameter.data.double() + update).to(parameter.dtype)

    def _repacked(
        self, lm: LanguageModel, name: str, module: nn.Module, update_OI: Tensor
    ) -> nn.Module:
        """The edited map that takes a packed one's place."""
        weight_OI = read_weight(module)
        wanted_OI = weight_OI.double() + update_OI
        if not lm.requantize:
            return with_weight(module, wanted_OI.to(lm.net.dtype), pack=False)
        edited = with_weight(module, wanted_OI.to(weight_OI.dtype), pack=True)
        missing = (read_weight(edited).double() - wanted_OI).norm() / update_OI.norm()
        self._lost[name] = missing.item()
        log.info(
            "%s: packed again, what is written is %.2f of the update away from it", name, missing
        )
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
        """Tensors and JSON from which :meth:`restore` puts the same edit in force again, to the bit.

        Of a map that is packed again these are the numbers that it stands for.
        """
        edited = {name: self._written(name) for name in self._spare}
        return {
            "edited": edited,
            "delta": self.delta.tensors(),
            "metadata": json.dumps(self.delta.metadata),
        }

    def _written(self, name: str) -> Tensor:
        """The parameter as this patch left it: in force, or kept by the next patch that changed it."""
        for later in self.lm.handles[self.lm.handles.index(self) + 1 :]:
            if isinstance(later, WeightPatch) and name in later._spare:
                kept = later._spare[name]
                return read_weight(kept) if isinstance(kept, nn.Module) else kept
        module = self.lm.net.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and is_quantised(module):
            return read_weight(module)
        return self.lm.net.get_parameter(name).data

    @classmethod
    def restore(cls, lm: LanguageModel, state: dict[str, Any]) -> WeightPatch:
        """The edit of :meth:`state`, on a model without it."""
        tensors = {name: tensor.to(lm.device) for name, tensor in state["delta"].items()}
        delta = Delta.from_tensors(tensors, json.loads(state["metadata"]))
        return cls(lm, delta, state["edited"])

    def absorb(self, newer: WeightPatch) -> None:
        """Takes a newer patch into this one: one undo for both, one spare copy per matrix."""
        if self.lm.handles[-2:] != [self, newer]:
            raise EditError("only the newest edit can be absorbed, by the one before it")
        delta = add_deltas([self.delta, newer.delta])
        with uninterrupted():
            for name, original in newer._spare.items():
                self._spare.setdefault(name, original)
            self.lowest_layer = min(self.lowest_layer, newer.lowest_layer)
            self.delta = delta
            self.lm.handles.pop()


def _named_once(lm: LanguageModel, delta: Delta) -> Delta:
    """The delta with tied parameters under the one name that the network lists them by."""
    listed = {id(parameter): name for name, parameter in lm.net.named_parameters()}
    every = {
        name: listed[id(parameter)]
        for name, parameter in lm.net.named_parameters(remove_duplicate=False)
    }
    return add_deltas(
        [Delta({every.get(name, name): update}) for name, update in delta.updates.items()]
    )


class TextPatch(EditHandle):
    """An edit in what the model is asked, or in who answers; no weight changes.

    A subclass overrides :meth:`rewrite` (other prompts to the same model) or :meth:`score` and
    :meth:`generate` themselves. While one of them runs the patch is set aside, so that it can ask the
    language model, with the older edits in force, in the ordinary way.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._in_force, self._aside = False, 0
        self.lowest_layer = lm.structure.num_layers - 1
        super().__init__(lm)

    @property
    def active(self) -> bool:
        """Whether the next question goes through this patch."""
        return self._in_force and not self._aside

    def swap(self) -> None:
        self._in_force = not self._in_force

    def set_aside(self) -> Reversible:
        """Inside, the model answers as if this patch were not there."""
        return set_aside([self])

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """What is asked in place of each prompt; the prompts themselves by default."""
        return list(prompts)

    def score(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        deltas: Sequence[Delta] | None,
        owners: Sequence[int] | None,
        full: bool,
    ) -> TargetScores:
        """Stands in for :meth:`LanguageModel.score`."""
        return self.lm.score(self.rewrite(prompts), targets, deltas, owners, full)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **options: Any) -> list[str]:  # noqa: ANN401
        """Stands in for :meth:`LanguageModel.generate`."""
        return self.lm.generate(self.rewrite(prompts), max_new_tokens, **options)


def set_aside(patches: Sequence[TextPatch]) -> Reversible:
    """Inside, the model answers as if these patches were not there."""
    aside: list[TextPatch] = []

    def put() -> None:
        for patch in patches:
            patch._aside += 1
            aside.append(patch)

    def put_back() -> None:
        while aside:
            aside.pop()._aside -= 1

    return Reversible(put, put_back)


# ---------------------------------------------------------------------------- methods


class Editor(ABC):
    """A method. ``edit`` writes all the given edits together and returns how to undo them."""

    def check(self, lm: LanguageModel) -> None:
        """Raises ValueError, at once, where ``layer`` or ``layers`` name a block that the model does not have."""
        own = getattr(self, "layer", None)
        for layer in [*(getattr(self, "layers", None) or ()), *([] if own is None else [own])]:
            lm.structure.block_name(layer)

    def check_edits(self, edits: Sequence[Edit]) -> None:
        """Raises EditError where there are none; warns, once, where two contradict each other."""
        if not edits:
            raise EditError(f"{type(self).__name__} was given no edit: give at least one")
        targets: dict[str, str] = {}
        against = [
            (edit.text, other, edit.target_new)
            for edit in edits
            if (other := targets.setdefault(edit.text, edit.target_new)) != edit.target_new
        ]
        if against:
            log.warning("%r is to be both %r and %r (%d such prompts): edited together, at most one can hold",
                        *against[0], len({text for text, *_ in against}))  # fmt: skip

    def prepare(self, lm: LanguageModel) -> None:  # noqa: B027  optional
        """Once per model, before the first edit: statistics, prompts. Idempotent."""

    @abstractmethod
    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> EditHandle:
        """Puts the edits in force."""

    @cached_property
    def counts(self) -> Counter[str]:
        """What the method counts of itself; a run that goes on adds what was counted before."""
        return Counter()

    def numbers(self) -> dict[str, float]:
        """What the method has counted of itself, for the run's summary."""
        return dict(self.counts)

    def origin(self, lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, Any]:
        """Where an edit comes from, for its metadata: base weights, editor, edits."""
        return {
            "base": lm.weights_hash,
            "model": lm.name,
            "editor": type(self).__name__,
            "edits": [[e.prompt, e.subject, e.target_new] for e in edits],
        }


class WeightEditor(Editor):
    """A method whose product is a weight update: computing (``propose``) is apart from writing (``edit``)."""

    @abstractmethod
    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """The update that writes all these edits together; the model is unchanged afterwards."""

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per entry, each computed as if the others did not exist.

        Methods that can, override it to compute all of them side by side with equal results.
        """
        return [self.propose(lm, group) for group in edits]

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> WeightPatch:
        self.check(lm)
        self.check_edits(edits)
        with editing_mode():
            self.prepare(lm)
            return WeightPatch(lm, self.stamp(lm, self.propose(lm, edits), edits))

    def stamp(self, lm: LanguageModel, delta: Delta, edits: Sequence[Edit]) -> Delta:
        """The delta with its origin in the metadata: base weights, editor, edits; warns where it is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in delta.tensors().values()):
            log.warning("%s: the update for %r is not finite: the edited model's answers will be NaN",
                        type(self).__name__, "; ".join(edit.text for edit in edits[:3]))  # fmt: skip
        return replace(delta.detach(), metadata=delta.metadata | self.origin(lm, edits))


@contextmanager
def editing_mode() -> Iterator[None]:
    """Gradients on, autocast off: what every method needs, also inside a validation loop."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
