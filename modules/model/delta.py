"""Edits of weights as data: :class:`Delta`, its file, and models edited in different ways side by side.

Shapes: O outputs, I inputs of a linear layer; r the rank of an update; B rows, T tokens, E edited models side by
side. Updates are always [out, in], however the module stores its weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from corrigenda.datamodules.records import Edit
from corrigenda.modules import files
from corrigenda.modules.interrupts import Reversible
from corrigenda.modules.model.hooks import Hook, hooked

FORMAT = "corrigenda-delta-1"


class EditError(ValueError):
    """An edit that cannot be made or removed; the message says why and what to do."""


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

    r is the numerical rank: values that are zero up to the update's rounding are left out. Factors are not
    multiplied; a bias counts as a single column. Raises EditError for an update that is not finite.
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
    """What an edit changes: for each parameter a low-rank or a dense update, always [out, in].

    Args:
        updates: by parameter name (``model.layers.3.mlp.down_proj.weight``); a bias is a dense vector.
        metadata: JSON values stored in the file's header; ``base`` is the weight hash of the model it belongs to.
        keys: by parameter name, inputs keys_NI whose outputs later edits should not change. They belong to
            the edit: they are saved in its files and checkpoints, and removed with it.
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
        """How many parameters of the model the update changes."""
        return sum(
            u.left_Or.shape[0] * u.right_rI.shape[1] if isinstance(u, LowRank) else u.numel()
            for u in self.updates.values()
        )

    @property
    def num_bytes(self) -> int:
        """Size of its tensors, in memory and in a file."""
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

    def scaled(self, factor: float) -> Delta:
        """The update times a factor."""
        scaled: dict[str, Update] = {
            name: LowRank(factor * u.left_Or, u.right_rI) if isinstance(u, LowRank) else factor * u
            for name, u in self.updates.items()
        }
        return Delta(scaled, self.metadata, self.keys)

    def tensors(self) -> dict[str, Tensor]:
        """Its content as plain tensors: ``<parameter>.left`` and ``.right``, or ``.dense``, and ``.keys``."""
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
        """The delta that has these :meth:`tensors`; raises EditError if there is none."""
        updates: dict[str, Update] = {}
        keys = {}
        for name, tensor in tensors.items():
            parameter, _, part = name.rpartition(".")
            shapes = {"keys": (2,), "dense": (1, 2), "left": (2,), "right": (2,)}
            if tensor.dim() not in shapes.get(part, ()) or not tensor.is_floating_point():
                raise EditError(f"not a part of an update: {name}, {_described(tensor)}")
            if part == "keys":
                keys[parameter] = tensor
            elif part != "right":
                if parameter in updates:
                    raise EditError(f"two updates of {parameter}")
                right = tensors.get(f"{parameter}.right")
                if part == "dense":
                    updates[parameter] = tensor
                elif right is None:
                    raise EditError(f"{name} without its other factor")
                else:
                    updates[parameter] = LowRank(tensor, right)
            elif f"{parameter}.left" not in tensors:
                raise EditError(f"{name} without its other factor")
        return cls(updates, metadata, keys)

    def save(self, path: str | Path) -> None:
        """Writes :meth:`tensors` into one safetensors file, in one step."""
        header = {"format": FORMAT, "delta": json.dumps(self.metadata)}
        files.write_tensors(Path(path), self.tensors(), header)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads a file of :meth:`save`; raises EditError for other files, and for NaN and infinity."""
        tensors, header = read_tensors(path, FORMAT, "delta")
        try:
            require_finite(tensors)
            return cls.from_tensors(tensors, read_origin(header["delta"]))
        except (KeyError, ValueError, RecursionError) as error:
            raise EditError(f"{path}: a damaged delta file ({error})") from None


def file_format(path: str | Path) -> str | None:
    """The format of a file that this project wrote; None for other files, or if there is none."""
    try:
        return files.read_metadata(Path(path)).get("format")
    except (ValueError, OSError):
        return None


def read_tensors(
    path: str | Path, wanted: str, kind: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a file that this project wrote; raises EditError for other files."""
    try:
        tensors, header = files.read_tensors(Path(path))
    except FileNotFoundError:
        raise EditError(f"{path}: no such {kind} file") from None
    except (ValueError, OSError) as error:
        raise EditError(str(error)) from None
    if header.get("format") != wanted:
        raise EditError(
            f"{path}: not a {kind} of this project (format {header.get('format')!r}, wanted {wanted!r})"
        )
    return tensors, header


def read_origin(text: str) -> dict[str, Any]:
    """Metadata of an edit from JSON: that of :meth:`~corrigenda.modules.editing.editor.Editor.origin`, and
    what was added to it.

    Raises:
        EditError: a value has the wrong type.
        ValueError: the text is not JSON.
        RecursionError: it is nested too deeply.
    """
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise EditError("its metadata is not a record")
    for name in ("base", "model", "editor", "encoder"):
        if not isinstance(metadata.get(name), str | None):
            raise EditError(f"its {name!r} is not text")
    for name, is_entry in (("edits", _is_edit), ("requantized", _is_loss)):
        entries = metadata.get(name, [])
        if not isinstance(entries, list) or not all(map(is_entry, entries)):
            raise EditError(f"its {name!r} are not a list as this project writes it")
    return metadata


def _is_edit(entry: object) -> bool:
    """Whether these are the arguments of an Edit, in order."""
    try:
        return isinstance(entry, list) and bool(Edit(*entry))
    except (TypeError, ValueError):
        return False


def _is_loss(entry: object) -> bool:
    numbers = entry.values() if isinstance(entry, dict) else [None]
    return all(isinstance(number, int | float) for number in numbers)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises EditError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise EditError(f"{name} holds numbers that are not finite: make the edit again")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}".removeprefix("torch.")


def add_deltas(deltas: Sequence[Delta]) -> Delta:
    """The sum of deltas; low-rank factors are concatenated, so ranks add up.

    Keys, and lists in the metadata (edits, notes), are concatenated; for other metadata the first value counts.
    """
    updates: dict[str, Update] = {}
    metadata: dict[str, Any] = {}
    keys: dict[str, Tensor] = {}
    for delta in deltas:
        for key, value in delta.metadata.items():
            joins = isinstance(metadata.get(key), list) and isinstance(value, list)
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


def side_branches(net: nn.Module, deltas: Sequence[Delta], owner_B: Tensor) -> Reversible:
    """Inside, row b of every batch runs through the network edited by ``deltas[owner_B[b]]``.

    The updates are applied in factored form and added at the outputs of the edited linear layers. No weight
    changes, and gradients reach the factors. Up to rounding, this equals writing each delta into the weights.
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
    return hooked(
        pairs, prepend=True
    )  # so that an adapter sees the updated output, as with edited weights


def _branch(kinds: dict[str, list[Update | None]], owner_B: Tensor) -> Hook:
    """The hook of one module: adds to its output each row's own update, applied to its input."""
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
    """Adds each owner's update to that owner's rows: for dense updates, and for a single one."""
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
