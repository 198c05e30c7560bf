"""Speed-ups over the reference path, both timed in one process on the same edits.

    python -m benchmarks [NAME ...] [--rounds 5] [--model smollm2] [--dtype bfloat16] [--device cuda]

The reference path is this project's code with ``reuse_prefix: false`` and ``parallel: 1``: the whole network in
every step, one edit at a time, all logits. Each benchmark first checks that both give the same result (in float32;
with less precise weights it reports the difference).
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks import (
    abilities,
    evaluation,
    generation,
    learned,
    memit,
    moments,
    neurons,
    retrieval,
    values,
)
from benchmarks.shapes import SHAPES, RandomModel
from benchmarks.side_by_side import HEADER
from corrigenda.datamodules.facts import Facts
from corrigenda.modules.model.lm import LanguageModel

SCRIPTS = {
    "values": values,
    "memit": memit,
    "neurons": neurons,
    "moments": moments,
    "learned": learned,
    "evaluation": evaluation,
    "generation": generation,
    "retrieval": retrieval,
    "abilities": abilities,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(SCRIPTS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    shapes = f"as for corrigenda, or {', '.join(SHAPES)} with random weights"
    parser.add_argument("--model", default="smollm2", help=shapes)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    if unknown := set(args.names) - SCRIPTS.keys():
        parser.error(
            f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(SCRIPTS)}"
        )
    kind = RandomModel if args.model in SHAPES else LanguageModel
    lm = kind(args.model, dtype=args.dtype, device=args.device)
    cases = Facts().cases("test")
    where = f"{torch.get_num_threads()} threads"
    if lm.device.type == "cuda":
        where = torch.cuda.get_device_name(lm.device)
    sys.stderr.write(f"{args.model}, {args.dtype}, {where}\n")
    sys.stdout.write(HEADER)
    for name in args.names or SCRIPTS:
        for row in SCRIPTS[name].rows(lm, cases, args.rounds):
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
