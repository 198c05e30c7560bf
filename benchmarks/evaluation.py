"""Evaluation of independent edits: one after the other, or side by side over a shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.side_by_side import corpus, ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.evaluation.module import Conditions, EditingModule
from corrigenda.modules.model.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    cases, module = cases[:16], EditingModule(lm)
    editor = ROME(lm.structure.num_layers // 10, corpus=corpus(lm), steps=2)
    with editing_mode():
        deltas = editor.propose_each(lm, [case.edits for case in cases])

    def reference() -> list[dict[str, float]]:
        lm.reuse.enabled = False
        results = []
        for case, delta in zip(cases, deltas, strict=True):
            module.conditions = Conditions(case_deltas=[delta])
            results += [result.metrics for result in module.evaluate([case])]
        return results

    def ours() -> list[dict[str, float]]:
        lm.reuse.enabled = True
        module.conditions = Conditions(case_deltas=deltas)
        return [result.metrics for result in module.evaluate(cases)]

    for a, b in zip(reference(), ours(), strict=True):
        require_close(lm, max(abs(a[name] - b[name]) for name in a), 1e-3)
    yield ratio(f"evaluation of {len(cases)} edited cases", reference, ours, rounds)
