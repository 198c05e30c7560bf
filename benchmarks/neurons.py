"""Knowledge neurons: attributions in all layers, with the points of the integral one by one or in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.side_by_side import ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.editors.kn import attributions
from corrigenda.modules.model.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    edit = cases[0].edits[0]
    fact = lm.tokens.rows([edit.text], [str(edit.target_true)])

    def run(reuse: bool) -> torch.Tensor:
        lm.reuse.enabled = reuse
        return attributions(lm, fact, points=10, batch_rows=10 if reuse else 1)

    reference, ours = run(False), run(True)
    found = ((reference - ours).norm() / reference.norm()).item()
    require_close(lm, found, 1e-3)
    name = f"KN, attributions in all layers, 10 points (agree to {found:.0e})"
    yield ratio(name, lambda: run(False), lambda: run(True), rounds)
