"""What a model has answered, in files: a row for each task and count of edits, and every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corrigenda.modules.files import file_name, write_text
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.json_lines import as_json
from corrigenda.pipeline.report.records import parse

ROWS, ANSWERS = "abilities.jsonl", "abilities"
KEYS = ("model", "edits", "task", "form", "profile")  # name a row


class AnswerFiles:
    """``abilities.jsonl`` of a folder, and a file of answers for each of its rows.

    The answers are written before their row, both in one step, so that a row is complete however a run ends.

    Raises UserError for a damaged file.

    Args:
        folder: of a run, or of the command ``abilities``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = _read(folder / ROWS)

    def find(self, **key: object) -> dict[str, Any] | None:
        """The row of this evaluation; None if there is none yet."""
        return next(
            (row for row in self.rows if all(row[name] == key[name] for name in KEYS)), None
        )

    def add(self, row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes a row and its answers; returns the row."""
        name = file_name("-".join(str(row[part]) for part in (*KEYS[1:], KEYS[0])))
        write_text(self.folder / ANSWERS / f"{name}.jsonl", _lines(examples))
        self.rows.append(dict(row))
        write_text(self.folder / ROWS, _lines(self.rows))
        return self.rows[-1]


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        rows = [parse(line) for line in file.read_text("utf-8").splitlines()]
        if not all(set(KEYS) <= row.keys() for row in rows):
            raise ValueError(f"a row lacks one of {', '.join(KEYS)}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: damaged ({error}): restore it, or remove it to evaluate again"
        ) from None
    return rows


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(as_json(row) + "\n" for row in rows)
