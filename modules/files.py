"""Files that appear whole or not at all, and files that one process writes at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

UNFINISHED = ".unfinished"  # ends the name of a folder in which a file is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there replaces ``path`` when the block ends without error.

    The temporary path lies in a hidden folder beside ``path``. Nothing remains of it after an error; what a
    killed process left is removed by the next write to the same path, or by :func:`remove_unfinished`.
    Only one process may write to a path at a time, see :func:`locked`.
    """
    folder = path.with_name(f".{path.name}{UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        part = folder / path.name
        yield part
        _to_disk(part)
        part.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text to ``path`` in one step, see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in one step, see :func:`replacing`; raises OSError where the disk refuses."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        try:
            save_file(plain, part, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of files in ``folder`` and below; call it under its lock."""
    for left in [*folder.rglob(f".*{UNFINISHED}")]:
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock file ``path``, which the system releases when the process ends, however it ends.

    Args:
        path: the lock file; it stays behind and means nothing by itself.
        what: the message's subject, such as "the run folder runs/rome".
        wait: seconds to wait for another process to finish.

    Raises:
        BlockingIOError: another process holds it still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise BlockingIOError(
            f"{what} is being written by another process{_owner(path)}: wait for it to end, or choose another"
        ) from None
    try:
        with suppress(OSError):
            path.write_text(str(os.getpid()), "ascii")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    with suppress(OSError, ValueError):
        return f" ({int(path.read_text('ascii'))})"
    return ""


def _to_disk(path: Path) -> None:
    """Waits until a file's content is on the disk, so that a power cut leaves the old file or the new one."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
