"""Raw records of files and public data sets; a bad one is told with its place, the field and what is wrong."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from datamodules.records import SLOT, Edit, occurrences

T = TypeVar("T")
RECORD_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>.+))?", re.ASCII
)


class DataError(ValueError):
    """Data that cannot be used; the message is one line: where, which field, what is wrong."""


def read_rows(path: str, source: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of ``path`` with the place it stands at, for error messages.

    Args:
        path: a .json list or a .jsonl file, either also as .gz; otherwise a Hub dataset, written
            ``owner/name``, ``owner/name:split`` or ``owner/name/config:split``.
        source: where the public can get the dataset, named when there is no such file.
    """
    if path.endswith(RECORD_FILES):
        require_file(path, source)
        lines = path.removesuffix(".gz").endswith(".jsonl")
        return _rows_of_lines(path) if lines else _rows_of_list(path)
    if Path(path).expanduser().exists():
        raise DataError(f"{path}: expected a file ending in {', '.join(RECORD_FILES)}")
    if hub_id := HUB_ID.fullmatch(path):
        return _rows_of_hub(path, *hub_id.group("name", "config", "split"))
    raise _no_file(path, source)


def require_file(path: str, source: str = "") -> None:
    """Raise unless ``path`` is a file."""
    if not Path(path).expanduser().is_file():
        raise _no_file(path, source)


def _no_file(path: str, source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: no such file" + (f"; public source: {source}" if source else "")
    )


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A UTF-8 text file, unpacked if its name ends in .gz; broken bytes are a DataError."""
    opener = gzip.open if path.endswith(".gz") else open
    # Only "\n" ends a line: JSON text may hold the other characters Python takes for line ends.
    file = opener(Path(path).expanduser(), "rt", encoding="utf-8-sig", newline="\n")
    with file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a complete gzip file ({error})") from None


def _rows_of_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{where}: not JSON ({error.msg}, column {error.colno})"
                    ) from None
                yield where, _record(where, row)


def _rows_of_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            place = f"{path}, line {error.lineno}"
            raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of records, got {_kind(rows)}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, record {number}"
        yield where, _record(where, row)


def _rows_of_hub(
    path: str, name: str, config: str | None, split: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset  # slow to import, and most runs read files

    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: no such file, and not loaded from the Hub: {reason}") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise DataError(f"{path}: add the split, one of :{', :'.join(data)}")
        data = next(iter(data.values()))
    for number, row in enumerate(data, start=1):
        yield f"{path}, record {number}", row


def _record(where: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a record with named fields, got {_kind(row)}")
    return row


def _kind(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "a record",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number" if isinstance(value, int | float) else repr(value))


@dataclass(frozen=True)
class Row:
    """One raw record. Its accessors check what they return and name the place when it is wrong.

    Args:
        where: file and line, for messages.
        index: position in its file, from 0.
        fields: the record itself.
        prefix: for a nested record, the names that lead to it ("requested_rewrite.").
    """

    where: str
    index: int
    fields: Mapping[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.where}, field '{self.prefix}{name}': {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there; Hub datasets write null for absent."""
        return self.fields.get(name) is not None

    def _get(self, name: str, kind: type[T], wanted: str) -> T:
        if not self.has(name):
            raise self.error(name, f"missing (the record has {', '.join(self.fields)})")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise self.error(name, f"expected {wanted}, got {_kind(value)}")
        return value

    def text(self, name: str) -> str:
        value = self._get(name, str, "text")
        if not value.strip():
            raise self.error(name, "empty")
        return value

    def is_blank(self, name: str) -> bool:
        """Whether the field is there and holds nothing but spaces."""
        value = self.fields.get(name)
        return isinstance(value, str) and not value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, possibly of none."""
        values = self._get(name, list, "a list of texts")
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str) or not value.strip():
                found = "an empty one" if isinstance(value, str) else _kind(value)
                raise self.error(name, f"expected a list of texts, got {found} at {number}")
        return tuple(values)

    def record(self, name: str) -> Row:
        fields = self._get(name, dict, "a record")
        return Row(self.where, self.index, fields, f"{self.prefix}{name}.")

    def records(self, name: str) -> list[Row]:
        """A list of nested records, possibly of none."""
        values = self._get(name, list, "a list of records")
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict):
                raise self.error(
                    name, f"expected a list of records, got {_kind(value)} at {number}"
                )
        prefixes = [f"{self.prefix}{name}[{i}]." for i in range(len(values))]
        return [Row(self.where, self.index, v, p) for v, p in zip(values, prefixes, strict=True)]

    def rewrite(self) -> Edit:
        """The edit of a record in the form of CounterFact's ``requested_rewrite``."""
        new, true = (self.record(n).text("str").strip() for n in ("target_new", "target_true"))
        relation = self.text("relation_id") if self.has("relation_id") else None
        prompt, subject = self.text("prompt"), self.text("subject").strip()
        try:
            return Edit(prompt, subject, new, true, relation)
        except ValueError as error:
            raise self.error("prompt", str(error)) from None

    @property
    def case_id(self) -> str:
        """The record's own ``case_id``, else its index."""
        value = self.fields.get("case_id")
        if value is None:
            return str(self.index)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error("case_id", f"expected a number or text, got {_kind(value)}")
        return str(value)

    def edit(self, name: str, target_new: str, **rest: str | None) -> Edit:
        """The edit whose prompt is field ``name``, which holds the subject or, in its place, ``{}``.

        A few published records spell the subject in other letter case than their prompt does; the
        prompt's spelling is what the model reads, so it becomes the subject.
        """
        text, subject = self.text(name), self.text("subject").strip()
        try:
            if SLOT in text:
                return Edit(text, subject, target_new, **rest)
            if subject not in text:
                found = occurrences(text, subject, ignore_case=True)
                if not found:
                    raise ValueError(f"the subject {subject!r} does not occur in {text!r}")
                subject = text[found[0] : found[0] + len(subject)]
            return Edit.from_text(text, subject, target_new, **rest)
        except ValueError as error:
            raise self.error(name, str(error)) from None
