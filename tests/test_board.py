"""What Weights & Biases gets: the offline file of a run, read record by record."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from corrigenda.pipeline.compare import _environment, read_study
from tests.samples import ROOT

CPU = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
BLOCK, HEADER = 32_768, 7  # bytes, of the file and of every chunk in it


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then chunks as in LevelDB's log format."""
    content, at, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the end of a block is padded
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + HEADER])
        parts += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished(path):
    """All records, once W&B's own process has written the last one."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


class Offline:
    """The offline run in a folder: what W&B shows once it is uploaded."""

    def __init__(self, folder):
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.files = path.parent / "files"
        self.config, self.summary, self.tags, self.group = {}, {}, [], ""
        for record in finished(path):
            if record.HasField("run"):
                self.tags = list(record.run.tags) or self.tags  # a later record has what is new
                self.group = record.run.run_group or self.group
                self._take(self.config, record.run.config.update)
            elif record.HasField("config"):
                self._take(self.config, record.config.update)
            elif record.HasField("summary"):
                self._take(self.summary, record.summary.update)
            elif record.HasField("history"):
                self._take(self.summary, record.history.item)

    @staticmethod
    def _take(into, items):
        for item in items:
            *parents, name = item.nested_key or [item.key]
            part = into
            for key in parents:
                part = part.setdefault(key, {})
            part[name] = json.loads(item.value_json)

    def table(self, name):
        found = self.summary[name]
        assert found["_type"] == "table-file"
        return json.loads((self.files / found["path"]).read_text("utf-8"))


@pytest.fixture
def offline(tiny_folder, data_files, tmp_path):
    """A study's run of two cases with generated answers."""
    words = [
        "validate", "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"),
        "--model.generate_tokens", "3", "--data", "ZsRE", "--data.path", data_files.zsre,
        "--data.limit", "2", "--edit.editor", "FT", "--edit.editor.layers", "[1]",
        "--edit.editor.steps", "2", *CPU,
    ]  # fmt: skip
    study = {"out": "out", "runs": [{"name": "a", "args": list(map(str, words))}]}
    (tmp_path / "my-study.yaml").write_text(yaml.safe_dump(study))
    environment = {n: v for n, v in os.environ.items() if not n.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "corrigenda", "compare", "my-study.yaml"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Offline(tmp_path / "out" / "a")


def test_an_offline_run_has_everything(offline):
    assert offline.group == "my-study"
    assert {"FT", "ZsRE", "each"} <= set(offline.tags) and len(offline.tags) == 4
    assert offline.config["edit"]["editor"]["class_path"].endswith("FT")
    assert offline.config["data"]["init_args"]["limit"] == 2
    assert offline.config["trainer"]["accelerator"] == "cpu"

    headline = offline.table("headline")
    row = dict(zip(headline["columns"], headline["data"][0], strict=True))
    assert row["run"] == "a" and row["editor"] == "FT" and 0 <= row["efficacy/exact"] <= 100
    assert row["seconds_per_edit"] == offline.summary["cost/seconds_per_edit"] > 0

    cases = offline.table("cases")
    assert cases["columns"][3:7] == ["question", "expected", "before", "after"]
    efficacy = [line for line in cases["data"] if line[2] == "efficacy"]
    assert len(efficacy) == 2
    assert all(isinstance(text, str) for line in efficacy for text in line[3:7])

    for name in ("headline", "trade_off"):
        picture = offline.summary[f"pictures/{name}"]
        assert picture["format"] == "png" and picture["captions"]
        assert all((offline.files / name).stat().st_size > 1000 for name in picture["filenames"])
    assert "val/efficacy/exact" in offline.summary


def test_a_study_groups_its_runs(tmp_path, monkeypatch):
    file = tmp_path / "layers.yaml"
    file.write_text("runs:\n  - {name: a, args: validate}\n")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert _environment(read_study(file))["WANDB_RUN_GROUP"] == "layers"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert _environment(read_study(file))["WANDB_RUN_GROUP"] == "mine"
