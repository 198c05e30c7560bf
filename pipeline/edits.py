"""``corrigenda edits verify``, ``apply`` and ``export``: what is done with saved edits and their base model.

They load the base model that a file names, and refuse a model with other weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers.pytorch_utils import Conv1D

from corrigenda.modules.checks import at_least
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import replacing, write_tensors, write_text
from corrigenda.modules.model.delta import Delta, svd
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.model.structure import is_linear, is_quantised
from corrigenda.pipeline.edit_files import (
    edits_of,
    kind_of,
    line_of,
    read,
    refuse_existing,
    shape_of,
    write,
)
from corrigenda.pipeline.errors import UserError


def verify(file: Path, lm_options: Mapping[str, Any]) -> bool:
    """Whether the edited model's greedy answer is the target of every edit; prints a line per edit.

    Raises UserError if removing the edits does not restore the base model bit-exactly.
    """
    (delta,) = read([file])
    edits = edits_of(delta)
    if not edits:
        raise UserError(f"{file} does not list its edits, so there is nothing to verify")
    lm = base_model([delta], lm_options)
    queries = [edit.text for edit in edits], [edit.target_new for edit in edits]
    before = lm.score(*queries)
    patch = WeightPatch(lm, delta)
    after = lm.score(*queries)
    for share in (s for lost in patch.delta.metadata.get("requantized", []) for s in lost.values()):
        write(f"requantised: {share:.2f} of the update lost")
    patch.remove()
    if hash_weights(lm.net) != lm.weights_hash:
        raise UserError(f"{file}: removing the edits does not restore the base model's weights")
    exact = after.exact_B.tolist()
    gains = zip(before.logprob_BM.sum(1).tolist(), after.logprob_BM.sum(1).tolist(), strict=True)
    for is_exact, (was, now), edit in zip(exact, gains, edits, strict=True):
        write(f"{'yes' if is_exact else 'no ':3}  {was:8.3f} -> {now:8.3f}  {line_of(edit)}")
    write(f"{sum(exact)} of {len(edits)} edits verified; removed again, all weights are restored")
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
    deltas = read(files)
    prompts = list(prompt or [edit.text for delta in deltas for edit in edits_of(delta)])
    if not prompts:
        raise UserError("the files do not list their edits: give a --prompt")
    lm = base_model(deltas, lm_options)
    before = lm.generate(prompts, tokens)
    for delta in deltas:
        WeightPatch(lm, delta)
    for text, was, now in zip(prompts, before, lm.generate(prompts, tokens), strict=True):
        write(text)
        write(f"  base    {' '.join(was.split())}")
        write(f"  edited  {' '.join(now.split())}")


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
    refuse_existing(out)
    (delta,) = read([file])
    lm = base_model([delta], lm_options)
    with replacing(out) as folder:
        folder.mkdir()
        (_write_adapter if format == "peft" else _write_model)(lm, delta, folder)
    write(f"wrote {out}")


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
        write(f"{path}: {kind_of(update)} update {shape_of(update)}, adapter of rank {ranks[path]} with "
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


def base_model(deltas: Sequence[Delta], options: Mapping[str, Any]) -> LanguageModel:
    """The model given in the options, or that in the files; :class:`WeightPatch` checks that its weights match."""
    name = options.get("name") or deltas[0].metadata.get("model")
    if not name:
        raise UserError("the file does not name its base model: give --lm.name")
    chat = bool(options.get("chat") or "chat" in deltas[0].metadata)
    return LanguageModel(**{**options, "name": name, "chat": chat})
