"""Files that are written atomically, by one process at a time, and checked when they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FULL_DISK = ("inline_container", "iostream")  # in the messages of torch's zip writer
UNFINISHED = ".unfinished"  # ends the name of a folder in which a file is being written
DIGEST = "digest"  # the metadata field that holds the hash of a file's tensors
SAFE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
LONGEST_NAME = 120  # bytes of a case id in a file name; file systems allow 255 in total


def file_name(case_id: str) -> str:
    """A file name, without suffix, that is unique for a case id on any file system.

    An id of lower-case ASCII letters, digits, ``-``, ``_`` and ``.`` is its own name. For any other id, and for
    ids that are too long, begin with ``.`` or ``_`` or end with ``.``, the readable part is followed by ``~`` and
    a hash of the id, because file systems differ in case sensitivity and in how they normalise accents.
    """
    short = 0 < len(case_id) <= LONGEST_NAME
    if short and case_id[0] not in "._" and case_id[-1] != "." and SAFE.issuperset(case_id):
        return case_id
    readable = "".join(c if c.isalnum() or c in "-_." else "_" for c in case_id).lstrip(".")
    readable = readable.encode()[:LONGEST_NAME].decode(errors="ignore")
    digest = hashlib.sha256(case_id.encode(errors="surrogatepass")).hexdigest()
    return f"{readable}~{digest[:16]}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there replaces ``path`` when the block ends without error.

    The temporary path is in a hidden folder beside ``path``, which is removed after an error. If a process is
    killed, the next write to the same path removes it, or :func:`remove_unfinished`. Only one process may write
    to a path at a time, see :func:`locked`. The block may also write a folder, if there is none yet at ``path``
    or an empty one.

    Raises:
        OSError: the disk is full or fails, whatever the writing library raises then.
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
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in FULL_DISK):
            raise
        reason = " ".join(str(error).split())
        raise OSError(f"cannot write {path}, the disk may be full: {reason}") from error
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Removes a folder, also if a signal, of which only the first one is raised, arrives meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text to ``path`` in one step, see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in one step, see :func:`replacing`, with a digest of the tensors."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = (
            own.clone() if storage in storages else own
        )  # the format has no shared tensors
        storages.add(storage)
    with replacing(path) as part:
        save_file(plain, part, {**metadata, DIGEST: digest(plain)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a safetensors file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: another format, or damaged: its tensors are not those that were written. Files of earlier
            versions have no digest and are not checked for damage.
    """
    tensors, metadata = {}, read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (
        SafetensorError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({_line(error)})") from None
    if metadata.get(DIGEST, written := digest(tensors)) != written:
        raise ValueError(f"{path}: damaged: its tensors are not those that were written")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; its tensors are not read. Raises what :func:`read_tensors` raises."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({_line(error)})") from None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, types, shapes and every bit of CPU tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def remove_unfinished(folder: Path) -> None:
    """Removes unfinished files of killed processes in ``folder`` and below; call it under its lock."""
    for left in [*folder.rglob(f".*{UNFINISHED}")]:
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock file ``path``; the system releases it when the process ends, however it ends.

    Args:
        path: the lock file, which remains and means nothing by itself.
        what: the subject of the error message, such as "the run folder runs/rome".
        wait: seconds to wait for another process to finish.

    Raises:
        BlockingIOError: another process still holds it.
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
    """Flushes a file or folder to disk, so that a power failure leaves the old one or the new one."""
    for each in [path, *path.rglob("*")]:
        if each.is_file():
            with open(each, "rb") as file:
                os.fsync(file.fileno())
