"""MEMIT: the insertion of given values, and a batch of edits end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import corpus, difference, ratio, require_close
from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel


class GivenValues(MEMIT):
    """MEMIT with random values instead of optimised ones, so that only their insertion is timed."""

    def _search(
        self, lm: LanguageModel, edits: Sequence[Edit], site: str, v0_ND: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        generator = torch.Generator().manual_seed(0)
        random_ND = torch.randn(v0_ND.shape, generator=generator).to(v0_ND)
        change_ND = (
            0.5 * v0_ND.norm(dim=1, keepdim=True) * random_ND / random_ND.norm(dim=1, keepdim=True)
        )
        return change_ND, [{"loss": 0.0, "nll": 0.0, "iterations": 0} for _ in edits]


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    """Insertions of given values, and one round of a batch end to end, which takes minutes."""
    for count in (1, 10, 50):
        reference, ours = _ways(lm, cases[:count], GivenValues)
        found = difference([reference()], [ours()])
        require_close(lm, found, 1e-3)
        name = f"MEMIT, insertion of {count} edit{'s' * (count > 1)} (updates agree to {found:.0e})"
        yield ratio(name, reference, ours, rounds)
    deltas: list[Delta] = []
    reference, ours = _ways(lm, cases[:100], MEMIT, steps=5)
    name = "MEMIT, 100 edits end to end, 5 steps each, one round"
    row = ratio(name, lambda: deltas.append(reference()), lambda: deltas.append(ours()), rounds=1)
    require_close(lm, difference(deltas[:1], deltas[1:]), 1e-3)
    yield row


def _ways(
    lm: LanguageModel,
    cases: Sequence[EditCase],
    kind: type[MEMIT],
    **changes: Any,  # noqa: ANN401
) -> tuple[Callable[[], Delta], Callable[[], Delta]]:
    """Functions that compute the update of some edits, along the reference path and with reuse."""
    settings: dict[str, Any] = {"ridge": 0.1, "corpus": corpus(lm)} | changes
    first = lm.structure.num_layers // 10
    layers = list(range(max(0, first - 3), first + 1))
    edits = [case.edits[0] for case in cases]

    def way(reuse: bool, parallel: int) -> Callable[[], Delta]:
        editor = kind(layers, parallel=parallel, **settings)

        def run() -> Delta:
            lm.reuse.enabled = reuse
            with editing_mode():
                return editor.propose(lm, edits)

        return run

    return way(False, 1), way(True, 16)
