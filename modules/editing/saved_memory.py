"""The file of a text memory, which is read without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules.model.delta import EditError, read_origin, read_tensors
from corrigenda.modules.retrieval.vectors import from_tensor, require_vectors

FORMAT = "corrigenda-remembered-1"


@dataclass(frozen=True)
class SavedMemory:
    """The content of a file that :meth:`corrigenda.modules.editing.memory.MemoryPatch.save` wrote.

    Attributes:
        edits: in the order they were made.
        known: the vectors of their keys and the index over them; empty if the file has none.
        metadata: editor, model, hashes of its weights and of the vectors' encoder.
    """

    edits: list[Edit]
    known: dict[str, Tensor]
    metadata: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> SavedMemory:
        """The edits of a file; raises EditError for any other file."""
        tensors, header = read_tensors(path, FORMAT, "memory of edits")
        try:
            edits = [Edit(**fields) for fields in from_tensor(tensors.pop("edits"))]
            metadata = read_origin(header["memory"])
            if not edits or not {"editor", "base"} <= metadata.keys():
                raise ValueError("it does not name its editor, its base model or any edit")
            if tensors or "encoder" in metadata:
                require_vectors(tensors, len(edits))
            return cls(edits, tensors, metadata)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise EditError(f"{path}: a damaged memory file ({error})") from None
