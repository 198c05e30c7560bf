"""Interrupted and resumed runs: nothing is repeated, lost or mixed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from corrigenda.modules.editing.adapters import ModuleEditor
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.files import locked
from corrigenda.modules.training.tuning import FineTune
from corrigenda.pipeline import checkpointing
from corrigenda.pipeline.checkpointing import LastCheckpoint
from corrigenda.pipeline.report.logs import read_log
from corrigenda.pipeline.run_writer import RunWriter
from tests.samples import QUIET, summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

FT = ["--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "2"]
ONE_MORE = ["--ckpt_path", "last"]


@pytest.fixture
def base(tiny_folder, data_files):
    """A small model and five cases, one per batch."""
    return [
        "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"), "--data", "ZsRE",
        "--data.path", data_files.zsre, "--data.batch_size", "1", *QUIET,
    ]  # fmt: skip


@pytest.fixture
def stream(base):
    return ["fit", *base, *FT, "--edit.schedule", "stream", "--trainer.log_every_n_steps", "1"]


@pytest.fixture
def validate(base):
    return ["validate", *base, *FT]


@pytest.fixture
def tuning(base):
    """An update of limited size, trained on all five cases."""
    method = ["--model.method", "FT", "--model.method.layers", "[1]",
              "--model.method.norm_constraint", "1e-3", "--trainer.max_epochs", "3"]  # fmt: skip
    return ["fit", "--model", "FineTune", *base[2:], *method]


@pytest.fixture(autouse=True)
def every_step_is_kept(monkeypatch):
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 0.0)


@pytest.fixture
def refused(corrigenda, capsys):
    """``refused(*args)``: the one line that a command ends with; what is in ``folder`` stays as it was."""

    def run(*args, folder=None):
        before = files(folder) if folder else None
        capsys.readouterr()
        assert corrigenda(*args) == 2
        error = capsys.readouterr().err
        assert error.startswith("corrigenda: error: ") and error.count("\n") == 1, error
        assert folder is None or files(folder) == before
        return error

    return run


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def stop_at(monkeypatch, owner, name, number, error=KeyboardInterrupt):
    """Raises at the call with that number, counted from 0; returns a list with an entry per call."""
    calls, method = [], getattr(owner, name)

    def counted(self, *args, **options):
        calls.append(args)
        if len(calls) == number + 1:
            raise error
        return method(self, *args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


# ---------------------------------------------------------------------------- resuming


def test_a_stream_makes_every_edit_once(corrigenda, stream, tmp_path, monkeypatch):
    assert corrigenda(*stream, "--run_dir", "whole") == 0
    calls = stop_at(monkeypatch, WeightEditor, "edit", 3)
    assert corrigenda(*stream, "--run_dir", "cut") == 130
    assert corrigenda(*stream, "--run_dir", "cut", *ONE_MORE) == 0
    made = [edits[0].subject for _, edits in calls]
    assert (
        len(made) == 6 and made[3] == made[4] and len(set(made)) == 5
    )  # the fourth was interrupted
    whole, cut = (summary(tmp_path / name) for name in ("whole", "cut"))
    assert whole["means"] == cut["means"]
    for name in ("num_edits", "bytes_per_edit"):
        assert whole["budget"][name] == cut["budget"][name]
    rows = [(tmp_path / name / "cases.jsonl").read_text() for name in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_an_adapter_resumes(corrigenda, base, tmp_path, monkeypatch):
    grace = ["--edit.editor", "GRACE", "--edit.editor.layer", "1", "--edit.editor.epsilon", "0.5",
             "--edit.editor.steps", "2"]  # fmt: skip
    args = ["fit", *base, *grace, "--edit.schedule", "stream"]
    calls = stop_at(monkeypatch, ModuleEditor, "edit", 2)
    assert corrigenda(*args, "--run_dir", "cut") == 130
    assert corrigenda(*args, "--run_dir", "cut", *ONE_MORE) == 0
    assert len(calls) == 6


def test_fine_tuning_makes_every_step_once(corrigenda, tuning, tmp_path, monkeypatch):
    """The shipped fits of FT and LoRA have no ModelCheckpoint; the limit on the update holds in what is kept."""
    assert corrigenda(*tuning, "--run_dir", "whole") == 0
    calls = stop_at(monkeypatch, FineTune, "training_step", 7)
    assert corrigenda(*tuning, "--run_dir", "cut") == 130
    assert checkpoint(tmp_path / "cut")["global_step"] == 7
    assert corrigenda(*tuning, "--run_dir", "cut", *ONE_MORE) == 0
    assert len(calls) == 16
    whole, cut = (checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert cut["global_step"] == 15
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name])
        assert 0 < value.abs().max() <= 1e-3 + 1e-9


def test_a_run_resumes_after_its_first_step_is_lost(
    corrigenda, stream, tmp_path, monkeypatch, caplog
):
    """Without a checkpoint it starts again with a warning, and earlier files are moved aside."""
    assert corrigenda(*stream, "--run_dir", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "training_step", 0)
        assert corrigenda(*stream, "--run_dir", "cut") == 130
    assert len((tmp_path / "cut" / "cases.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "cut" / "checkpoints").exists()
    assert corrigenda(*stream, "--run_dir", "cut", *ONE_MORE) == 0
    assert "starts from the beginning (earlier files are in cut/interrupted-1)" in caplog.text
    rows = [(tmp_path / name / "cases.jsonl").read_text() for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert (tmp_path / "cut" / "interrupted-1" / "cases.jsonl").exists()


def test_an_empty_config_of_a_killed_run_is_no_obstacle(corrigenda, validate, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    assert corrigenda(*validate, "--run_dir", "a") == 0
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["model"]


def test_budgets_are_of_all_processes(corrigenda, stream, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "training_step", 3)
        assert corrigenda(*stream, "--run_dir", "cut") == 130
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["callbacks"]["EditCallback"]["made"] == 3
    saved["callbacks"]["EditCallback"] |= {"seconds": 1e4, "peak_gib": 1e3, "prepare_seconds": 1e5}
    saved["callbacks"]["RunWriter"]["run_seconds"] = 1e6
    torch.save(saved, path)
    assert corrigenda(*stream, "--run_dir", "cut", *ONE_MORE) == 0
    budget = summary(tmp_path / "cut")["budget"]
    assert budget["num_edits"] == 5 and 1e4 < 5 * budget["seconds_per_edit"] < 1.1e4
    assert budget["peak_gib"] == 1e3 and budget["run_seconds"] > 1e6
    assert budget["prepare_seconds"] > 1e5


def test_what_a_killed_process_was_writing_is_removed(corrigenda, stream, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "training_step", 2)
        corrigenda(*stream, "--run_dir", "cut")
    left = tmp_path / "cut" / "checkpoints" / ".last.ckpt.unfinished"
    left.mkdir()
    (left / "last.ckpt").write_bytes(b"half")
    other = tmp_path / "cut" / "edits" / ".step-000009.safetensors.unfinished"
    other.mkdir()
    assert corrigenda(*stream, "--run_dir", "cut", *ONE_MORE) == 0
    assert not left.exists() and not other.exists()


def test_a_run_interrupted_before_its_summary_only_writes_that(
    corrigenda, base, tmp_path, monkeypatch
):
    """The checkpoint stays as it was, and the memory has its size although nothing is looked up again."""
    memory = ["--edit.editor", "MemPrompt", "--edit.editor.encoder", "lm"]
    args = ["fit", *base, *memory, "--edit.schedule", "stream"]
    assert corrigenda(*args, "--run_dir", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, RunWriter, "on_fit_end", 0)
        assert corrigenda(*args, "--run_dir", "cut") == 130
    kept = (tmp_path / "cut" / "checkpoints" / "last.ckpt").read_bytes()
    assert corrigenda(*args, "--run_dir", "cut", *ONE_MORE) == 0
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").read_bytes() == kept
    whole, cut = (summary(tmp_path / name)["numbers"] for name in ("whole", "cut"))
    assert cut["memory_bytes"] == whole["memory_bytes"] > 0
    assert cut["questions"] == whole["questions"]


@pytest.mark.parametrize("schedule", ["each", "batch", "epoch"])
def test_a_validation_interrupted_before_its_summary_logs_how_many_edits_were_active(
    corrigenda, base, tmp_path, monkeypatch, schedule
):
    """Though every case had been measured, so that none is edited again."""
    args = ["validate", *base, *FT, "--edit.schedule", schedule, "--data.batch_size", "2"]
    assert corrigenda(*args, "--run_dir", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, RunWriter, "on_validation_end", 0)
        assert corrigenda(*args, "--run_dir", "cut") == 130
    assert corrigenda(*args, "--run_dir", "cut") == 0
    whole, cut = (read_log(tmp_path / name)[-1]["edit/num_edits"] for name in ("whole", "cut"))
    assert cut == whole > 0


@pytest.mark.parametrize("number", [1, 3])
def test_the_values_of_a_saved_step_are_logged(corrigenda, tuning, tmp_path, monkeypatch, number):
    """Killed after a step was kept and before Lightning logged it; the third is the last."""
    args = [*tuning, "--run_dir", "cut", "--trainer.check_val_every_n_epoch", "2",
            "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]  # fmt: skip
    save, calls = LastCheckpoint._save, []

    def saved_and_killed(self, trainer):
        save(self, trainer)
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", saved_and_killed)
        assert corrigenda(*args) == 130
    assert corrigenda(*args, *ONE_MORE) == 0
    rows = read_log(tmp_path / "cut")
    assert sorted(row["step"] for row in rows if "train/loss" in row) == [0, 1, 2]


# ---------------------------------------------------------------------------- extending


@pytest.mark.parametrize(
    ("kind", "first", "then", "evaluated"),
    [("stream", 3, 5, 1), ("tuning", 3, 5, 1), ("tuning", 5, 8, 2)],
    ids=["a stream", "within an epoch", "at the end of an epoch"],
)
def test_a_finished_fit_can_be_extended(
    request, corrigenda, refused, tmp_path, kind, first, then, evaluated
):
    """As if it had been given as many steps at once, also where it ended within an epoch."""
    args = [*request.getfixturevalue(kind), "--trainer.check_val_every_n_epoch", evaluated]
    assert corrigenda(*args, "--run_dir", "whole", "--trainer.max_steps", then) == 0
    assert corrigenda(*args, "--run_dir", "a", "--trainer.max_steps", first) == 0
    short = summary(tmp_path / "a")
    more = [*args, "--run_dir", "a", *ONE_MORE, "--trainer.max_steps"]
    assert "leave nothing to do: increase --trainer.max_steps" in refused(
        *more, first, folder=tmp_path / "a"
    )
    assert "nothing left to do" in refused(*more, first - 1, folder=tmp_path / "a")
    assert corrigenda(*more, then) == 0
    whole, longer = (summary(tmp_path / name) for name in ("whole", "a"))
    assert whole["means"] == longer["means"]
    assert longer["budget"]["run_seconds"] > short["budget"]["run_seconds"]
    saved = [checkpoint(tmp_path / name) for name in ("whole", "a")]
    assert saved[0]["global_step"] == saved[1]["global_step"] == then
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name])
    assert "holds a finished run" in refused(*args, "--run_dir", "a", folder=tmp_path / "a")


# ---------------------------------------------------------------------------- starts that fail


@pytest.mark.parametrize(
    "change",
    [
        ["--model.lm.name", "nowhere/at-all"],
        ["--data.path", "nowhere.jsonl"],
        ["--edit.schedule", "stream"],  # of a validate: found when everything is loaded
        ["--edit.editor.layers", "[7]"],
    ],
    ids=lambda change: change[0],
)
def test_a_start_that_fails_leaves_no_folder(refused, validate, tmp_path, change):
    refused(*validate, *change, "--run_dir", "runs/new/a", folder=tmp_path)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "a").mkdir()
    refused(*validate, *change, "--run_dir", "a", folder=tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("kind", ["validate", "stream", "tuning"])
def test_a_rehearsal_leaves_nothing(request, corrigenda, tmp_path, kind):
    args = [*request.getfixturevalue(kind), "--run_dir", "a"]
    assert corrigenda(*args, "--trainer.fast_dev_run", "true") == 0
    assert not (tmp_path / "a").exists()
    assert corrigenda(*args) == 0
    before = files(tmp_path / "a")
    assert corrigenda(*args, "--trainer.fast_dev_run", "true") == 0
    assert files(tmp_path / "a") == before


def test_a_folder_belongs_to_one_process(corrigenda, refused, validate, tmp_path):
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / ".lock", "it"):
        message = refused(*validate, "--run_dir", "a", folder=tmp_path)
    assert "the run folder a is being written by another process" in message
    assert corrigenda(*validate, "--run_dir", "a") == 0  # the lock file alone means nothing


# ---------------------------------------------------------------------------- the same run


@pytest.fixture
def copies(tmp_path, tiny_folder, data_files):
    """A model folder and a data file that a test may replace, as arguments."""
    shutil.copytree(tiny_folder("gpt2"), tmp_path / "lm")
    shutil.copy(data_files.zsre, tmp_path / "cases.jsonl")
    return ["--model.lm.name", "lm", "--data.path", "cases.jsonl"]


def other_model(folder, tiny_folder):
    (folder / "lm" / "model.safetensors").write_bytes(
        (tiny_folder("gpt2", seed=1) / "model.safetensors").read_bytes()
    )


def other_tokenizer(folder, _):
    file = folder / "lm" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up": 1}))


def other_cases(folder, _):
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    rows[-1]["alt"] = "a blue house"
    (folder / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_change(*_):
    pass


CHANGES = [
    (other_model, [], "the content of lm/model.safetensors has changed"),
    (other_tokenizer, [], "the content of lm/tokenizer_config.json has changed"),
    (other_cases, [], "the content of cases.jsonl has changed"),
    (no_change, ["--edit.editor.steps", "3"], "--edit.editor.steps has changed: 2, now 3"),
    (no_change, ["--seed_everything", "3"], "--seed_everything has changed: 0, now 3"),
]


@pytest.mark.parametrize("verb", ["validate", "stream"])
def test_only_the_same_run_can_be_resumed(
    request, corrigenda, refused, tiny_folder, copies, tmp_path, monkeypatch, verb
):
    command = [*request.getfixturevalue(verb), *copies, "--run_dir", "cut"]
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "evaluate", 3)
        assert corrigenda(*command) == 130
    last = ONE_MORE if verb == "stream" else []
    for change, args, words in CHANGES:
        before = files(tmp_path)
        change(tmp_path, tiny_folder)
        message = refused(*command, *args, *last, folder=tmp_path / "cut")
        assert words in message or (verb == "stream" and "was trained for" in message)
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
    assert corrigenda(*command, *last) == 0


def test_a_validation_resumes_with_the_same_code_and_checkpoint(
    corrigenda, refused, tuning, validate, tmp_path, monkeypatch
):
    assert corrigenda(*tuning, "--run_dir", "a", "--trainer.max_steps", "2") == 0
    args = ["validate", *tuning[1:], "--ckpt_path", "a/checkpoints/last.ckpt", "--run_dir", "b"]
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "evaluate", 3)
        assert corrigenda(*args) == 130
    with monkeypatch.context() as patch:
        patch.setattr("corrigenda.pipeline.run_folder._hash_of_code", lambda: "other")
        assert "the version of Corrigenda's code has changed" in refused(*args, folder="b")
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    kept = path.read_bytes()
    saved = checkpoint(tmp_path / "a")
    for value in saved["state_dict"].values():
        value += 1
    torch.save(saved, path)
    assert "the content of a/checkpoints/last.ckpt has changed" in refused(*args, folder="b")
    path.write_bytes(kept)
    assert corrigenda(*args) == 0


def test_a_resumed_fit_warns_about_other_code(corrigenda, stream, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "training_step", 2)
        assert corrigenda(*stream, "--run_dir", "a") == 130
    monkeypatch.setattr("corrigenda.pipeline.run_folder._hash_of_code", lambda: "other")
    assert corrigenda(*stream, "--run_dir", "a", *ONE_MORE) == 0
    assert "was started with another value of the version of Corrigenda's code" in caplog.text


def test_another_runs_checkpoint_is_refused(
    corrigenda, refused, stream, tuning, tmp_path, monkeypatch
):
    assert corrigenda(*stream, "--run_dir", "a", "--seed_everything", "1") == 0
    assert corrigenda(*tuning, "--run_dir", "b") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "training_step", 2)
        assert corrigenda(*stream, "--run_dir", "c") == 130
    last = tmp_path / "c" / "checkpoints" / "last.ckpt"
    for name, words in (("a", "--seed_everything has changed"), ("b", "use the class")):
        last.write_bytes((tmp_path / name / "checkpoints" / "last.ckpt").read_bytes())
        assert words in refused(*stream, "--run_dir", "c", *ONE_MORE, folder="c")
    last.write_bytes(last.read_bytes()[:-100])
    assert "not a readable checkpoint" in refused(*stream, "--run_dir", "c", *ONE_MORE, folder="c")


LINES = ["no json", "[1]", '{"metrics": {}}', '{"fingerprint": "a", "metrics": {"a": "b"}}']


def test_cases_of_another_make_are_refused(corrigenda, refused, validate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "evaluate", 2)
        assert corrigenda(*validate, "--run_dir", "a") == 130
    path = tmp_path / "a" / "cases.jsonl"
    size = path.stat().st_size
    for line in LINES:
        path.write_text(line + " " * (size - len(line) - 1) + "\n")
        message = refused(*validate, "--run_dir", "a", folder="a")
        assert "a/cases.jsonl:1: this version cannot read the row" in message
    (tmp_path / "a" / "progress.json").write_text("{")
    assert "whose settings are unknown" in refused(*validate, "--run_dir", "a", folder="a")


# ---------------------------------------------------------------------------- numbers that are not finite


def test_infinite_values_are_null_and_are_counted_again(
    corrigenda, validate, tmp_path, monkeypatch
):
    measure = "corrigenda.modules.metrics.kl"
    monkeypatch.setattr(measure, lambda before, after, mask: torch.full((len(mask),), torch.inf))
    assert corrigenda(*validate, "--run_dir", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, EditingModule, "evaluate", 3)
        assert corrigenda(*validate, "--run_dir", "cut") == 130
    assert corrigenda(*validate, "--run_dir", "cut") == 0

    def refuse(name):
        raise AssertionError(name)

    for name in ("whole", "cut"):
        folder = tmp_path / name
        lines = (folder / "cases.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=refuse) for line in lines]
        assert [row["metrics"]["locality/kl"] for row in rows] == [None] * 5
        found = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
        assert (
            found["means"]["locality/kl"] is None and found["means"]["efficacy/exact"] is not None
        )
        log = (folder / "logs").glob("version_*/metrics.csv")
        assert "inf" in max(log).read_text()
    assert summary(tmp_path / "whole")["means"] == summary(tmp_path / "cut")["means"]
    assert corrigenda("report", "whole", "cut", "--out", "report") == 0


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("kind", ["stream", "tuning"])
def test_a_signal_waits_for_the_step_and_keeps_it(
    request, corrigenda, tmp_path, monkeypatch, capfd, kind, number
):
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 60.0)
    args = request.getfixturevalue(kind)
    owner = EditingModule if kind == "stream" else FineTune
    calls, step = [], owner.training_step

    def interrupted(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(self, *rest)

    monkeypatch.setattr(owner, "training_step", interrupted)
    assert corrigenda(*args, "--run_dir", "cut") in (130, 143)
    assert "stopping after this step" in capfd.readouterr().err
    assert checkpoint(tmp_path / "cut")["global_step"] == 3
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert corrigenda(*args, "--run_dir", "cut", *ONE_MORE) == 0
    assert len(calls) == (5 if kind == "stream" else 15)


def test_a_second_ctrl_c_does_not_wait(corrigenda, tuning, tmp_path, monkeypatch):
    """The process ends within the step; a second SIGTERM changes nothing."""

    class AtOnce(BaseException):
        pass

    def end(status):
        raise AtOnce(status)

    said = []

    def interrupted(*_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            said.append(number)
            os.kill(os.getpid(), number)
        said.append("went on")

    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 60.0)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(FineTune, "training_step", interrupted)
    with pytest.raises(AtOnce, match="130"):
        corrigenda(*tuning, "--run_dir", "cut")
    assert said == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    assert not (tmp_path / "cut" / "checkpoints").exists()
