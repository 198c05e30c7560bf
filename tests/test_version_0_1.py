"""Edit files, memories, checkpoints and configurations of version 0.1, from before everything moved under one
name.

``assets/version-0.1`` was written by that version: a random model, edits of it by eight methods, three runs,
and in
``expected.json`` the log-probabilities and means that version got with them.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel

ASSETS = Path(__file__).parent / "assets"
OLD = ASSETS / "version-0.1"
EXPECTED = json.loads((OLD / "expected.json").read_text("utf-8"))
EDITS = [
    Edit("The maker of {} is", "Ada Quill", "Paris"),
    Edit("{} lies in", "Lake Onna", "Zembla"),
]
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def folder(tmp_path):
    """A copy of the old files, with the tokenizer beside the model."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((ASSETS / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "lm" / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.fixture
def old_lm(folder):
    return LanguageModel("lm")


def check(lm, name):
    found = lm.score([e.text for e in EDITS], [e.target_new for e in EDITS]).logprob_BM.sum(1)
    torch.testing.assert_close(found, torch.tensor(EXPECTED[name]), **NEAR)


@pytest.mark.parametrize("name", ["ft", "lora"])
def test_edits_of_weights(old_lm, name):
    check(old_lm, "unedited")
    patch = WeightPatch(old_lm, Delta.load(Path(f"{name}.safetensors")))
    check(old_lm, name)
    patch.remove()
    check(old_lm, "unedited")


@pytest.mark.parametrize("name", ["grace", "melo", "calinet", "wise"])
def test_adapters(old_lm, name):
    ModulePatch.load(old_lm, f"{name}.safetensors")
    check(old_lm, name)


def test_a_memory_of_text(old_lm):
    MemPrompt("distance").restore(old_lm, "memprompt.safetensors")
    check(old_lm, "memprompt")


def test_the_edits_of_a_stream(old_lm):
    """What the checkpoint of an interrupted stream holds of them."""
    checkpoint = torch.load("stream/checkpoints/last.ckpt", weights_only=True)
    ModulePatch.restore(old_lm, checkpoint["callbacks"]["EditCallback"]["patches"][0])
    lines = Path("counterfact.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line)["requested_rewrite"] for line in lines]
    prompts = [row["prompt"].format(row["subject"]) for row in rows]
    found = old_lm.score(prompts, [row["target_new"]["str"] for row in rows])
    torch.testing.assert_close(found.logprob_BM.sum(1), torch.tensor(EXPECTED["stream"]), **NEAR)


@pytest.mark.parametrize("run", ["mend", "lora-fit"])
def test_configurations_and_checkpoints_of_runs(corrigenda, folder, run):
    """Class paths in the old file are read as today's classes, and the trained editor gives the old means."""
    os.chdir(folder)
    command = ["validate", "-c", f"{run}/config.yaml", "--run_dir", "again", "--wandb", "off"]
    given = [
        "--ckpt_path",
        f"{run}/checkpoints/last.ckpt",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert corrigenda(*command, *given) == 0
    means = json.loads((folder / "again" / "summary.json").read_text("utf-8"))["means"]
    assert means.keys() >= EXPECTED[run].keys()
    for name, value in EXPECTED[run].items():
        assert means[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
