"""Raw records of files and public datasets; errors name the place, the field and what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from corrigenda.datamodules.records import SLOT, Edit, located
from corrigenda.datamodules.tables import TABLES, rows_of_parquet, rows_of_table
from corrigenda.datamodules.text_files import (
    DataError,
    Report,
    lines,
    local,
    no_file,
    open_text,
    refuse,
    require_file,
)
from corrigenda.modules import hub
from corrigenda.modules.interrupts import replaced

T = TypeVar("T")
LONGEST_TEXT = 1_000_000  # characters of one field; more than any context
RECORD_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", *TABLES, ".parquet")
SURROGATE = re.compile("[\ud800-\udfff]")
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>.+))?", re.ASCII
)


def read_rows(
    path: str, source: str = "", report: Report = refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of ``path`` with its place, for error messages.

    Args:
        path: a file of records (.jsonl; .json with a list, a record of records, or a list under its one name; .csv
            or .tsv; these also with .gz; .parquet); otherwise a Hub dataset, written ``owner/name``,
            ``owner/name:split`` or ``owner/name/config:split``.
        source: where the dataset is published; named in the error if there is no such file.
        report: takes the error of a single record that cannot be read.
    """
    if path.endswith(RECORD_FILES):
        require_file(path, source)
        if path.endswith(TABLES):
            return rows_of_table(path, report)
        if path.endswith(".parquet"):
            return rows_of_parquet(str(local(path)))
        by_line = path.removesuffix(".gz").endswith(".jsonl")
        return _rows_of_lines(path, report) if by_line else _rows_of_json(path, report)
    if local(path).exists():
        raise DataError(f"{path}: expected a file ending in {', '.join(RECORD_FILES)}")
    if hub_id := HUB_ID.fullmatch(path):
        return _rows_of_hub(path, *hub_id.group("name", "config", "split"))
    raise no_file(path, source)


def _rows_of_lines(path: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in lines(path):
        if not line.strip():
            continue
        try:
            yield where, _record(where, _parsed(where, line))
        except DataError as error:
            report(error)


def _rows_of_json(path: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        text = file.read()
    places = _places(text, found := _parsed(path, text))
    for name, row in _listed(path, found):
        where = f"{path}, record {name}{next(places, '')}"
        try:
            record = _record(where, row)
            yield where, record if isinstance(name, int) else {"case_id": name, **record}
        except DataError as error:
            report(error)


def _places(text: str, found: object) -> Iterator[str]:
    """For each record of a list that stands on several lines, in which of them it begins."""
    if not isinstance(found, list) or "\n" not in text.strip():
        return
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for _ in found:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        yield f" (line {text.count(chr(10), 0, at) + 1})"
        _, at = decoder.raw_decode(text, at)


def _listed(path: str, found: object) -> Iterator[tuple[int | str, Any]]:
    """The records of a JSON value with their numbers or names."""
    if isinstance(found, dict) and found:
        values = list(found.values())
        if len(values) == 1 and isinstance(values[0], list):
            found = values[0]
        elif all(isinstance(value, dict) for value in values):
            yield from found.items()
            return
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a JSON list of records, got {_kind(found)}")
    yield from enumerate(found, start=1)


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


def _flattened(value: object) -> Iterator[object]:
    """The value, or all that is in a list of lists."""
    if isinstance(value, list):
        for part in value:
            yield from _flattened(part)
    else:
        yield value


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

    def answers(self, name: str, optional: bool = False) -> tuple[str, ...]:
        """Acceptable answers: a text or number, or a list of those, lists of alternatives included.

        None if the field is ``optional`` and absent, blank or empty.
        """
        if optional and (
            not self.has(name) or self.fields[name] in ("", []) or self.is_blank(name)
        ):
            return ()
        value = self._get(name, object, "an answer")
        found = [self._answer(name, part) for part in _flattened(value)]
        if not found and not optional:
            raise self.error(name, "empty")
        return tuple(dict.fromkeys(found))

    def _answer(self, name: str, value: object) -> str:
        if isinstance(value, str) and not value.strip():
            raise self.error(name, "empty")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, str) and not (number and math.isfinite(value)):  # type: ignore[arg-type]
            raise self.error(name, f"expected text or a number, got {_kind(value)}")
        return self._plain(name, str(value))

    def edit(self, name: str, target_new: str, unique: bool = False, **rest: str | None) -> Edit:
        """The edit whose prompt is field ``name``, which holds the subject or, in its place, ``{}``.

        Where the subject's letter case or Unicode form differs from the prompt's, the prompt's is used, since that
        is what the model reads.

        Args:
            name: the field.
            target_new: the answer to write.
            unique: refuse a subject that occurs several times; otherwise the first occurrence counts.
            **rest: further fields of the edit.
        """
        text, subject = self.text(name), self.text("subject").strip()
        try:
            if SLOT in text:
                return Edit(text, subject, target_new, **rest)
            text, subject, starts = located(text, subject)
            if not starts:
                raise ValueError(f"the subject {subject!r} does not occur in {text!r}")
            if unique and len(starts) > 1:
                raise ValueError(
                    f"the subject {subject!r} occurs {len(starts)} times in {text!r}: write {{}} in its place to "
                    "choose one"
                )
            return Edit.from_text(text, subject, target_new, **rest)
        except ValueError as error:
            raise self.error(name, str(error)) from None
