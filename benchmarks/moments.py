"""Second moments of five layers: one pass over the text for each layer, or one for all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.side_by_side import ratio
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.moments import Moments


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    first = lm.structure.num_layers // 8  # the relative depth of MEMIT's published layers for Llama
    layers = list(range(first, first + 5))
    tokens = max(6_000, 2 * lm.structure.inner_width)

    def gather(groups: list[list[int]]) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            service = Moments(lm, Corpus("facts", tokens), Path(folder))
            for group in groups:
                found |= service.gather(group, progress=False)
        return found

    def reference() -> dict[int, torch.Tensor]:
        return gather([[layer] for layer in layers])

    def ours() -> dict[int, torch.Tensor]:
        return gather([layers])

    expected, found = reference(), ours()
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-6)
    yield ratio("second moments, five layers", reference, ours, rounds)
