"""A model whose blocks are in several places is edited and evaluated as on one device.

There is no GPU here. Two devices are the CPU and a second one that computes on it but does not mix with it
(second_device.py); memory and disk are those that accelerate would take beside a GPU. Not tested: real copies
between devices, their streams, and quantised models on several of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.full import FullFT
from corrigenda.modules.evaluation.requirements import require_place
from corrigenda.modules.model import placement
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.hooks import first, hooked, replace_first
from corrigenda.modules.model.lm import LanguageModel
from tests.samples import ROOT

EDIT = Edit("The capital of {} is", "Ruritania", "Strelsau")
DISK = {
    "transformer.wte": "disk", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk",
    "transformer.ln_f": "disk", "lm_head": "disk",
}  # fmt: skip
PLACEMENTS = ("two devices", "in the CPU's memory", "on disk")
EDITORS = ("ROME", "MEMIT-seq", "FT-M", "LoRA", "KN", "GRACE", "WISE", "CaliNET", "MELO", "MEND", "KE",
           "MemPrompt")  # fmt: skip
FEW = {"in the CPU's memory": ("ROME", "KN", "WISE", "MEND", "MemPrompt")}
# Of these both devices' blocks are edited, and autograd adds up the devices' gradients in another order.
OTHER_ORDER = [("two devices", "FT-M"), ("two devices", "LoRA")]


@pytest.fixture(scope="module")
def found(tiny_folder, data_files):
    """What tests/placed.py computes."""
    folder = tiny_folder("llama", num_hidden_layers=3)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/placed.py", str(folder), data_files.text],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, text=True, capture_output=True, timeout=500, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("where", PLACEMENTS)
def test_the_model_is_the_same_wherever_its_parts_are(found, where):
    for what in ("model", "trace", "hash"):  # hash: also once edits were made and removed
        assert found[where][what] == found["one device"][what], what
    assert found[where]["hash"] is True


@pytest.mark.parametrize(
    ("where", "editor"),
    [(where, editor) for where in PLACEMENTS for editor in FEW.get(where, EDITORS)],
)
def test_an_edit_is_the_same_wherever_the_parts_are(found, where, editor):
    here, there = found["one device"][editor], found[where][editor]
    assert isinstance(here, dict), here
    assert isinstance(there, dict), there
    gradients = [made.get("gradients", []) for made in (there, here)]  # of a training step
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
    assert here["restored"] and there["restored"]
    if (where, editor) in OTHER_ORDER:
        logprob = [torch.tensor(made["logprob"]) for made in (there, here)]
        torch.testing.assert_close(*logprob, atol=1e-5, rtol=0)
    else:
        assert there | {"gradients": None} == here | {"gradients": None}


# ---------------------------------------------------------------------------- in this process


@pytest.fixture
def folder(tiny_folder):
    return str(tiny_folder("gpt2"))


@pytest.fixture
def lm(folder):
    """A model with tied embeddings and transposed weights, all but a block of it on disk."""
    return LanguageModel(folder, device_map=DISK)


def test_weights_on_disk_have_the_hash_and_the_names_of_the_model(lm, folder, tiny_lm):
    whole = LanguageModel(folder)
    assert placement.is_offloaded(lm.net) and not placement.is_offloaded(whole.net)
    assert lm.weights_hash == whole.weights_hash and lm.structure == whole.structure
    assert lm.structure.tied and not tiny_lm("llama", tie_word_embeddings=False).structure.tied
    assert placement.first_names(lm.net) == placement.first_names(whole.net)
    for (name, mine), (other, its) in zip(
        placement.weights(lm.net), placement.weights(whole.net), strict=True
    ):
        assert name == other and torch.equal(mine, its)


def test_an_edit_of_weights_on_disk_stays_through_a_checkpoint_and_comes_off(lm, folder):
    base = lm.score([EDIT.text], [EDIT.target_new]).logprob_BM
    patch = FT([0, 1], steps=3).edit(lm, [EDIT])
    state, edited = patch.state(), lm.score([EDIT.text], [EDIT.target_new]).logprob_BM
    assert not torch.equal(edited, base)
    patch.remove()
    assert torch.equal(lm.score([EDIT.text], [EDIT.target_new]).logprob_BM, base)
    lm.edits.__dict__.pop("weights_hash")
    assert lm.weights_hash == LanguageModel(folder).weights_hash
    for other in (lm, LanguageModel(folder)):
        restored = type(patch).restore(other, state)
        assert torch.equal(other.score([EDIT.text], [EDIT.target_new]).logprob_BM, edited)
        restored.remove()


def test_the_model_s_own_file_stays_as_it_is(lm, folder):
    (file,) = Path(folder).glob("*.safetensors")
    before = file.read_bytes()
    patch = FT([1], steps=2).edit(lm, [EDIT])
    assert file.read_bytes() == before
    patch.remove()
    assert file.read_bytes() == before


def test_gradients_keep_the_weights_of_offloaded_blocks(lm):
    """As the documentation says: no memory is saved while a value is searched for."""
    name, saved = lm.structure.out_name(1), []
    rows = lm.tokens.rows([EDIT.text], [EDIT.target_new])
    leaf = torch.zeros(lm.structure.width, requires_grad=True)
    site = lm.net.get_submodule(lm.structure.block_name(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None),
        hooked([(site, lambda _m, _a, out: replace_first(out, first(out) + leaf))]),
    ):
        lm.reuse.tail(rows.without_last(), 0).logits(*rows.answer_positions())
    weight = placement.read(lm.net.get_submodule(name), "weight")
    assert any(t.shape in (weight.shape, weight.T.shape) and
               torch.equal(t.sort().values, (weight if t.shape == weight.shape else weight.T).sort().values)
               for t in saved)  # fmt: skip


def test_an_update_of_every_weight_needs_them_on_devices(lm):
    with pytest.raises(
        ValueError, match="full fine-tuning adds to every weight, and transformer.wte"
    ):
        FullFT(steps=2).edit(lm, [EDIT])
    norm = Delta({"transformer.ln_f.weight": torch.ones(lm.structure.width)})
    with pytest.raises(EditError, match="transformer.ln_f.weight is offloaded"):
        lm.score([EDIT.text], [EDIT.target_new], [norm])
    plain = lm.score([EDIT.text], [EDIT.target_new]).logprob_BM
    patch = WeightPatch(lm, norm)
    assert not torch.equal(lm.score([EDIT.text], [EDIT.target_new]).logprob_BM, plain)
    patch.remove()


def test_auto_on_one_device_is_that_device(folder):
    lm = LanguageModel(folder, device_map="auto")
    assert not placement.is_placed(lm.net) and lm.device.type == "cpu"


def test_moving_a_placed_model_leaves_it(lm):
    places = [p.device.type for p in lm.net.parameters()]
    lm.to("meta")
    assert [p.device.type for p in lm.net.parameters()] == places


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "auto", "device": "cpu"}, "give one of them"),
        ({"device_map": {"": "cuda:7"}}, "which this machine does not have: it has cpu, disk"),
        ({"device_map": {"": "here"}}, "which this machine does not have"),
        ({"device_map": {"transformer.h": "cpu", "transformer.wte": "disk"}, "quantization": "int8"},
         "quantised weights cannot be offloaded"),
        ({"device_map": {"transformer.h": "disk"}}, "any device for the following parameters"),
    ],
)  # fmt: skip
def test_a_map_that_cannot_be_is_refused_in_one_line(folder, options, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")) as error:
        LanguageModel(folder, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def command(tmp_path, folder, data_files):
    """``command(device_map, *more)``: a command's options."""

    def options(device_map, model="EditingModule", *more):
        config = {
            "model": {"class_path": model, "init_args": {"lm": {"name": folder}}},
            "data": {"class_path": "CounterFact", "init_args": {"path": data_files.counterfact, "limit": 3}},
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
            "wandb": "off",
        }  # fmt: skip
        if device_map:
            config["model"]["init_args"]["lm"]["device_map"] = device_map
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["-c", str(path), *more]

    return options


def test_validate_measures_the_same_on_disk(corrigenda, command, tmp_path):
    editor = ["--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "2"]
    for name, device_map in (("whole", None), ("placed", DISK)):
        more = [
            *editor,
            "--edit.schedule",
            "batch",
            "--run_dir",
            name,
            "--model.generate_tokens",
            "3",
        ]
        assert corrigenda("validate", *command(device_map, "EditingModule", *more)) == 0
    whole, there = ((tmp_path / name / "cases.jsonl").read_text() for name in ("whole", "placed"))
    assert whole == there and whole.count("\n") == 3


def test_auto_is_given_on_the_command_line(corrigenda, command):
    assert corrigenda("validate", *command(None), "--model.lm.device_map", "auto") == 0


def test_training_through_offloaded_blocks_is_refused_at_setup(
    corrigenda, command, data_files, capsys
):
    data = [
        "--data",
        "ZsRE",
        "--data.path",
        data_files.zsre,
        "--data.train_path",
        data_files.zsre_train,
    ]
    assert corrigenda("fit", *command(DISK, "MEND", *data)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trains through all blocks above" in error
    assert "some of this model's are offloaded" in error


def test_several_processes_do_not_place_a_model_each(lm, folder):
    trainer = SimpleNamespace(
        strategy=None, world_size=2, state=SimpleNamespace(fn=TrainerFn.VALIDATING)
    )
    with pytest.raises(ValueError, match="every process would place the whole model"):
        require_place(trainer, lm.net, "EditingModule", learns=False)
    whole = LanguageModel(folder, device_map="auto")
    require_place(trainer, whole.net, "EditingModule", learns=False)


def test_an_edited_layer_is_where_the_one_before_was():
    """Quantised layers are replaced as a whole."""
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    placement._away[one] = torch.device("cpu"), torch.device("meta")
    placement.beside(one, other)
    seen = []
    hook = placement.at_home(other, lambda _module, args, output: seen.append((args, output)))
    hook(other, (torch.ones(2),), torch.ones(2))
    assert placement._away[other] == placement._away[one] and len(seen) == 1
