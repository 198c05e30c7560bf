"""Runs that are killed at a random time and resumed end with the files of an uninterrupted run.

``CORRIGENDA_KILLS=20`` kills every kind as many times (else once), ``CORRIGENDA_SEED=n`` chooses other moments.
"""

import csv
import json
import os
import random
import re
import signal
import time
from contextlib import suppress

import pytest
import torch
import transformers
from safetensors import safe_open

from corrigenda.modules.statistics import moments
from corrigenda.pipeline import checkpointing
from tests.processes import Process, import_everything

KILLS = int(os.environ.get("CORRIGENDA_KILLS", "1"))
SEED = os.environ.get("CORRIGENDA_SEED", "0")
# What is measured in time or memory, tokens (states that a cache has are not computed again), and a value that
# Lightning's ModelCheckpoint does not read again.
CLOCK = re.compile(r"second|tokens|gib|quer|training_time|current_score")
PLAIN = "--wandb off --trainer.accelerator cpu --trainer.enable_progress_bar false"
MODEL = "--model EditingModule --model.lm.name {lm}"
CASES = "--data CounterFact --data.path {counterfact} --data.batch_size 1"
PAIRS = "--data ZsRE --data.path {zsre} --data.train_path {zsre_train} --data.batch_size 2 "
OFTEN = "--trainer.log_every_n_steps 1"
TRAIN = f"--trainer.max_steps 8 --trainer.max_epochs 50 --trainer.val_check_interval 3 {OFTEN}"
STREAM = f"fit {MODEL} {CASES} --edit.schedule stream --trainer.val_check_interval 2 {OFTEN}"
TEXT = "corpus.source {text} --edit.editor.corpus.tokens 2000 --edit.editor.contexts [[4,2]]"
ROME = f"--edit.editor ROME --edit.editor.layer 1 --edit.editor.steps 3 --edit.editor.{TEXT}"
MEMIT = f"--edit.editor MEMIT --edit.editor.layers [1] --edit.editor.steps 3 --edit.editor.{TEXT}"
GRACE = "--edit.editor GRACE --edit.editor.layer 1 --edit.editor.epsilon 0.5 --edit.editor.steps 3"
IKE = (
    "--edit.editor IKE --edit.editor.encoder {bert} --edit.editor.num_demonstrations 2 "
    "--edit.editor.pool corrigenda.datamodules.zsre.ZsRE --edit.editor.pool.train_path {zsre_train}"
)
KINDS = {
    "mend": "fit -c configs/mend/smollm2.yaml --model.lm.name {lm} --model.layers [1] --model.rank 4 "
    f"{PAIRS} {TRAIN}",
    "scope": f"fit -c configs/serac/smollm2-scope.yaml --model.encoder {{bert}} {PAIRS} {TRAIN}",
    "lora": f"fit -c configs/lora/smollm2-fit.yaml --model.lm.name {{lm}} --model.method.layers [1] {CASES} "
    "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 2 " + OFTEN,
    "stream-rome": f"{STREAM} {ROME}",
    "stream-grace": f"{STREAM} {GRACE}",
    "stream-ike": f"{STREAM} {IKE}",
    "each": f"validate {MODEL} {CASES} {ROME}",
    "batch": f"validate {MODEL} {CASES} {MEMIT} --edit.schedule batch --data.batch_size 2",
    "epoch": f"validate {MODEL} {CASES} {MEMIT} --edit.schedule epoch",
    "moments": "moments --lm.name {lm} --corpus.source {text} --corpus.tokens 6000 --layers 0 1",
}


@pytest.fixture(scope="module")
def names(tiny_folder, data_files, tmp_path_factory):
    """Files that the commands name; everything is imported before the first process is forked."""
    import_everything()
    bert, lm = tmp_path_factory.mktemp("bert"), tiny_folder("gpt2", max_position_embeddings=512)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=404, intermediate_size=64, **sizes)
    transformers.BertModel(config).save_pretrained(bert)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(bert)
    return vars(data_files) | {"lm": lm, "bert": bert}


@pytest.fixture
def start(names, tmp_path):
    """``start(kind, folder)``: the process of a run that is kept after every step, with a cache of its own."""

    def keep_everything():
        checkpointing.SAVE_EVERY = moments.WRITE_SECONDS = 0.0

    def process(kind, folder, *more):
        (tmp_path / folder).mkdir(exist_ok=True)
        words = KINDS[kind].format(**names).split()
        words += [] if kind == "moments" else [*PLAIN.split(), "--run_dir", "run"]
        cache = {"CORRIGENDA_CACHE": str(tmp_path / folder / "cache")}
        return Process([*words, *more], tmp_path / folder, cache, keep_everything)

    return process


def watch(process, folder, changes=10**9):
    """How many changes of a folder's files there were when they were so many, or the process had ended."""
    seen, count = set(), 0
    while process.is_running() and count < changes:
        now = set()
        for place, _, names in os.walk(folder):  # takes no notice of what vanishes meanwhile
            for path in (os.path.join(place, name) for name in names):
                with suppress(OSError):
                    now.add((path, os.stat(path).st_size, os.stat(path).st_mtime_ns))
        count, seen = count + (now != seen), now
        time.sleep(0.001)
    return count


def without_times(value):
    """A tree of results without what differs between any two runs; tensors as their bytes."""
    if isinstance(value, dict):
        kept = [(str(name), part) for name, part in value.items() if not CLOCK.search(str(name))]
        return [
            (name, without_times(part)) for name, part in sorted(kept, key=lambda item: item[0])
        ]
    if isinstance(value, list | tuple):
        return [without_times(part) for part in value]
    if isinstance(value, torch.Tensor):
        flat = value.contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(flat.numpy())
    return value


def content(path):
    """What a result file says, to be compared."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return without_times([file.metadata(), tensors])
    if path.suffix == ".ckpt":
        saved = torch.load(path, "cpu", weights_only=True)
        saved.pop("loops")  # Lightning's counters differ by how often it was started
        return without_times(saved)
    if path.name == "summary.json":
        return without_times(json.loads(path.read_text()))
    return path.read_text() if path.suffix == ".jsonl" else None


def results(folder):
    """Content of every file of a run by name, and the logged values by metric and step."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not re.search(
            r"config|/logs/|interrupted-|partial|cache/(?!moments)", name
        ):
            found[name] = repr(content(path)).replace(str(folder), "")
    for log in sorted(folder.glob("run/**/metrics.csv"), key=lambda path: (len(str(path)), path)):
        for row in csv.DictReader(log.open()):
            for metric, value in row.items():
                if value and not CLOCK.search(metric):
                    found[metric, row["step"]] = value
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, start, tmp_path):
    draw = random.Random(f"{SEED} {kind}")
    process = start(kind, "whole")
    changes = watch(process, tmp_path / "whole")
    ended = process.end()
    assert ended.status == 0, ended.err
    whole = results(tmp_path / "whole")
    for number in range(KILLS):
        folder = f"cut-{number}"
        process = start(kind, folder)
        after = draw.randint(1, changes)
        watch(process, tmp_path / folder, after)
        process.send(signal.SIGKILL)
        was_killed = process.end().status == -signal.SIGKILL
        if was_killed and not (tmp_path / folder / "run" / "summary.json").exists():
            last = ["--ckpt_path", "last"] if KINDS[kind].startswith("fit") else []
            ended = start(kind, folder, *last).end()
            assert ended.status == 0, (folder, after, ended.err)
        cut = results(tmp_path / folder)
        assert cut.keys() == whole.keys(), (folder, after)
        assert [name for name in whole if whole[name] != cut[name]] == [], (folder, after)
