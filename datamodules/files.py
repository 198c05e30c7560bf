"""Raw records of files and public datasets; errors name the place, the field and what is wrong."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from corrigenda.datamodules.records import SLOT, Edit, occurrences
from corrigenda.modules import hub
from corrigenda.modules.interrupts import replaced

T = TypeVar("T")
LONGEST_LINE = 1 << 26  # characters
LONGEST_TEXT = 1_000_000  # characters of one field; more than any context
RECORD_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SURROGATE = re.compile("[\ud800-\udfff]")
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>.+))?", re.ASCII
)


class DataError(ValueError):
    """Data that cannot be used; the message is one line: where, which field, what is wrong."""


def read_rows(path: str, source: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of ``path`` with its place, for error messages.

    Args:
        path: a .json list or a .jsonl file, either also as .gz; otherwise a Hub dataset, written
            ``owner/name``, ``owner/name:split`` or ``owner/name/config:split``.
        source: where the dataset is published; named in the error if there is no such file.
    """
    if path.endswith(RECORD_FILES):
        require_file(path, source)
        lines = path.removesuffix(".gz").endswith(".jsonl")
        return _rows_of_lines(path) if lines else _rows_of_list(path)
    if _local(path).exists():
        raise DataError(f"{path}: expected a file ending in {', '.join(RECORD_FILES)}")
    if hub_id := HUB_ID.fullmatch(path):
        return _rows_of_hub(path, *hub_id.group("name", "config", "split"))
    raise _no_file(path, source)


def require_file(path: str, source: str = "") -> None:
    """Raises FileNotFoundError unless ``path`` is a file."""
    if not _local(path).is_file():
        raise _no_file(path, source)


def _local(path: str) -> Path:
    """The path with ``~`` expanded, if there is a home folder."""
    return Path(os.path.expanduser(path))


def _no_file(path: str, source: str) -> FileNotFoundError:
    found = "is a folder, not a file" if _local(path).is_dir() else "no such file"
    return FileNotFoundError(f"{path}: {found}" + (f"; public source: {source}" if source else ""))


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A UTF-8 text file, decompressed if its name ends in .gz; raises DataError for invalid bytes."""
    opener = gzip.open if path.endswith(".gz") else open
    # Only "\n" ends a line: JSON text may contain other characters that Python treats as line ends.
    file = opener(_local(path), "rt", encoding="utf-8-sig", newline="\n")
    with file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a complete gzip file ({error})") from None


def lines(path: str) -> Iterator[tuple[str, str]]:
    """Every line of a text file with its place; raises DataError for one that is too long."""
    with open_text(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == LONGEST_LINE:
                raise DataError(f"{where}: longer than {LONGEST_LINE:,} characters")
            yield where, line


def _rows_of_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in lines(path):
        if line.strip():
            yield where, _record(where, _parsed(where, line))


def _rows_of_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        rows = _parsed(path, file.read())
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of records, got {_kind(rows)}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, record {number}"
        yield where, _record(where, row)


def _parsed(where: str, text: str) -> Any:  # noqa: ANN401
    """The JSON value of a text; raises DataError for anything else."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if text.rstrip().count("\n") else ""
        raise DataError(f"{where}{line}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{where}: lists or records inside one another too deeply") from None
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{where}: not usable JSON ({error})") from None


def _rows_of_hub(
    path: str, name: str, config: str | None, split: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # slow to import, and most runs read files

    offline = datasets.config.HF_HUB_OFFLINE or not hub.responds()
    try:
        with replaced(datasets.config, HF_HUB_OFFLINE=offline):
            data = datasets.load_dataset(name, config, split=split)
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


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _kind(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "a record",
        bool: "true or false",
        type(None): "null",
    }
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class Row:
    """One raw record, whose accessors check values and name the place of an error.

    Args:
        where: file and line, for error messages.
        index: position in its file, from 0.
        fields: the record itself.
        prefix: for a nested record, the names that lead to it ("requested_rewrite.").
    """

    where: str
    index: int
    fields: Mapping[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str) -> DataError:
        line = _shortened(" ".join(problem.split()), 300)
        return DataError(f"{self.where}, field '{self.prefix}{name}': {line}")

    def has(self, name: str) -> bool:
        """Whether the field is there; Hub datasets write null for absent."""
        return self.fields.get(name) is not None

    def _get(self, name: str, kind: type[T], wanted: str) -> T:
        if not self.has(name):
            there = _shortened(", ".join(map(str, self.fields)) or "no fields", 200)
            raise self.error(name, f"missing (the record has {there})")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise self.error(name, f"expected {wanted}, got {_kind(value)}")
        return value

    def text(self, name: str, limit: int = LONGEST_TEXT) -> str:
        """A text of at most ``limit`` characters that is not blank."""
        value = self._get(name, str, "text")
        if not value.strip():
            raise self.error(name, "empty")
        return self._plain(name, value, limit)

    def _plain(self, name: str, value: str, limit: int = LONGEST_TEXT) -> str:
        if len(value) > limit:
            raise self.error(name, f"{len(value):,} characters, at most {limit:,} can be read")
        if not value.isascii() and SURROGATE.search(value):
            raise self.error(name, "not Unicode text: it holds half a character (a lone surrogate)")
        return value

    def is_blank(self, name: str) -> bool:
        """Whether the field is there and blank."""
        value = self.fields.get(name)
        return isinstance(value, str) and not value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, possibly empty."""
        values = self._get(name, list, "a list of texts")
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str) or not value.strip():
                found = "an empty one" if isinstance(value, str) else _kind(value)
                raise self.error(name, f"expected a list of texts, got {found} at {number}")
            self._plain(name, value)
        return tuple(values)

    def record(self, name: str) -> Row:
        fields = self._get(name, dict, "a record")
        return Row(self.where, self.index, fields, f"{self.prefix}{name}.")

    def records(self, name: str) -> list[Row]:
        """A list of nested records, possibly empty."""
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
            raise self.error("case_id", f"expected a whole number or text, got {_kind(value)}")
        return self._plain("case_id", str(value))

    def edit(self, name: str, target_new: str, **rest: str | None) -> Edit:
        """The edit whose prompt is field ``name``, which holds the subject or, in its place, ``{}``.

        In a few published records the letter case of the subject differs from the prompt's. The model
        reads the prompt, so the prompt's spelling is used.
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
