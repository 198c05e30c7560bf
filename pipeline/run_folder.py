"""The folder of a run: locked by one process at a time, and only resumed by the same run.

The results of a resumed run come from several processes, so everything that they depend on is recorded and
compared: settings, the content of files named in them, versions. The weights and the cases, which are known only
when they have been loaded, are added by the :class:`~corrigenda.pipeline.run_writer.RunWriter`.
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
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)

NAMED_RUN = "CORRIGENDA_RUN_DIR"  # passes the name of the run from the first process to the others
LOCK = ".lock"
# Kept whatever becomes of a run: its rows name the edits by their content.
ANSWERS = "abilities.jsonl"
RESULTS = ("summary.json", "cases.jsonl", "checkpoints", "edits", "forgetting.json", "guard.jsonl")
# Settings that a resumed fit cannot change.
OF_A_FIT = ("model", "data", "edit", "seed_everything", "guard", "forgetting")
LARGE = 2**30  # bytes; larger files are identified by size and modification time
PROJECT = Path(__file__).parents[1]
CODE = "the version of Corrigenda's code"


@dataclass(frozen=True)
class RunFolder:
    """The locked folder of a run, and how the run starts.

    Attributes:
        path: the folder.
        text: the settings, as YAML.
        depends_on: what results depend on, by a name shown to the user, see :func:`dependencies`.
        checkpoint: the checkpoint that a ``fit`` resumes from.
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
    """The run's folder, locked until the block ends.

    A folder that holds a run is refused, unless the run can be resumed: an unfinished ``validate`` with the same
    settings, or a ``fit`` with ``--ckpt_path last``. An error before any result is written leaves the folder as it
    was.

    Raises:
        UserError: the folder holds another run.
        BlockingIOError: another process is writing into it.
    """
    from lightning.pytorch.utilities import rank_zero_only

    if verb != "fit" and config.ckpt_path == "last":
        raise UserError(f"{verb} --ckpt_path needs a file, such as runs/NAME/checkpoints/last.ckpt")
    if config.trainer.fast_dev_run:  # results are discarded
        with TemporaryDirectory(prefix="corrigenda-") as name:
            yield RunFolder(Path(name), text, checkpoint=_last(config))
        return
    folder = Path(config.run_dir) if config.run_dir else _named_by_time(verb)
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process checks and locks it
        yield RunFolder(folder, text, checkpoint=_last(config))
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    present = set(folder.rglob("*"))
    with locked(folder / LOCK, f"the run folder {folder}"):
        try:
            remove_unfinished(folder)
            depends_on = dependencies(text, verb)
            if verb == "fit":
                yield RunFolder(folder, text, depends_on, _checkpoint(folder, config, text))
            else:
                _require_unfinished(folder, depends_on)
                yield RunFolder(folder, text, depends_on)
        except BaseException:
            _remove_unused(folder, present, missing)
            raise


def _last(config: Namespace) -> Path | None:
    return last_checkpoint(Path(config.run_dir)) if config.ckpt_path == "last" else None


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that :class:`~corrigenda.pipeline.checkpointing.LastCheckpoint` saves."""
    return folder / "checkpoints" / "last.ckpt"


def continues(trainer: Trainer, folder: Path) -> bool:
    """Whether a run continues the one in its folder, rather than starts from another one's checkpoint."""
    given = trainer.ckpt_path
    return bool(given) and Path(str(given)).resolve() == last_checkpoint(folder).resolve()


def _checkpoint(folder: Path, config: Namespace, text: str) -> Path | None:
    """The checkpoint that a ``fit`` resumes from; None for a new run."""
    is_finished = (folder / "summary.json").exists()
    last = last_checkpoint(folder)
    if config.ckpt_path == "last" and last.exists():
        if is_finished and _settings(text, "run_dir", "ckpt_path") in _earlier_settings(folder):
            raise UserError(
                f"{folder} holds a finished run, and these settings leave nothing to do: increase "
                "--trainer.max_steps or --trainer.max_epochs, or choose another --run_dir"
            )
        return last
    if is_finished:
        raise UserError(
            f"{folder} holds a finished run, and runs are never overwritten: choose another --run_dir"
        )
    is_started = any((folder / name).exists() for name in RESULTS)
    if config.ckpt_path == "last":
        aside = _set_aside(folder) if is_started else None
        log.warning("%s has no checkpoint to resume from, so the run starts from the beginning%s", folder,
                    f" (earlier files are in {aside})" if aside else "")  # fmt: skip
    elif is_started:
        raise UserError(
            f"{folder} holds an unfinished run: resume it with --ckpt_path last, or choose another --run_dir"
        )
    return None


def _earlier_settings(folder: Path) -> list[dict[str, str]]:
    """Settings with which the run in a folder has been started, as far as they can be read."""
    found = []
    for file in folder.glob("config*.yaml"):
        with suppress(OSError, ValueError, yaml.YAMLError):
            found.append(_settings(file.read_text("utf-8"), "run_dir", "ckpt_path"))
    return found


def _set_aside(folder: Path) -> Path:
    """Moves what a run has written before its first checkpoint into a subfolder."""
    number = 1
    while (aside := folder / f"interrupted-{number}").exists():
        number += 1
    aside.mkdir()
    for path in (*map(folder.joinpath, RESULTS), *folder.glob("config*.yaml"), folder / "logs"):
        if path.exists():
            path.rename(aside / path.name)
    return aside


def _require_unfinished(folder: Path, depends_on: Mapping[str, str]) -> None:
    """Raises UserError unless the folder is empty or the same validation was interrupted in it."""
    if (folder / "summary.json").exists():
        raise UserError(
            f"{folder} holds a finished run, and runs are never overwritten: choose another --run_dir"
        )
    if any((folder / name).exists() for name in RESULTS):
        require_same(folder, read_progress(folder).get("depends_on"), depends_on)


def _remove_unused(folder: Path, present: set[Path], missing: list[Path]) -> None:
    """Restores the folder, unless results, logs or checkpoints have been written since."""
    new = set(folder.rglob("*")) - present
    if any(path.name in (*RESULTS, ANSWERS, "metrics.csv") for path in new):
        return
    for path in new:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in missing:  # the folder first, then its parents
        with suppress(OSError):
            path.rmdir()


def _named_by_time(verb: str) -> Path:
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process has chosen the name
        if NAMED_RUN not in os.environ:
            raise UserError("processes that are started separately need the same --run_dir")
        return Path(os.environ[NAMED_RUN])
    first = folder = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}"
    number = 1
    while folder.exists():  # another run has started in the same second
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    os.environ[NAMED_RUN] = str(folder)
    return folder


# ---------------------------------------------------------------------------- what results depend on


def dependencies(text: str, verb: str) -> dict[str, str]:
    """What a run's results depend on, as far as it is known before loading, by a name shown to the user.

    Args:
        text: the settings as YAML.
        verb: for ``fit`` only settings of model, data and edits count, because training may be extended.
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
    """Raises UserError if what a run depends on has changed since it was started; the message names it.

    Args:
        folder: the run's folder.
        before: what it depended on when it was started; None if unknown.
        now: what it would depend on now.
        code: whether a change of versions is an error; otherwise it is a warning.
    """
    if before is None:
        raise UserError(
            f"{folder} holds an unfinished run whose settings are unknown: choose another --run_dir"
        )
    is_same_code = before.get(CODE) == now.get(CODE)  # otherwise there may be other options
    names = [
        name
        for name in {**before, **now}
        if (name in before and name in now) or (is_same_code and name.startswith("--"))
    ]
    changed = [name for name in names if before.get(name) != now.get(name)]
    versions = [name for name in changed if name.startswith("the version of ")]
    if versions and not code:
        log.warning("%s was started with another value of %s", folder, ", ".join(versions))
        changed = [name for name in changed if name not in versions]
    if changed:
        name = changed[0]
        values = (
            f": {before.get(name, 'null')}, now {now.get(name, 'null')}"
            if name.startswith("--")
            else ""
        )
        raise UserError(
            f"{folder} holds a run that was started with other settings or files: {name} has changed{values}; "
            "restore it, or choose another --run_dir"
        )


def read_progress(folder: Path) -> dict[str, Any]:
    """``progress.json`` of an unfinished validation; empty if it cannot be read."""
    with suppress(OSError, ValueError):
        return parse((folder / "progress.json").read_text("utf-8"))
    return {}


def _settings(text: str, *without: str) -> dict[str, str]:
    """Settings by the name of their option, values as JSON."""
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
    """Files that a setting names, including those in the folder of a model."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _named_files(part)
    elif isinstance(value, str) and value:
        path = Path(value)
        with suppress(OSError, ValueError):  # not a path, for example too long
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
    """Hash of the source, because the version does not change when it is edited in a checkout."""
    files = [*PROJECT.glob("modules/**/*.py"), *PROJECT.glob("datamodules/**/*.py")]
    text = "".join(_hash(file) for file in sorted([*files, *PROJECT.glob("pipeline/*.py")]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
