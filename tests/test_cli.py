"""The command line: what it accepts, what it writes, and one line for everything that goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
import yaml

from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.callbacks import EditCallback
from corrigenda.pipeline.compare import read_study
from corrigenda.pipeline.fit import CONFIGS
from tests.samples import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture
def tiny(tiny_folder, data_files):
    """Arguments of a small run of FT on a small model."""
    return [
        "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"),
        "--data", "ZsRE", "--data.path", data_files.zsre, "--edit.editor", "FT",
        "--edit.editor.layers", "[1]", "--edit.editor.steps", "2", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


@pytest.fixture
def parsed(corrigenda, capsys):
    """``parsed(*args)``: the configuration these arguments stand for."""

    def parse(*args):
        capsys.readouterr()
        assert corrigenda(*args, "--print_config") == 0
        return yaml.safe_load(capsys.readouterr().out)

    return parse


# ---------------------------------------------------------------------------- mistakes


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("corrigenda: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--edit.editro", "ROME"], ["--edit.editro", "corrigenda validate --help"]),
        (["--edit.editor.stpes", "3"], ["edit.editor", "'stpes' is not accepted"]),
        (["--edit.editor", "ROME"], ["edit.editor", "required: layer"]),
        (["--edit.editor", "ROMY"], ["edit.editor", "ROMY"]),
        (
            ["--edit.schedule", "all"],
            ["edit.schedule", "'each', 'batch', 'epoch', 'stream'", "all"],
        ),
        (["--edit.schedule", "stream"], ["'stream'", "run fit"]),
        (["--edit.editor.layers", "[99]"], ["layer 99 does not exist", "0 to 1"]),
        (
            ["--edit.editor", "ROME", "--edit.editor.layer", "9"],
            ["layer 9 does not exist", "0 to 1"],
        ),
        (["--data.path", "nope.jsonl"], ["nope.jsonl: no such file", "public source"]),
        (["--data.path", "bad.jsonl"], ["bad.jsonl, line 1", "'src'", "'Bede' does not occur"]),
        (["--data.limit", "0"], ["limit must be at least 1, got 0"]),
        (["--data.known_only", "true"], ["known_only leaves nothing to edit"]),
        (
            ["--model.lm.name", "nowhere/at-all"],
            ["cannot load the model 'nowhere/at-all'", "give a hub id"],
        ),
        (["--model", "MEND", "--model.layers", "[2]"], ["layer 2 does not exist"]),
        (["-c", "nope.yaml"], ["no configuration file nope.yaml", str(CONFIGS)]),
        (["-c", "typo.yaml"], ["editor", "'layre' is not accepted"]),
        (["-c", "broken.yaml"], ["broken.yaml"]),
        (["--ckpt_path", "nope.ckpt"], ["nope.ckpt"]),
        (["--ckpt_path", "bad.jsonl"], ["bad.jsonl: not a readable checkpoint", "another format"]),
        (["--ckpt_path", "last"], ["--ckpt_path needs a local file"]),
        (["--run_dir", "finished"], ["finished holds a finished run", "choose another --run_dir"]),
        (
            ["--run_dir", "begun"],
            [
                "begun holds an unfinished run",
                "whose settings are unknown",
                "choose another --run_dir",
            ],
        ),
        (["--trainer.devices", "0"], ["devices"]),
        (["--trainer.gradient_clip_val", "-1"], ["gradient_clip_val is negative: -1"]),
        (["--trainer.val_check_interval", "0"], ["val_check_interval must be above 0, got 0"]),
        (["--trainer.check_val_every_n_epoch", "0"], ["must be above 0, got 0"]),
        (["--trainer.accumulate_grad_batches", "0"], ["must be above 0, got 0"]),
        (["--conf", "typo.yaml"], ["unrecognized arguments: --conf"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if value[0].startswith("-") else "",
)
def test_a_mistake_is_one_line(corrigenda, tiny, tmp_path, capsys, args, words):
    record = {"subject": "Bede", "src": "Who was he?", "rephrase": "He was who?", "alt": "a monk"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(record))
    (tmp_path / "typo.yaml").write_text("edit: {editor: {class_path: ROME, init_args: {layre: 1}}}")
    (tmp_path / "broken.yaml").write_text("edit: {editor: [")
    for name, file in (("finished", "summary.json"), ("begun", "cases.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    assert corrigenda("validate", *tiny, *args) == 2
    message = one_line(capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["frobnicate"],
            ["unknown command 'frobnicate'", "fit, validate, compare, report, "],
        ),
        (["compare"], ["file", "corrigenda compare --help"]),
        (["compare", "nope.yaml"], ["nope.yaml"]),
        (["report", "nope", "--out", "out"], ["nope"]),
        (["moments", "--layers", "0", "--corpsu", "x"], ["--corpsu"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_so_is_one_with_another_command(corrigenda, capsys, args, words):
    assert corrigenda(*args) == 2
    message = one_line(capsys)
    assert all(word in message for word in words), message


def test_a_mistake_in_a_process_of_its_own(tmp_path, tiny):
    command = [
        sys.executable,
        "-m",
        "corrigenda",
        "validate",
        *map(str, tiny),
        "--edit.editor.stpes",
        "3",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'stpes' is not accepted" in done.stderr


def test_a_mistake_of_ours_keeps_its_traceback(corrigenda, tiny, monkeypatch):
    monkeypatch.setattr(LanguageModel, "score", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corrigenda("validate", *tiny)
    monkeypatch.setenv("CORRIGENDA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        corrigenda("validate", *tiny, "--data.path", "nope.jsonl")


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_names_the_commands(corrigenda, capsys, args):
    assert corrigenda(*args) == 0
    text = capsys.readouterr().out
    assert all(
        f"\n  {name} " in text
        for name in ("fit", "validate", "compare", "report", "moments", "doctor")
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "fit",
            [
                "Train an editor",
                "--edit.schedule",
                "where 'last' is the last checkpoint in --run_dir",
            ],
        ),
        ("validate", ["Edit the model and measure", "--edit.schedule", "--data.help"]),
        ("compare", ["--only", "--seeds", "--out"]),
        ("report", ["--baseline", "--out"]),
        ("moments", ["--layers", "--lm.name"]),
        ("doctor", ["--facts", "--lm.dtype"]),
        ("edits", ["show", "verify", "apply", "merge", "export"]),
        ("edits show", ["files"]),
        ("edits verify", ["file", "--lm.name"]),
        ("edits apply", ["--prompt"]),
        ("edits merge", ["--out"]),
        ("edits export", ["--out", "--lm.name"]),
    ],
)
def test_every_command_explains_itself(corrigenda, capsys, command, words):
    assert corrigenda(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: corrigenda ") and command.split()[-1] in text.splitlines()[0]
    plain = " ".join(text.split())
    assert all(word in plain for word in words)
    assert "weights_only" not in text and "hpc" not in text


def test_short_names_stand_for_classes(parsed):
    found = parsed("validate", "--model", "MEND", "--data", "Facts", "--edit.editor", "ROME",
                   "--edit.editor.layer", "3")  # fmt: skip
    assert found["model"]["class_path"] == "corrigenda.MEND"
    assert found["data"]["class_path"] == "corrigenda.Facts"
    assert found["edit"]["editor"]["class_path"] == "corrigenda.ROME"
    assert found["edit"]["editor"]["init_args"]["layer"] == 3
    assert found["trainer"]["inference_mode"] is False  # from configs/defaults.yaml


def test_printed_configuration_is_the_configuration(parsed, tmp_path):
    args = [
        "-c",
        "configs/rome/smollm2.yaml",
        "-c",
        "configs/data/zsre.yaml",
        "--data.path",
        "x.jsonl",
    ]
    once = parsed("validate", *args, "--edit.schedule", "batch")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(once))
    assert parsed("validate", "-c", "all.yaml") == once
    assert once["edit"]["schedule"] == "batch" and once["data"]["init_args"]["path"] == "x.jsonl"


def test_no_options_of_edits_are_refused(corrigenda, tmp_path, capsys):
    (tmp_path / "null.yaml").write_text("edit: null")
    args = ["-c", "base/smollm2.yaml", "-c", "data/facts.yaml", "-c", "null.yaml"]
    assert corrigenda("validate", *args) == 2
    assert "edit is null: to edit nothing" in one_line(capsys)


def test_files_combine_and_come_from_anywhere(parsed, tmp_path):
    """Ours are found from every folder, with or without configs/ in front; one that is here comes first."""
    own = {"data": {"init_args": {"batch_size": 3}}, "edit": {"schedule": "epoch"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    found = parsed(
        "validate",
        "-c",
        "base/smollm2.yaml",
        "--config",
        "configs/data/zsre.yaml",
        "-c",
        "own.yaml",
    )
    assert found["model"]["init_args"]["lm"]["init_args"]["name"] == "smollm2"
    assert found["data"]["class_path"].endswith(".ZsRE")
    assert (
        found["data"]["init_args"]["variant"] == "E"
        and found["data"]["init_args"]["batch_size"] == 3
    )
    assert found["edit"]["schedule"] == "epoch" and found["edit"]["editor"] is None


def test_options_win_over_files_wherever_they_stand(parsed, tmp_path):
    """``--data.limit`` needs the class that a file after it names."""
    (tmp_path / "own.yaml").write_text("{edit: {schedule: epoch}, data: {init_args: {limit: 9}}}")
    files = ["-c", "base/smollm2.yaml", "-c", "data/facts.yaml", "-c", "own.yaml"]
    options = ["--data.limit", "3", "--edit.schedule", "batch"]
    first, mixed = [*options, *files], [*files[:2], *options[:2], *files[2:], *options[2:]]
    for args in (first, mixed):
        found = parsed("validate", *args)
        assert found == parsed("validate", *files, *options)
        assert found["data"]["init_args"]["limit"] == 3 and found["edit"]["schedule"] == "batch"


@pytest.mark.parametrize(
    "one", [["-c", "{}"], ["-c{}"], ["-c={}"], ["--config", "{}"], ["--config={}"]]
)
def test_every_spelling_of_a_file_is_the_same(parsed, tmp_path, one):
    """Files in their order, options win, ours are found, wherever they stand."""
    (tmp_path / "own.yaml").write_text("{edit: {schedule: epoch}, data: {init_args: {limit: 9}}}")

    def given(file):
        return [word.format(file) for word in one]

    files = [*given("base/smollm2.yaml"), *given("configs/data/facts.yaml"), *given("own.yaml")]
    found = parsed("validate", "--data.limit", "3", *files, "--data.seed=5")
    assert found["data"]["init_args"]["limit"] == 3 and found["data"]["init_args"]["seed"] == 5
    assert found["edit"]["schedule"] == "epoch"
    assert found == parsed("validate", *files, "--data.seed", "5", "--data.limit", "3")


@pytest.mark.parametrize(
    "args", [["--run_dir=~/x"], ["--run_dir", "~/x"], ["-c=~/c.yaml"], ["-c~/c.yaml"]]
)
def test_the_home_folder_is_found_everywhere(parsed, tmp_path, monkeypatch, args):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text("{run_dir: ~/x, data: {init_args: {path: ~/d.json}}}")
    base = ["-c", "base/smollm2.yaml", "-c", "data/zsre.yaml", "--data.path=~/d.json"]
    found = parsed("validate", *base, *args)
    assert found["run_dir"] == str(tmp_path / "home" / "x")
    assert found["data"]["init_args"]["path"] == str(tmp_path / "home" / "d.json")


def test_paths_of_other_commands_are_expanded(tmp_path, monkeypatch, corrigenda, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "s.yaml").write_text("{out: ~/out, runs: [{name: a, args: validate}]}")
    assert read_study(tmp_path / "s.yaml").out == tmp_path / "home" / "out"
    for args in (["report", "~/a", "--out", "b"], ["compare", "~/a"], ["edits", "show", "~/a"]):
        assert corrigenda(*args) == 2
        assert str(tmp_path / "home" / "a") in one_line(capsys)


@pytest.mark.parametrize("args", [["--run_dir", ""], ["--run_dir="]])
def test_a_folder_without_a_name_is_refused(corrigenda, tiny, capsys, args):
    assert corrigenda("validate", *tiny, *args) == 2
    assert "--run_dir is empty" in one_line(capsys)
    assert corrigenda("report", "a", *[arg.replace("run_dir", "out") for arg in args]) == 2
    assert "--out is empty" in one_line(capsys)


# ---------------------------------------------------------------------------- runs


@pytest.fixture
def online(monkeypatch):
    """W&B as users have it, without the environment variable for offline mode."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "")
    yield
    monkeypatch.undo()
    wandb.finish()


def test_a_run_needs_no_connection_to_wandb(
    corrigenda, tiny, tmp_path, caplog, monkeypatch, online
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    args = ["--run_dir", "a", "--wandb", "online", "--data.limit", "1"]
    assert corrigenda("validate", *tiny, *args) == 0
    assert (tmp_path / "a" / "summary.json").is_file()
    assert caplog.text.count("Weights & Biases is disabled after an error, the run continues") == 1


def test_a_run_outlives_wandb(corrigenda, tiny, tmp_path, caplog, monkeypatch, online):
    def fail(*_, **__):
        raise RuntimeError("the service is gone")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", fail)
    monkeypatch.setattr("wandb.sdk.wandb_run.Run.define_metric", fail)
    args = ["--run_dir", "a", "--wandb", "offline", "--data.limit", "2", "--data.batch_size", "1"]
    assert corrigenda("fit", *tiny, *args, "--edit.schedule", "stream") == 0
    assert (tmp_path / "a" / "summary.json").is_file()
    assert caplog.text.count("the run continues: the service is gone") == 1


def test_surroundings_do_not_matter(corrigenda, tiny, tmp_path, monkeypatch):
    """A terminal of one column; a job of SLURM whose command was not started by srun."""
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert corrigenda("validate", *tiny, "--run_dir", "a", "--data.limit", "1") == 0
    assert (tmp_path / "a" / "summary.json").is_file()


def test_a_run_folder(corrigenda, tiny, tmp_path):
    assert corrigenda("validate", *tiny, "--run_dir", "a") == 0
    folder = tmp_path / "a"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    edits = {f"edits/{i}.safetensors" for i in range(5)}
    assert (
        written
        == {".lock", "config.yaml", "cases.jsonl", "progress.json", "summary.json"}
        | {"logs/version_0/metrics.csv"}
        | edits
    )
    assert json.loads((folder / "summary.json").read_text())["run"] == "a"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["edit"]["editor"]["init_args"]["steps"] == 2 and config["seed_everything"] == 0

    # The file alone repeats the run in another folder, and does not touch this one.
    assert corrigenda("validate", "-c", "a/config.yaml", "--run_dir", "b") == 0
    lines = [(tmp_path / name / "cases.jsonl").read_text() for name in "ab"]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 5
    assert {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } == written
    assert (tmp_path / "b" / "logs" / "version_0" / "metrics.csv").is_file()
    assert corrigenda("validate", "-c", "a/config.yaml") == 2


def test_without_a_name_a_run_is_named_by_time(corrigenda, tiny, tmp_path):
    assert corrigenda("validate", *tiny, "--data.limit", "1", "--edit.save_edits", "false") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-validate") and not (folder / "edits").exists()
    assert len((folder / "cases.jsonl").read_text().splitlines()) == 1


def test_the_seed_of_a_run_is_its_editors_too(corrigenda, tiny, tmp_path, monkeypatch):
    """Unless the editor was given one; the data's own seed stays."""
    seen, setup = [], EditCallback.setup

    def note(self, trainer, *rest, **stage):
        seen.append((self.editor.seed, trainer.datamodule.seed, torch.initial_seed()))
        setup(self, trainer, *rest, **stage)

    monkeypatch.setattr(EditCallback, "setup", note)
    lora = ["--edit.editor", "LoRA", "--edit.editor.targets", "all", "--edit.editor.steps", "1"]
    for name, args in (("a", []), ("b", ["--edit.editor.seed", "7"])):
        args = [*tiny, *lora, *args, "--data.limit", "1", "--seed_everything", "3"]
        assert corrigenda("validate", *args, "--run_dir", name) == 0
        assert json.loads((tmp_path / name / "summary.json").read_text())["seed"] == 3
    assert seen == [(3, 0, 3), (7, 0, 3)]


def test_a_mistake_found_before_the_run_leaves_its_folder_free(corrigenda, tiny):
    assert corrigenda("validate", *tiny, "--run_dir", "a", "--model.lm.name", "nowhere/at-all") == 2
    assert corrigenda("validate", *tiny, "--run_dir", "a") == 0


def test_a_stream_is_stopped_and_resumed(corrigenda, tiny, tmp_path, capsys, monkeypatch):
    """The checkpoints of the default settings serve a stream of edits, too."""
    args = ["fit", *tiny, "--run_dir", "a", "--edit.schedule", "stream", "--data.batch_size", "1"]
    monkeypatch.setattr("corrigenda.pipeline.checkpointing.SAVE_EVERY", 0)
    score, calls = LanguageModel.score, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(LanguageModel, "score", stop)
    assert corrigenda(*args) == 130
    assert "interrupted" in capsys.readouterr().err
    assert corrigenda(*args) == 2
    assert "resume it with --ckpt_path last" in capsys.readouterr().err
    assert corrigenda(*args, "--ckpt_path", "last") == 0
    assert (tmp_path / "a" / "config-resumed-1.yaml").is_file()
    rows = [json.loads(line) for line in (tmp_path / "a" / "cases.jsonl").read_text().splitlines()]
    assert [row["case_id"] for row in rows if row["phase"] == "val"] == list("01234")
    saved = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["EditCallback"]["done"] == list("01234")


@pytest.mark.parametrize("schedule", ["each", "batch", "epoch"])
def test_an_interrupted_validation_resumes(
    corrigenda, tiny, tmp_path, capsys, caplog, monkeypatch, schedule
):
    """Repeating the command neither edits nor evaluates cases again."""
    args = ["validate", *tiny, "--edit.schedule", schedule, "--data.batch_size", "2"]
    assert corrigenda(*args, "--run_dir", "whole") == 0
    evaluate, calls = EditingModule.evaluate, []

    def stop_once(self, cases):
        calls.append(len(cases))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, cases)

    monkeypatch.setattr(EditingModule, "evaluate", stop_once)
    assert corrigenda(*args, "--run_dir", "cut") == 130
    assert corrigenda(*args, "--run_dir", "cut", "--data.limit", "4") == 2
    assert "--data.limit has changed: null, now 4" in capsys.readouterr().err
    assert corrigenda(*args, "--run_dir", str(tmp_path / "cut")) == 0
    assert calls == [2, 2, 1, 0, 0, 1]
    assert "4 cases in" in caplog.text and "are not evaluated again" in caplog.text
    whole, cut = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")
    )
    assert whole["means"] == cut["means"] and whole["means"]["efficacy/exact"] is not None
    assert cut["budget"]["num_edits"] == whole["budget"]["num_edits"] == 5
    whole, cut = (
        (tmp_path / name / "cases.jsonl").read_text().splitlines() for name in ("whole", "cut")
    )
    assert whole == cut


def test_moments(corrigenda, tiny_folder, data_files, capsys):
    args = ["moments", "--lm.name", tiny_folder("gpt2"), "--corpus.source", data_files.text,
            "--corpus.tokens", "1500"]  # fmt: skip
    assert corrigenda(*args, "--layers", "0", "1") == 0
    first = capsys.readouterr().out
    assert "layer 0: (128, 128)" in first and "layer 1: (128, 128)" in first
    assert first.count("% of it from first tokens") == 2
    folder = Path(first.splitlines()[-1].removeprefix("saved in "))
    assert len(list(folder.glob("layer?.safetensors"))) == len(list(folder.glob("*cholesky*"))) == 2
    assert corrigenda(*args, "--layers", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
    assert corrigenda(*args, "--layers", "0", "7") == 2
    assert "layer 7 does not exist" in capsys.readouterr().err


def test_moments_of_others(corrigenda, tiny_folder, tmp_path, capsys):
    keys = torch.randn(400, 128)
    np.savez(tmp_path / "a.npz", **{"mom2.mom2": (keys.T @ keys).numpy(), "mom2.count": 400})
    args = ["moments", "--lm.name", tiny_folder("gpt2"), "--import", "a.npz"]
    assert corrigenda(*args, "--layers", "0", "1") == 2
    assert "a.npz holds one layer" in one_line(capsys)
    assert corrigenda(*args, "--layers", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    trace = float(keys.square().sum() / 400)
    assert lines[0] == f"layer 1: (128, 128), trace {trace:.4g}"
    assert Path(lines[-1].removeprefix("saved in ")).name.startswith("imported")
    args[-1] = "b.npz"
    assert corrigenda(*args, "--layers", "1") == 2
    assert "b.npz: no such statistics file" in one_line(capsys)


@pytest.mark.slow
def test_wandb_writes_into_the_run_folder(corrigenda, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert corrigenda("validate", *tiny, "--run_dir", "a", "--wandb", "offline") == 0
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not (tmp_path / "wandb").exists()


def test_every_case_has_an_edit_file_of_its_own(tiny, corrigenda, data_files, tmp_path):
    """Also where ids differ in what a file name cannot hold, and nothing is written elsewhere."""
    rows = [json.loads(line) for line in Path(data_files.zsre).read_text().splitlines()]
    ids = ["a/b", "a_b", "A_B", "../../up", "x" * 300]
    lines = [json.dumps(row | {"case_id": name}) for row, name in zip(rows, ids, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert corrigenda("validate", *tiny, "--data.path", "rows.jsonl", "--run_dir", "deep/run") == 0
    files = list((tmp_path / "deep" / "run" / "edits").iterdir())
    assert len(files) == 5 and len({file.name.casefold() for file in files}) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
