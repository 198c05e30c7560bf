"""One command under torchrun and SLURM, and the table of docs/several-devices.md: what works with what."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.malmen import MALMEN
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.peft_tuning import PeftFineTune
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model import placement
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.processes import number_started
from corrigenda.modules.training.counterfactual import CounterfactualModel
from corrigenda.modules.training.scope import ScopeClassifier
from corrigenda.modules.training.sharding import Sharded, shard
from corrigenda.modules.training.tuning import FineTune
from tests.samples import ROOT, summary

# ---------------------------------------------------------------------------- launchers


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_folder, data_files):
    folder = tmp_path_factory.mktemp("launched")
    path = folder / "config.yaml"
    settings = {
        "model": {"class_path": "EditingModule", "init_args": {"lm": {"name": str(tiny_folder("llama"))}}},
        "data": {"class_path": "CounterFact",
                 "init_args": {"path": data_files.counterfact, "batch_size": 1}},
        "edit": {"editor": {"class_path": "FT", "init_args": {"layers": [1], "steps": 2}}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "wandb": "off",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def words(config, tmp_path):
    """The command for two processes."""
    more = [
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    return ["corrigenda", "validate", "-c", str(config), *more]


@pytest.fixture
def same(corrigenda, config, tmp_path):
    """``same()``: whether the run of the launched processes is that of one process."""

    def compare():
        assert corrigenda("validate", "-c", config, "--run_dir", tmp_path / "alone") == 0
        found, wanted = summary(tmp_path / "run"), summary(tmp_path / "alone")
        assert found["means"] == wanted["means"] and found["budget"]["num_edits"] == 5
        lines, whole = ((tmp_path / name / "cases.jsonl").read_text() for name in ("run", "alone"))
        assert lines == whole and whole.count("\n") == 5

    return compare


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(words, env):
    """A process of its own group, with this environment beside ours."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *words], cwd=ROOT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(*processes):
    """(exit statuses, what they said); all are stopped if one takes too long."""
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], said


def test_torchrun_starts_the_processes(words, same):
    launcher = [
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "-m",
    ]
    status, said = ended(started([*launcher, *words], {}))
    assert status == [0], said
    same()


def slurm(rank, **more):
    """What srun sets for a task."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "edits", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **more,
    }  # fmt: skip


def test_srun_starts_the_processes(words, same):
    port = {"MASTER_PORT": free_port()}
    status, said = ended(*(started(words, slurm(rank, **port)) for rank in (0, 1)))
    assert status == [0, 0], said
    same()


@pytest.mark.parametrize(
    ("env", "number"),
    [
        ({}, 1),
        (slurm(0), 2),
        ({**slurm(0), "SLURM_JOB_NAME": "bash"}, 1),
        ({name: value for name, value in slurm(0).items() if name != "SLURM_STEP_ID"}, 1),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3"}, 3),
    ],
)
def test_processes_that_were_started_together_are_counted(monkeypatch, env, number):
    for name in (*slurm(0), "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert number_started() == number


@pytest.mark.parametrize(
    ("env", "more", "said"),
    [
        (slurm(0), ["--trainer.devices", "1"], "2 processes were started together, and these settings"),
        (slurm(0, SLURM_NTASKS="two"), [], "SLURM_NTASKS must be a whole number, got 'two'"),
        ({**slurm(0), "SLURM_NTASKS_PER_NODE": ""}, ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
         "Use `--ntasks-per-node=2` instead"),
    ],
)  # fmt: skip
def test_processes_that_would_not_be_one_group_are_refused(
    corrigenda, config, capsys, monkeypatch, tmp_path, env, more, said
):
    for name, value in env.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert corrigenda("validate", "-c", config, "--run_dir", "run", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- the table

PAGE = (ROOT / "docs/several-devices.md").read_text(encoding="utf-8")
HEADER, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## What works with what")[2].splitlines()
    if line.startswith("|") and not line.startswith("| ---")
]
COLUMNS = ("devices", "offloaded", "ddp", "sharded")
FIT, VALIDATE = (TrainerFn.FITTING, "fit"), (TrainerFn.VALIDATING, "validate")
LAYERS = {"layers": [1]}
MODULES = {
    "`validate`: weights": (VALIDATE, EditingModule),
    "`validate`: memories beside the network": (VALIDATE, EditingModule),
    "`validate`: memories of texts": (VALIDATE, EditingModule),
    "`validate`: trained editors": (VALIDATE, lambda lm: MEND(lm, rank=4, **LAYERS)),
    "`fit`: a stream of edits": (FIT, EditingModule),
    "`fit`: MEND, KE": (FIT, lambda lm: KE(lm, hidden=4, condition=6, **LAYERS)),
    "`fit`: MALMEN": (FIT, lambda lm: MALMEN(lm, rank=4, **LAYERS)),
    "`fit`: fine-tuning": (FIT, lambda lm: FineTune(lm, FT([1]))),
    "`fit`: SERAC's counterfactual model": (FIT, lambda lm: CounterfactualModel(lm, FT([1]))),
    "`fit`: SERAC's scope classifier": (FIT, lambda _: ScopeClassifier()),
    "`fit`: adapters of peft": (
        FIT, lambda lm: PeftFineTune(lm, {"peft_type": "LORA", "target_modules": ["down_proj"]})
    ),
}  # fmt: skip
DISK = {"model": "cpu", "lm_head": "disk"}


def cells():
    """(row, column, what the page says) of every cell that is not empty."""
    return [
        (row, column, said)
        for row, *rest in ROWS
        for column, said in zip(COLUMNS, rest, strict=True)
        if said and not row.startswith("a base model")
    ]


def test_the_table_has_these_rows_and_columns():
    assert len(HEADER) == 5 and "devices alone" in HEADER[1] and "disk" in HEADER[2]
    assert HEADER[3:] == ["`ddp`", "`sharded`"]
    assert {said for _, _, said in cells()} == {"yes", "no"}
    starts = [start for row, *_ in ROWS for start in MODULES if row.startswith(start)]
    assert starts == list(MODULES) and len(ROWS) == len(MODULES) + 1


@pytest.mark.parametrize(("row", "column", "said"), cells())
def test_what_the_table_rules_out_is_refused_at_setup(tiny_folder, monkeypatch, row, column, said):
    (function, stage), make = next(v for start, v in MODULES.items() if row.startswith(start))
    strategy = {"ddp": DDPStrategy, "sharded": Sharded}.get(column, SingleDeviceStrategy)()
    is_placed = column in ("devices", "offloaded")
    lm = LanguageModel(str(tiny_folder("llama")), device_map=DISK if is_placed else None)
    if column == "devices":  # what is asked is only whether weights are away while a module waits
        monkeypatch.setattr(placement, "is_offloaded", lambda _: False)
    module = make(lm)
    module._trainer = SimpleNamespace(
        strategy=strategy, world_size=2 if column in ("ddp", "sharded") else 1,
        state=SimpleNamespace(fn=function), precision="32-true", limit_val_batches=0,
    )  # fmt: skip
    if said == "yes":
        module.setup(stage)
        return
    with pytest.raises(ValueError, match="--trainer|--model.lm.device_map") as error:
        module.setup(stage)
    assert "\n" not in str(error.value)


def test_a_quantised_base_is_neither_offloaded_nor_sharded(tiny_folder):
    folder = str(tiny_folder("llama", hidden_size=64, intermediate_size=128))
    (row,) = [rest for name, *rest in ROWS if name.startswith("a base model")]
    assert row == ["yes", "no", "yes", "no"]
    with pytest.raises(ValueError, match="quantised weights cannot be offloaded"):
        LanguageModel(folder, quantization="int8", device_map=DISK)
    with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
        shard(LanguageModel(folder, quantization="int8"), mesh=None)
    assert LanguageModel(folder, quantization="int8", device_map="auto").score(["He"], ["is"])
