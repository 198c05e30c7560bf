"""What starting imports: libraries that take seconds are imported only by what needs them.

Each test is a process of its own, because this one has imported everything.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from corrigenda.modules.model.delta import Delta
from corrigenda.pipeline.stored_help import COLUMNS, FOLDER, VERBS, stored_help
from tests.samples import ROOT

MODELS = ("transformers", "tokenizers")
TRAINING = ("lightning", "torchmetrics", "wandb", "datasets", "matplotlib")
EVERYTHING = ("torch", "numpy", "jsonargparse", *MODELS, *TRAINING)
COMMAND = "from corrigenda.pipeline.cli import main; main(sys.argv[1:])"


def python(code, *args):
    """What a new process prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *args],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def imported(code, *args):
    """The packages that code imports, and what it prints before."""
    *printed, names = python(f"{code}\nprint(*sys.modules)", *args).splitlines()
    return {name.partition(".")[0] for name in names.split()}, "\n".join(printed)


@pytest.fixture
def edits(tmp_path):
    path = tmp_path / "rome.safetensors"
    origin = {"model": "tiny", "base": "0" * 16, "editor": "ROME", "edits": []}
    Delta({"layers.3.weight": torch.ones(2, 3)}, origin).save(path)
    return path


def test_importing_the_package_imports_no_library():
    assert not imported("import corrigenda")[0] & {*EVERYTHING}


@pytest.mark.parametrize("args", [("--help",), *((verb, "--help") for verb in VERBS)])
def test_help_imports_no_library(args):
    found, text = imported(COMMAND, *args)
    assert not found & {*EVERYTHING}
    assert "usage: corrigenda" in text


def test_showing_an_edit_imports_no_model_library(edits):
    found, text = imported(COMMAND, "edits", "show", str(edits))
    assert "torch" in found and not found & {*MODELS, *TRAINING}
    assert "layers.3.weight [2, 3]: dense, rank 1" in text


def test_editing_in_python_imports_no_training_library():
    """What ``README.md`` imports first, and the texts whose statistics ROME uses."""
    found, text = imported(
        "from corrigenda import Edit, LanguageModel, ROME\n"
        "from corrigenda.modules.statistics.corpus import Corpus\n"
        "print(Corpus().key)"
    )
    assert "transformers" in found and not found & {*TRAINING}
    assert text.startswith("facts-")


def test_the_stored_help_is_that_of_the_options():
    """After a change of an option: ``make options``."""
    code = (
        "import json\nfrom corrigenda.pipeline.stored_help import VERBS, build_help\n"
        "print(json.dumps([build_help(verb) for verb in VERBS]))"
    )
    for verb, built in zip(VERBS, json.loads(python(code)), strict=True):
        assert (FOLDER / f"{verb}.txt").read_text("utf-8") == built, "run make options"


def test_help_of_other_versions_is_built(monkeypatch):
    """With another Lightning, the stored options may not be the real ones."""
    assert "--trainer.max_steps" in stored_help("validate")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert stored_help("validate") is None
