"""Every benchmark runs: both ways agree, and its rows are rows of the table."""

import re

import pytest

from benchmarks.__main__ import SCRIPTS
from benchmarks.side_by_side import HEADER, require_close
from datamodules.facts import Facts

ROW = re.compile(r"\| [^|]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ to [\d.]+ \|")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_compares_two_ways_to_one_result(name, tiny_lm):
    lm = tiny_lm("llama", num_hidden_layers=6)
    found = list(SCRIPTS[name].rows(lm, Facts().cases("test")[:16], rounds=1))
    assert found and all(ROW.fullmatch(row) for row in found)
    assert HEADER.count("|") == found[0].count("|") * 2
    assert not lm.handles


def test_a_wrong_answer_is_no_benchmark():
    require_close(1e-6, 1e-4)
    for wrong in (1e-2, float("nan")):
        with pytest.raises(AssertionError, match="the two ways differ by"):
            require_close(wrong, 1e-4)
