"""What SECURITY.md promises: files and configurations of strangers run nothing and exhaust nothing."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from corrigenda.pipeline.compare import read_study
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import report
from corrigenda.pipeline.trust import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, load_yaml, read_yaml
from tests.samples import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
EVIL = "open({!r}, 'w').close()\nimport lightning.pytorch as pl\nclass Evil(pl.Callback): pass\n"


@pytest.fixture
def tiny(tiny_folder, data_files):
    """Arguments of a validation of an unedited small model."""
    return [
        "validate", "--model", "EditingModule", "--model.lm.name", str(tiny_folder("gpt2")),
        "--data", "ZsRE", "--data.path", data_files.zsre, "--data.limit", "1", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that code of the importable module ``evil_module``, or a pickle, makes when it runs."""
    made = tmp_path / "code-was-run"
    (tmp_path / "evil_module.py").write_text(EVIL.format(str(made)))
    monkeypatch.syspath_prepend(tmp_path)
    yield made
    sys.modules.pop("evil_module", None)


@pytest.fixture
def refused(corrigenda, capsys, trap):
    """``refused(*args)``: the one line that the command ends with, exit status 2, no code run."""

    def run(*args):
        capsys.readouterr()
        begin = time.process_time()  # whatever else the machine does
        assert corrigenda(*args) == 2
        error = capsys.readouterr().err
        assert error.startswith("corrigenda: error: ") and error.count("\n") == 1, error
        assert time.process_time() - begin < 20
        assert not trap.exists() and "evil_module" not in sys.modules
        return error

    return run


# ---------------------------------------------------------------------------- classes

PLACES = [
    "model: {class_path: %s}",
    "data: {class_path: %s}",
    "edit: {editor: {class_path: %s}}",
    "trainer: {callbacks: [{class_path: %s}]}",
    "trainer: {callbacks: {class_path: %s}}",
    "trainer: {logger: {class_path: %s}}",
    "trainer: {plugins: [{class_path: %s}]}",
    "trainer: {strategy: {class_path: %s}}",
    "trainer: {profiler: {class_path: %s}}",
    "trainer: {accelerator: {class_path: %s}}",
]
NAMES = ["evil_module.Evil", "os.system", "torch.hub.load", "corrigenda.pipeline.fit.os.system"]


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_imports_only_known_classes(refused, tiny, tmp_path, place):
    names = NAMES if place == PLACES[0] else NAMES[:1]
    for name in names:
        (tmp_path / "c.yaml").write_text(place % name)
        assert "is not accepted here: only classes of Corrigenda" in refused(*tiny, "-c", "c.yaml")


@pytest.mark.parametrize(
    ("callback", "argument", "value"),
    [
        ("LambdaCallback", "on_validation_start", "evil_module.Evil"),
        ("lightning.pytorch.callbacks.LambdaCallback", "on_validation_start", "os.getcwd"),
        ("ThroughputMonitor", "batch_size_fn", "evil_module.Evil"),
        ("ThroughputMonitor", "batch_size_fn", "torch.hub.load"),
        ("ThroughputMonitor", "batch_size_fn", "corrigenda.modules.files.remove_unfinished"),
        (
            "ThroughputMonitor",
            "batch_size_fn",
            "lightning.pytorch.plugins.io.TorchCheckpointIO.remove_checkpoint",
        ),
        ("BackboneFinetuning", "lambda_func", "subprocess.run"),
    ],
)
def test_no_function_is_named(refused, tiny, tmp_path, callback, argument, value):
    content = [{"class_path": callback, "init_args": {argument: value}}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": content}}))
    assert "is not accepted here" in refused(*tiny, "-c", "c.yaml")


def test_classes_of_lightning_and_plugins_are_accepted(corrigenda, tiny, tmp_path, trap):
    """Profilers, loggers, callbacks, plugins and strategies; further modules once the command line names them."""
    trainer = {
        "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"},
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
        "plugins": [{"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}],
        "strategy": {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy"},
        "callbacks": [{"class_path": "evil_module.Evil"}],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    assert corrigenda(*tiny, "-c", "c.yaml", "--print_config", "--plugin", "evil_module") == 0
    assert trap.exists()


def test_a_configuration_names_no_plugin(refused, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text("plugin: evil_module")
    assert "'plugin'" in refused(*tiny, "-c", "c.yaml")


@pytest.mark.parametrize("word", ["--plugin evil_module", "--plugin=evil_module"])
def test_a_study_names_no_plugin(tmp_path, word):
    (tmp_path / "s.yaml").write_text(f"runs: [{{name: a, args: validate {word}}}]")
    with pytest.raises(UserError, match="give --plugin to the compare command"):
        read_study(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(f"{{common: {word}, runs: [{{name: a, args: validate}}]}}")
    with pytest.raises(UserError, match="give --plugin to the compare command"):
        read_study(tmp_path / "s.yaml")


def test_modules_in_the_current_folder_are_not_imported(tmp_path):
    """A study's folder may hold a file named like a library."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('code was run')")
    (tmp_path / "s.yaml").write_text("runs: [{name: a, args: validate --frobnicate}]")
    command = [sys.executable, "-m", "corrigenda", "compare", "s.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2 and "--frobnicate" in done.stderr, done.stderr


# ---------------------------------------------------------------------------- checkpoints


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("path", ["c.ckpt", "file://{}/c.ckpt", "http://127.0.0.1:9/c.ckpt"])
@pytest.mark.parametrize("only", ["", "weights_only: false", "weights_only: true"])
def test_a_checkpoint_runs_nothing(refused, tiny, tmp_path, trap, path, only):
    torch.save({"state_dict": {}, "x": Bomb(str(trap))}, tmp_path / "c.ckpt")
    (tmp_path / "c.yaml").write_text(f"ckpt_path: {path.format(tmp_path)}\n{only}")
    error = refused(*tiny, "-c", "c.yaml")
    assert any(text in error for text in ("never loaded", "no such file", "weights_only cannot be"))


@pytest.mark.parametrize(
    "path", ["best", "hpc", "registry", "registry:a/b", "s3://a/b", "hf://a/b", ""]
)
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_is_a_local_file(refused, tiny, verb, path):
    assert "no such file" in refused(verb, *tiny[1:], "--ckpt_path", path)


def test_a_bare_pickle_is_no_checkpoint(refused, tiny, tmp_path, trap):
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps(Bomb(str(trap))))
    assert "not a readable checkpoint" in refused(*tiny, "--ckpt_path", "c.ckpt")


def test_files_that_say_weights_only_still_load(corrigenda, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text("weights_only: true")
    assert corrigenda(*tiny, "-c", "c.yaml", "--print_config") == 0


def test_a_checkpoint_does_not_change_the_configuration(corrigenda, tiny, tmp_path, capsys):
    """Lightning takes a model's arguments from the checkpoint."""
    content = {
        "hyper_parameters": {"_class_path": "evil_module.Evil"},
        "state_dict": {},
        "loops": {},
    }
    content |= {"base_model": {"name": "x", "hash": "y"}, "epoch": 0, "global_step": 0}
    torch.save({**content, "pytorch-lightning_version": "2.5"}, tmp_path / "c.ckpt")
    assert corrigenda(*tiny, "--ckpt_path", "c.ckpt") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "evil" not in error and "with weights y, not for" in error, (
        error
    )


# ---------------------------------------------------------------------------- YAML

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghijk"
)
TOO_MUCH = {
    "nested": ("edit: " + "[" * 100_000, "levels deep"),
    "mappings": ("{a: " * 3000 + "}" * 3000, "levels deep"),
    "laughs": (LAUGHS, f"more than {MAX_VALUES:,} values"),
    "itself": ("edit: &a {editor: *a}", "*a refers to a value that contains it"),
    "long": ("a: " + "x" * MAX_CHARACTERS, "the limit is 1,000,000"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_yaml_has_limits_wherever_it_is_read(refused, tiny, tmp_path, name):
    text, reason = TOO_MUCH[name]
    (tmp_path / "c.yaml").write_text(text)
    begin = time.process_time()
    assert reason in refused(*tiny, "-c", "c.yaml")
    assert reason in refused("compare", "c.yaml")
    with pytest.raises(UserError):
        load_yaml(text)
    assert time.process_time() - begin < 5
    assert reason in refused(*tiny, "--model", text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1, 2]", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"just text", "expected a mapping"),
        (bytes(range(256)), "not YAML"),
        (b"a: \0", "not YAML"),
        (b"a: {", "not YAML"),
        (b"a: *b", "not YAML"),
        (b"a: " + b"9" * 5000, "not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"a: !!python/name:os.system", "not YAML"),
        (None, "not a file"),
    ],
)
def test_what_is_no_configuration_is_one_line(refused, tiny, tmp_path, content, reason):
    if content is None:
        (tmp_path / "c.yaml").mkdir()
    else:
        (tmp_path / "c.yaml").write_bytes(content)
    assert reason in refused(*tiny, "-c", "c.yaml")
    if content not in (b"", None):
        assert "c.yaml" in refused("compare", "c.yaml")


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("a: 1")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=f"cannot read {file}: Permission denied"):
        read_yaml(file)


def test_ordinary_yaml_is_within_the_limits():
    text = "a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 3}\n"
    assert load_yaml(text) == yaml.safe_load(text)
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert load_yaml(deep) == yaml.safe_load(deep)


def test_an_endless_argument_is_refused_at_once(refused, tiny):
    assert "10,000,000 characters" in refused(*tiny, "--data.path", "x" * 10_000_000)
    assert "10,000,000 characters" in refused("edits", "apply", "a", "--prompt", "x" * 10_000_000)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/c.yaml", "file:///c.yaml", "memory://c.yaml"])
def test_configurations_are_local_files(refused, tiny, url):
    assert "no configuration file" in refused(*tiny, "-c", url)
    refused(*tiny, "--model", url)


# ---------------------------------------------------------------------------- reports


def test_reports_show_texts_from_files_as_text(tmp_path, capsys):
    bad = "<script>alert(1)</script> `x` | y [z](javascript:z) \\"
    name = "<img src=x onerror=z>|`"
    metrics = {"efficacy/exact": 1.0, f"efficacy/{bad}": 1.0}
    probe = {"criterion": bad, "prompt": bad, "target": bad, "prediction": bad, "exact": 1.0}
    row = {"case_id": bad, "fingerprint": "f", "phase": "val", "num_edits": 1, "metrics": metrics}
    for run in (name, "base"):
        (tmp_path / "in" / run).mkdir(parents=True)
        content = {
            "format": 1,
            "finished": True,
            "editor": bad,
            "model": bad,
            "dataset": bad,
            "schedule": bad,
        }
        content |= {"protocols": {metric: f"{bad}@each" for metric in metrics}}
        (tmp_path / "in" / run / "summary.json").write_text(json.dumps(content))
        (tmp_path / "in" / run / "cases.jsonl").write_text(
            json.dumps(row | {"probes": [probe]}) + "\n"
        )
        logs = tmp_path / "in" / run / "logs" / "version_0"
        logs.mkdir(parents=True)
        (logs / "metrics.csv").write_text(f'step,train/loss,"{bad}"\n0,1.0,1.0\n1,0.5,1.0\n')
    report([tmp_path / "in"], tmp_path / "out", name)
    html = (tmp_path / "out" / "report.html").read_text()
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert html.count("<script") == 2 and "alert(1)</script" not in html
    assert "script-src 'sha256-" in html and "default-src 'none'" in html
    for text in (html, markdown):
        assert "<script>alert" not in text and "<img" not in text and "&lt;script" in text
    assert "`" not in markdown and "](" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in tables}
    headers = {
        line.count("|")
        for line, rule in zip(tables, tables[1:], strict=False)
        if rule.startswith("| ---")
    }
    assert widths == headers
