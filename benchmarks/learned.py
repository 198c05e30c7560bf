"""MEND: a training step, each pass through the whole network, or over what is kept of the texts.

New texts are those of a first epoch: what the frozen blocks make of them is computed, once for all passes, and
kept. Cached ones have been seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.side_by_side import ratio, require_close
from datamodules.records import EditCase
from modules.editors.mend import MEND
from modules.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    last = lm.structure.num_layers
    lm.cache_disk_gib = 0
    for layers in ([last - n for n in (6, 5, 4, 3)], [last - n for n in (3, 2, 1)]):
        editor = MEND(lm, layers)
        editor.observe(cases)
        for count in (1, 8):
            yield from _steps(editor, cases[:count], rounds)
    lm.drop_prefix()


def _steps(editor: MEND, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    lm, layers = editor.lm, editor.layers
    chosen = ([case.edits[0] for case in cases], [case.probes["generality"][0] for case in cases],
              [case.probes["unrelated"][0] for case in cases])  # fmt: skip

    def step(reuse: bool, new: bool = False) -> tuple[list[float], Tensor]:
        """Losses, and their gradient in the editor's weights."""
        lm.reuse_prefix = reuse
        if new:
            lm.keep_prefix(layers[0], lm.structure.num_layers)
        editor.zero_grad()
        edit_loss, kl = editor._losses(*chosen)
        (edit_loss + kl).backward()
        gradients = [p.grad.flatten() for p in editor.parameters() if p.grad is not None]
        return [edit_loss.item(), kl.item()], torch.cat(gradients)

    plain, gradient = step(False)
    for losses, same in (step(True, new=True), step(True)):
        apart = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain, losses, strict=True)]
        require_close(lm, max(apart), 1e-4)
        require_close(lm, ((gradient - same).norm() / gradient.norm()).item(), 1e-4)
    edits = "1 edit" if len(cases) == 1 else f"{len(cases)} edits"
    for new, texts in ((True, "new"), (False, "cached")):
        name = f"MEND on blocks {layers[0]} to {layers[-1]}, a step of {edits}, {texts} texts"
        yield ratio(name, lambda: step(False), lambda new=new: step(True, new), rounds)  # type: ignore[misc]
