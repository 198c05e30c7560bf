"""RECT: writes only the largest relative changes of an edit (Gu et al., 2024, arXiv 2401.04700).

Of another editor's update D of a weight W, the entries with the largest relative change of W are kept as they
are, and all others are set to zero:

    D'_ij = D_ij  where  |D_ij| / (|W_ij| + eps)  is among the largest ``keep`` of all, else 0

W is the weight when the edit is made, including earlier edits. The result is no longer of low rank. Several edits
written in one call are regularised once, on their sum.

Departures from the authors' code: eps is added to |W|, since adding it to W itself can change the sign of small
weights; the number of entries kept is exact; biases are regularised like weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.model.delta import Delta, Update
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import read_parameter

EPS = 1e-8


class RECT(WeightEditor):
    """Keeps a share of the entries of another editor's updates.

    Args:
        editor: the method whose updates are regularised.
        keep: share of the entries kept, per parameter: 0 keeps none, 1 all. The paper's results are for 0.2,
            those in AlphaEdit's comparison for 0.4.
    """

    def __init__(self, editor: WeightEditor, keep: float = 0.4) -> None:
        checks.between(0, 1, keep=keep)
        self.editor, self.keep = editor, keep

    def check(self, lm: LanguageModel) -> None:
        self.editor.check(lm)

    def prepare(self, lm: LanguageModel) -> None:
        self.editor.prepare(lm)

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return self._regularised(lm, self.editor.propose(lm, edits))

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        return [self._regularised(lm, delta) for delta in self.editor.propose_each(lm, edits)]

    def _regularised(self, lm: LanguageModel, delta: Delta) -> Delta:
        if self.keep == 1:
            return delta
        kept: dict[str, Update] = {
            name: largest_changes(
                delta.dense(name, torch.float32), read_parameter(lm.net, name), self.keep
            )
            for name in delta.updates
        }
        return Delta(kept, delta.metadata)


def largest_changes(update: Tensor, weight: Tensor, keep: float) -> Tensor:
    """The ceil(keep * size) entries of the update that are largest relative to the weight, and zeros elsewhere."""
    change = (update.abs() / (weight.to(update).abs() + EPS)).flatten()
    count = math.ceil(round(keep * change.numel(), 6))  # 0.07 * 100 is a little more than 7
    kept = change.topk(count, sorted=False).indices
    return torch.zeros_like(change).index_put((kept,), update.flatten()[kept]).view_as(update)
