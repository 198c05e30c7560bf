"""The folder of a run: one process at a time, and only the same run goes on in it.

A run that goes on mixes what was made before with what is made now, so everything that a result depends on is
noted: settings, the content of files that they name, versions. The weights and the cases, which are only known
once they are loaded, are added by the :class:`~corrigenda.pipeline.run_writer.RunWriter`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from corrigenda.modules.files import locked, remove_unfinished, write_text
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.records import parse

if TYPE_CHECKING:
    from jsonargparse import Namespace

log = logging.getLogger(__name__)

NAMED_RUN = "CORRIGENDA_RUN_DIR"  # tells further processes what the first one has named the run
LOCK = ".lock"
RESULTS = ("summary.json", "cases.jsonl", "checkpoints", "edits")
OF_A_FIT = ("model", "data", "edit", "seed_everything")  # settings that cannot change on the way
LARGE = 2**30  # bytes; larger files are told apart by size and time of change
PROJECT = Path(__file__).parents[1]
CODE = "the version of Corrigenda's code"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, locked, and how the run begins.

    Attributes:
        path: the folder.
        text: the settings, as YAML.
        depends_on: what results depend on, by a name to be shown, see :func:`dependencies`.
        checkpoint: the checkpoint that an interrupted or finished ``fit`` goes on from.
    """

    path: Path
    text: str
    depends_on: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None

    def save_config(self) -> None:
        """Writes config.yaml; a resumed fit keeps the first one and writes config-resumed-N.yaml."""
        file, number = self.path / "config.yaml", 0
        while self.checkpoint and file.exists():
            number += 1
            file = self.path / f"config-resumed-{number}.yaml"
        write_text(file, self.text)


@contextmanager
def open_run(config: Namespace, verb: str, text: str) -> Iterator[RunFolder]:
    """The run's folder, kept from other processes until the block ends.

    Refuses a folder that holds a run, unless it is one to go on with: an unfinished ``validate`` of the same
    settings, a ``fit`` with ``--ckpt_path last``. An error before anything was kept leaves the folder as it was.

    Raises:
        UserError: the folder holds another run.
        BlockingIOError: another process writes into it.
    """
    from lightning.pytorch.utilities import rank_zero_only

    if verb != "fit" and config.ckpt_path == "last":
        raise UserError(f"{verb} --ckpt_path needs a file, such as runs/NAME/checkpoints/last.ckpt")
    if config.trainer.fast_dev_run:  # a rehearsal
        with TemporaryDirectory(prefix="corrigenda-") as name:
            yield RunFolder(Path(name), text, checkpoint=_last(config))
        return
    folder = Path(config.run_dir) if config.run_dir else _named_by_time(verb)
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process looks at it and writes
        yield RunFolder(folder, text, checkpoint=_last(config))
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    present = set(folder.rglob("*"))
    with locked(folder / LOCK, f"the run folder {folder}"):
        try:
            remove_unfinished(folder)
            depends_on = dependencies(text, verb)
            if verb == "fit":
                yield RunFolder(folder, text, depends_on, _goes_on_from(folder, config, text))
            else:
                _require_unfinished(folder, depends_on)
                yield RunFolder(folder, text, depends_on)
        except BaseException:
            _remove_start(folder, present, missing)
            raise


def _last(config: Namespace) -> Path | None:
    return last_checkpoint(Path(config.run_dir)) if config.ckpt_path == "last" else None


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that a ``fit`` keeps up to date, see
    :class:`~corrigenda.pipeline.checkpointing.LastCheckpoint`."""
    return folder / "checkpoints" / "last.ckpt"


def _goes_on_from(folder: Path, config: Namespace, text: str) -> Path | None:
    """The checkpoint that a ``fit`` goes on from; None for one that begins."""
    is_finished = (folder / "summary.json").exists()
    last = last_checkpoint(folder)
    if config.ckpt_path == "last" and last.exists():
        if is_finished and _settings(text, "run_dir", "ckpt_path") in _earlier_settings(folder):
            raise UserError(
                f"{folder} holds a finished run, and these settings leave nothing to do: give more "
                "--trainer.max_steps or --trainer.max_epochs, or choose another --run_dir"
            )
        return last
    if is_finished:
        raise UserError(
            f"{folder} holds a finished run, and runs are never overwritten: choose another --run_dir"
        )
    begun = [name for name in RESULTS if (folder / name).exists()]
    if config.ckpt_path == "last":
        aside = _put_aside(folder) if begun else None
        log.warning("%s has no checkpoint to go on from: the run starts from the beginning%s", folder,
                    f" (what was there is in {aside})" if aside else "")  # fmt: skip
    elif begun:
        raise UserError(
            f"{folder} holds an unfinished run: resume it with --ckpt_path last, or choose another --run_dir"
        )
    return None


def _earlier_settings(folder: Path) -> list[dict[str, str]]:
    """Settings that the run in a folder has been started with, as far as they can be read."""
    found = []
    for file in folder.glob("config*.yaml"):
        with suppress(OSError, ValueError, yaml.YAMLError):
            found.append(_settings(file.read_text("utf-8"), "run_dir", "ckpt_path"))
    return found


def _put_aside(folder: Path) -> Path:
    """Moves what a run has left before its first checkpoint into a folder of its own."""
    number = 1
    while (aside := folder / f"interrupted-{number}").exists():
        number += 1
    aside.mkdir()
    for path in (*map(folder.joinpath, RESULTS), *folder.glob("config*.yaml"), folder / "logs"):
        if path.exists():
            path.rename(aside / path.name)
    return aside


def _require_unfinished(folder: Path, depends_on: Mapping[str, str]) -> None:
    """Refuses to ``validate`` into a folder, unless it is empty or the same validation was interrupted there."""
    if (folder / "summary.json").exists():
        raise UserError(
            f"{folder} holds a finished run, and runs are never overwritten: choose another --run_dir"
        )
    if any((folder / name).exists() for name in RESULTS):
        require_same(folder, read_progress(folder).get("depends_on"), depends_on)


def _remove_start(folder: Path, present: set[Path], missing: list[Path]) -> None:
    """Leaves the folder as it was, if nothing was measured, logged or kept since."""
    new = set(folder.rglob("*")) - present
    if any(path.name in RESULTS or path.name == "metrics.csv" for path in new):
        return
    for path in new:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in missing:  # the folder first, then those around it
        with suppress(OSError):
            path.rmdir()


def _named_by_time(verb: str) -> Path:
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process has named it
        if NAMED_RUN not in os.environ:
            raise UserError("processes that are started one by one need the same --run_dir")
        return Path(os.environ[NAMED_RUN])
    first = folder = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}"
    number = 1
    while folder.exists():  # another run began in the same second
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    os.environ[NAMED_RUN] = str(folder)
    return folder


# ---------------------------------------------------------------------------- what results depend on


def dependencies(text: str, verb: str) -> dict[str, str]:
    """What a run's results depend on before anything is loaded, by a name to be shown to the user.

    Args:
        text: the settings as YAML.
        verb: of a ``fit`` only the settings of model, data and edits count: training may go on for longer.
    """
    settings = _settings(text, "run_dir")
    if verb == "fit":
        settings = {k: v for k, v in settings.items() if k.split(".")[0] in OF_A_FIT}
    found = {f"--{name}": value for name, value in settings.items()}
    for value in settings.values():
        for file in _named_files(json.loads(value)):
            found[f"the content of {file}"] = _hash(file)
    found[CODE] = _hash_of_code()
    for package in ("torch", "transformers"):
        found[f"the version of {package}"] = importlib.metadata.version(package)
    return found


def require_same(
    folder: Path, before: Mapping[str, str] | None, now: Mapping[str, str], code: bool = True
) -> None:
    """Refuses to go on with a run that depends on something else now; the message names it.

    Args:
        folder: the run's.
        before: what it depended on when it began; None if that cannot be told.
        now: what it would depend on.
        code: whether other versions of the code are refused; they are reported anyway.
    """
    if before is None:
        raise UserError(
            f"{folder} holds an unfinished run of which it is not known how it was begun: choose another --run_dir"
        )
    is_same_code = before.get(CODE) == now.get(CODE)  # else there may be other options
    names = [
        name
        for name in {**before, **now}
        if (name in before and name in now) or (is_same_code and name.startswith("--"))
    ]
    changed = [name for name in names if before.get(name) != now.get(name)]
    versions = [name for name in changed if name.startswith("the version of ")]
    if versions and not code:
        log.warning("%s was begun with another value of %s", folder, ", ".join(versions))
        changed = [name for name in changed if name not in versions]
    if changed:
        name = changed[0]
        values = (
            f": {before.get(name, 'null')}, now {now.get(name, 'null')}"
            if name.startswith("--")
            else ""
        )
        raise UserError(
            f"{folder} holds a run that was begun with other settings or files: {name} has changed{values}; "
            "restore it, or choose another --run_dir"
        )


def read_progress(folder: Path) -> dict[str, Any]:
    """What is known about an unfinished validation: ``depends_on`` and ``budget``; empty if nothing is."""
    with suppress(OSError, ValueError):
        return parse((folder / "progress.json").read_text("utf-8"))
    return {}


def _settings(text: str, *without: str) -> dict[str, str]:
    """Settings by their option's name, values as JSON."""
    found: dict[str, str] = {}

    def add(name: str, value: Any) -> None:  # noqa: ANN401
        if isinstance(value, dict) and value:
            for key, part in value.items():
                add(name if key == "init_args" else f"{name}.{key}".lstrip("."), part)
        else:
            found[name] = json.dumps(value, sort_keys=True, default=str)

    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError("not settings")
    add("", {name: value for name, value in content.items() if name not in without})
    return found


def _named_files(value: Any) -> Iterator[Path]:  # noqa: ANN401
    """Files that a setting names, those of a folder with a model included."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _named_files(part)
    elif isinstance(value, str) and value:
        path = Path(value)
        with suppress(OSError, ValueError):  # too long for a name, say
            if path.is_file():
                yield path
            elif (path / "config.json").is_file():
                yield from sorted(file for file in path.iterdir() if file.is_file())


def _hash(file: Path) -> str:
    info = file.stat()
    if info.st_size > LARGE:
        return f"{info.st_size} bytes, changed at {info.st_mtime_ns}"
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _hash_of_code() -> str:
    """Of the source, not the version: that stays the same where the project is installed from a checkout."""
    files = [*PROJECT.glob("modules/**/*.py"), *PROJECT.glob("datamodules/**/*.py")]
    text = "".join(_hash(file) for file in sorted([*files, *PROJECT.glob("pipeline/*.py")]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
