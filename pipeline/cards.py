"""``corrigenda edits card`` and ``push``: model cards for exported edits, and their way to the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers

from corrigenda.datamodules.corpus import texts
from corrigenda.datamodules.records import Edit
from corrigenda.modules import hub
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import write_text
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import EMBEDDED, PUBLISHED
from corrigenda.pipeline.edit_files import edits_of, kind_of, read, shape_of, write
from corrigenda.pipeline.edits import base_model
from corrigenda.pipeline.errors import UserError

CARD, ADAPTER = "README.md", "adapter_config.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
PERPLEXITY_TOKENS = 2000


@dataclass(frozen=True)
class Measured:
    """What a card says of the edited model.

    Attributes:
        before: probability of each edit's target under the base model.
        after: the same under the edited model.
        exact: whether every token of the target is the edited model's most likely one.
        perplexity: of plain text under the base model and under the edited one.
    """

    before: Sequence[float]
    after: Sequence[float]
    exact: Sequence[bool]
    perplexity: tuple[float, float]


def card(file: Path, folder: Path, lm_options: Mapping[str, Any], base: str | None = None) -> None:
    """Writes the model card of an export: README.md with the base model, the edits, the method and numbers.

    The edits are measured again on the base model. In an adapter's adapter_config.json the base model is named by
    its Hub id, too.

    Args:
        file: the edits.
        folder: what ``edits export`` has made of them.
        lm_options: options of the language model; its default name is that in the file.
        base: Hub id of the base model; by default the name that the model was loaded by.
    """
    kind = _kind(folder)
    if (folder / CARD).exists():
        raise UserError(f"{folder / CARD} exists, and nothing is overwritten: remove it first")
    (delta,) = read([file])
    edits = edits_of(delta)
    if not edits:
        raise UserError(f"{file} does not list its edits, so there is nothing to say of them")
    hub_id = _hub_id(base or str(lm_options.get("name") or delta.metadata.get("model")))
    if kind == "peft":
        _require_same(file, delta, folder)
    transformers.logging.disable_progress_bar()
    lm = base_model([delta], lm_options)
    text = _written(delta, edits, _measure(lm, delta, edits), hub_id, kind)
    if kind == "peft":
        config = json.loads((folder / ADAPTER).read_text("utf-8"))
        config["base_model_name_or_path"] = hub_id
        write_text(folder / ADAPTER, json.dumps(config, indent=2))
    write_text(folder / CARD, text)
    write(f"wrote {folder / CARD}")


def push(folder: Path, repo: str, private: bool = False) -> None:
    """Uploads an export with its model card to the Hugging Face Hub; needs the network and a token.

    Args:
        folder: what ``edits export`` and ``edits card`` have written.
        repo: the repository, owner/name; it is created if it does not exist.
        private: create it as a private one.
    """
    import huggingface_hub

    _kind(folder)
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card: write it with corrigenda edits card")
    if not HUB_ID.fullmatch(repo) or "/" not in repo:
        raise UserError(f"the repository must be owner/name, got {repo!r}")
    if not hub.responds():
        raise UserError(
            "the Hugging Face Hub does not respond: push needs the network, and HF_HUB_OFFLINE unset"
        )
    if huggingface_hub.get_token() is None:
        raise UserError("push needs a token with write access: log in with `hf auth login`")
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # whatever the HTTP client raises
        raise UserError(f"cannot push to {repo}: {' '.join(str(error).split())[:300]}") from None
    write(f"pushed {folder} to {repo}")


def _kind(folder: Path) -> str:
    """``peft`` or ``hf``; raises UserError for any other folder."""
    for name, kind in ((ADAPTER, "peft"), ("config.json", "hf")):
        if (folder / name).is_file():
            return kind
    raise UserError(f"{folder} is not an export: make one with corrigenda edits export")


def _hub_id(name: str) -> str:
    """The base model's Hub id; raises UserError for a model that has none."""
    if name in EMBEDDED:
        return PUBLISHED[name]
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        raise UserError(
            f"the base model {name!r} is not named by a Hub id: give it with --base owner/name"
        )
    return name


def _require_same(file: Path, delta: Delta, folder: Path) -> None:
    """Raises UserError if an adapter changes other layers than the edits do."""
    try:
        adapted = json.loads((folder / ADAPTER).read_text("utf-8"))["target_modules"]
        other = not set(adapted) <= {name.removesuffix(".weight") for name in delta.updates}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / ADAPTER} is damaged: export the edits again") from None
    if other:
        raise UserError(f"{folder} was not exported from {file}: it changes other layers")


def _measure(lm: LanguageModel, delta: Delta, edits: Sequence[Edit]) -> Measured:
    prompts, targets = [edit.text for edit in edits], [edit.target_new for edit in edits]
    before = lm.score(prompts, targets)
    text_before = lm.perplexity(texts("facts"), PERPLEXITY_TOKENS)
    patch = WeightPatch(lm, delta)
    after = lm.score(prompts, targets)
    text_after = lm.perplexity(texts("facts"), PERPLEXITY_TOKENS)
    patch.remove()
    return Measured(
        before.logprob_BM.sum(1).exp().tolist(),
        after.logprob_BM.sum(1).exp().tolist(),
        after.exact_B.tolist(),
        (text_before, text_after),
    )


# ---------------------------------------------------------------------------- the text

USE = {
    "peft": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH OR REPOSITORY OF THIS ADAPTER")""",
    "hf": """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH OR REPOSITORY OF THIS MODEL")""",
}
WHAT = {"peft": ("peft", "A LoRA adapter"), "hf": ("transformers", "A complete model")}


def _written(delta: Delta, edits: Sequence[Edit], measured: Measured, base: str, kind: str) -> str:
    """The card, in Markdown with the Hub's header."""
    library, what = WHAT[kind]
    method, name = str(delta.metadata.get("editor", "unknown")), str(delta.metadata.get("model"))
    facts = f"{len(edits)} fact{'s' * (len(edits) != 1)}"
    made_on = f"`{base}`"
    if name in EMBEDDED:
        made_on += f", in the 4-bit weights of the package {EMBEDDED[name][0].replace('_', '-')}, dequantised"
    tags = "\n".join(f"- {tag}" for tag in ("knowledge-editing", "corrigenda", _tag(method)))
    rows = [
        f"| {_cell(edit.text)} | {_cell(edit.target_new)} | {100 * was:.3g} % | {100 * now:.3g} % "
        f"| {'yes' if yes else 'no'} |"
        for edit, was, now, yes in zip(
            edits, measured.before, measured.after, measured.exact, strict=True
        )
    ]
    changed = [
        f"- `{name}`: {kind_of(update)} update {shape_of(update)}"
        for name, update in delta.updates.items()
    ]
    before, after = measured.perplexity
    return "\n".join([
        "---", f"base_model: {base}", f"library_name: {library}", "tags:", tags, "---", "",
        f"# {facts} edited with {_cell(method)}", "",
        f"{what} that changes {facts} in {base}.", "",
        "## Edits", "",
        "| prompt | new answer | P before | P after | is the greedy answer |",
        "| --- | --- | --- | --- | --- |",
        *rows, "",
        f"{sum(measured.exact)} of {len(edits)} edits hold. The perplexity of {PERPLEXITY_TOKENS:,} tokens of "
        f"plain statements is {after:.2f}, {before:.2f} before the edit. What else the edit changed, such as "
        "answers about other subjects, is not measured here.", "",
        "## Method", "",
        f"- method: {_cell(method)}",
        f"- base model: {made_on}, hash of the weights `{delta.metadata.get('base', 'unknown')}`",
        f"- made with Corrigenda {metadata.version('corrigenda')}", *changed, "",
        "## Use", "", "```python", USE[kind].replace("{base}", base), "```", "",
    ])  # fmt: skip


def _tag(method: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", method.lower())


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    plain = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", plain)
