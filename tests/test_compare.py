"""Studies whose runs are a small script with an argument for its behaviour."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corrigenda.pipeline import compare as study_runner
from corrigenda.pipeline.compare import compare, read_study, run_command
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import report
from tests.samples import ROOT

# Usage: fake.py <verb> [anything] <what to do> [anything] --run_dir DIR [--ckpt_path last]
FAKE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
what = next(word for word in sys.argv if word in ("ok", "fail", "die", "interrupt", "silent", "wait"))
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "calls.txt").open("a") as calls:
    calls.write(" ".join([folder.name, *sys.argv[1:]]) + "\\n")
if what == "fail":
    sys.exit(3)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
    (folder / "closed").touch()
    sys.exit(1)
if what == "wait" and not (folder.parent / "closed").exists():
    from corrigenda.pipeline.signals import interruptible, status_of
    with interruptible():
        try:
            (folder.parent / "waiting").touch()
            time.sleep(600)
        except KeyboardInterrupt as stop:
            (folder.parent / "closed").touch()
            sys.exit(status_of(stop))
last = sys.argv[::-1].index("--seed_everything") if "--seed_everything" in sys.argv else 0
seed = int(sys.argv[len(sys.argv) - last]) if last else 1
row = {"case_id": "1", "fingerprint": "f", "phase": "val", "num_edits": 1,
       "metrics": {"efficacy/exact": float(seed < 5)}, "probes": []}
(folder / "cases.jsonl").write_text(json.dumps(row) + "\\n")
summary = {"format": 1, "finished": True, "editor": None, "means": {}, "budget": {}, "seed": seed,
           "protocols": {"efficacy/exact": "tf_exact@each"}}
if sys.argv[1] == "fit":
    (folder / "logs" / "version_0").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / "version_0" / "metrics.csv").write_text("step,train/loss\\n0,1.5\\n")
if what != "silent":
    (folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that writes a study file with these runs, whose commands are the script."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def fake_command(args, run_dir):
        return [sys.executable, str(script), *args, "--run_dir", str(run_dir)]

    monkeypatch.setattr(study_runner, "run_command", fake_command)

    def write(*runs, **keys):
        file = tmp_path / "demo.yaml"
        entries = [
            {"name": name, "args": args, **rest}
            for name, args, *others in runs
            for rest in [others[0] if others else {}]
        ]
        file.write_text(json.dumps({"out": str(tmp_path / "out"), "runs": entries, **keys}))
        return file

    return write


def calls(tmp_path, folder="out"):
    path = tmp_path / folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def called(tmp_path):
    return [line.split()[0] for line in calls(tmp_path)]


def test_the_command_is_ours():
    command = run_command(["fit", "-c", "a.yaml"], Path("runs/x"))
    assert command == [
        *(sys.executable, "-m", "corrigenda", "fit", "-c", "a.yaml"),
        *("--run_dir", str(Path("runs/x"))),
    ]


def test_runs_in_order_then_reports(study, tmp_path, capfd):
    file = study(
        ("train", "fit ok", {"report": False}),
        ("b", "validate ok --ckpt_path {out}/train/best.ckpt"),
        ("a", ["validate", "ok", "--seed", 3, True]),
        baseline="b",
        common="--limit 30 --name 'two words'",
    )
    compare(file)
    out = tmp_path / "out"
    common = "--limit 30 --name two words"  # first, so that a run's own arguments win
    assert calls(tmp_path) == [
        f"train fit {common} ok --run_dir {out}/train",
        f"b validate {common} ok --ckpt_path {out}/train/best.ckpt --run_dir {out}/b",
        f"a validate {common} ok --seed 3 true --run_dir {out}/a",
    ]
    text = (out / "report.csv").read_text()
    assert [line.split(",")[0] for line in text.splitlines()] == ["run", "b", "a"]
    assert "Difference to b" in (out / "report.md").read_text()
    assert ">train</text>" in (out / "report.html").read_text()  # its learning curve
    printed = capfd.readouterr().out
    assert "[2/3] b" in printed
    assert f"report: {out / 'report.html'}" in printed


def test_finished_runs_are_skipped(study, tmp_path, capfd):
    file = study(("a", "validate ok"), ("b", "validate ok"))
    compare(file)
    capfd.readouterr()
    compare(file)
    assert called(tmp_path) == ["a", "b"]
    printed = capfd.readouterr().out
    assert "[1/2] a: already finished, skipped" in printed
    assert "report:" in printed


def test_an_interrupted_fit_is_resumed(study, tmp_path):
    file = study(("a", "fit ok"))
    checkpoint = tmp_path / "out" / "a" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    compare(file)
    assert calls(tmp_path) == [f"a fit ok --ckpt_path last --run_dir {tmp_path / 'out' / 'a'}"]
    assert checkpoint.exists()


def test_an_interrupted_validation_resumes_in_its_folder(study, tmp_path):
    with pytest.raises(SystemExit):
        compare(study(("a", "validate silent")))
    assert (tmp_path / "out" / "a" / "cases.jsonl").exists()
    with pytest.raises(SystemExit):
        compare(study(("a", "validate silent")))
    assert called(tmp_path) == ["a", "a"]
    assert not (tmp_path / "out" / "a.interrupted-1").exists()


def test_an_interrupted_run_without_checkpoint_is_put_aside(study, tmp_path):
    file = study(("a", "validate ok"))
    for name in ("a", "a.interrupted-1"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "a" / "cases.jsonl").write_text('{"case_')
    (tmp_path / "out" / "a" / "summary.json").write_text('{"fini')
    compare(file)
    assert called(tmp_path) == ["a"]
    assert (tmp_path / "out" / "a.interrupted-2" / "cases.jsonl").read_text() == '{"case_'
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(("what", "status"), [("fail", 3), ("die", 137), ("silent", 1)])
def test_a_failing_run_stops_the_comparison(study, tmp_path, capfd, what, status):
    file = study(("a", "validate ok"), ("b", f"validate {what}"), ("c", "validate ok"))
    with pytest.raises(SystemExit) as caught:
        compare(file)
    assert caught.value.code == status
    assert called(tmp_path) == ["a", "b"]
    message = capfd.readouterr().err.strip()
    assert "run b" in message
    assert "\n" not in message
    # After a fix the same study resumes where it stopped.
    compare(study(("a", "validate ok"), ("b", "validate ok"), ("c", "validate ok")))
    assert called(tmp_path) == ["a", "b", "b", "c"]
    assert (tmp_path / "out" / "b.interrupted-1").is_dir()


def test_ctrl_c_lets_the_run_close_and_says_how_to_go_on(study, tmp_path, capfd):
    file = study(("a", "validate interrupt"), ("b", "validate ok"))
    # A shell's background jobs begin with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            compare(file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == 130
    assert called(tmp_path) == ["a"]
    assert (tmp_path / "out" / "a" / "closed").exists()
    assert "repeat the command to resume" in capfd.readouterr().err


ALONE = """
import sys
from pathlib import Path
from corrigenda.pipeline import compare as runner
_, script, study = sys.argv
runner.run_command = lambda args, folder: [sys.executable, script, *args, "--run_dir", str(folder)]
runner.compare(Path(study))
"""


def test_a_run_ends_when_only_its_comparison_is_killed(study, tmp_path):
    """Repeating the command resumes, and the report is that of an uninterrupted study."""
    file = study(("a", "validate ok"), ("b", "validate wait"))
    command = [sys.executable, "-c", ALONE, str(tmp_path / "fake.py"), str(file)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until((tmp_path / "out" / "waiting").exists)
    assert called(tmp_path) == ["a", "b"]
    with pytest.raises(BlockingIOError, match="study's folder .*out is being written by another"):
        compare(file)
    process.kill()
    process.wait()
    until((tmp_path / "out" / "closed").exists)
    compare(file)
    assert called(tmp_path) == ["a", "b", "b"]
    whole = tmp_path / "whole" / "out"  # the page's title is the folder's name
    compare(study(("a", "validate ok"), ("b", "validate ok")), out=whole)
    for name in ("report.csv", "report.md", "report.html"):
        assert (tmp_path / "out" / name).read_text() == (whole / name).read_text()


def until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_plugins_of_the_command_line_are_passed_on(study, tmp_path):
    compare(study(("a", "validate ok")), plugins=["my_editors"])
    assert calls(tmp_path)[0].startswith("a validate ok --plugin=my_editors --run_dir")
    compare(study(("a", "validate ok")))  # no change of the run's own arguments
    assert called(tmp_path) == ["a"]


def test_changed_arguments_are_refused_before_anything_runs(study, tmp_path):
    compare(study(("a", "validate ok"), ("b", "validate ok")))
    changed = study(("c", "validate ok"), ("a", "validate ok"), ("b", "validate ok --limit 3"))
    with pytest.raises(UserError) as caught:
        compare(changed)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("run b", "validate ok", str(tmp_path / "out" / "b"), "--out"):
        assert part in message
    assert called(tmp_path) == ["a", "b"]
    compare(changed, only=["a"])
    (tmp_path / "out" / "b").rename(tmp_path / "out" / "b.old")
    compare(changed)
    assert called(tmp_path) == ["a", "b", "c", "b"]


def test_changed_arguments_of_an_interrupted_fit_are_refused(study, tmp_path):
    with pytest.raises(SystemExit):
        compare(study(("a", "fit fail")))
    (tmp_path / "out" / "a" / "checkpoints").mkdir()
    (tmp_path / "out" / "a" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="run a .* other arguments"):
        compare(study(("a", "fit ok")))


def test_a_study_may_be_moved(study, tmp_path):
    file = study(("a", "validate ok {out}/x"))
    compare(file)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    compare(file, out=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "calls.txt").read_text().count("\n") == 1


def test_only_some(study, tmp_path, capfd):
    file = study(("train", "fit ok", {"report": False}), ("a", "validate ok"), ("b", "validate ok"))
    compare(file, only=["train"])
    assert called(tmp_path) == ["train"]
    assert "no report" in capfd.readouterr().out
    compare(file, only=["b"])
    assert called(tmp_path) == ["train", "b"]
    assert "not finished: a" in capfd.readouterr().out
    with pytest.raises(UserError, match="no run 'x'; its runs are train, a, b"):
        compare(file, only=["x"])


def test_every_run_once_per_seed(study, tmp_path, capfd):
    """Each seed has a folder of its own, which is what {out} stands for; the report is over all."""
    use = "validate ok --ckpt_path {out}/train/best.ckpt --seed_everything 9"
    file = study(("train", "fit ok", {"report": False}), ("a", use), ("b", "validate ok"))
    compare(file, only=["train", "a"], seeds=[3, 5, 3])
    out = tmp_path / "out"
    for seed in (3, 5):
        given, folder = f"--seed_everything {seed} --run_dir", out / f"seed-{seed}"
        assert calls(tmp_path, folder) == [
            f"train fit ok {given} {folder}/train",
            f"a validate ok --ckpt_path {folder}/train/best.ckpt --seed_everything 9 {given} {folder}/a",
        ]
    printed = capfd.readouterr().out
    assert "[3/4] seed-5/train" in printed and "not finished: seed-3/b, seed-5/b" in printed
    assert (out / "report.csv").read_text().splitlines()[1].split(",")[4:6] == ["1", "0.5"]
    # More seeds later, and the report again by hand.
    compare(file, only=["train", "a"], seeds=[3, 5, 7])
    assert [len(calls(tmp_path, f"out/seed-{seed}")) for seed in (3, 5, 7)] == [2, 2, 2]
    text = (out / "report.csv").read_text()
    assert text.splitlines()[1].split(",")[5] == str(1 / 3)
    assert (
        "| a | none |" in (out / "report.md").read_text()
        and "3, 5, 7" in (out / "report.md").read_text()
    )
    report([out], tmp_path / "again")
    assert (tmp_path / "again" / "report.csv").read_text() == text


def test_a_run_made_by_hand_is_trusted(study, tmp_path):
    file = study(("a", "validate ok"))
    compare(file)
    (tmp_path / "out" / "study.json").unlink()
    other = study(("a", "validate ok --limit 3"))
    compare(other)
    compare(other)
    assert called(tmp_path) == ["a"]


def test_out_defaults_to_the_file_name(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text("runs: [{name: a, args: validate}]")
    assert read_study(file).out == Path("runs/tiny")
    assert read_study(file, Path("x")).out == Path("x")


def test_common_arguments_of_the_command_override_the_files_but_not_the_runs(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text("common: --a 1\nruns: [{name: a, args: fit --b 2}]")
    assert read_study(file, None, ["--a", "3"]).runs[0].args == (
        *("fit", "--a", "1", "--a", "3", "--b", "2"),
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["mapping"]),
        ("runs: [", ["not YAML"]),
        ("runs: []", ["runs must be a list"]),
        ("run: []", ["unknown key run"]),
        ("runs: [{name: a, args: fit, arg: y}]", ["run 1 (a)", "unknown key arg"]),
        ("runs: [{name: a, args: fit}, {name: a, args: fit}]", ["'a'", "rename"]),
        ("runs: [{name: a/b, args: fit}]", ["run 1 (a/b)", "slashes"]),
        ("runs: [{name: .., args: fit}]", ["starting with a dot"]),
        ("runs: [{args: fit}]", ["run 1", "needs a name"]),
        ("runs: [{name: 7, args: fit}]", ["run 1", "got 7"]),
        ("runs: [{name: a}]", ["run 1 (a)", "no args"]),
        ("runs: [a]", ["run 1", "mapping"]),
        ("""runs: [{name: a, args: "fit 'y"}]""", ["run 1 (a)", "quotation"]),
        ("runs: [{name: a, args: {fit: y}}]", ["run 1 (a)", "string or a list"]),
        ("runs: [{name: a, args: fit --run_dir y}]", ["run 1 (a)", "--run_dir"]),
        ("runs: [{name: a, args: fit, report: maybe}]", ["run 1 (a)", "true or false"]),
        ("{baseline: b, runs: [{name: a, args: fit}]}", ["baseline 'b'", "(a)"]),
        ("{baseline: a, runs: [{name: a, args: fit, report: false}]}", ["baseline 'a'"]),
        ("{out: 3, runs: [{name: a, args: fit}]}", ["out must be"]),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, text, parts):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_study(file)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(file), *parts]:
        assert part in message


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere.yaml: No such file"):
        read_study(tmp_path / "nowhere.yaml")
