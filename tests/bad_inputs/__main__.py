"""Runs the corpus: every row in a process of its own, with what came of it.

    python -m tests.bad_inputs [--out FILE] [--jobs N] [NAME ...]

Names are parts of rows' names; without any, all rows run. The last line counts what was tried. ``--out`` writes
one JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

from tests import conftest  # noqa: F401  first: it sets the variables that libraries read
from tests.bad_inputs import makers
from tests.bad_inputs.rows import FOLDER, Row, expand, fill, read_rows
from tests.bad_inputs.verdicts import Result, judge, summary
from tests.processes import Process, contents, import_everything

SECONDS = 60.0  # after which a row counts as hanging; the machine may be busy


def run(row: Row, inputs: Path, folder: Path) -> Result:
    """Runs one row in a new folder, which is removed afterwards."""
    work, canary = folder / "work", folder / "executed"
    work.mkdir(parents=True)
    places = {"inputs": inputs, "canary": canary, "work": work}
    for name, given in row.files.items():
        makers.make(work / name, given, places)
    before = contents(work)
    locks = {path / name for path in (work, *work.rglob("*")) for name in (".lock", "study.lock")}
    env = {"CORRIGENDA_CACHE": str(folder / "cache"), "HOME": str(folder / "home"), **row.env}
    env = {name: value and fill(value, places) for name, value in env.items()}
    ended = Process(row.words(**places), work, env, _stranger).end(SECONDS)
    locks = {path.relative_to(work).as_posix() for path in locks}  # they mean nothing by themselves
    after = {name: content for name, content in contents(work).items() if name not in locks}
    changed = [name for name in before if after.get(name) != before[name] and name not in locks]
    left = [
        name
        for name in after
        if name not in before and not any(fnmatch(name, pattern) for pattern in row.leaves)
    ]
    left += [
        name for name in contents(folder) if name.startswith("cache/") and ".unfinished" in name
    ]
    result = judge(row, ended, changed, left, canary.exists())
    shutil.rmtree(folder)
    return result


def _run(given: tuple[Row, Path, Path]) -> Result:
    return run(*given)


def _stranger() -> None:
    """In the row's process: modules are found in its folder, and there is no network beyond this machine."""
    sys.path.insert(0, os.getcwd())
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:  # noqa: ANN401
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"no network in this test (to {address})")
        connect(self, address)

    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]


def run_all(rows: Sequence[Row], jobs: int) -> list[Result]:
    """Results in the order of the rows; what they share is made first, and may not be changed by any."""
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    inputs = folder / "inputs"
    inputs.mkdir()
    os.environ["CORRIGENDA_CACHE"] = str(folder / "cache")
    try:
        makers.make_inputs(inputs)
        makers.make_runs(inputs, _words(makers.RUNS, inputs))
        before = contents(inputs)
        results = []
        each = [(row, inputs, folder / f"row-{number}") for number, row in enumerate(rows)]
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for result in pool.imap(_run, each):
                results.append(result)
                if result.verdict != "clear":
                    sys.stdout.write(f"{result.verdict}: {result.name}\n    {result.why}\n")
                    sys.stdout.flush()
        after = contents(inputs)
        changed = [
            name
            for name in {**before, **after}
            if before.get(name) != after.get(name) and not name.endswith(".lock")
        ]
        if changed:
            why = f"good inputs were changed by some row: {', '.join(changed)}"
            results.append(Result("good inputs", "unclear", why, 0.0))
            sys.stdout.write(f"unclear: {why}\n")
    finally:
        shutil.rmtree(folder)
    return results


def _words(commands: Mapping[str, str], inputs: Path) -> dict[str, list[str]]:
    return {
        name: [fill(word, {"inputs": inputs}) for word in expand(command).split()]
        for name, command in commands.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bad_inputs", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for one JSON line per row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at the same time")
    parser.add_argument("names", nargs="*", help=f"parts of rows' names, see {FOLDER}")
    given = parser.parse_args()
    rows = read_rows()
    if given.names:
        rows = [row for row in rows if any(name in row.name for name in given.names)]
    results = run_all(rows, given.jobs)
    if given.out:
        lines = [json.dumps(asdict(result)) + "\n" for result in results]
        given.out.write_text("".join(lines), "utf-8")
    slow = max(results, key=lambda result: result.seconds)
    sys.stdout.write(f"{summary(results)}\n")
    total = sum(result.seconds for result in results)
    sys.stdout.write(f"{total:.0f} s, at most {slow.seconds:.1f} s ({slow.name})\n")
    sys.exit(any(result.verdict != "clear" for result in results))


if __name__ == "__main__":
    main()
