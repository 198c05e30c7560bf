"""What is made of the way a row has ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bad_inputs.rows import Row
from tests.processes import UNCAUGHT, Ended

LONGEST = 1000  # characters of what is written to stderr
VERDICTS = {  # as they are counted
    "clear": "clear",
    "unclear": "unclear",
    "traceback": "tracebacks",
    "hang": "hangs",
    "accepted": "wrongly accepted",
    "code executed": "code executed",
}


@dataclass(frozen=True)
class Result:
    """What came of a row: one of VERDICTS, and why it is not clear."""

    name: str
    verdict: str
    why: str
    seconds: float


def judge(
    row: Row, ended: Ended, changed: Sequence[str], left: Sequence[str], executed: bool
) -> Result:
    """The verdict on a row.

    Args:
        row: what was expected.
        ended: what its process wrote, and with which status.
        changed: files of the row that are not what they were.
        left: files that were not there before.
        executed: whether code of a foreign file has run.
    """

    def result(verdict: str, why: str = "") -> Result:
        return Result(row.name, verdict, why, ended.seconds)

    message = ended.err.strip()
    shown = message if len(message) <= LONGEST else f"{message[:300]} ... {message[-600:]}"
    if executed:
        return result("code executed", f"code of a foreign file ran; {shown}")
    if ended.status is None:
        return result("hang", f"not ended after {ended.seconds:.0f} seconds; {shown}")
    if ended.status == UNCAUGHT or "Traceback (most recent call last)" in ended.err + ended.out:
        return result("traceback", shown or ended.out[-600:])
    if ended.status == 0 and row.exit:
        return result("accepted", f"exit status 0; {shown}")
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
    return result("unclear", f"{'; '.join(wrong)}: {shown}") if wrong else result("clear")


def summary(results: Sequence[Result]) -> str:
    """One line: what was tried and what came of it."""
    counts = Counter(result.verdict for result in results)
    parts = [f"{counts[verdict]} {name}" for verdict, name in VERDICTS.items()]
    return ", ".join([f"{len(results)} tried", *parts])
