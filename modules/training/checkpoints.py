"""Checkpoints: .ckpt files of Lightning and our modules, read without executing anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from corrigenda.modules.model.delta import EditError

ZIP = b"PK\x03\x04"
PARTS = {
    "state_dict": dict,
    "base_model": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "means": dict,
    "matrices": list,
    "editor": str,
    "hyper_parameters": dict,
    "scope": dict,
    "counterfactual": dict,
    "tasks": dict,
    "replay": dict,
}


def read_checkpoint(path: str | Path, *needs: str, of: str = "") -> dict[str, Any]:
    """The content of a checkpoint that ``fit`` wrote: tensors and plain values, on the CPU.

    Args:
        path: a file; URLs and folders are refused.
        needs: required parts, besides the weights and the base model's name.
        of: the class whose checkpoint is expected, for the message.

    Raises:
        EditError: in one line: the file is empty, truncated or damaged, has another format, holds objects other
            than tensors and plain values, or lacks a part of this project's checkpoints.
    """
    file, what = Path(path), f"checkpoint of a {of}" if of else "checkpoint"
    try:
        found = _load(file)
        _check(found)
    except (EditError, OSError) as error:
        raise EditError(f"{path}: not a readable {what}: {error}") from None
    if not found.keys() >= set(needs):
        raise EditError(f"{path} is not a {what}: give one that its fit has written")
    return found


def _load(file: Path) -> Any:  # noqa: ANN401
    if not file.is_file():
        raise EditError("it is a folder" if file.is_dir() else "there is no such file")
    with open(file, "rb") as opened:
        start = opened.read(len(ZIP))
    if start != ZIP:
        raise EditError("it is a file of another format" if start else "it is empty")
    try:
        with ZipFile(file) as whole:
            damaged = whole.testzip()  # verifies the CRCs, which torch writes but does not verify
    except Exception:
        damaged = "its directory"
    if damaged is not None:
        raise EditError(f"it is cut or damaged, in {damaged}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # decoding untrusted bytes may raise anything
        raise EditError(
            "it holds more than tensors and plain values, which is never loaded, or is damaged"
        ) from None


def _check(found: Any) -> None:  # noqa: ANN401
    """Raises EditError if a part of the checkpoint is missing or has the wrong type."""
    if not isinstance(found, dict):
        raise EditError(f"it holds one {type(found).__name__}, not the parts of a checkpoint")
    if missing := [name for name in ("state_dict", "base_model") if name not in found]:
        raise EditError(f"it has no {missing[0]!r}, which every checkpoint of this project has")
    for name, kind in PARTS.items():
        if name in found and not isinstance(found[name], kind):
            raise EditError(f"its {name!r} is a {type(found[name]).__name__}")
    for part in ("state_dict", "counterfactual"):
        for name, value in found.get(part, {}).items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise EditError(f"its {part!r} holds {name!r}, which is not a tensor")
            if not value.isfinite().all():
                raise EditError(f"its {name} holds numbers that are not finite: train it again")
    base = found["base_model"]
    if not all(isinstance(base.get(key), str) for key in ("name", "hash")):
        raise EditError("its 'base_model' does not give the name and the hash of a model")
