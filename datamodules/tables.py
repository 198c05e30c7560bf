"""Records of tables: CSV and TSV files, whose first line names the columns, and Parquet files.

A blank cell is an absent field. A cell with a JSON list or record, such as ``["Berlin", "Bonn"]``, is read so.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from corrigenda.datamodules.text_files import DataError, Report, open_text

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def rows_of_table(path: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a CSV or TSV file with their places; raises DataError if its first line names no columns.

    A CSV file whose first line has semicolons and no comma is separated by those, as some spreadsheets write it.
    """
    with open_text(path) as file:
        first = file.readline()
        delimiter = "\t" if ".tsv" in Path(path).suffixes else ","
        if delimiter == "," not in first and ";" in first:
            delimiter = ";"
        reader = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
        columns = _columns(path, reader)
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader)
                if cells:
                    yield where, _record(where, columns, cells, delimiter)
            except StopIteration:
                return
            except csv.Error as error:
                report(DataError(f"{where}: not a line of a table ({error})"))
            except DataError as error:
                report(error)


def _columns(path: str, reader: Iterator[list[str]]) -> list[str]:
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}, line 1: not a line of a table ({error})") from None
    if not any(columns):
        raise DataError(
            f"{path}: no columns: the first line must name them, such as prompt,subject,target_new"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: two columns are called {twice[0]!r}")
    return columns


def _record(where: str, columns: list[str], cells: list[str], delimiter: str) -> dict[str, Any]:
    if len(cells) > len(columns):
        raise DataError(
            f"{where}: {len(cells)} cells, but the first line names {len(columns)} columns: put double quotes "
            f"around text that holds {delimiter!r}"
        )
    named = zip(columns, cells, strict=False)
    return {name: _value(cell) for name, cell in named if cell.strip() and name}


def _value(cell: str) -> Any:  # noqa: ANN401
    """A cell's text, or the list or record that it holds."""
    if cell.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(cell)
        except ValueError:
            return cell
        return found or cell  # {} alone is a prompt
    return cell


def rows_of_parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a Parquet file with their places."""
    # It comes with datasets, and is slow to import.
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        batches = ParquetFile(path).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path}, record {number}", row
    except (ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({reason})") from None
