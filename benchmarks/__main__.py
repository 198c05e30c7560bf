"""Speed as ratios against the plain way, both timed in one process on the same edits.

    python -m benchmarks [--rounds 5] [--model smollm2]

The plain way is our own code with ``reuse_prefix: false`` and ``parallel: 1``: the whole network for every
step, one edit at a time, all logits. Each line first checks that both ways give the same result; a faster wrong
answer fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from datamodules.facts import Facts
from datamodules.records import EditCase
from modules.editing import Delta, WeightEditor, editing_mode
from modules.editors.kn import attributions
from modules.editors.memit import MEMIT
from modules.editors.mend import MEND
from modules.editors.rome import ROME
from modules.evaluation import EditingModule
from modules.lm import LanguageModel
from modules.moments import Corpus, Moments


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(name: str, plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> str:
    """One table row: both warmed up, then in turn; the median of the rounds' ratios and their range."""
    plain(), ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    median_plain, median_ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return (
        f"| {name} | {median_plain:.2f} | {median_ours:.2f} | {statistics.median(ratios):.1f} "
        f"| {min(ratios):.1f} to {max(ratios):.1f} |"
    )


def error(a: list[Delta], b: list[Delta]) -> float:
    """Largest relative difference between the updates of two ways."""
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        for name in left.updates:
            x, y = left.dense(name), right.dense(name)
            worst = max(worst, ((x - y).norm() / x.norm()).item())
    return worst


def side_by_side(
    lm: LanguageModel,
    cases: list[EditCase],
    rounds: int,
    name: str,
    make: Callable[..., WeightEditor],
) -> list[str]:
    """An editor's updates of one and of eight facts that do not know of each other."""
    slow, fast = make(parallel=1), make(parallel=8)
    rows = []
    for count in (1, 8):
        edits = [case.edits for case in cases[:count]]

        def run(editor: WeightEditor, reuse: bool, edits: list = edits) -> list[Delta]:
            lm.reuse_prefix = reuse
            with editing_mode():
                if reuse:
                    return editor.propose_each(lm, edits)
                return [editor.propose(lm, group) for group in edits]

        found = error(run(slow, False), run(fast, True))
        assert found < 1e-3, f"the two ways differ by {found}"
        label = f"{name}, {count} edit{'s' if count > 1 else ''} (updates agree to {found:.0e})"
        rows.append(ratio(label, lambda r=run: r(slow, False), lambda r=run: r(fast, True), rounds))
    return rows


def neurons(lm: LanguageModel, cases: list[EditCase], rounds: int) -> str:
    """Attributions in all layers: each point of the integral through the whole network, or all together."""
    edit = cases[0].edits[0]
    rows = lm.rows([edit.text], [str(edit.target_true)])

    def run(reuse: bool) -> torch.Tensor:
        lm.reuse_prefix = reuse
        return attributions(lm, rows, points=20, batch_rows=20 if reuse else 1)

    plain, ours = run(False), run(True)
    found = ((plain - ours).norm() / plain.norm()).item()
    assert found < 1e-3, f"the two ways differ by {found}"
    return ratio(
        f"KN, attributions in all layers (agree to {found:.0e})",
        lambda: run(False),
        lambda: run(True),
        rounds,
    )


def moments(lm: LanguageModel, rounds: int) -> str:
    """Second moments of five layers: a pass over the text for each, or one for all."""
    layers, found = [1, 2, 3, 4, 5], {}

    def gather(groups: list[list[int]]) -> dict[int, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            service = Moments(lm, Corpus("facts", 6_000), Path(folder))
            for group in groups:
                found.update(service.gather(group, progress=False))
        return dict(found)

    apart, together = gather([[n] for n in layers]), gather([layers])
    assert all(torch.allclose(apart[n], together[n], rtol=1e-5) for n in layers)
    return ratio(
        "second moments, five layers",
        lambda: gather([[n] for n in layers]),
        lambda: gather([layers]),
        rounds,
    )


def mend(lm: LanguageModel, cases: list[EditCase], rounds: int) -> str:
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
    assert all(abs(a - b) < 1e-2 * max(1, abs(a)) for a, b in zip(plain, ours, strict=True))
    return ratio(
        "MEND, one training step of 8 edits", lambda: step(False), lambda: step(True), rounds
    )


def evaluation(lm: LanguageModel, cases: list[EditCase], rounds: int) -> str:
    """16 cases under their own edits: one after the other, or side by side over a shared prefix."""
    module = EditingModule(lm)
    editor = ROME(3, corpus=Corpus("facts", 50_000), steps=2)
    with editing_mode():
        deltas = editor.propose_each(lm, [case.edits for case in cases])

    def plain() -> list[dict]:
        lm.reuse_prefix = False
        results = []
        for case, delta in zip(cases, deltas, strict=True):
            module.case_deltas = [delta]
            results += [result.metrics for result in module.evaluate([case])]
        return results

    def ours() -> list[dict]:
        lm.reuse_prefix = True
        module.case_deltas = deltas
        return [result.metrics for result in module.evaluate(cases)]

    for a, b in zip(plain(), ours(), strict=True):
        assert all(abs(a[name] - b[name]) < 1e-3 for name in a), "the two ways differ"
    return ratio(f"evaluation of {len(cases)} edited cases", plain, ours, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    lm = LanguageModel(args.model, device=args.device)
    cases = Facts().cases("test")[:16]
    sys.stdout.write("| | plain, s | ours, s | ratio | range |\n| --- | --- | --- | --- | --- |\n")
    corpus = Corpus("facts", 50_000)
    rounds = args.rounds
    work: list[Callable[[], list[str]]] = [
        lambda: side_by_side(lm, cases, rounds, "ROME", partial(ROME, 3, corpus=corpus)),
        lambda: side_by_side(
            lm, cases, rounds, "MEMIT", partial(MEMIT, [0, 1, 2, 3], 0.1, corpus=corpus)
        ),
        lambda: [neurons(lm, cases, rounds)],
        lambda: [moments(lm, rounds)],
        lambda: [mend(lm, cases, rounds)],
        lambda: [evaluation(lm, cases, rounds)],
    ]
    for rows in work:
        sys.stdout.write("".join(f"{row}\n" for row in rows()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
