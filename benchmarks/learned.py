"""MEND: a training step, each pass through the whole network or all over a shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.side_by_side import ratio
from datamodules.records import EditCase
from modules.editors.mend import MEND
from modules.lm import LanguageModel


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    editor = MEND(lm)
    chosen = ([c.edits[0] for c in cases[:8]], [c.probes["generality"][0] for c in cases[:8]],
              [c.probes["unrelated"][0] for c in cases[:8]])  # fmt: skip

    def step(reuse: bool) -> tuple[float, float]:
        lm.reuse_prefix = reuse
        edit_loss, kl = editor._losses(*chosen)
        (edit_loss + kl).backward()
        editor.zero_grad()
        return edit_loss.item(), kl.item()

    plain, ours = step(False), step(True)
    if any(abs(a - b) > 1e-2 * max(1, abs(a)) for a, b in zip(plain, ours, strict=True)):
        raise AssertionError(f"the two ways differ: {plain} and {ours}")
    name = "MEND, one training step of 8 edits"
    yield ratio(name, lambda: step(False), lambda: step(True), rounds)
