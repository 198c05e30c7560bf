"""Two processes, each with half of every batch, train and evaluate as one does with all of it."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.samples import ROOT, summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

# Runs commands one after the other. In the run "broken" one loss of one process is not a number, in "different"
# one process makes a slightly larger edit.
PROCESS = """
import atexit, json, os, sys, torch
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(3))  # runs last: the group is left
torch.set_num_threads(1)
from corrigenda.modules.editors.mend import MEND
from corrigenda.pipeline import cli
losses, steps, statuses = MEND._losses, [], {}
def broken(self, *chosen):
    edit_loss, kl = losses(self, *chosen)
    steps.append(0)
    return edit_loss * (torch.nan if len(steps) == 2 and os.environ["LOCAL_RANK"] == "1" else 1), kl
from corrigenda.modules.editors.rome import ROME
propose = ROME.propose
def different(self, *given):
    delta = propose(self, *given)
    return delta.scaled(1 + 1e-6) if os.environ["LOCAL_RANK"] == "1" else delta
from corrigenda.modules.training import sharding
shard = sharding.shard
def measured(lm, mesh):
    whole = sum(p.numel() for p in lm.net.parameters())
    shard(lm, mesh)
    local = sum(getattr(p, "_local_tensor", p).numel() for p in lm.net.parameters())
    print("SHARDED", json.dumps([local, whole]), file=sys.stderr)
sharding.shard = measured
for name, command in json.loads(sys.argv[1]).items():
    MEND._losses = broken if name == "broken" else losses
    ROME.propose = different if name == "different" else propose
    try:
        statuses[name] = cli.main(command)
    except SystemExit as end:
        statuses[name] = end.code
print(json.dumps(statuses))
"""
# A kind of handle each: weights, a memory beside the network, a memory of texts.
KINDS = {
    "ROME": {"layer": 0, "steps": 3, "contexts": [[3, 1]], "corpus": {"source": "TEXT", "tokens": 2000}},
    "CaliNET": {"layers": [1], "slots": 4, "steps": 4, "contexts": [[3, 1]]},
    "MemPrompt": {"encoder": "lm"},
}  # fmt: skip
EDITED = [
    *(f"ROME-{schedule}" for schedule in ("each", "batch", "epoch", "stream")),
    *(f"CaliNET-{schedule}" for schedule in ("each", "epoch", "stream")),
    *(f"MemPrompt-{schedule}" for schedule in ("batch", "epoch", "stream")),
]
ACCUMULATED = ("--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "4")
LIGHTNING = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
                        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1}})  # fmt: skip
EDITORS = {
    "FineTune": {"method": {"class_path": "FT", "init_args": {"layers": [0, 1], "lr": 1e-3}}},
    "MEND": {"layers": [1], "rank": 4, "lr": 1e-2, "warm_up": 2, "alpha": 1e-2, "num_normalising": 4},
    "KE": {"layers": [1], "hidden": 4, "condition": 6, "lr": 1e-2, "warm_up": 2, "margin": 0.01},
    "MALMEN": {"layers": [1], "rank": 4},
}  # fmt: skip


def config(name, lm, data, batch_size):
    """Six steps in epochs of three, a validation after every second step."""
    return {
        "model": {
            "class_path": name if name in EDITORS else "EditingModule",
            "init_args": {"lm": {"name": str(lm)}} | EDITORS.get(name, {}),
        },
        "data": data | {"init_args": data["init_args"] | {"batch_size": batch_size}},
        "trainer": {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None,
                    "enable_progress_bar": False, "accelerator": "cpu", "log_every_n_steps": 1},
        "wandb": "off",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def write(folder, tiny_folder, data_files):
    """``write(name, batch_size)``: a configuration file of an editor, or of none on partly filled cases."""
    sparse = folder / "sparse.jsonl"
    records = [json.loads(line) for line in Path(data_files.counterfact).read_text().splitlines()]
    for record in records[1:]:  # only the first process meets locality
        record["neighborhood_prompts"] = []
    sparse.write_text("".join(json.dumps(record) + "\n" for record in records))
    training = {"path": data_files.zsre, "train_path": data_files.zsre_train, "val_fraction": 0.2}

    def file(name, batch_size):
        kind = "ZsRE" if name in EDITORS else "CounterFact"
        settings = {"path": str(sparse)} if kind == "CounterFact" else training
        data = {"class_path": kind, "init_args": settings}
        path = folder / f"{name}-{batch_size}.yaml"
        content = config(name, tiny_folder("llama"), data, batch_size)
        if name in KINDS:
            settings = json.loads(json.dumps(KINDS[name]).replace("TEXT", data_files.text))
            content["edit"] = {"editor": {"class_path": name, "init_args": settings}}
            for name in ("max_steps", "val_check_interval", "check_val_every_n_epoch"):
                del content["trainer"][name]
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return file


def commands(write, root, batch_size, *more):
    """Name of a run to its command; batches are of all processes together when training."""

    def run(verb, name, run_name, *args, size=batch_size):
        return [verb, "-c", write(name, size), "--run_dir", str(root / run_name), *more, *args]

    def edited(kind, schedule):
        verb = "fit" if schedule == "stream" else "validate"
        return run(verb, kind, f"{kind}-{schedule}", "--edit.schedule", schedule, size=2)

    trained = ("--ckpt_path", str(root.with_name("one") / "mend/checkpoints/last.ckpt"))
    return {
        "mend": run("fit", "MEND", "mend"),
        "ke": run("fit", "KE", "ke"),
        "accumulated": run("fit", "MEND", "accumulated", *ACCUMULATED),
        "tuned": run("fit", "FineTune", "tuned", size=2),
        "broken": run("fit", "MEND", "broken", "--trainer.limit_val_batches", "0"),
        "evaluated": run("validate", "MEND", "evaluated", *trained, size=1),
        "sparse": run("validate", "EditingModule", "sparse", size=1),
        "refused": run("fit", "MALMEN", "refused"),
        "different": run("validate", "ROME", "different", "--edit.schedule", "epoch"),
        **sharded(run, trained),
        "mend-epoch": run("validate", "MEND", "mend-epoch", *trained, "--edit.schedule", "epoch", size=1),
        **{name: edited(*name.split("-")) for name in EDITED},
    }  # fmt: skip


def sharded(run, trained):
    """Commands over a sharded base; those that begin with "refused" cannot work."""
    over = ("--trainer.strategy", "sharded", "--trainer.limit_val_batches", "0")
    return {
        "sharded-mend": run("fit", "MEND", "sharded-mend", *over),
        "sharded-ke": run("fit", "KE", "sharded-ke", *over),
        "sharded-tuned": run("fit", "FineTune", "sharded-tuned", *over, size=2),
        "sharded-accumulated": run("fit", "MEND", "sharded-accumulated", *over, *ACCUMULATED),
        "sharded-half": run(
            "fit", "FineTune", "sharded-half", *over, "--trainer.max_steps", "3", size=2
        ),
        "sharded-rest": run(
            "fit", "FineTune", "sharded-half", *over, "--ckpt_path", "last", size=2
        ),
        "refused-evaluation": run("fit", "MEND", "refused", *over[:2]),
        "refused-validate": run("validate", "MEND", "refused", *over[:2], *trained),
        "refused-stream": run("fit", "ROME", "refused", *over, "--edit.schedule", "stream"),
        "refused-lightning": run("fit", "MEND", "refused", *over, "--trainer.strategy", LIGHTNING),
    }


@pytest.fixture(scope="module")
def one(folder, write):
    """Folder of the runs of one process."""
    root = folder / "one"
    every = commands(write, root, 2)
    alone = {
        name: words for name, words in every.items() if not name.startswith(("sharded", "refused-"))
    }
    run_all(alone, [{"LOCAL_RANK": "0"}])
    return root


@pytest.fixture(scope="module")
def two(folder, write, one):
    """Folder of the runs of two processes, and what both said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    ranks = [where | {"LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return folder / "two", run_all(commands(write, folder / "two", 1, *more), ranks)


def run_all(every, ranks):
    """Exit statuses and messages of processes that run the same commands."""
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROCESS, json.dumps(every)],
            env=os.environ | rank | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in ranks
    ]  # fmt: skip
    ended = [process.communicate(timeout=1800) for process in running]
    assert all(process.returncode == 0 for process in running), ended
    refused = [name for name in every if name.startswith(("refused", "different"))]
    wanted = dict.fromkeys(every) | (dict.fromkeys(refused, 2) if len(ranks) > 1 else {})
    assert [json.loads(out.splitlines()[-1]) for out, _ in ended] == [wanted] * len(ranks), ended
    return [err for _, err in ended]


def logged(root, *columns):
    (file,) = root.glob("logs/version_*/metrics.csv")
    with open(file, newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row[columns[0]]]
    return torch.tensor([[float(row[column]) for column in columns] for row in rows])


def saved(root):
    return torch.load(root / "checkpoints/last.ckpt", weights_only=True)


LOSSES = ("train/loss", "train/edit_loss", "train/kl")


@pytest.mark.parametrize("run", ["mend", "ke", "accumulated"])
def test_the_loss_curve_is_that_of_one_process(one, two, run):
    found, wanted = logged(two[0] / run, *LOSSES), logged(one / run, *LOSSES)
    assert len(wanted) >= 4 and (wanted[0] - wanted[-1]).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    mine, its = saved(two[0] / run)["state_dict"], saved(one / run)["state_dict"]
    for key in its.keys() - {"training_time"}:
        torch.testing.assert_close(mine[key], its[key], atol=1e-4, rtol=1e-3)
    if run == "ke":
        assert its["multiplier"] != 1


def test_validation_during_fit_agrees(one, two):
    found, wanted = (summary(root / "mend")["means"] for root in (two[0], one))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith(("exact", "accuracy", "agreement", "known_before", "drawdown")):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, abs=1e-4, rel=1e-3, nan_ok=True), name


@pytest.mark.parametrize(("run", "cases"), [("evaluated", 5), ("sparse", 5)])
def test_an_evaluation_is_bit_exact_with_one_and_two_processes(one, two, run, cases):
    """An odd number of cases: none is lost or counted twice, also where a criterion is met by one process only."""
    found, wanted = summary(two[0] / run), summary(one / run)
    assert found["means"] == wanted["means"] and wanted["means"]["efficacy/accuracy"] is not None
    assert found["means"]["locality/kl"] is not None
    for part in ("num_edits", "bytes_per_edit"):
        assert found["budget"][part] == wanted["budget"][part]
    lines, whole = ((root / run / "cases.jsonl").read_text() for root in (two[0], one))
    assert lines == whole and whole.count("\n") == cases
    edits = [sorted(p.name for p in (root / run).glob("edits/*")) for root in (two[0], one)]
    assert edits[0] == edits[1]


def edits_of(root):
    """Every tensor in the run's files of edits."""
    return {(path.name, name): tensor for path in sorted(root.glob("edits/*"))
            for name, tensor in load_file(path).items()}  # fmt: skip


@pytest.mark.parametrize("run", [*EDITED, "mend-epoch"])
def test_every_editor_edits_as_in_one_process_under_every_schedule(one, two, run):
    found, wanted = summary(two[0] / run), summary(one / run)
    assert found["means"] == wanted["means"] and wanted["means"]["efficacy/accuracy"] is not None
    assert found["budget"]["num_edits"] == wanted["budget"]["num_edits"]
    assert found["budget"]["bytes_per_edit"] == wanted["budget"]["bytes_per_edit"]
    lines, whole = ((root / run / "cases.jsonl").read_text() for root in (two[0], one))
    assert lines == whole and whole.count("\n") >= 5
    edits, same = edits_of(two[0] / run), edits_of(one / run)
    assert edits.keys() == same.keys() and same
    assert run.startswith("MemPrompt") or any(
        tensor.float().abs().max() > 1e-3 for tensor in same.values()
    )
    for name, tensor in same.items():
        torch.testing.assert_close(edits[name], tensor, atol=1e-6, rtol=0)


def test_a_process_that_edits_differently_stops_the_run_in_one_line(two):
    for said in two[1]:
        lines = [
            line for line in said.splitlines() if line.startswith("corrigenda: error: the edit")
        ]
        assert len(lines) == 1 and "'all' differs between processes 0 and 1" in lines[0]
        assert "--trainer.devices 1" in lines[0]
    assert not (two[0] / "different/summary.json").exists()


@pytest.mark.parametrize(
    ("run", "alone", "near"),
    [
        ("tuned", "tuned", 0),
        ("half", "tuned", 0),  # which went on from its own checkpoint
        ("ke", "ke", 1e-5),
        ("accumulated", "accumulated", 1e-5),
    ],
)
def test_training_over_a_sharded_base_learns_what_one_process_learns(one, two, run, alone, near):
    """Its checkpoint has the same format."""
    mine, its = saved(two[0] / f"sharded-{run}"), saved(one / alone)
    assert mine.keys() == its.keys() and mine["state_dict"].keys() == its["state_dict"].keys()
    assert mine["global_step"] == its["global_step"]
    for name, value in its["state_dict"].items():
        if name != "training_time":
            torch.testing.assert_close(mine["state_dict"][name], value, atol=near, rtol=near)


@pytest.mark.parametrize("run", ["mend", "ke", "accumulated"])
def test_the_loss_curve_over_a_sharded_base_is_that_of_one_process(one, two, run):
    """MEND's weights are not compared after six steps: where a gradient is small Adam makes much of last bits."""
    found, wanted = logged(two[0] / f"sharded-{run}", *LOSSES), logged(one / run, *LOSSES)
    torch.testing.assert_close(found[:2], wanted[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_process_keeps_half_of_a_sharded_base(two):
    for said in two[1]:
        sizes = [
            json.loads(line.split(" ", 1)[1])
            for line in said.splitlines()
            if line.startswith("SHARDED")
        ]
        assert len(sizes) >= 5
        for local, whole in sizes:
            assert local <= whole // 2 + 500  # the last norm is whole


@pytest.mark.parametrize(
    "said",
    [
        "set --trainer.limit_val_batches 0, and validate the checkpoint in one process",
        "--trainer.strategy sharded is for training beside a base model, which MEND does not do here",
        "--trainer.strategy sharded is for training beside a base model, which EditingModule does not",
        "ModelParallelStrategy would write the base model into every checkpoint",
    ],
)
def test_what_a_sharded_base_cannot_do_is_refused_in_one_line(two, said):
    for text in two[1]:
        lines = [line for line in text.splitlines() if said in line]
        assert len(lines) == 1 and lines[0].startswith("corrigenda: error")


def test_a_loss_that_is_no_number_in_one_process_is_skipped_by_all(two):
    state = saved(two[0] / "broken")
    assert state["global_step"] == 6 and state["state_dict"]["num_skipped"] == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    losses = logged(two[0] / "broken", "train/loss")[:, 0]
    assert losses.isnan().tolist() == [False, True, False, False, False, False]


def test_malmen_is_refused_in_one_line(two):
    for said in two[1]:
        (line,) = (
            line for line in said.splitlines() if line.startswith("corrigenda: error: MALMEN")
        )
        assert (
            "combines several training cases in one update" in line
            and "--trainer.devices 1" in line
        )


def test_a_command_starts_its_processes_and_they_share_a_folder(write, tmp_path):
    """Without --run_dir the first process names it."""
    args = [
        "validate",
        "-c",
        write("MEND", 1),
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
    ]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "corrigenda", *args],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, text=True, capture_output=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert summary(run)["finished"] and len(list((run / "edits").iterdir())) == 5
