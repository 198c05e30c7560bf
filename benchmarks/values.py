"""ROME's edits: the search for values from stored states, of several facts together, and the whole edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.side_by_side import difference, ratio, require_close
from datamodules.records import EditCase
from modules.editing import Delta, editing_mode
from modules.editors.rome import ROME
from modules.lm import LanguageModel
from modules.moments import Corpus


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    """One fact, and six together: the same edits and steps in both ways, in ROME's 21 contexts."""
    yield _row(lm, cases[:1], rounds, "ROME, 1 edit, 10 steps", steps=10)
    yield _row(lm, cases[:6], rounds, "ROME, 6 edits, 5 steps each", steps=5)


def _row(lm: LanguageModel, cases: Sequence[EditCase], rounds: int, name: str, steps: int) -> str:
    layer = lm.structure.num_layers // 10
    corpus = Corpus("facts", max(20_000, 10 * lm.structure.inner_width))
    editor = ROME(layer, corpus=corpus, steps=steps)
    edits = [case.edits for case in cases]

    def plain() -> list[Delta]:
        """The whole network in every step, one edit at a time, all logits."""
        lm.reuse_prefix = False
        with editing_mode():
            return [editor.propose(lm, group) for group in edits]

    def ours() -> list[Delta]:
        lm.reuse_prefix = True
        with editing_mode():
            return editor.propose_each(lm, edits)

    one, other = plain(), ours()
    found = difference(one, other)
    require_close(lm, found, 1e-3)
    searched = [[d.metadata["notes"][0]["iterations"] for d in way] for way in (one, other)]
    if lm.net.dtype == torch.float32 and searched[0] != searched[1]:
        raise AssertionError(f"the two ways took {searched[0]} and {searched[1]} steps")
    return ratio(f"{name} (updates agree to {found:.0e})", plain, ours, rounds)
