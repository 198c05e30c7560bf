"""Generation: every batch over its complete prompts until its last row ends, or with reuse of common prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.side_by_side import ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel

SHOWN, COUNT = 12, 32


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    edits = [case.edits[0] for case in cases]
    shown = "".join(f"{edit.text} {edit.target_new}.\n" for edit in edits[:SHOWN])
    texts = [edit.text for edit in edits[SHOWN:][:COUNT]]
    for name, prompts, tokens, stop in (
        (
            f"{len(texts)} prompts with a common prefix of {SHOWN} lines, which is cached",
            [shown + text for text in texts],
            24,
            "\n",
        ),
        (f"{len(texts)} texts of 64 tokens", texts, 64, None),
    ):
        reference, ours = (
            partial(_answers, lm, prompts, tokens, stop, reuse) for reuse in (False, True)
        )
        require_close(lm, float(reference() != ours()), 0.0)
        yield ratio(name, reference, ours, rounds)


def _answers(
    lm: LanguageModel, prompts: Sequence[str], tokens: int, stop: str | None, reuse: bool
) -> list[str]:
    lm.reuse.enabled = reuse
    with lm.reuse.common_prefix():
        return lm.generate(prompts, tokens, stop=[stop] if stop else [])
