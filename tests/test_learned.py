"""Interrupted and resumed runs of learned editors, and the content of their checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from corrigenda.datamodules.records import Edit, Probe
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.malmen import MALMEN
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.model.reuse import Reuse
from corrigenda.modules.training import learned
from corrigenda.pipeline import checkpointing

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

EDITORS = {
    "MEND": (
        MEND,
        {"layers": [1], "rank": 4, "lr": 1e-2, "warm_up": 2, "alpha": 1e-2, "num_normalising": 4},
    ),
    "KE": (KE, {"layers": [1], "hidden": 4, "condition": 6, "lr": 1e-2, "warm_up": 2}),
    "MALMEN": (
        MALMEN,
        {
            "layers": [1],
            "rank": 4,
            "lr": 1e-2,
            "eta": 1e-2,
            "warm_up": 2,
            "num_normalising": 4,
            "micro_batch": 3,
        },
    ),
}


@pytest.fixture(params=EDITORS)
def name(request):
    return request.param


@pytest.fixture
def run(name, corrigenda, tiny_folder, data_files, tmp_path):
    """``run(folder, *args)``: six steps in epochs of three, a validation after every second step."""

    def fit(folder, *args):
        lm = {"lm": {"name": str(tiny_folder("llama"))}}
        config = {
            "model": {"class_path": name, "init_args": lm | EDITORS[name][1]},
            "data": {"class_path": "ZsRE", "init_args": {
                "path": data_files.zsre, "train_path": data_files.zsre_train, "batch_size": 2,
                "val_fraction": 0.2}},
            "trainer": {"max_steps": 6, "max_epochs": 100, "val_check_interval": 2,
                        "check_val_every_n_epoch": None, "enable_progress_bar": False, "accelerator": "cpu"},
            "wandb": "off",
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return corrigenda("fit", "-c", tmp_path / "run.yaml", "--run_dir", folder, *args)

    return fit


def load(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_scaled_update_is_made_but_not_trained_with(name, tiny_lm):
    lm = tiny_lm("llama")
    editor = EDITORS[name][0](lm, **EDITORS[name][1])
    for parameter in editor.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape) * parameter.requires_grad
    edits = [
        Edit("The capital of {} is", "Ruritania", "Strelsau"),
        Edit("{} plays the", "Ada", "oboe"),
    ]
    chosen = edits, [Probe(e.text, e.target_new) for e in edits], [Probe("The sea is", "deep")] * 2
    losses, updates = [], []
    for scale in (1.0, 0.25):
        editor.scale = scale
        losses.append([loss.item() for loss in editor._losses(*chosen)])
        with editing_mode():
            updates.append(editor.propose(lm, edits))
    assert losses[0] == losses[1]
    for parameter in updates[0].updates:
        whole, part = (update.dense(parameter) for update in updates)
        assert whole.abs().max() > 0
        torch.testing.assert_close(part, 0.25 * whole)


def test_a_resumed_run_equals_an_uninterrupted_one(name, run, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch, after a checkpoint in it."""
    assert run(tmp_path / "whole") == 0
    editor = EDITORS[name][0]
    steps, training_step = iter(range(99)), editor.training_step

    def stop_once(self, *args):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(editor, "training_step", stop_once)
    assert run(tmp_path / "cut") == 130
    assert load(tmp_path / "cut")["global_step"] == 4
    assert run(tmp_path / "cut", "--ckpt_path", "last") == 0
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    assert whole["global_step"] == cut["global_step"] == 6
    start = torch.load(tmp_path / "whole/checkpoints/initial.ckpt", weights_only=True)["state_dict"]
    for key, value in whole["state_dict"].items():
        assert key == "training_time" or torch.equal(value, cut["state_dict"][key]), key
    assert any(not torch.equal(value, start[key]) for key, value in whole["state_dict"].items())
    assert whole["lr_schedulers"] == cut["lr_schedulers"]
    means = [
        json.loads((tmp_path / part / "summary.json").read_text())["means"]
        for part in ("whole", "cut")
    ]
    assert means[0] == means[1] and means[0]["efficacy/accuracy"] is not None


def test_training_time_counts_every_saved_step(name, run, tmp_path, monkeypatch):
    """Interrupted right after a step that is kept before anything else happens."""
    editor, clock = EDITORS[name][0], [0.0]
    training_step = editor.training_step

    def a_second(self, *args):
        if stops and clock[0] == 3:
            raise KeyboardInterrupt
        clock[0] += 1
        return training_step(self, *args)

    monkeypatch.setattr(editor, "training_step", a_second)
    monkeypatch.setattr(learned, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 0.0)
    stops = True
    assert run(tmp_path / "run") == 130
    kept = load(tmp_path / "run")
    assert kept["global_step"] == kept["state_dict"]["training_time"] == 3
    stops = False
    assert run(tmp_path / "run", "--ckpt_path", "last") == 0
    assert load(tmp_path / "run")["state_dict"]["training_time"] == 6


def test_a_checkpoint_holds_the_editor_alone_and_edits_as_it_did(
    name, run, corrigenda, tmp_path, capsys
):
    assert run(tmp_path / "run") == 0
    saved = load(tmp_path / "run")
    assert saved["state_dict"] and not any(key.startswith("lm.") for key in saved["state_dict"])
    assert set(saved["base_model"]) == {"name", "hash"}

    def validate(folder, *args):
        return corrigenda("validate", "-c", tmp_path / "run/config.yaml", "--run_dir", folder,
                          "--ckpt_path", tmp_path / "run/checkpoints/last.ckpt", *args)  # fmt: skip

    means = []
    for folder in ("one", "two"):
        assert validate(tmp_path / folder) == 0
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        means.append(summary["means"])
    assert means[0] == means[1] and summary["editor"] == name
    assert summary["budget"]["num_edits"] == 5
    capsys.readouterr()
    assert validate(tmp_path / "other", "--model.layers", "[0]") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "use the same --model.layers" in message


def test_caching_of_texts_changes_no_number(name, run, tmp_path, monkeypatch):
    """A run that keeps nothing, one that keeps all, one that finds all on disk: the same bits."""
    counts = []

    def drop(reuse):
        counts.append(reuse._store.num_computed if reuse._store else None)
        dropped(reuse)

    dropped = Reuse.drop
    monkeypatch.setattr(Reuse, "drop", drop)
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path / "cache"))
    nothing = ("--model.lm.cache_memory_gib", "0", "--model.lm.cache_disk_gib", "0")
    memory_alone = nothing[2:]
    for folder, args in (("none", nothing), ("memory", memory_alone), ("all", ()), ("disk", ())):
        assert run(tmp_path / folder, *args) == 0
    none, memory, everything, disk = (count for count in counts if count is not None)
    assert none > memory == everything > disk == 0
    states = [load(tmp_path / folder)["state_dict"] for folder in ("none", "memory", "all", "disk")]
    for state in states[1:]:
        for key, value in state.items():
            assert key == "training_time" or torch.equal(value, states[0][key]), key
    means = [json.loads((tmp_path / folder / "summary.json").read_text())["means"]
             for folder in ("none", "memory", "all", "disk")]  # fmt: skip
    assert all(mean == means[0] for mean in means)


def test_training_the_plain_way_gives_nearly_the_same(name, run, tmp_path):
    assert run(tmp_path / "ours") == 0
    assert run(tmp_path / "plain", "--model.lm.reuse_prefix", "false") == 0
    ours, plain = (load(tmp_path / folder)["state_dict"] for folder in ("ours", "plain"))
    start = torch.load(tmp_path / "ours/checkpoints/initial.ckpt", weights_only=True)["state_dict"]
    ours, plain, start = (
        torch.cat([v.double().flatten() for k, v in state.items() if k != "training_time"])
        for state in (ours, plain, start)
    )
    assert (ours - plain).norm() < 1e-2 * (ours - start).norm()
