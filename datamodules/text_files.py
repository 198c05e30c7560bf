"""Text files of any kind: opened, decompressed and read line by line, with errors that name the place."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

LONGEST_LINE = 1 << 26  # characters


class DataError(ValueError):
    """Data that cannot be used; the message is one line: where, which field, what is wrong."""


Report = Callable[[DataError], None]
"""What becomes of a record that cannot be used: it raises the error, or takes note and reading goes on."""


def refuse(error: DataError) -> NoReturn:
    """Raises the error."""
    raise error


def require_file(path: str, source: str = "") -> None:
    """Raises FileNotFoundError unless ``path`` is a file."""
    if not local(path).is_file():
        raise no_file(path, source)


def local(path: str) -> Path:
    """The path with ``~`` expanded, if there is a home folder."""
    return Path(os.path.expanduser(path))


def no_file(path: str, source: str) -> FileNotFoundError:
    found = "is a folder, not a file" if local(path).is_dir() else "no such file"
    return FileNotFoundError(f"{path}: {found}" + (f"; public source: {source}" if source else ""))


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A UTF-8 text file, decompressed if its name ends in .gz; raises DataError for invalid bytes."""
    opener = gzip.open if path.endswith(".gz") else open
    # Only "\n" ends a line: JSON text may contain other characters that Python treats as line ends.
    file = opener(local(path), "rt", encoding="utf-8-sig", newline="\n")
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
