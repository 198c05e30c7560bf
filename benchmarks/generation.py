"""Free answers: every batch whole to its end over its whole texts, or without what has been said already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.side_by_side import ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel

SHOWN, ASKED = 12, 32


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    edits = [case.edits[0] for case in cases]
    shown = "".join(f"{edit.text} {edit.target_new}.\n" for edit in edits[:SHOWN])
    asked = [edit.text for edit in edits[SHOWN:][:ASKED]]
    for name, prompts, tokens, stop in (
        (
            f"{len(asked)} lines after the same {SHOWN}, read before",
            [shown + text for text in asked],
            24,
            "\n",
        ),
        (f"{len(asked)} texts of 64 tokens", asked, 64, None),
    ):
        plain, ours = (
            partial(_answers, lm, prompts, tokens, stop, reuse) for reuse in (False, True)
        )
        require_close(lm, float(plain() != ours()), 0.0)
        yield ratio(name, plain, ours, rounds)


def _answers(
    lm: LanguageModel, prompts: Sequence[str], tokens: int, stop: str | None, reuse: bool
) -> list[str]:
    lm.reuse.enabled = reuse
    with lm.reuse.common_prefix():
        return lm.generate(prompts, tokens, stop=[stop] if stop else [])
