"""Corrigenda: change what a language model believes, measure what that broke, compare it with fine-tuning.

The names below are loaded when they are first used, so that ``import corrigenda`` itself takes no time::

    from corrigenda import Edit, LanguageModel, ROME
"""

from importlib import import_module, metadata
from typing import Any

# Public names and the modules that define them.
_HOMES = {
    "Edit": "datamodules.records",
    "EditCase": "datamodules.records",
    "Probe": "datamodules.records",
    "CounterFact": "datamodules.counterfact",
    "Edits": "datamodules.own",
    "Facts": "datamodules.facts",
    "MQuAKE": "datamodules.mquake",
    "ZsRE": "datamodules.zsre",
    "LanguageModel": "modules.model.lm",
    "EditingModule": "modules.evaluation.module",
    "FineTune": "modules.training.tuning",
    "EditCallback": "pipeline.callbacks",
    "AlphaEdit": "modules.editors.alphaedit",
    "CaliNET": "modules.editors.calinet",
    "EMMET": "modules.editors.emmet",
    "EWC": "modules.editors.ewc",
    "FT": "modules.editors.finetune",
    "FullFT": "modules.editors.full",
    "GRACE": "modules.editors.grace",
    "IKE": "modules.editors.ike",
    "KE": "modules.editors.ke",
    "KN": "modules.editors.kn",
    "L2SP": "modules.editors.l2sp",
    "LoRA": "modules.editors.lora",
    "LocFT": "modules.editors.locft",
    "LwF": "modules.editors.lwf",
    "MALMEN": "modules.editors.malmen",
    "MELO": "modules.editors.melo",
    "MEMIT": "modules.editors.memit",
    "MEND": "modules.editors.mend",
    "MeLLo": "modules.editors.mello",
    "MemPrompt": "modules.editors.memprompt",
    "OLoRA": "modules.editors.task_lora",
    "PRUNE": "modules.editors.prune",
    "PeftFineTune": "modules.editors.peft_tuning",
    "RECT": "modules.editors.rect",
    "ROME": "modules.editors.rome",
    "Replay": "modules.editors.replay",
    "SERAC": "modules.editors.serac",
    "TaskLoRA": "modules.editors.task_lora",
    "TPatcher": "modules.editors.t_patcher",
    "Trained": "modules.editors.trained",
    "WISE": "modules.editors.wise",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        return metadata.version("corrigenda")
    if name not in _HOMES:
        raise AttributeError(f"module 'corrigenda' has no attribute {name!r}")
    return getattr(import_module(f"corrigenda.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])
