"""Every benchmark runs: both ways agree, and its rows are rows of the table."""

import re
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import abilities
from benchmarks.__main__ import SCRIPTS
from benchmarks.shapes import SHAPES, RandomModel
from benchmarks.side_by_side import HEADER, require_close
from corrigenda.datamodules.facts import Facts

ROW = re.compile(r"\| [^|]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ to [\d.]+ \|")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_compares_two_ways_to_one_result(name, tiny_lm, monkeypatch):
    lm = tiny_lm("llama", num_hidden_layers=6, max_position_embeddings=8192)
    monkeypatch.setattr(abilities, "QUESTIONS", 1)
    if name == "abilities" and not abilities.DATA.is_dir():
        pytest.skip("the folder ../shared with real rows is not there")
    found = list(SCRIPTS[name].rows(lm, Facts().cases("test")[:16], rounds=1))
    assert found and all(ROW.fullmatch(row) for row in found)
    assert HEADER.count("|") == found[0].count("|") * 2
    assert not lm.handles


def test_a_wrong_answer_is_no_benchmark(tiny_lm):
    lm = tiny_lm("llama")
    require_close(lm, 1e-6, 1e-4)
    for wrong in (1e-2, float("nan")):
        with pytest.raises(AssertionError, match="the results differ by"):
            require_close(lm, wrong, 1e-4)
    lm.net.bfloat16()
    require_close(lm, 1e-2, 1e-4)


def test_a_published_shape_is_drawn_at_random(monkeypatch):
    small = partial(
        LlamaConfig,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=80,
        num_attention_heads=2,
    )
    monkeypatch.setitem(SHAPES, "llama-7b", small)
    lm, same = (RandomModel("llama-7b", "bfloat16", None) for _ in range(2))
    assert lm.structure.inner_width == 80 and lm.net.dtype == torch.bfloat16
    assert all(map(torch.equal, lm.net.parameters(), same.net.parameters()))
    assert lm.score(["The capital of France is"], ["Paris"]).logprob_BM.isfinite().all()
