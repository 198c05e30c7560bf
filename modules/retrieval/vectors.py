"""Texts and vectors in a file: how they are written, and what may be read. No model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corrigenda.modules.model.delta import require_finite


def as_tensor(value: object) -> Tensor:
    """JSON values as bytes in a tensor, because the header of a safetensors file is limited in size."""
    text = json.dumps(value, ensure_ascii=False)
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> Any:  # noqa: ANN401
    """The inverse of :func:`as_tensor`; raises ValueError for other bytes, RecursionError for deep nesting."""
    return json.loads(tensor.numpy().tobytes())


def require_vectors(tensors: Mapping[str, Tensor], count: int) -> None:
    """Raises ValueError unless these can be the :meth:`Retriever.tensors` of ``count`` entries."""
    vectors_ND, index = tensors.get("vectors"), {"centres", "ends", "members"}
    if vectors_ND is None or vectors_ND.dim() != 2 or len(vectors_ND) != count:
        raise ValueError(f"it does not hold one vector for each of its {count} texts")
    require_finite(tensors)
    if tensors.keys() - {"vectors"} not in (set(), index):
        raise ValueError(f"it holds {', '.join(sorted(tensors))}")
    if "members" in tensors:
        member_N, end_C = tensors["members"], tensors["ends"]
        fits = tensors["centres"].shape == (len(end_C), vectors_ND.shape[1])
        whole = torch.equal(member_N.sort().values, torch.arange(len(member_N)))
        if not fits or not whole or len(member_N) > count or end_C.tolist()[-1:] != [len(member_N)]:
            raise ValueError("its index does not fit its vectors")
