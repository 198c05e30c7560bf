"""Faults at every file operation of a command: a resumed run ends with the files of an uninterrupted one.

    python -m tests.faults [--every N] [KIND ...]

A command runs in a process of its own (see processes.py). At its n-th operation on a file of its folder the
fault strikes: it is killed, terminated, interrupted twice, or the disk is full from then on. Then the command
is given again as the documentation says, and every file must be that of an uninterrupted run. Numbers that are
times may differ. ``--every 1`` tries all n, which takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

import torch
from safetensors import safe_open

from tests import conftest  # noqa: F401  first: it sets the variables that libraries read
from tests.bad_inputs import makers
from tests.bad_inputs.rows import expand, fill
from tests.processes import Ended, Process, import_everything

OFTEN = "--trainer.log_every_n_steps 1"
KINDS = {
    "validate": "validate {ft} --data.batch_size 1 --data.limit 3",
    "validate epoch": "validate {rome} --edit.schedule epoch --data.limit 2",
    "stream": f"fit {{stream}} {OFTEN} --trainer.val_check_interval 1",
    "mend": f"fit {{mend}} {OFTEN}",
    "lora": f"fit {{lora_fit}} --data.batch_size 1 --data.limit 2 {OFTEN}",
    "moments": "moments {moments}",
    "merge": "edits merge {inputs}/runs/rome/edits/0.safetensors {inputs}/runs/rome/edits/1.safetensors "
    "--out run/merged.safetensors",
    "export": "edits export {inputs}/runs/rome/edits/0.safetensors --format hf --out run/model",
    "report": "report {inputs}/runs/ft {inputs}/runs/rome --out run",
}
TIMES = re.compile(
    r"seconds|tokens|current_score|peak_gib|training_time|quer(y|ies)|_last_lr_time|bytes_kept"
)
# What says that a run was interrupted, metrics.csv, which is compared by its values, and what may be forgotten.
OWN = re.compile(
    r"config-resumed-\d+\.yaml$|interrupted-\d+/|\.lock$|progress\.json$|logs/|cache/prefixes"
)


class Bench:
    """Good inputs and what uninterrupted commands make of them, in a temporary folder."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="faults-"))
        self.inputs = self.root / "inputs"
        self.inputs.mkdir()
        os.environ["CORRIGENDA_CACHE"] = str(self.root / "cache")
        makers.make_inputs(self.inputs)
        runs = {name: makers.RUNS[name] for name in ("rome", "ft")}
        words = {name: self._filled(expand(run)) for name, run in runs.items()}
        makers.make_runs(self.inputs, words)
        self._whole: dict[str, tuple[Path, int]] = {}
        self._number = 0

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _filled(self, command: str) -> list[str]:
        return [fill(word, {"inputs": self.inputs}) for word in command.split()]

    def words(self, kind: str, again: bool = False) -> list[str]:
        """The command of a kind; ``again`` is the one that resumes it."""
        words = self._filled(expand(KINDS[kind]))
        return words + (["--ckpt_path", "last"] if again and words[0] == "fit" else [])

    def folder(self, name: str) -> Path:
        """A new folder to run in."""
        self._number += 1
        folder = self.root / f"{name.replace(' ', '-')}-{self._number}"
        folder.mkdir()
        return folder

    def start(
        self,
        kind: str,
        folder: Path,
        before: Callable[[], object] | None = None,
        again: bool = False,
    ) -> Process:
        """Starts the command of a kind in a folder of its own, where its cache is, too."""

        def prepare() -> None:
            import corrigenda.modules.statistics.moments
            import corrigenda.pipeline.checkpointing

            # Checkpoints and sums are kept after every step, not every minute.
            corrigenda.pipeline.checkpointing.SAVE_EVERY = (
                corrigenda.modules.statistics.moments.WRITE_SECONDS
            ) = 0.0
            corrigenda.modules.statistics.moments.BUFFER_TEXTS = 32
            if before is not None:
                before()

        env = {"CORRIGENDA_CACHE": str(folder / "cache")}
        return Process(self.words(kind, again), folder, env, prepare)

    def whole(self, kind: str) -> tuple[Path, int]:
        """The folder of an uninterrupted run of this kind, and its number of file operations."""
        if kind not in self._whole:
            folder, count = self.folder(f"whole {kind}"), Shared()
            ended = self.start(kind, folder, lambda: _strike(folder, -1, count, _nothing)).end()
            assert ended.status == 0, ended.err
            self._whole[kind] = folder, count.value
        return self._whole[kind]

    def trial(self, kind: str, fault: str, number: int) -> list[str]:
        """What is wrong after a fault at the operation ``number`` (from 0), and after resuming."""
        whole, _ = self.whole(kind)
        folder, struck = self.folder(f"{fault} {kind}"), Shared()
        ended = self.start(kind, folder, lambda: FAULTS[fault](folder, number, struck)).end()
        wrong = [f"then: {line}" for line in _end(fault, ended, folder)]
        if ended.status != 0 and not (folder / "run/summary.json").exists():  # else it is finished
            again = self.start(kind, folder, again=True).end()
            if again.status != 0:
                wrong.append(f"resuming ends with {again.status}: {again.err[-300:]}")
        wrong += differences(whole, folder)
        if not wrong:
            shutil.rmtree(folder)
        return wrong


class Shared:
    """A number that a forked process and its parent share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int(struct.unpack("q", self._memory[:8])[0])

    @value.setter
    def value(self, value: int) -> None:
        self._memory[:8] = struct.pack("q", value)


# ---------------------------------------------------------------------------- faults

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
}


def _strike(folder: Path, number: int, count: Shared, act: Callable[[str], object]) -> None:
    """Calls ``act`` before every operation on a file of the folder from the one with this number on."""
    inside = f"{folder}{os.sep}"

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        if not (writes or event in _CHANGES) or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(inside):
            return
        count.value += 1
        if 0 <= number < count.value:
            act(event)

    sys.addaudithook(watch)


def _nothing(_: str) -> None:
    pass


def _kill(folder: Path, number: int, count: Shared) -> None:
    _strike(folder, number, count, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def _terminate(folder: Path, number: int, count: Shared) -> None:
    def once(_: str) -> None:
        if count.value == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    _strike(folder, number, count, once)


def _interrupt_twice(folder: Path, number: int, count: Shared) -> None:
    """Two operations apart: the second one strikes while what is kept at the end is written."""

    def twice(_: str) -> None:
        if count.value in (number + 1, number + 3):
            os.kill(os.getpid(), signal.SIGINT)

    _strike(folder, number, count, twice)


def _fill_disk(folder: Path, number: int, count: Shared) -> None:
    """Nothing can be created any more; what is there can be removed and renamed."""

    def refuse(event: str) -> None:
        if event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    _strike(folder, number, count, refuse)


def _limit_files(folder: Path, number: int, count: Shared) -> None:
    """Every write beyond ``number`` KiB of a file fails, in whatever language it is made."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number << 10, number << 10))


FAULTS: dict[str, Callable[[Path, int, Shared], None]] = {
    "kill": _kill,
    "SIGTERM": _terminate,
    "Ctrl-C twice": _interrupt_twice,
    "disk full": _fill_disk,
    "file too large": _limit_files,
}
STATUS = {
    "kill": (-signal.SIGKILL,),
    "SIGTERM": (143,),
    "Ctrl-C twice": (130,),
    "disk full": (2,),
    "file too large": (2,),
}


def _end(fault: str, ended: Ended, folder: Path) -> Iterator[str]:
    """What is wrong with the way a command ends after a fault; one that came too late changes nothing."""
    if "Traceback" in ended.err:
        yield ended.err[-600:]
    if ended.status == 0:
        return
    if ended.status not in STATUS[fault]:
        yield f"exit status {ended.status}, not {STATUS[fault]}: {ended.err[-300:]}"
    said = ended.err.strip().rpartition("\n")[2]
    if fault in ("disk full", "file too large") and not said.startswith("corrigenda: error: "):
        yield f"no line that says what is wrong: {ended.err[-300:]}"
    if fault == "SIGTERM" and not said.startswith("corrigenda: terminated"):
        yield f"no line that says that it was terminated: {ended.err[-300:]}"
    if fault in ("SIGTERM", "disk full", "file too large"):
        yield from (f"{path} is left" for path in folder.rglob("*.unfinished"))


# ---------------------------------------------------------------------------- comparison


def differences(whole: Path, cut: Path) -> list[str]:
    """Where two finished folders differ, by name; times and what tells of an interruption are left out."""
    names = [
        {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not OWN.search(path.relative_to(folder).as_posix())
        }
        for folder in (whole, cut)
    ]
    found = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    found += [f"{name} is left" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        one, other = (_read(folder / name, folder) for folder in (whole, cut))
        found += [f"{name}: {place} differs" for place in _differ(one, other, "")][:5]
    logged = [_logged(folder) for folder in (whole, cut)]
    found += [
        f"metrics.csv: {name} at step {step}"
        for name, step in logged[0]
        if logged[0][name, step] != logged[1].get((name, step))
    ][:5]
    return found


def _read(path: Path, folder: Path) -> Any:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if path.suffix == ".ckpt":
        return torch.load(path, "cpu", weights_only=True)
    if path.suffix in (".json", ".jsonl"):
        return [json.loads(line) for line in _objects(path)]
    if path.name.startswith("report."):
        return path.suffix  # it holds times
    text = path.read_text("utf-8", errors="replace").replace(str(folder), "")
    return re.sub(r"(?m)^ckpt_path: .*$", "", text)  # of a config.yaml, where a run started over


def _objects(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _differ(one: Any, other: Any, place: str) -> Iterator[str]:
    if TIMES.search(place.rpartition("/")[2]):
        return
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if not same or not torch.equal(_bytes(one), _bytes(other)):
            yield place
    elif isinstance(one, dict) and isinstance(other, dict):
        # Paths of checkpoints are keys in the state of Lightning's callbacks.
        one, other = ({_named(key): part for key, part in whole.items()} for whole in (one, other))
        for key in one.keys() | other.keys():
            yield from _differ(one.get(key), other.get(key), f"{place}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{place} (length)"
        for i, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from _differ(left, right, f"{place}/{i}")
    elif _named(one) != _named(other):
        yield f"{place} ({_named(one)[:80]} and {_named(other)[:80]})"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _named(value: object) -> str:
    """A value as text, the same for two folders of a bench."""
    return re.sub(r"/[\w./-]*faults-\w+/[\w-]+-\d+", "", repr(value))


def _logged(folder: Path) -> dict[tuple[str, str], str]:
    """All values of metrics.csv by name and step, later ones winning, as a report reads them."""
    values = {}
    for file in sorted(
        folder.glob("run/logs/version_*/metrics.csv"), key=lambda f: (len(str(f)), f)
    ):
        for row in csv.DictReader(file.open(encoding="utf-8")):
            values |= {
                (name, row["step"]): value
                for name, value in row.items()
                if value and not TIMES.search(name)
            }
    return values


# ---------------------------------------------------------------------------- many


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try every n-th operation")
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    given = parser.parse_args()
    import_everything()
    bench, bad = Bench(), 0
    for kind in given.kinds:
        _, operations = bench.whole(kind)
        for fault in given.fault:
            verdicts: Counter[str] = Counter()
            points = range(0, operations, given.every)
            if fault == "file too large":
                points = range(1, 129, 4 * given.every)  # with 0, no message can be written either
            for number in points:
                wrong = bench.trial(kind, fault, number)
                verdicts["different" if wrong else "as uninterrupted"] += 1
                for line in wrong:
                    sys.stdout.write(f"    {kind}, {fault} at {number}: {line}\n")
            counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
            sys.stdout.write(f"{kind:15} {fault:15} {len(points):4} points: {counts}\n")
            sys.stdout.flush()
            bad += verdicts["different"]
    bench.close()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
