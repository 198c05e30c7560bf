"""ROME's edits: the search for values from stored states, of several facts together, and the whole edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.side_by_side import corpus, difference, ratio, require_close
from datamodules.records import EditCase
from modules.delta import Delta
from modules.editing import editing_mode
from modules.editors.rome import ROME
from modules.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    """Six facts, subjects early and late, one after the other and together; 10 steps in 21 contexts."""
    layer = lm.structure.num_layers // 10
    editor = ROME(layer, corpus=corpus(lm), steps=10)
    edits = [case.edits for case in cases[:6]]

    def one_by_one(reuse: bool) -> list[Delta]:
        lm.reuse_prefix = reuse
        with editing_mode():
            return [editor.propose(lm, group) for group in edits]

    def together() -> list[Delta]:
        lm.reuse_prefix = True
        with editing_mode():
            return editor.propose_each(lm, edits)

    def plain() -> list[Delta]:
        """The whole network in every step, all logits."""
        return one_by_one(reuse=False)

    ways = {"one after the other": lambda: one_by_one(reuse=True), "together": together}
    expected = plain()
    for how, ours in ways.items():
        found = ours()
        apart = difference(expected, found)
        require_close(lm, apart, 1e-3)
        steps = [[d.metadata["notes"][0]["iterations"] for d in way] for way in (expected, found)]
        if lm.net.dtype == torch.float32 and steps[0] != steps[1]:
            raise AssertionError(f"the two ways took {steps[0]} and {steps[1]} steps")
        yield ratio(f"ROME, 6 edits {how} (updates agree to {apart:.0e})", plain, ours, rounds)
