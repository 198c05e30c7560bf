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
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

from tests import conftest  # noqa: F401  first: it sets the variables that libraries read
from tests.bad_inputs import makers
from tests.bad_inputs.rows import FOLDER, Row, expand, fill, read_rows
from tests.processes import UNCAUGHT, Ended, Process, contents, import_everything

SECONDS = 20.0  # after which a row counts as hanging
LONGEST = 1000  # characters of a message
COLUMNS = ("clear", "unclear", "traceback", "hang", "accepted", "code executed")
PLURAL = {"traceback": "tracebacks", "hang": "hangs", "accepted": "wrongly accepted"}


@dataclass(frozen=True)
class Result:
    """What came of a row: one of COLUMNS, and why it is not clear."""

    name: str
    verdict: str
    why: str
    seconds: float


def run(row: Row, inputs: Path, folder: Path) -> Result:
    """Runs one row in a new folder, which is removed afterwards."""
    work, canary = folder / "work", folder / "executed"
    work.mkdir(parents=True)
    places = {"inputs": inputs, "canary": canary, "work": work}
    for name, given in row.files.items():
        makers.make(work / name, given, places)
    before = contents(work)
    env = {"CORRIGENDA_CACHE": str(folder / "cache"), "HOME": str(folder / "home"), **row.env}
    env = {name: value and fill(value, places) for name, value in env.items()}
    ended = Process(row.words(**places), work, env, _stranger).end(SECONDS)
    after = contents(work)
    changed = [name for name in before if after.get(name) != before[name]]
    left = [
        name
        for name in after
        if name not in before and not any(fnmatch(name, pattern) for pattern in row.leaves)
    ]
    left += [
        name for name in contents(folder) if name.startswith("cache/") and ".unfinished" in name
    ]
    verdict, why = judge(row, ended, changed, left, canary.exists())
    shutil.rmtree(folder)
    return Result(row.name, verdict, why, ended.seconds)


def _run(given: tuple[Row, Path, Path]) -> Result:
    return run(*given)


def judge(
    row: Row, ended: Ended, changed: Sequence[str], left: Sequence[str], executed: bool
) -> tuple[str, str]:
    """The verdict and the reason."""
    message = ended.err.strip()
    shown = message if len(message) <= LONGEST else f"{message[:300]} ... {message[-600:]}"
    if executed:
        return "code executed", f"code of a foreign file ran; {shown}"
    if ended.status is None:
        return "hang", f"not ended after {SECONDS:g} seconds; {shown}"
    if ended.status == UNCAUGHT or "Traceback (most recent call last)" in ended.err + ended.out:
        return "traceback", shown or ended.out[-600:]
    if ended.status == 0 and row.exit:
        return "accepted", f"exit status 0; {shown}"
    wrong = []
    if ended.status != row.exit:
        wrong.append(f"exit status {ended.status}, not {row.exit}")
    if row.exit == 2 and not re.search(r"(?:^|\n)corrigenda: error: [^\n]+$", message):
        wrong.append("not one line that begins with 'corrigenda: error:'")
    if len(message) > LONGEST:
        wrong.append(f"a message of {len(message)} characters")
    said = message + ended.out if row.exit == 0 else message
    wrong += [f"does not say {part!r}" for part in row.says if not re.search(part, said, re.S)]
    wrong += [f"{name} was changed" for name in changed[:3]] + [
        f"{name} is left" for name in left[:3]
    ]
    return ("unclear", f"{'; '.join(wrong)}: {shown}") if wrong else ("clear", "")


def _stranger() -> None:
    """In the row's process: modules are found in its folder, and there is no network."""
    sys.path.insert(0, os.getcwd())

    def refuse(self: socket.socket, address: object) -> NoReturn:
        raise ConnectionRefusedError(f"no network in this test (to {address})")

    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign,assignment]


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
        assert contents(inputs) == before, "a row has changed a file that is not its own"
    finally:
        shutil.rmtree(folder)
    return results


def _words(commands: Mapping[str, str], inputs: Path) -> dict[str, list[str]]:
    return {
        name: [fill(word, {"inputs": inputs}) for word in expand(command).split()]
        for name, command in commands.items()
    }


def summary(results: Sequence[Result]) -> str:
    """One line: what was tried and what came of it."""
    counts = Counter(result.verdict for result in results)
    parts = [f"{len(results)} tried"]
    return ", ".join(parts + [f"{counts[name]} {PLURAL.get(name, name)}" for name in COLUMNS])


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
