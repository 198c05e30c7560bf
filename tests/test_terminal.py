"""What a user sees: progress, the table at the end, presets, versions, help; all within 80 columns."""

import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from corrigenda.pipeline.terminal import StepProgressBar, print_result

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def seen(corrigenda, capsys, monkeypatch):
    """``seen(*words)``: the lines that a command shows in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        capsys.readouterr()
        assert corrigenda(*words, "--trainer.accelerator", "cpu") == 0, capsys.readouterr()
        return ESCAPES.sub("", capsys.readouterr().out).splitlines()

    return run


@pytest.fixture
def mend(tiny_folder, data_files):
    return ["fit", "--model", "MEND", "--model.lm.name", tiny_folder("llama"), "--model.layers", "[1]",
            "--model.rank", "4", "--data", "ZsRE", "--data.path", data_files.zsre, "--data.train_path",
            data_files.zsre_train, "--data.batch_size", "4", "--wandb", "off", "--run_dir", "mend"]  # fmt: skip


@pytest.fixture
def ft(tiny_folder, data_files):
    return ["validate", "--model", "EditingModule", "--model.lm.name", tiny_folder("llama"), "--data",
            "CounterFact", "--data.path", data_files.counterfact, "--edit.editor", "FT",
            "--edit.editor.layers", "[1]", "--edit.editor.steps", "2", "--run_dir", "ft"]  # fmt: skip


def test_fit_counts_all_steps_and_shows_loss_and_speed(seen, mend):
    """Five steps are more than one epoch, of two batches."""
    out = seen(*mend, "--trainer.max_steps", "5")
    (last, *_) = [line for line in reversed(out) if line.startswith("step")]
    assert re.match(r"step +━+ 5/5 [\d.e+]+/s \S+ loss: [\d.e-]+", last)
    assert "v_num" not in "".join(out) and max(map(len, out[1:])) <= 80
    assert re.match(r"loading .*\(float32\); this run is written to mend", out[0])


def test_the_bar_shows_the_last_validation():
    logged = {"train/loss": 0.25, "val/efficacy/exact": 1.0, "val/generality/exact": 0.5}
    bar = StepProgressBar()

    def shown():
        tensors = {name: torch.tensor(value) for name, value in logged.items()}
        return bar.get_metrics(SimpleNamespace(callback_metrics=tensors), None)

    assert shown() == {"loss": "0.25"}
    logged["val/locality/agreement"] = 0.876
    assert shown() == {"loss": "0.25", "eff/gen/loc": "100/50/88"}


def test_validate_ends_with_a_table_in_per_cent(seen, ft):
    out = seen(*ft, "--wandb", "off")
    text = "\n".join(out)
    assert "×100, mean over 5 cases with 95 % interval" in text and max(map(len, out[1:])) <= 80
    assert re.search(r"^efficacy exact +\d+\.\d  \[\d+\.\d, \d+\.\d\]$", text, re.M)
    assert re.search(r"^score +\d+\.\d$", text, re.M)
    assert re.search(
        r"^[\d.]+ s per edit, [\d.]+ GiB at most\nall measures: ft/summary.json$", text, re.M
    )
    assert "Validate metric" not in text and "┃" not in text


def test_an_unfinished_run_prints_nothing(tmp_path, capsys):
    print_result(tmp_path)
    assert capsys.readouterr().out == ""


def test_tensorboard_reads_the_preset_s_log(seen, ft, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen(*ft, "-c", "configs/presets/tensorboard.yaml")
    (file,) = (tmp_path / "ft").rglob("*tfevents*")
    log = events.EventAccumulator(str(file)).Reload()
    (value,) = log.Scalars("val/efficacy/exact")
    assert 0 <= value.value <= 1
    assert list((tmp_path / "ft" / "logs").rglob("metrics.csv"))  # which reports read


def test_debug_runs_a_few_batches(seen, mend, tmp_path):
    seen(*mend, "-c", "configs/presets/debug.yaml", "--trainer.max_steps", "2")
    assert (tmp_path / "mend" / "summary.json").is_file()
    assert not (tmp_path / "mend" / "wandb").exists()


def test_the_version(corrigenda, capsys):
    assert corrigenda("--version") == 0
    assert capsys.readouterr().out == f"corrigenda {metadata.version('corrigenda')}\n"


@pytest.mark.parametrize(("verb", "says", "not_of"), [
    ("fit", "the run to resume", "what fit has trained"),
    ("validate", "what fit has trained", "the run to resume"),
])  # fmt: skip
def test_help_is_true_of_its_verb(corrigenda, capsys, verb, says, not_of):
    assert corrigenda(verb, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert says in text and not_of not in text and "--verbose" not in text
