"""``corrigenda edits show`` and ``merge``, which only read files and import no model library."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.saved_memory import FORMAT as MEMORY_OF_EDITS
from corrigenda.modules.editing.saved_memory import SavedMemory
from corrigenda.modules.model.delta import Delta, LowRank, Update, add_deltas, file_format, svd
from corrigenda.pipeline.errors import UserError


def show(files: Sequence[Path]) -> None:
    """Prints the content of edit files: base model, editor, edits, and the update of each parameter."""
    for file in files:
        if file_format(file) == MEMORY_OF_EDITS:
            _show_memory(file)
            continue
        delta = read([file])[0]
        meta = delta.metadata
        _show_origin(file, meta, edits_of(delta))
        for name, update in delta.updates.items():
            _, values_r, _ = svd(update)
            write(f"  change  {name} {shape_of(update)}: {kind_of(update)}, rank {len(values_r)}, "
                   f"norm {values_r.norm():.4g}")  # fmt: skip
        for lost in meta.get("requantized", []):
            for name, share in lost.items():
                write(f"  quantised  {name}: {share:.2f} of the update lost by requantising it")


def _show_memory(file: Path) -> None:
    """Prints a text memory, of IKE, MemPrompt, MeLLo or SERAC."""
    saved = SavedMemory.load(file)
    _show_origin(file, saved.metadata, saved.edits)
    size = sum(tensor.nbytes for tensor in saved.known.values())
    vectors = f"vectors of the encoder {saved.metadata['encoder']}" if saved.known else "no vectors"
    write(f"  memory  {len(saved.edits)} edits as text, {vectors}, {size:,} bytes")


def _show_origin(file: Path, meta: Mapping[str, Any], edits: Sequence[Edit]) -> None:
    write(str(file))
    write(f"  base    {meta.get('model', 'unknown')}, weights {meta.get('base', 'unknown')}")
    write(f"  editor  {meta.get('editor', 'unknown')}")
    for edit in edits:
        write(f"  edit    {line_of(edit)}")


def merge(files: Sequence[Path], out: Path) -> None:
    """Adds up edits of one base model, and prints contradictions and overlaps between them."""
    refuse_existing(out)
    if len(files) < 2:
        raise UserError("merge needs at least two files")
    deltas = read(files)
    shapes: dict[str, list[int]] = {}
    for file, delta in zip(files, deltas, strict=True):
        for name, update in delta.updates.items():
            if shapes.setdefault(name, shape_of(update)) != shape_of(update):
                raise UserError(f"{file}: its update of {name} has the shape {shape_of(update)}, earlier ones "
                                f"have {shapes[name]}")  # fmt: skip
    for line in (*_contradictions(files, deltas), *_overlaps(files, deltas)):
        write(line)
    total = add_deltas(deltas)
    editors = dict.fromkeys(str(delta.metadata.get("editor", "unknown")) for delta in deltas)
    total.metadata["editor"] = "+".join(editors)
    total.save(out)
    write(f"{out}: {len(edits_of(total))} edits in {len(total.updates)} parameters")


def _contradictions(files: Sequence[Path], deltas: Sequence[Delta]) -> Iterator[str]:
    """Lines about prompts that occur several times, with different targets or with the same one."""
    stated: dict[str, list[tuple[str, Path]]] = {}
    for file, delta in zip(files, deltas, strict=True):
        for edit in edits_of(delta):
            stated.setdefault(edit.text, []).append((edit.target_new, file))
    for text, found in stated.items():
        if len(found) > 1:
            where = ", ".join(f"{target!r} ({file})" for target, file in found)
            conflict = len({target for target, _ in found}) > 1
            yield f"{'conflict' if conflict else 'twice'}: {text!r} -> {where}"


def _overlaps(files: Sequence[Path], deltas: Sequence[Delta]) -> Iterator[str]:
    """Lines about parameters that several files change, with the largest similarities of two updates.

    The cosine is between the flattened updates. The overlap of inputs is the share of the smaller update's input
    space that lies in the other's; where it is 0, each update maps the inputs of the other to zero.
    """
    names = dict.fromkeys(name for delta in deltas for name in delta.updates)
    for name in names:
        parts = [
            (file, *svd(delta.updates[name]))
            for file, delta in zip(files, deltas, strict=True)
            if name in delta.updates
        ]
        pairs = [
            (*_alike(one[1:], other[1:]), f"({one[0]}, {other[0]})")
            for one, other in combinations([part for part in parts if len(part[2])], 2)
        ]
        if pairs:
            cosine = max(pairs, key=lambda pair: abs(pair[0]))
            inputs = max(pairs, key=lambda pair: pair[1])
            yield (f"{name}: changed by {len(parts)} files, cosine at most {cosine[0]:.3f} {cosine[2]}, "
                   f"overlap of inputs at most {inputs[1]:.3f} {inputs[2]}")  # fmt: skip


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """(cosine, overlap of inputs) of two updates given by their singular vectors and values."""
    (left_Or, s_r, right_rI), (left_Op, s_p, right_pI) = one, other
    outputs_rp, inputs_rp = left_Or.T @ left_Op, right_rI @ right_pI.T
    inner = (s_r[:, None] * s_p * outputs_rp * inputs_rp).sum() / (s_r.norm() * s_p.norm())
    return inner.item(), (inputs_rp.square().sum() / min(len(s_r), len(s_p))).item()


# ---------------------------------------------------------------------------- helpers


def read(files: Sequence[Path]) -> list[Delta]:
    """The deltas in the files; raises UserError if they belong to different base models."""
    for file in files:
        if file_format(file) == MEMORY_OF_EDITS:
            raise UserError(
                f"{file} is a text memory of {SavedMemory.load(file).metadata['editor']}, which changes no "
                "weight: `edits show` prints it, the editor's restore() activates it"
            )
    deltas = [Delta.load(file) for file in files]
    bases = [(d.metadata.get("model"), d.metadata.get("base")) for d in deltas]
    for file, (name, base) in zip(files, bases, strict=True):
        if base != bases[0][1]:
            raise UserError(
                f"{file} belongs to {name!r} with weights {base}, {files[0]} to {bases[0][0]!r} with weights "
                f"{bases[0][1]}: edits of different base models cannot be combined"
            )
    return deltas


def edits_of(delta: Delta) -> list[Edit]:
    return [Edit(*edit) for edit in delta.metadata.get("edits", [])]


def line_of(edit: Edit) -> str:
    return f"{edit.prompt.replace('{}', '{' + edit.subject + '}', 1)} -> {edit.target_new}"


def kind_of(update: Update) -> str:
    return "low-rank" if isinstance(update, LowRank) else "dense"


def shape_of(update: Update) -> list[int]:
    if isinstance(update, LowRank):
        return [update.left_Or.shape[0], update.right_rI.shape[1]]
    return list(update.shape)


def refuse_existing(file: Path, what: str = "--out") -> None:
    """Raises UserError if there is such a file, and asks for another ``what``."""
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} exists, and nothing is overwritten: choose another {what}")


def printable(text: str, kept: str = "\n") -> str:
    """The text with control characters, which a file or a model may contain, escaped, but those in ``kept``."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def write(text: str) -> None:
    """Prints a line, see :func:`printable`."""
    sys.stdout.write(f"{printable(text)}\n")
