"""What the formulas say of three published models and of a million edits: the tables of docs/scaling.md.

python -m benchmarks.on_paper
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from benchmarks.cost import SINGLE, Cost, Shape, Text, size
from benchmarks.formulas import (
    VECTOR,
    attention,
    fine_tuned,
    grace,
    in_context,
    ke,
    lora,
    malmen,
    memit,
    mend,
    mend_step,
    neurons,
    rome,
    wise,
)

HEADER = (
    "| | held | peak | kept | file | token-blocks | seconds |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)
MODELS = {
    "GPT-2 XL": Shape(48, 1600, 6400, 50_257, 1600, 1600, inputs=1, tied=True),
    "Llama-2 7B": Shape(32, 4096, 11_008, 32_000, 4096, 4096, bytes=2),
    "Llama-3 70B": Shape(80, 8192, 28_672, 128_256, 8192, 1024, bytes=2),
}
FACT = Text(whole=12, after=6, answer=2, context=8)
RATE, BANDWIDTH = (
    100e12,
    2e12,
)  # operations and bytes per second of the accelerator that the tables assume


def methods(shape: Shape) -> dict[str, Callable[[Shape, Text], Cost]]:
    """Every method with settings like the published ones, on a model of any depth."""
    low, high = shape.layers // 6, 5 * shape.layers // 6
    spread = [low - 1 + n for n in range(5)]
    answered = partial(in_context, demonstrations=0, each=FACT.whole)
    return {
        "ROME": partial(rome, layer=low),
        "MEMIT, 1 edit": partial(memit, layers=spread, edits=1),
        "MEMIT, 100 edits": partial(memit, layers=spread, edits=100),
        "AlphaEdit, 100 edits": partial(memit, layers=spread, edits=100, keeps_keys=True),
        "KN": neurons,
        "FT, FT-M": partial(fine_tuned, layer=2 * shape.layers // 3),
        "LoRA": partial(lora, layers=shape.layers, targets=attention(shape), steps=70),
        "MEND": mend,
        "MEND, a training step": mend_step,
        "KE": ke,
        "MALMEN, 512 edits": partial(malmen, edits=512),
        "GRACE": partial(grace, layer=high),
        "WISE": partial(wise, layer=high),
        "IKE, a first question": in_context,
        "SERAC, a question in scope": answered,
    }


def table(shape: Shape) -> str:
    """What every method costs on one model, as a table."""
    text = HEADER
    pause = shape.block * shape.bytes / BANDWIDTH
    for name, cost_of in methods(shape).items():
        cost = cost_of(shape, FACT)
        sizes = " | ".join(size(n) for n in (cost.held, cost.peak, cost.kept, cost.disk))
        blocks = f"{cost.forward:.2g} + {cost.trained:.2g}"
        text += f"| {name} | {sizes} | {blocks} | {cost.seconds(shape, RATE, pause):.2g} |\n"
    return text


def million(shape: Shape) -> str:
    """What is kept of a million edits, as a table: by methods whose memory grows, and by those whose does not."""
    edits = 10**6
    rows = {
        "one dense matrix per edited block (ROME, MEMIT, FT; five blocks)": 5
        * SINGLE
        * shape.matrix,
        "a file for each of ROME's edits": edits * rome(shape, FACT, shape.layers // 6).disk,
        "keys of AlphaEdit and MEMIT-seq, five blocks": edits * 5 * SINGLE * shape.inner,
        "GRACE's codebook": edits * grace(shape, FACT, shape.layers // 2).kept,
        "WISE, merged": SINGLE * shape.matrix,
        "vectors of IKE, SERAC, MeLLo": edits * SINGLE * VECTOR,
    }
    lines = [f"| {name} | {size(number)} |\n" for name, number in rows.items()]
    return "| | bytes |\n| --- | --- |\n" + "".join(lines)


def main() -> None:
    for name, shape in MODELS.items():
        sys.stdout.write(f"\n{name}, {size(shape.weights)}\n\n{table(shape)}")
    sys.stdout.write("\n" + million(MODELS["Llama-2 7B"]))


if __name__ == "__main__":
    main()
