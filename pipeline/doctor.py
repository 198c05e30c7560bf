"""``corrigenda doctor``: a model's structure, where to edit it, and a test edit that is applied and removed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.pytorch_utils import Conv1D

from corrigenda.datamodules.corpus import texts
from corrigenda.datamodules.facts import Facts
from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.files import replacing, write_text
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.model.structure import is_linear, is_quantised, sizes
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.first_tokens import first_token_shares
from corrigenda.modules.statistics.moments import Moments
from corrigenda.modules.statistics.tracing import (
    LAST_SUBJECT,
    ROLES,
    SITES,
    CausalTrace,
    causal_trace,
)
from corrigenda.pipeline.errors import UserError

MAX_FIRST_SHARE = 0.25  # of trace(C) from first tokens; layers above it are not proposed
OF_PEAK = 0.5  # the range consists of layers with at least this share of the largest effect
MAX_MEMIT_LAYERS = 5
BATCH = 64  # facts scored per call, in search of known ones
MAX_SCORED = 1024
MEASURED_TEXTS = 512  # for the share of first tokens


@dataclass(frozen=True)
class Proposal:
    """Where to edit.

    Attributes:
        rome: the layer for ROME and other single-layer methods.
        layers: the range that it is taken from.
        memit: consecutive layers for MEMIT.
        mend: layers for MEND.
        reason: a short explanation.
    """

    rome: int
    layers: list[int]
    memit: list[int]
    mend: list[int]
    reason: str


def doctor(
    lm: LanguageModel,
    out: Path | None = None,
    facts: int = 5,
    samples: int = 3,
    tokens: int | None = None,
) -> None:
    """Inspects a model: its structure, tokenizer, memory, where to edit it, and a test edit applied and removed.

    Args:
        lm: the model.
        out: folder for the heat map and the configuration (default: runs/doctor-MODEL).
        facts: number of known facts that are traced to find the layers.
        samples: number of noise samples per fact.
        tokens: number of tokens for the second moment of the test edit (default: ten times the key width, at least
            50,000).
    """
    checks.whole(1, facts=facts, samples=samples, tokens=tokens)
    out = out or Path("runs") / f"doctor-{Path(lm.name).name}"
    edits = [case.edits[0] for case in Facts().cases("train")]
    _show("Model", _structure(lm))
    _show("Tokenizer", _tokenizer(lm, edits[:BATCH]))
    _show("Memory, without activations", _memory(lm))
    known = _known(lm, edits, facts)
    trace = causal_trace(lm, known, samples, progress=True) if known else None
    _show("Causal trace", _traced(trace, known, out))
    shares = first_token_shares(lm, _few_texts())
    proposal = propose_layers(trace, shares)
    _show("First tokens' share of trace(C), by block", _shares(shares))
    corpus = Corpus("facts", tokens or moment_tokens(lm))
    _show("Where to edit", _proposed(lm, proposal, corpus, out))
    edit = (known or edits)[0]
    self_test(lm, edit, proposal.rome, corpus)
    _show("Self-test", [
        f"ROME at block {proposal.rome}: {edit.text!r} -> {edit.target_new!r}: every token is predicted",
        "removed again: all weights are restored bit-exactly",
    ])  # fmt: skip


def _show(title: str, lines: Sequence[str]) -> None:
    sys.stdout.write(f"{title}\n" + "".join(f"  {line}\n" for line in lines) + "\n")
    sys.stdout.flush()


def _pairs(found: dict[str, Any]) -> list[str]:
    width = max(map(len, found))
    return [f"{name:<{width}}  {value}" for name, value in found.items()]


# ---------------------------------------------------------------------------- structure, tokenizer, memory


def _structure(lm: LanguageModel) -> list[str]:
    structure, block = lm.structure, lm.net.get_submodule(lm.structure.block_name(0))
    out = lm.net.get_submodule(structure.out_name(0))
    stored = "[in, out], transposed" if isinstance(out, Conv1D) else "[out, in]"
    norms = [name for name, m in block.named_modules() if "norm" in type(m).__name__.lower()]
    quantised = [name for name, m in lm.net.named_modules() if is_linear(m) and is_quantised(m)]
    scale = structure.residual_scale
    added = "normalised before it is added" if scale is None else f"added, times {scale:g}"
    return _pairs({
        "model": f"{lm.name} ({lm.net.config.model_type}, {_count(lm):,} parameters, {lm.net.dtype})",
        "blocks": f"{structure.num_layers} at {structure.blocks}, width {structure.width}",
        "MLP output projection": f"{structure.out_proj}, {structure.inner_width} -> {structure.width}, "
                                 f"stored {stored}",
        "MLP input projections": f"{', '.join(structure.in_projs)} ({'gated' if structure.gated else 'plain'})",
        "MLP output": added,
        "attention": structure.attention or "not found",
        "norms in a block": ", ".join(norms) or "none",
        "final norm": structure.final_norm or "none",
        "head": f"{structure.head}, {'tied' if structure.tied else 'not tied'} to the embedding",
        "quantised": f"{len(quantised)} linear layers, such as {quantised[0]}" if quantised else "no",
        "context length": f"{lm.max_length} tokens" if lm.max_length else "no limit",
    })  # fmt: skip


def _count(lm: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in lm.net.parameters())


def _tokenizer(lm: LanguageModel, edits: Sequence[Edit]) -> list[str]:
    tokenizer = lm.tokenizer
    special = set(tokenizer.all_special_ids)
    (one,) = lm.tokens.encode(["a"])
    begins = [tokenizer.convert_ids_to_tokens(i) for i in one if i in special]
    merges = lm.tokens.num_boundary_merges
    rows = lm.tokens.rows([e.text for e in edits], [str(e.target_true) for e in edits])
    merged, lm.tokens.num_boundary_merges = lm.tokens.num_boundary_merges - merges, merges
    alone = lm.tokens.encode([str(e.target_true) for e in edits])
    differ = 0
    for r, ids in enumerate(alone):
        target = rows.ids_BT[r, int(rows.start_B[r]) : int(rows.length_B[r])].tolist()
        differ += [i for i in ids if i not in special] != target
    year = lm.tokens.rows(["It was in"], ["1984"])
    digits = int(year.length_B[0] - year.start_B[0])
    total = len(edits)
    spare = lm.net.get_output_embeddings().weight.shape[0] - len(tokenizer)
    return _pairs({
        "special tokens added first": ", ".join(begins) or "none",
        "special tokens added last": "one, which is removed" if lm.tokens.appends else "none",
        "prompt + target": f"{total - merged} of {total} prompts have the same tokens when a target follows",
        "leading space": f"{differ} of {total} targets have different tokens alone than after a prompt",
        "numbers": f"' 1984' is {digits} token{'s' * (digits > 1)}",
        "padding": f"token {tokenizer.pad_token!r}, on the {tokenizer.padding_side} by default; "
                   "here always masked and on the right",
        "character offsets": "yes" if tokenizer.is_fast else "no: subjects cannot be located, so edits will fail",
        "vocabulary": f"{len(tokenizer):,} tokens; {spare:,} rows of the head have none",
    })  # fmt: skip


def _memory(lm: LanguageModel) -> list[str]:
    structure = lm.structure
    inputs, outputs = sizes(lm.net.get_submodule(structure.out_name(0)))
    of_weight = next(lm.net.parameters()).element_size()
    spare = inputs * outputs * of_weight
    with torch.device("meta"):
        mend = MEND(lm)
    learned = [p for name, p in mend.named_parameters() if not name.startswith("lm.")]
    editor = sum(p.numel() for p in learned)
    matrices = sum(math.prod(sizes(lm.net.get_submodule(name))) for name in mend.names)
    stored = sum(p.numel() * p.element_size() for p in lm.net.parameters())
    return _pairs({
        "model": _bytes(stored),
        "ROME, MEMIT": f"{_bytes(16 * inputs**2)} per edited block for the second moment and its factor, "
                       f"{_bytes(spare)} to undo it",
        "MEND": f"{editor:,} parameters: {_bytes(4 * editor)} to edit, {_bytes(16 * editor)} to train; "
                f"{_bytes(matrices * of_weight)} to undo (blocks {mend.layers[0]} to {mend.layers[-1]})",
        "FT, one block": f"{_bytes(16 * inputs * outputs)} for the update, its gradient and Adam; "
                         f"{_bytes(spare)} to undo it",
        "KN": f"{_bytes(spare)} per block with a neuron, to undo it",
    })  # fmt: skip


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} GiB"


# ---------------------------------------------------------------------------- where to edit


def _known(lm: LanguageModel, edits: Sequence[Edit], wanted: int) -> list[Edit]:
    """The first ``wanted`` facts of which the model predicts every token."""
    found: list[Edit] = []
    for begin in range(0, min(len(edits), MAX_SCORED), BATCH):
        part = edits[begin : begin + BATCH]
        right = lm.score([e.text for e in part], [str(e.target_true) for e in part]).exact_B
        found += [edit for edit, yes in zip(part, right.tolist(), strict=True) if yes]
        if len(found) >= wanted:
            break
    return found[:wanted]


def _few_texts() -> list[str]:
    source = texts("facts")
    return [text for _, text in zip(range(MEASURED_TEXTS), source, strict=False)]


def propose(lm: LanguageModel, facts: int = 5, samples: int = 3) -> Proposal:
    """Where to edit a model, from a causal trace of facts that it knows."""
    edits = [case.edits[0] for case in Facts().cases("train")]
    known = _known(lm, edits, facts)
    trace = causal_trace(lm, known, samples, progress=True) if known else None
    return propose_layers(trace, first_token_shares(lm, _few_texts()))


def moment_tokens(lm: LanguageModel) -> int:
    """Tokens for a second moment: ten times the key width, at least 50,000."""
    return max(50_000, 10 * lm.structure.inner_width)


def propose_layers(trace: CausalTrace | None, shares: Sequence[float]) -> Proposal:
    """Layers to edit, from a causal trace (None if the model knows no fact) and the shares of first tokens.

    The range consists of consecutive blocks around the one whose MLP has the largest effect at the subject's last
    token. All of them have at least half of that effect, and a small share of first tokens in C. Its lowest block
    is proposed, because side effects grow with depth and the peak of a trace is not where editing works best (Hase
    et al., 2023, arXiv 2301.04213).
    """
    depth = len(shares)
    usable = [layer for layer, share in enumerate(shares) if share <= MAX_FIRST_SHARE]
    usable = usable or [min(range(depth), key=lambda layer: shares[layer])]
    mend = list(range(max(0, depth - 3), depth))
    effect_L = None if trace is None else trace.effect["mlp"][LAST_SUBJECT].nan_to_num(0.0)
    if effect_L is None or max(effect_L[usable].tolist()) <= 0:
        early = [layer for layer in usable if depth // 10 <= layer <= depth // 2]
        layers = _run((early or usable)[0], early or usable)
        reason = "no fact could be traced, so the lowest usable block in the first half"
    else:
        peak = max(usable, key=lambda layer: float(effect_L[layer]))
        strong = [n for n in usable if effect_L[n] >= OF_PEAK * effect_L[peak]]
        layers = _run(peak, strong)
        reason = f"MLPs have the largest effect around block {peak} (last subject token); lower is more local"
    return Proposal(layers[0], layers, layers[:MAX_MEMIT_LAYERS], mend, reason)


def _run(inside: int, layers: Sequence[int]) -> list[int]:
    """The consecutive layers around one of them."""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(layers)) if b > a + 1]
    for begin, end in pairwise([0, *breaks, len(layers)]):
        if inside in layers[begin:end]:
            return list(layers[begin:end])
    return [inside]


def _traced(trace: CausalTrace | None, known: Sequence[Edit], out: Path) -> list[str]:
    if trace is None:
        return [f"none: the model answers none of {MAX_SCORED} facts correctly"]
    lines = [
        f"{trace.facts} facts, such as {known[0].text!r} -> {known[0].target_true!r}",
        f"mean probability of the answer: {trace.clean:.2f}, with a corrupted subject {trace.corrupted:.2f}",
    ]
    for site in SITES:
        effect_RL = trace.effect[site].nan_to_num(-torch.inf)
        role, layer = divmod(int(effect_RL.argmax()), effect_RL.shape[1])
        lines.append(
            f"{_SITE_NAMES[site]}: largest effect at the {ROLES[role]}, block {layer} "
            f"({effect_RL[role, layer]:+.2f})"
        )
    return [*lines, _heat_map(trace, out / "causal_trace.png")]


_SITE_NAMES = {"hidden": "block outputs", "mlp": "MLP outputs"}


def _heat_map(trace: CausalTrace, path: Path) -> str:
    """Draws the effects; returns the line to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no heat map: matplotlib is not installed"
    depth = trace.effect["hidden"].shape[1]
    figure = Figure(figsize=(6 + depth / 8, 5), layout="constrained")
    axes = figure.subplots(len(SITES), 1, sharex=True)
    for ax, site in zip(axes, SITES, strict=True):
        image = ax.imshow(trace.effect[site].numpy(), aspect="auto", cmap="Purples", vmin=0)
        ax.set_yticks(range(len(ROLES)), ROLES)
        ax.set_title(f"{_SITE_NAMES[site]} restored", loc="left", fontsize="medium")
        figure.colorbar(image, ax=ax, label="gain in P(answer)")
    axes[-1].set_xlabel("block")
    with replacing(path) as part:
        figure.savefig(part, dpi=150)
    return f"heat map in {path}"


def _shares(shares: Sequence[float]) -> list[str]:
    cells = [f"{layer:>3}: {100 * share:3.0f} %" for layer, share in enumerate(shares)]
    lines = ["   ".join(cells[begin : begin + 8]) for begin in range(0, len(cells), 8)]
    bad = [str(layer) for layer, share in enumerate(shares) if share > MAX_FIRST_SHARE]
    if bad:
        limit = f"above {100 * MAX_FIRST_SHARE:.0f} %"
        lines.append(f"{limit}, so C represents other tokens badly: {', '.join(bad)}")
    return lines


def _proposed(lm: LanguageModel, proposal: Proposal, corpus: Corpus, out: Path) -> list[str]:
    path = out / "rome.yaml"
    model = {"name": lm.name}
    if lm.net.dtype != torch.float32:
        model["dtype"] = str(lm.net.dtype).removeprefix("torch.")
    config = {
        "model": {
            "class_path": "corrigenda.modules.evaluation.module.EditingModule",
            "init_args": {"lm": model},
        },
        "edit": {
            "editor": {
                "class_path": "corrigenda.modules.editors.rome.ROME",
                "init_args": {
                    "layer": proposal.rome,
                    "corpus": {"source": corpus.source, "tokens": corpus.tokens},
                },
            }
        },
    }
    text = yaml.safe_dump(config, sort_keys=False)
    write_text(path, text)
    first, last = proposal.layers[0], proposal.layers[-1]
    together = lm.structure.residual_scale is not None
    memit = (
        f"layers: {proposal.memit}"
        if together
        else "not supported: the model normalises MLP outputs"
    )
    lines = [
        f"blocks {first} to {last}: {proposal.reason}" if last > first else f"block {first}: {proposal.reason}",
        f"MEMIT  {memit}",
        f"MEND   layers: {proposal.mend}",
        f"ROME   {path}:",
        *(f"  {line}" for line in text.splitlines()),
    ]  # fmt: skip
    return lines


# ---------------------------------------------------------------------------- self-test


def self_test(lm: LanguageModel, edit: Edit, layer: int, corpus: Corpus) -> None:
    """Makes an edit with ROME; raises UserError if it has no effect or its removal is not bit-exact."""
    Moments(lm, corpus).gather([layer])
    before = lm.weights_hash
    handle = ROME(layer, corpus=corpus).edit(lm, [edit])
    succeeded = bool(lm.score([edit.text], [edit.target_new]).exact_B[0])
    handle.remove()
    after = hash_weights(lm.net)
    if after != before:
        raise UserError("self-test failed: removing the edit has not restored the weights")
    if not succeeded:
        raise UserError(
            f"self-test failed: after ROME at block {layer} the answer to {edit.text!r} is not "
            f"{edit.target_new!r}: try another layer or more steps"
        )
