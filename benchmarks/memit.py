"""MEMIT: what writing many values takes beside the search for them, and a batch end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import difference, ratio, require_close
from benchmarks.values import CONTEXTS
from datamodules.records import Edit, EditCase
from modules.editing import Delta, editing_mode
from modules.editors.memit import MEMIT
from modules.lm import LanguageModel
from modules.moments import Corpus


class GivenValues(MEMIT):
    """MEMIT whose values are given, so that only their insertion is timed."""

    def _search(
        self, lm: LanguageModel, edits: Sequence[Edit], site: str, v0_ND: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        generator = torch.Generator().manual_seed(0)
        moved_ND = torch.randn(v0_ND.shape, generator=generator).to(v0_ND)
        return 0.5 * v0_ND.norm(dim=1, keepdim=True) * moved_ND / moved_ND.norm(
            dim=1, keepdim=True
        ), [{"loss": 0.0, "nll": 0.0, "iterations": 0} for _ in edits]


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> list[str]:
    table = []
    for count in (1, 10, 50):
        name = f"MEMIT, insertion of {count} edit{'s' * (count > 1)}"
        table.append(_row(lm, cases[:count], rounds, name, GivenValues))
    some = min(rounds, 2)  # minutes each
    name = f"MEMIT, 100 edits end to end, 5 steps each, {some} rounds"
    return [*table, _row(lm, cases[:100], some, name, MEMIT, steps=5)]


def _row(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    rounds: int,
    name: str,
    kind: type[MEMIT],
    **changes: Any,  # noqa: ANN401
) -> str:
    corpus = Corpus("facts", max(50_000, 10 * lm.structure.inner_width))
    settings: dict[str, Any] = {"ridge": 0.1, "corpus": corpus, "contexts": CONTEXTS} | changes
    first = lm.structure.num_layers // 10
    layers = list(range(max(0, first - 3), first + 1))
    slow, fast = kind(layers, parallel=1, **settings), kind(layers, parallel=16, **settings)
    edits = [case.edits[0] for case in cases]

    def run(editor: MEMIT, reuse: bool) -> Delta:
        lm.reuse_prefix = reuse
        with editing_mode():
            return editor.propose(lm, edits)

    found = difference([run(slow, False)], [run(fast, True)])
    require_close(found, 1e-3)
    label = f"{name} (updates agree to {found:.0e})"
    return ratio(label, lambda: run(slow, False), lambda: run(fast, True), rounds)
