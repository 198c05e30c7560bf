"""``corrigenda edits``: shows, verifies, applies, merges and exports saved edits.

``show`` and ``merge`` only read files; ``show`` also reads text memories. ``verify``, ``apply`` and ``export``
load the base model that a file names, and refuse a model with other weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from corrigenda.datamodules.records import Edit
from corrigenda.modules.checks import at_least
from corrigenda.modules.editing.memory import FORMAT as MEMORY_OF_EDITS
from corrigenda.modules.editing.memory import SavedMemory
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import replacing, write_tensors, write_text
from corrigenda.modules.model.delta import Delta, LowRank, Update, add_deltas, file_format, svd
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.model.structure import is_linear, is_quantised
from corrigenda.pipeline.errors import UserError

# ---------------------------------------------------------------------------- without a model


def show(files: Sequence[Path]) -> None:
    """Prints the content of edit files: base model, editor, edits, and the update of each parameter."""
    for file in files:
        if file_format(file) == MEMORY_OF_EDITS:
            _show_memory(file)
            continue
        delta = _read([file])[0]
        meta = delta.metadata
        _show_origin(file, meta, _edits(delta))
        for name, update in delta.updates.items():
            _, values_r, _ = svd(update)
            _print(f"  change  {name} {_shape(update)}: {_kind(update)}, rank {len(values_r)}, "
                   f"norm {values_r.norm():.4g}")  # fmt: skip
        for lost in meta.get("requantized", []):
            for name, share in lost.items():
                _print(f"  quantised  {name}: {share:.2f} of the update lost by requantising it")


def _show_memory(file: Path) -> None:
    """Prints a text memory, of IKE, MemPrompt, MeLLo or SERAC."""
    saved = SavedMemory.load(file)
    _show_origin(file, saved.metadata, saved.edits)
    size = sum(tensor.nbytes for tensor in saved.known.values())
    vectors = f"vectors of the encoder {saved.metadata['encoder']}" if saved.known else "no vectors"
    _print(f"  memory  {len(saved.edits)} edits as text, {vectors}, {size:,} bytes")


def _show_origin(file: Path, meta: Mapping[str, Any], edits: Sequence[Edit]) -> None:
    _print(str(file))
    _print(f"  base    {meta.get('model', 'unknown')}, weights {meta.get('base', 'unknown')}")
    _print(f"  editor  {meta.get('editor', 'unknown')}")
    for edit in edits:
        _print(f"  edit    {_line(edit)}")


def merge(files: Sequence[Path], out: Path) -> None:
    """Adds up edits of one base model, and prints contradictions and overlaps between them."""
    _refuse_existing(out)
    if len(files) < 2:
        raise UserError("merge needs at least two files")
    deltas = _read(files)
    shapes: dict[str, list[int]] = {}
    for file, delta in zip(files, deltas, strict=True):
        for name, update in delta.updates.items():
            if shapes.setdefault(name, _shape(update)) != _shape(update):
                raise UserError(f"{file}: its update of {name} has the shape {_shape(update)}, earlier ones have "
                                f"{shapes[name]}")  # fmt: skip
    for line in (*_contradictions(files, deltas), *_overlaps(files, deltas)):
        _print(line)
    total = add_deltas(deltas)
    editors = dict.fromkeys(str(delta.metadata.get("editor", "unknown")) for delta in deltas)
    total.metadata["editor"] = "+".join(editors)
    total.save(out)
    _print(f"{out}: {len(_edits(total))} edits in {len(total.updates)} parameters")


def _contradictions(files: Sequence[Path], deltas: Sequence[Delta]) -> Iterator[str]:
    """Lines about prompts that occur several times, with different targets or with the same one."""
    stated: dict[str, list[tuple[str, Path]]] = {}
    for file, delta in zip(files, deltas, strict=True):
        for edit in _edits(delta):
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


# ---------------------------------------------------------------------------- with the base model


def verify(file: Path, lm_options: Mapping[str, Any]) -> bool:
    """Whether the edited model's greedy answer is the target of every edit; prints a line per edit.

    Raises UserError if removing the edits does not restore the base model bit-exactly.
    """
    (delta,) = _read([file])
    edits = _edits(delta)
    if not edits:
        raise UserError(f"{file} does not list its edits, so there is nothing to verify")
    lm = _base_model([delta], lm_options)
    queries = [edit.text for edit in edits], [edit.target_new for edit in edits]
    before = lm.score(*queries)
    patch = WeightPatch(lm, delta)
    after = lm.score(*queries)
    for share in (s for lost in patch.delta.metadata.get("requantized", []) for s in lost.values()):
        _print(f"requantised: {share:.2f} of the update lost")
    patch.remove()
    if hash_weights(lm.net) != lm.weights_hash:
        raise UserError(f"{file}: removing the edits does not restore the base model's weights")
    exact = after.exact_B.tolist()
    gains = zip(before.logprob_BM.sum(1).tolist(), after.logprob_BM.sum(1).tolist(), strict=True)
    for is_exact, (was, now), edit in zip(exact, gains, edits, strict=True):
        _print(f"{'yes' if is_exact else 'no ':3}  {was:8.3f} -> {now:8.3f}  {_line(edit)}")
    _print(f"{sum(exact)} of {len(edits)} edits verified; removed again, all weights are restored")
    return all(exact)


def apply(
    files: Sequence[Path],
    lm_options: Mapping[str, Any],
    prompt: Sequence[str] | None = None,
    tokens: int = 20,
) -> None:
    """Prints the answers of the base model and of the edited model to prompts.

    Args:
        files: edits, all active together, applied in this order.
        lm_options: options of the language model; its default name is that in the files.
        prompt: the prompts; by default those of the edits.
        tokens: length of an answer in tokens.
    """
    at_least(1, tokens=tokens)
    for text in prompt or []:
        if not text.strip():
            raise UserError("a --prompt is empty: give some text")
    deltas = _read(files)
    prompts = list(prompt or [edit.text for delta in deltas for edit in _edits(delta)])
    if not prompts:
        raise UserError("the files do not list their edits: give a --prompt")
    lm = _base_model(deltas, lm_options)
    before = lm.generate(prompts, tokens)
    for delta in deltas:
        WeightPatch(lm, delta)
    for text, was, now in zip(prompts, before, lm.generate(prompts, tokens), strict=True):
        _print(text)
        _print(f"  base    {' '.join(was.split())}")
        _print(f"  edited  {' '.join(now.split())}")


# ---------------------------------------------------------------------------- export


def export(
    file: Path, format: Literal["peft", "hf"], out: Path, lm_options: Mapping[str, Any]
) -> None:
    """Exports edits for use without this project: as a PEFT adapter, or as a complete edited model.

    Args:
        file: the edits.
        format: ``peft`` is an equivalent LoRA adapter, ``hf`` the edited model and its tokenizer.
        out: a folder that does not exist yet; it is written atomically.
        lm_options: options of the language model; its default name is that in the file.
    """
    _refuse_existing(out)
    (delta,) = _read([file])
    lm = _base_model([delta], lm_options)
    with replacing(out) as folder:
        folder.mkdir()
        (_write_adapter if format == "peft" else _write_model)(lm, delta, folder)
    _print(f"wrote {out}")


def _write_model(lm: LanguageModel, delta: Delta, folder: Path) -> None:
    if any(is_linear(module) and is_quantised(module) for module in lm.net.modules()):
        raise UserError(
            f"{lm.name!r} is quantised, but edited layers are not: export the edit with --format peft"
        )
    patch = WeightPatch(lm, delta)
    lm.net.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    patch.remove()


def _write_adapter(lm: LanguageModel, delta: Delta, folder: Path) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``: W + B A, with a scaling of 1.

    Every update is factorised by its singular value decomposition, with the root of the singular values in both
    factors, which gives the smallest rank with the same effect.
    """
    WeightPatch(lm, delta).remove()  # raises for another base model or shapes that do not fit
    tensors, ranks = {}, {}
    for name, update in delta.updates.items():
        path = _adapted(lm, name)
        left_Or, values_r, right_rI = svd(update)
        if not len(values_r):
            continue  # the update is zero, and there are no adapters of rank 0
        key, root_r = f"base_model.model.{path}", values_r.sqrt()
        tensors[f"{key}.lora_A.weight"] = root_r[:, None] * right_rI
        tensors[f"{key}.lora_B.weight"] = left_Or * root_r
        ranks[path] = len(values_r)
        outputs, inputs = len(left_Or), right_rI.shape[1]
        _print(f"{path}: {_kind(update)} update {_shape(update)}, adapter of rank {ranks[path]} with "
               f"{ranks[path] * (outputs + inputs):,} parameters instead of {outputs * inputs:,}")  # fmt: skip
    if not ranks:
        raise UserError("the edit changes nothing, so there is nothing to export")
    transposed = any(isinstance(lm.net.get_submodule(path), Conv1D) for path in ranks)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = _adapter_config(lm.net.name_or_path, ranks, transposed)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2))


def _adapter_config(base: str, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    """PEFT's configuration; alpha equals the rank of each layer, so the scaling alpha / rank is 1."""
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }


def _adapted(lm: LanguageModel, name: str) -> str:
    """The path of the linear layer with this weight; raises UserError for parameters that LoRA cannot change."""
    path, _, kind = name.rpartition(".")
    module = lm.net.get_submodule(path)
    if kind != "weight" or not is_linear(module):
        raise UserError(
            f"{name} is not the weight of a linear layer, which is all that a LoRA adapter can change: "
            "export the edited model with --format hf"
        )
    if module.weight is lm.net.get_input_embeddings().weight:
        raise UserError(
            f"{name} is tied to the input embedding, which a LoRA adapter does not change: "
            "export the edited model with --format hf"
        )
    return path


# ---------------------------------------------------------------------------- helpers


def _read(files: Sequence[Path]) -> list[Delta]:
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


def _base_model(deltas: Sequence[Delta], options: Mapping[str, Any]) -> LanguageModel:
    """The model given in the options, or that in the files; :class:`WeightPatch` checks that its weights match."""
    name = options.get("name") or deltas[0].metadata.get("model")
    if not name:
        raise UserError("the file does not name its base model: give --lm.name")
    return LanguageModel(**{**options, "name": name})


def _edits(delta: Delta) -> list[Edit]:
    return [Edit(*edit) for edit in delta.metadata.get("edits", [])]


def _line(edit: Edit) -> str:
    return f"{edit.prompt.replace('{}', '{' + edit.subject + '}', 1)} -> {edit.target_new}"


def _kind(update: Update) -> str:
    return "low-rank" if isinstance(update, LowRank) else "dense"


def _shape(update: Update) -> list[int]:
    if isinstance(update, LowRank):
        return [update.left_Or.shape[0], update.right_rI.shape[1]]
    return list(update.shape)


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists, and nothing is overwritten: choose another --out")


def _print(text: str) -> None:
    """Prints a line; control characters, which an untrusted file may contain, are escaped."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    sys.stdout.write(f"{plain}\n")
