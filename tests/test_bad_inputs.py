"""Every bad input of tests/bad_inputs ends in one line that names it: see ``python -m tests.bad_inputs``."""

import json
import re
import subprocess
import sys

import pytest

from tests.bad_inputs.rows import Row, read_rows
from tests.bad_inputs.verdicts import judge, summary
from tests.processes import UNCAUGHT, Ended
from tests.samples import ROOT

ROWS = read_rows()


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What came of the rows that are tested now, all of them run at once."""
    names = [
        item.callspec.params["row"].name
        for item in request.session.items
        if item.originalname == "test_a_bad_input_ends_in_one_line"
    ]
    file = tmp_path_factory.mktemp("bad-inputs") / "results.jsonl"
    names = [] if len(names) == len(ROWS) else names
    command = [sys.executable, "-m", "tests.bad_inputs", "--out", str(file), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert file.exists(), done.stderr
    return {result["name"]: result for result in map(json.loads, file.open(encoding="utf-8"))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_bad_input_ends_in_one_line(results, row):
    result = results[row.name]
    assert result["verdict"] == "clear", result["why"]


def test_there_are_many_and_all_promises_have_some():
    files = {row.name.partition(":")[0] for row in ROWS}
    assert len(ROWS) >= 300 and {"options", "data", "checkpoints", "security"} <= files
    assert all(re.compile(part) for row in ROWS for part in row.says)


@pytest.mark.parametrize(
    ("ended", "found", "verdict"),
    [
        ((2, "corrigenda: error: a.txt: empty\n"), {}, "clear"),
        ((2, "a warning\ncorrigenda: error: a.txt: empty\n"), {}, "clear"),
        ((2, "corrigenda: error: a.txt: empty\nmore\n"), {}, "unclear"),
        ((2, "corrigenda: error: something is empty\n"), {}, "unclear"),
        ((1, "corrigenda: error: a.txt: empty\n"), {}, "unclear"),
        ((2, "corrigenda: error: a.txt " + "x" * 2000), {}, "unclear"),
        ((2, "corrigenda: error: a.txt: empty\n"), {"left": ["run/"]}, "unclear"),
        ((2, "corrigenda: error: a.txt: empty\n"), {"changed": ["a.txt"]}, "unclear"),
        ((2, "corrigenda: error: a.txt: empty\n"), {"executed": True}, "code executed"),
        ((0, ""), {}, "accepted"),
        ((UNCAUGHT, "Traceback (most recent call last):\n"), {}, "traceback"),
        ((2, "Traceback (most recent call last):\ncorrigenda: error: a.txt\n"), {}, "traceback"),
        ((None, ""), {}, "hang"),
    ],
)
def test_verdicts(ended, found, verdict):
    """The corpus would notice each of these."""
    row = Row("files: empty", "validate a.txt", ("a.txt",), {}, {})
    status, err = ended
    found = {"changed": [], "left": [], "executed": False} | found
    result = judge(row, Ended(status, "", err, 1.0), **found)
    assert result.verdict == verdict and bool(result.why) == (verdict != "clear")
    assert summary([result]).startswith("1 tried, ")
