"""Edits as data and edits in force: :class:`Delta`, :class:`EditHandle`, :class:`Editor`.

Three seams, one handle each: :class:`WeightPatch` (parameters), :class:`ModulePatch` (outputs of modules, through
a memory beside the network) and :class:`TextPatch` (what the model is asked).

Shapes: O outputs, I inputs of a linear map; r the rank of an update; B rows, T tokens, E edited models side by
side. Updates are always [out, in], whatever the module stores.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datamodules.records import Edit
from modules.hooks import Hook, hooked
from modules.structure import (
    exchange,
    is_quantised,
    read_weight,
    sizes,
    to_storage,
    with_weight,
)

if TYPE_CHECKING:
    from modules.lm import LanguageModel
    from modules.rows import TargetScores

log = logging.getLogger(__name__)

FORMAT = "corrigenda-delta-1"


class EditError(ValueError):
    """An edit that cannot be made or undone; the message says why and what to do."""


@dataclass(frozen=True)
class LowRank:
    """The update ``left_Or @ right_rI``."""

    left_Or: Tensor
    right_rI: Tensor

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.left_Or.to(dtype) @ self.right_rI.to(dtype)

    def __post_init__(self) -> None:
        if self.left_Or.shape[1] != self.right_rI.shape[0]:
            raise EditError(
                f"factors do not fit: {tuple(self.left_Or.shape)} @ {tuple(self.right_rI.shape)}"
            )


Update = LowRank | Tensor


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """(left_Or, values_r, right_rI) in float64: singular vectors and values, the largest first.

    r is the numerical rank: what is zero up to the update's own rounding is left out. Factors are never
    multiplied out; a bias counts as a single column. Raises EditError for an update that is not finite.
    """
    parts = (update.left_Or, update.right_rI) if isinstance(update, LowRank) else (update,)
    if not all(part.isfinite().all() for part in parts):
        raise EditError("the update holds numbers that are not finite: make the edit again")
    if isinstance(update, LowRank):
        left_Oq, left_qr = torch.linalg.qr(update.left_Or.double())
        right_Iq, right_qr = torch.linalg.qr(update.right_rI.double().T)
        inner, dtype = left_qr @ right_qr.T, update.left_Or.dtype
        left_qs, values_s, right_sq = torch.linalg.svd(inner, full_matrices=False)
        left_Os, right_sI = left_Oq @ left_qs, right_sq @ right_Iq.T
    else:
        whole = update.double() if update.dim() == 2 else update.double()[:, None]
        left_Os, values_s, right_sI = torch.linalg.svd(whole, full_matrices=False)
        dtype = update.dtype
    least = values_s[:1] * max(len(left_Os), right_sI.shape[1]) * torch.finfo(dtype).eps
    rank = int((values_s > least).sum())
    return left_Os[:, :rank], values_s[:rank], right_sI[:rank]


@dataclass
class Delta:
    """What an edit changes: parameter name to a low-rank or a dense update, always [out, in].

    Args:
        updates: by parameter name (``model.layers.3.mlp.down_proj.weight``); a bias is a dense vector.
        metadata: JSON values kept in the file's header; ``base`` is the weight hash of the model it belongs to.
        keys: by parameter name, inputs keys_NI whose answers later edits are to leave alone. They are kept
            with the edit, so they go where it goes: into files and checkpoints, and out with it.
    """

    updates: dict[str, Update]
    metadata: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)

    def dense(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """One parameter's update as a full [out, in] matrix."""
        update = self.updates[name]
        return update.dense(dtype) if isinstance(update, LowRank) else update.to(dtype)

    @property
    def num_parameters(self) -> int:
        """How many parameters of the model the update touches."""
        return sum(
            u.left_Or.shape[0] * u.right_rI.shape[1] if isinstance(u, LowRank) else u.numel()
            for u in self.updates.values()
        )

    @property
    def num_bytes(self) -> int:
        """What its tensors take, in memory and in a file."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def detach(self) -> Delta:
        """The same update outside the autograd graph."""
        cut = {
            name: LowRank(u.left_Or.detach(), u.right_rI.detach())
            if isinstance(u, LowRank)
            else u.detach()
            for name, u in self.updates.items()
        }
        return Delta(cut, self.metadata, self.keys)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as plain tensors: ``<parameter>.left``, ``.right`` or ``.dense``, and ``.keys``."""
        tensors = {f"{name}.keys": keys_NI for name, keys_NI in self.keys.items()}
        for name, update in self.updates.items():
            if isinstance(update, LowRank):
                tensors[f"{name}.left"] = update.left_Or
                tensors[f"{name}.right"] = update.right_rI
            else:
                tensors[f"{name}.dense"] = update
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Delta:
        """The delta that :meth:`tensors` took apart."""
        updates: dict[str, Update] = {}
        keys = {}
        for name, tensor in tensors.items():
            parameter, _, part = name.rpartition(".")
            if part == "keys":
                keys[parameter] = tensor
            elif part == "dense":
                updates[parameter] = tensor
            elif part == "left":
                updates[parameter] = LowRank(tensor, tensors[f"{parameter}.right"])
        return cls(updates, metadata, keys)

    def save(self, path: str | Path) -> None:
        """Writes :meth:`tensors` into one safetensors file, atomically."""
        write_tensors(path, self.tensors(), {"format": FORMAT, "delta": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads a file that :meth:`save` wrote; raises EditError for anything else."""
        tensors, header = read_tensors(path, FORMAT, "delta")
        try:
            return cls.from_tensors(tensors, json.loads(header["delta"]))
        except (KeyError, ValueError) as error:
            raise EditError(f"{path}: a damaged delta file ({error})") from None


def write_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """One safetensors file, written atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(copies, part, header)
    part.replace(path)


def file_format(path: str | Path) -> str | None:
    """What kind of file of ours this is; None where it is none, or not there."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return None


def read_tensors(
    path: str | Path, wanted: str, kind: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a file of ours; raises EditError for anything else."""
    if not Path(path).is_file():
        raise EditError(f"{path}: no such {kind} file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise EditError(f"{path}: not a readable safetensors file ({error})") from None
    if header.get("format") != wanted:
        raise EditError(
            f"{path}: not a {kind} of this project (format {header.get('format')!r}, wanted {wanted!r})"
        )
    return tensors, header


def add_deltas(deltas: Sequence[Delta]) -> Delta:
    """One delta with the effect of all of them added up; low-rank factors are stacked, ranks add.

    Keys and lists in the metadata (edits, notes) are joined; of anything else the first counts.
    """
    updates: dict[str, Update] = {}
    metadata: dict[str, Any] = {}
    keys: dict[str, Tensor] = {}
    for delta in deltas:
        for key, value in delta.metadata.items():
            joins = key in metadata and isinstance(value, list)
            metadata[key] = metadata[key] + value if joins else metadata.get(key, value)
        for name, keys_NI in delta.keys.items():
            keys[name] = torch.cat([keys[name], keys_NI]) if name in keys else keys_NI
        for name, update in delta.updates.items():
            old = updates.get(name)
            if old is None:
                updates[name] = update
            elif isinstance(old, LowRank) and isinstance(update, LowRank):
                updates[name] = LowRank(
                    torch.cat([old.left_Or, update.left_Or], 1),
                    torch.cat([old.right_rI, update.right_rI], 0),
                )
            else:
                dtype = (update.left_Or if isinstance(update, LowRank) else update).dtype
                one, other = (
                    u.dense(dtype) if isinstance(u, LowRank) else u for u in (old, update)
                )
                updates[name] = one + other
    return Delta(updates, metadata, keys)


# ---------------------------------------------------------------------------- side by side


@contextmanager
def side_branches(net: nn.Module, deltas: Sequence[Delta], owner_B: Tensor) -> Iterator[None]:
    """Inside, row b of every batch runs through the network edited by ``deltas[owner_B[b]]``.

    The updates are added at the outputs of the edited maps, in their factors; no weight is touched, and
    gradients reach the factors. Equal to writing each delta into the weights, up to rounding.
    """
    by_module: dict[str, dict[str, list[Update | None]]] = {}
    for index, delta in enumerate(deltas):
        for parameter, update in delta.updates.items():
            module, _, kind = parameter.rpartition(".")
            slots = by_module.setdefault(module, {}).setdefault(kind, [None] * len(deltas))
            slots[index] = update
    pairs = [
        (net.get_submodule(module), _branch(kinds, owner_B)) for module, kinds in by_module.items()
    ]
    with hooked(pairs, ahead=True):  # as a weight would be: an adapter sees what they add
        yield


def _branch(kinds: dict[str, list[Update | None]], owner_B: Tensor) -> Hook:
    """The hook of one module: output plus every row's own update applied to its input."""
    weights = kinds.get("weight", [])
    low = all(u is None or isinstance(u, LowRank) for u in weights)
    factors = _stack_factors(weights, owner_B) if weights and low and len(weights) > 1 else None

    def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        flat = args[0].dim() == 2  # some families flatten rows and tokens before their MLP
        x_BTI, y_BTO = args[0], output
        if flat:
            x_BTI, y_BTO = (t.view(len(owner_B), -1, t.shape[-1]) for t in (x_BTI, y_BTO))
        if factors is not None:
            left_BrO, right_BIr = factors
            added = torch.bmm(torch.bmm(x_BTI.to(right_BIr.dtype), right_BIr), left_BrO)
            y_BTO = y_BTO + added.to(y_BTO.dtype)
        else:
            y_BTO = _add_by_owner(x_BTI, y_BTO, weights, owner_B)
        biases = cast("list[Tensor | None] | None", kinds.get("bias"))  # never low-rank
        if biases:
            none = torch.zeros_like(next(bias for bias in biases if bias is not None))
            rows = [none if biases[i] is None else biases[i] for i in owner_B.tolist()]
            y_BTO = y_BTO + torch.stack(rows)[:, None].to(y_BTO.dtype)
        return y_BTO.reshape(output.shape)

    return hook


def _stack_factors(updates: list[Update | None], owner_B: Tensor) -> tuple[Tensor, Tensor]:
    """(left_BrO, right_BIr), padded to the largest rank with zeros, one entry per row."""
    some = next(u for u in updates if isinstance(u, LowRank))
    zero = LowRank(some.left_Or[:, :0], some.right_rI[:0])
    whole = [u if isinstance(u, LowRank) else zero for u in updates]
    left_ErO = pad_sequence([u.left_Or.T for u in whole], batch_first=True)
    right_ErI = pad_sequence([u.right_rI for u in whole], batch_first=True)
    owner_B = owner_B.to(left_ErO.device)
    return left_ErO[owner_B], right_ErI[owner_B].transpose(1, 2)


def _add_by_owner(
    x_BTI: Tensor, y_BTO: Tensor, updates: list[Update | None], owner_B: Tensor
) -> Tensor:
    """Adds each owner's update to that owner's rows; the way for dense updates and for a single one."""
    if len(updates) == 1 and updates[0] is not None:
        return y_BTO + _apply(updates[0], x_BTI).to(y_BTO.dtype)
    added = torch.zeros_like(y_BTO)
    for index, update in enumerate(updates):
        rows = (owner_B == index).nonzero()[:, 0].to(x_BTI.device)
        if update is not None and len(rows):
            added = added.index_add(0, rows, _apply(update, x_BTI[rows]).to(y_BTO.dtype))
    return y_BTO + added


def _apply(update: Update, x_BTI: Tensor) -> Tensor:
    if isinstance(update, LowRank):
        return x_BTI.to(update.right_rI.dtype) @ update.right_rI.T @ update.left_Or.T
    return x_BTI.to(update.dtype) @ update.T


# ---------------------------------------------------------------------------- in force


class EditHandle(ABC):
    """An edit in force on a language model. Handles come off in reverse order of going in."""

    lowest_layer: int = 0  # nothing below this block is changed

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
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
    ``requantized``: |written - wanted| / |wanted| by parameter.
    """

    def __init__(self, lm: LanguageModel, delta: Delta) -> None:
        require_base(lm, delta.metadata, "delta")
        self.delta = delta
        self.lowest_layer = min((lm.structure.layer_of(name) for name in delta.updates), default=0)
        self._lost: dict[str, float] = {}
        written = _named_once(lm, delta)
        self._spare = {name: self._edited(lm, name, written) for name in written.updates}
        if self._lost:
            self.delta = Delta(delta.updates, delta.metadata | {"requantized": [self._lost]})
        super().__init__(lm)
        self.swap()

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
        patch = cls(lm, Delta.from_tensors(tensors, json.loads(state["metadata"])))
        for name, tensor in state["edited"].items():
            module = lm.net.get_submodule(name.rpartition(".")[0])
            if name.endswith(".weight") and is_quantised(module):
                exchange(lm.net, name, with_weight(module, tensor, pack=True))
            else:
                exchange(lm.net, name, tensor)
        return patch

    def absorb(self, newer: WeightPatch) -> None:
        """Takes a newer patch into this one: one undo for both, one spare copy per matrix."""
        if self.lm.handles[-2:] != [self, newer]:
            raise EditError("only the newest edit can be absorbed, by the one before it")
        for name, original in newer._spare.items():
            self._spare.setdefault(name, original)
        self.lowest_layer = min(self.lowest_layer, newer.lowest_layer)
        self.delta = add_deltas([self.delta, newer.delta])
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
        self._in_force, self._aside = True, 0
        self.lowest_layer = lm.structure.num_layers - 1
        super().__init__(lm)

    @property
    def active(self) -> bool:
        """Whether the next question goes through this patch."""
        return self._in_force and not self._aside

    def swap(self) -> None:
        self._in_force = not self._in_force

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the model answers as if this patch were not there."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

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


# ---------------------------------------------------------------------------- methods


class Editor(ABC):
    """A method. ``edit`` writes all the given edits together and returns how to undo them."""

    def prepare(self, lm: LanguageModel) -> None:  # noqa: B027  optional
        """Once per model, before the first edit: statistics, prompts. Idempotent."""

    @abstractmethod
    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> EditHandle:
        """Puts the edits in force."""

    def numbers(self) -> dict[str, float]:
        """What the method has counted of itself, for the run's summary."""
        return {}

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
        with editing_mode():
            self.prepare(lm)
            return WeightPatch(lm, self.stamp(lm, self.propose(lm, edits), edits))

    def stamp(self, lm: LanguageModel, delta: Delta, edits: Sequence[Edit]) -> Delta:
        """The delta with its origin in the metadata: base weights, editor, edits."""
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
