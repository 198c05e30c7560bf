"""Ctrl-C, SIGTERM and the end of a parent: what each command does, and the status it ends with."""

import os
import signal
import subprocess
import sys
import time

import pytest

from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline import signals
from corrigenda.pipeline.run_writer import RunWriter
from tests.samples import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture
def tiny(tiny_folder, data_files):
    """Arguments of a stream of five edits on a small model."""
    return [
        "fit", "--model", "EditingModule", "--model.lm.name", str(tiny_folder("gpt2")), "--data", "ZsRE",
        "--data.path", data_files.zsre, "--data.batch_size", "1", "--edit.schedule", "stream",
        "--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "2", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run_dir", "a",
    ]  # fmt: skip


def send(number):
    signal.raise_signal(number)


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell's background jobs begin with Ctrl-C ignored."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) == before[1]
    signal.signal(signal.SIGINT, before[0])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_is_stopped_in_one_line(
    corrigenda, tiny, tmp_path, capsys, monkeypatch, number, status
):
    score, calls, stopped = LanguageModel.score, [], []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            send(number)
        return score(*args, **kwargs)

    monkeypatch.setattr(LanguageModel, "score", stop)
    monkeypatch.setattr(RunWriter, "on_exception", lambda *args: stopped.append(args[-1]))
    assert corrigenda(*tiny) == status
    error = capsys.readouterr().err
    assert error.endswith("; files written so far are kept\n") and error.count("corrigenda:") == 1
    assert isinstance(stopped[0], KeyboardInterrupt)  # callbacks keep what they keep on Ctrl-C
    assert not (tmp_path / "a" / "summary.json").exists()
    assert (tmp_path / "a" / "cases.jsonl").exists()


def test_a_second_ctrl_c_ends_a_run_that_is_stopping(corrigenda, tiny, monkeypatch):
    """Lightning would ignore it."""

    class AtOnce(BaseException):
        pass

    def end(status):
        raise AtOnce(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(LanguageModel, "score", lambda *_, **__: send(signal.SIGINT))
    monkeypatch.setattr(RunWriter, "on_exception", lambda *_: send(signal.SIGINT))
    with pytest.raises(AtOnce, match="130"):
        corrigenda("validate", *tiny[1:], "--edit.schedule", "each")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("args", "function"),
    [
        (["report", "a", "--out", "b"], "corrigenda.pipeline.report.read_runs"),
        (["moments", "--layers", "0"], "corrigenda.modules.model.lm.load_model"),
        (["doctor", "a"], "corrigenda.modules.model.lm.load_model"),
        (["edits", "show", "a.safetensors"], "corrigenda.pipeline.edit_files.file_format"),
        (["compare", "s.yaml"], "corrigenda.pipeline.compare.run_child"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_so_is_every_command(
    corrigenda, tmp_path, capsys, monkeypatch, args, function, number, status
):
    def stop(*_, **__):
        send(number)

    monkeypatch.setattr(function, stop)
    (tmp_path / "s.yaml").write_text("runs: [{name: a, args: validate}]")
    assert corrigenda(*args) == status
    error = capsys.readouterr().err
    assert error.startswith("corrigenda") and error.count("\n") == 1


WAITS = """
import sys, time
from pathlib import Path
from corrigenda.pipeline.signals import interruptible, status_of
folder = Path(sys.argv[1])
with interruptible():
    try:
        (folder / "ready").touch()
        time.sleep(600)
    except KeyboardInterrupt as stop:
        (folder / "closing").touch()
        time.sleep(float(sys.argv[2]))
        (folder / "closed").touch()
        raise SystemExit(status_of(stop))
"""
PARENT = """
import os, sys
from corrigenda.pipeline.signals import interruptible, run_child, status_of
with interruptible():
    try:
        run_child([sys.executable, *sys.argv[1:]], os.environ, 30)
    except KeyboardInterrupt as stop:
        raise SystemExit(status_of(stop))
"""


def until(condition):
    end = time.monotonic() + 600  # seconds; the machine may be busy
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """``start(seconds to close, with_parent)``: a process that waits, once it does."""
    started = []

    def run(seconds, with_parent=False):
        waits, parent = tmp_path / "waits.py", tmp_path / "parent.py"
        waits.write_text(WAITS)
        parent.write_text(PARENT)
        command = [str(waits), str(tmp_path), str(seconds)]
        command = [sys.executable, *([str(parent)] if with_parent else []), *command]
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        until((tmp_path / "ready").exists)
        return started[0]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_ctrl_c_twice_ends_at_once(start, tmp_path):
    process = start(600)
    process.send_signal(signal.SIGINT)
    until((tmp_path / "closing").exists)
    process.send_signal(signal.SIGTERM)  # changes nothing
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert not (tmp_path / "closed").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_child_closes_its_files_when_its_parent_ends(start, tmp_path, number, status):
    process = start(0.1, with_parent=True)
    process.send_signal(number)
    assert process.wait(120) == status
    until((tmp_path / "closed").exists)


def test_a_process_without_such_a_parent_continues(monkeypatch):
    monkeypatch.setenv(signals.PARENT, "no number")
    with signals.interruptible():
        assert signals.PARENT not in os.environ
        time.sleep(0.05)


def test_sigterm_ends_a_real_run_and_what_follows_does_not_run(tiny, tmp_path):
    args = [sys.executable, "-m", "corrigenda", *tiny[:-2], "--run_dir", str(tmp_path / "a")]
    args += ["--edit.editor.steps", "2000", "--edit.editor.stop_loss", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(args, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        until((tmp_path / "a" / "cases.jsonl").exists)
        process.terminate()
        error = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 143
    lines = [line for line in error.splitlines() if line]
    assert lines[-1] == "corrigenda: terminated; files written so far are kept"
    assert lines[:-1] in (
        [],
        ["corrigenda: stopping after this step; a second Ctrl-C stops immediately"],
    )
    assert not (tmp_path / "a" / "summary.json").exists()
