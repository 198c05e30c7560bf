"""Which editor ``corrigenda edit`` uses: one of the shipped configurations, a file, or a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.fit import CONFIGS
from corrigenda.pipeline.trust import known_classes, read_yaml, restrict_parsing

SHOWN = "configs"  # how that folder is named in messages
OWN = "smollm2.yaml"  # every method has settings for the embedded model
OWN_BLOCKS = 30
LOW = OWN_BLOCKS // 4  # settings whose highest block is below it edit where facts are read in


@dataclass(frozen=True)
class Settings:
    """An editor's settings before the model is known.

    Attributes:
        editor: class path and arguments.
        source: the file that they are from.
        fits: whether they were chosen for the model that is edited.
    """

    editor: dict[str, Any]
    source: str
    fits: bool


def find_settings(name: str, model: str) -> Settings:
    """The settings of a method for a model; raises UserError for a name that cannot be used.

    Args:
        name: a folder in ``configs``, a configuration file with ``edit.editor``, or a checkpoint (``.ckpt``) of a
            learned editor.
        model: the model's name, as it was given.
    """
    if name.endswith(".ckpt"):
        trained = {"class_path": "corrigenda.modules.editors.trained.Trained"}
        return Settings(trained | {"init_args": {"checkpoint": name}}, name, fits=True)
    if name.endswith((".yaml", ".yml")):
        return Settings(_editor_in(read_yaml(Path(name)), name), name, fits=True)
    if name not in (known := _shipped()):
        raise UserError(
            f"unknown editor {name!r}: choose one of {', '.join(known)}, a configuration file (.yaml) or the "
            "checkpoint (.ckpt) of a learned editor"
        )
    own = CONFIGS / name / OWN
    files = [own, *sorted((CONFIGS / name).glob("*.yaml"))]
    found = next((file for file in files if _model_in(read_yaml(file)) == model), None)
    file = found or own
    editor = _editor_in(read_yaml(file), name)
    return Settings(editor, f"{SHOWN}/{name}/{file.name}", fits=found is not None)


def build(settings: Settings, lm: LanguageModel) -> tuple[Editor, str]:
    """The editor for a model, and where its settings are from."""
    config, source = settings.editor, settings.source
    if not settings.fits:
        config, how = _adapted(config, lm)
        source += f", {how}"
    for path in _class_paths(config):
        if path.startswith("corrigenda."):
            importlib.import_module(path.rpartition(".")[0])
    return _instance(config, settings.source), source


def _shipped() -> list[str]:
    """Methods with settings for the embedded model, learned ones included."""
    found = [file.parent.name for file in sorted(CONFIGS.glob(f"*/{OWN}"))]
    return [name for name in found if name != "base"]


def _editor_in(config: Any, name: str) -> dict[str, Any]:  # noqa: ANN401
    """``edit.editor`` of a configuration; raises UserError for one that trains an editor first."""
    try:
        found = (config.get("edit") or {}).get("editor")
        learned = config.get("model", {}).get("class_path", "")
    except AttributeError:
        raise UserError(f"{name}: expected a mapping of options with edit.editor") from None
    if isinstance(found, dict):
        return found
    if found is None and learned.startswith("corrigenda.modules.editors."):
        raise UserError(
            f"{name} must be trained before it can edit: corrigenda fit -c {SHOWN}/{Path(name).stem}/{OWN} "
            f"-c {SHOWN}/data/facts.yaml --run_dir runs/{Path(name).stem}, then give "
            f"--editor runs/{Path(name).stem}/checkpoints/best.ckpt"
        )
    raise UserError(f"{name}: it has no edit.editor with a class_path, so it says of no method")


def _model_in(config: Mapping[str, Any]) -> str | None:
    """The name of the language model in a shipped configuration."""
    name = config.get("model", {}).get("init_args", {}).get("lm", {}).get("name")
    return None if name is None else str(name)


def _class_paths(config: object) -> Iterator[str]:
    """Every class that a configuration names."""
    if isinstance(config, dict):
        if isinstance(path := config.get("class_path"), str):
            yield path
        for part in config.values():
            yield from _class_paths(part)


def _instance(config: dict[str, Any], source: str) -> Editor:
    from jsonargparse import ArgumentParser

    restrict_parsing(known_classes())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--editor", type=Editor)
    try:
        given = parser.parse_object({"editor": config})
    except Exception as error:  # jsonargparse's own
        raise UserError(f"{source}: {' '.join(str(error).split())[:400]}") from None
    editor: Editor = parser.instantiate(given).editor
    return editor


# ---------------------------------------------------------------------------- another model's layers


def _adapted(config: dict[str, Any], lm: LanguageModel) -> tuple[dict[str, Any], str]:
    """The embedded model's settings with layers for another model, and how these were chosen."""
    config = deepcopy(config)
    arguments = config["init_args"] = dict(config.get("init_args") or {})
    if isinstance(inner := arguments.get("editor"), dict):  # RECT and PRUNE restrain another method
        arguments["editor"], how = _adapted(inner, lm)
        return config, how
    layers = [*arguments.get("layers", []), *([arguments["layer"]] if "layer" in arguments else [])]
    if not layers:
        return config, "which names no layer"
    if max(layers) >= LOW:
        return config, _scaled(arguments, layers, lm.structure.num_layers)
    return config, _proposed(arguments, lm)


def _scaled(arguments: dict[str, Any], layers: Sequence[int], blocks: int) -> str:
    """Moves all layers by the same number, the highest one to the same relative depth."""
    shift = round(max(layers) * (blocks - 1) / (OWN_BLOCKS - 1)) - max(layers)
    if "layers" in arguments:
        arguments["layers"] = sorted({max(0, layer + shift) for layer in arguments["layers"]})
    if "layer" in arguments:
        arguments["layer"] = max(0, arguments["layer"] + shift)
    return f"moved to the same relative depth: {_named(arguments)}"


def _proposed(arguments: dict[str, Any], lm: LanguageModel) -> str:
    """Takes the layers that the doctor proposes, and its number of tokens for second moments."""
    from corrigenda.pipeline.doctor import moment_tokens, propose

    proposal = propose(lm)
    if "layer" in arguments:
        arguments["layer"] = proposal.rome
    if "layers" in arguments:
        several = len(arguments["layers"]) > 1
        arguments["layers"] = proposal.memit if several else [proposal.rome]
    if "corpus" in arguments:
        arguments["corpus"] = dict(arguments["corpus"]) | {"tokens": moment_tokens(lm)}
    return f"with the doctor's proposal: {_named(arguments)} ({proposal.reason})"


def _named(arguments: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {arguments[name]}" for name in ("layer", "layers") if name in arguments
    )
