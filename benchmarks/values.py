"""ROME: whole edits whose value search reuses stored states, for single facts and for several together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.side_by_side import corpus, difference, ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    """Six facts, each in a round of its own, and all together; 10 steps in 21 contexts.

    A step runs the tokens from the subject on, which are most of the text if the subject is early.
    """
    layer = lm.structure.num_layers // 10
    editor = ROME(layer, corpus=corpus(lm), steps=10)
    edits = [case.edits for case in cases[:6]]

    def one_by_one(reuse: bool) -> Iterator[Delta]:
        for group in edits:
            lm.reuse.enabled = reuse
            with editing_mode():
                delta = editor.propose(lm, group)
            yield delta

    def reference() -> list[Delta]:
        """Runs the whole network in every step, with all logits."""
        return list(one_by_one(reuse=False))

    def together() -> list[Delta]:
        lm.reuse.enabled = True
        with editing_mode():
            return editor.propose_each(lm, edits)

    expected = reference()
    errors = []
    for found in (list(one_by_one(reuse=True)), together()):
        errors.append(difference(expected, found))
        require_close(lm, errors[-1], 1e-3)
        steps = [[d.metadata["notes"][0]["iterations"] for d in way] for way in (expected, found)]
        if lm.net.dtype == torch.float32 and steps[0] != steps[1]:
            raise AssertionError(f"the two searches took {steps[0]} and {steps[1]} steps")
    reference_each, ours_each = one_by_one(reuse=False), one_by_one(reuse=True)
    yield ratio(f"ROME, 1 edit, six in turn (updates agree to {errors[0]:.0e})",
                lambda: next(reference_each), lambda: next(ours_each), len(edits))  # fmt: skip
    name = f"ROME, 6 edits together (updates agree to {errors[1]:.0e})"
    yield ratio(name, reference, together, rounds)
