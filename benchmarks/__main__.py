"""Speed as ratios against the plain way, both timed in one process on the same edits.

    python -m benchmarks [NAME ...] [--rounds 5] [--model smollm2] [--dtype bfloat16] [--device cuda]

The plain way is our own code with ``reuse_prefix: false`` and ``parallel: 1``: the whole network for every
step, one edit at a time, all logits. A script per claim; each first checks that both ways give the same result
(in float32; with less precise weights it says how far they are apart).
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks import evaluation, generation, learned, memit, moments, neurons, retrieval, values
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    shapes = f"as for corrigenda, or {', '.join(SHAPES)} with random weights"
    parser.add_argument("--model", default="smollm2", help=shapes)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    if unknown := set(args.names) - SCRIPTS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
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
