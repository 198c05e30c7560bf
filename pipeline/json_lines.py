"""Files of JSON lines that a run appends to, and that a resumed run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corrigenda.pipeline.errors import UserError


class JsonLines:
    """A file with a JSON object per line.

    Args:
        path: the file; it is made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of the file; a checkpoint keeps it, for :meth:`truncate`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows; they are on the disk afterwards, because checkpoints refer to them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(as_json(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def drop_partial_line(self) -> None:
        """Removes a last line that a killed run has written only in part."""
        if self.size:
            whole = self.path.read_bytes()
            os.truncate(self.path, whole.rfind(b"\n") + 1)

    def truncate(self, size: int) -> None:
        """Drops the rows written after the state that the run resumes from."""
        if self.size < size:
            raise UserError(f"{self.path} is missing rows that it had when the run was interrupted: "
                            "restore the file, or choose another --run_dir")  # fmt: skip
        if self.size > size:
            os.truncate(self.path, size)


def as_json(value: Any, indent: int | None = None) -> str:  # noqa: ANN401
    """Strict JSON; numbers that are not finite become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
