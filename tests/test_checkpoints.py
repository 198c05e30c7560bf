"""Checkpoints of strangers and damaged ones: one line each, and nothing in them is run."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from corrigenda.modules.model.delta import EditError
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.modules.training.scope import ScopeClassifier

GOOD = {
    "state_dict": {"a": torch.arange(1000.0)},
    "base_model": {"name": "tiny", "hash": "0"},
    "epoch": 0,
    "global_step": 3,
    "pytorch-lightning_version": "2.5.0",
    "loops": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}
CANARY = "code-was-run"


class Runs:
    """What unpickles into a call."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


def saved(path, content):
    torch.save(content, path)
    return path


def cut(path):
    saved(path, GOOD)
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path):
    saved(path, GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(content)


def packed(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (lambda path: path.write_text("no checkpoint"), "another format"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "another format"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "missing": (lambda path: None, "no such file"),
    "cut": (cut, "cut or damaged"),
    "one bit of a weight": (flipped, "cut or damaged, in .*/data/0"),
    "safetensors": (lambda path: save_file(GOOD["state_dict"], path), "another format"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Runs())), "another format"),
    "zip": (packed, "more than tensors and plain values"),
    "code": (lambda path: saved(path, GOOD | {"loops": Runs()}), "more than tensors and plain values"),
    "list": (lambda path: saved(path, [1, 2]), "holds one list"),
    "tensor": (lambda path: saved(path, torch.ones(2)), "holds one Tensor"),
    "weights alone": (lambda path: saved(path, GOOD["state_dict"]), "no 'state_dict'"),
    "no base": (
        lambda path: saved(path, {k: v for k, v in GOOD.items() if k != "base_model"}),
        "no 'base_model'",
    ),
    "base without hash": (lambda path: saved(path, GOOD | {"base_model": {}}), "name and the hash"),
    "weights as text": (lambda path: saved(path, GOOD | {"state_dict": {"a": "b"}}), "'a', which is not"),
    "steps as text": (lambda path: saved(path, GOOD | {"global_step": "3"}), "'global_step' is a str"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[kind]
    make(path := tmp_path / "bad.ckpt")
    with pytest.raises(EditError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EditError, match=f"checkpoint of a ScopeClassifier.*{message}"):
        ScopeClassifier.load(str(path))
    assert not (tmp_path / CANARY).exists()


def test_a_good_checkpoint_is_read_and_its_reader_says_what_it_needs(tmp_path):
    path = saved(tmp_path / "good.ckpt", GOOD)
    found = read_checkpoint(path, "loops")
    assert found.keys() == GOOD.keys() and torch.equal(
        found["state_dict"]["a"], torch.arange(1000.0)
    )
    with pytest.raises(
        EditError, match="good.ckpt is not a checkpoint of a Thing: give one that its fit"
    ):
        read_checkpoint(path, "things", of="Thing")


def test_any_damage_is_one_line(tmp_path):
    """Bytes changed, cut off or doubled anywhere: the content as it was, or an EditError."""
    content = saved(tmp_path / "good.ckpt", GOOD).read_bytes()
    rng, path, noticed = random.Random(0), tmp_path / "bad.ckpt", 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 50])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            found = read_checkpoint(path)
        except EditError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:
            assert torch.equal(found["state_dict"]["a"], GOOD["state_dict"]["a"])
    assert noticed > 100


@pytest.mark.parametrize("kind", ["empty", "cut", "code", "list", "folder", "one bit of a weight"])
@pytest.mark.parametrize("verb", ["validate", "fit"])
def test_a_run_from_a_bad_checkpoint_does_not_begin(corrigenda, capsys, tmp_path, kind, verb):
    """It is refused before a model is loaded, and leaves no run folder."""
    make, _ = BAD[kind]
    make(tmp_path / "bad.ckpt")
    args = [
        "--model",
        "EditingModule",
        "--model.lm.name",
        "nowhere/at-all",
        "--data",
        "Facts",
        "--wandb",
        "off",
    ]
    assert corrigenda(verb, *args, "--run_dir", "run", "--ckpt_path", "bad.ckpt") == 2
    message = capsys.readouterr().err
    assert message.startswith("corrigenda: error: ") and message.count("\n") == 1
    assert "bad.ckpt" in message
    assert {path.name for path in tmp_path.iterdir()} == {"bad.ckpt"}
