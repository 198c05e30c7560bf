"""Plain text, for second moments of a layer's inputs and for perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corrigenda.datamodules.files import Row, read_rows
from corrigenda.datamodules.text_files import LONGEST_LINE, lines, require_file


def texts(source: str) -> Iterator[str]:
    """The texts of a corpus, in order, without blank ones.

    Args:
        source: ``facts``, the statements that come with the project; a .txt file (also .txt.gz),
            one text per line; or records with a field ``text``: .json, .jsonl, .csv, .tsv, these
            also with .gz, .parquet, or a Hub dataset (``owner/name:split`` or ``owner/name/config:split``).
    """
    if source == "facts":
        from corrigenda.datamodules.fact_tables import statements

        return iter(statements())
    if source.endswith((".txt", ".txt.gz")):
        require_file(source)
        return _lines(source)
    return _records(read_rows(source))


def _lines(path: str) -> Iterator[str]:
    for _, line in lines(path):
        if text := line.strip():
            yield text


def _records(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    for index, (where, fields) in enumerate(rows):
        row = Row(where, index, fields)
        if not row.is_blank("text"):
            yield row.text("text", LONGEST_LINE)  # of a whole book only the first tokens are used
