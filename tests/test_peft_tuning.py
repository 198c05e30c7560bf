"""Adapters of peft: active edits that train, are saved and leave the base model as it was."""

import pytest
import torch
from lightning.pytorch import Trainer

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.tasks import Tasks
from corrigenda.modules.editors import peft_tuning
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.peft_tuning import PeftFineTune
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.training.tuning import FineTune

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

EDITS = [
    Edit("The capital of {} is", "Ruritania", "Strelsau"),
    Edit("{} was written by", "The Voyage Out", "Iris Vane"),
    Edit("{} plays the", "Ada", "oboe"),
    Edit("{} lies in", "Port Larch", "Zembla"),
]
CASES = [
    EditCase(str(n), (edit,), {
        "efficacy": (Probe(edit.text, edit.target_new, "the sea"),),
        "locality": (Probe("The colour of snow is", "white", "black"),),
    })
    for n, edit in enumerate(EDITS)
]  # fmt: skip
PROMPTS, TARGETS = [e.text for e in EDITS], [e.target_new for e in EDITS]
MODULES = {"target_modules": ["q_proj", "down_proj"]}
ADAPTERS = {
    "LoRA": {"peft_type": "LORA", "r": 4, **MODULES},
    "DoRA": {"peft_type": "LORA", "r": 4, "use_dora": True, **MODULES},
    "PiSSA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa", **MODULES},
    "OLoRA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "olora", **MODULES},
    "OFT": {"peft_type": "OFT", "oft_block_size": 8, "r": 0, **MODULES},
    "OSF": {"peft_type": "OSF", **MODULES},
    "LN": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]},
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=list(ADAPTERS))


class Stream(EditDataModule):
    def cases(self, split):
        return CASES


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("llama")


def logprob(lm):
    return lm.score(PROMPTS, TARGETS).logprob_BM


def trainer(folder, epochs=2):
    return Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, max_epochs=epochs,
    )  # fmt: skip


@every_adapter
def test_it_trains_beside_a_base_that_stays(tiny_lm, adapter, tmp_path):
    lm = tiny_lm("llama")
    names, before = [name for name, _ in lm.net.named_parameters()], logprob(lm)
    weights = hash_weights(lm.net)
    module = PeftFineTune(lm, adapter, lr=2e-2)
    assert not module.trained and torch.equal(logprob(lm), before)
    fit = trainer(tmp_path)
    fit.fit(module, Stream(batch_size=2, tasks=Tasks(2, 2, passes=4)))
    assert module.trained and not lm.handles
    assert module.means["locality/kl"] > 0  # against the base
    assert torch.equal(logprob(lm), before) and hash_weights(lm.net) == weights
    assert [name for name, _ in lm.net.named_parameters()] == names
    patch = module.edit()
    assert logprob(lm).sum() > before.sum() + 0.5
    with lm.pristine():
        assert torch.equal(logprob(lm), before) and hash_weights(lm.net) == weights
    learned = logprob(lm)
    patch.remove()

    path = tmp_path / "one.ckpt"
    fit.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert set(saved) == {*(f"learned.{name}" for name in module.learned), "num_steps"}
    again = PeftFineTune(tiny_lm("llama"), adapter)
    trainer(tmp_path).validate(again, Stream(), path, verbose=False, weights_only=True)
    assert again.means == pytest.approx(module.means, abs=1e-5) and again.trained
    again.edit()
    torch.testing.assert_close(logprob(again.lm), learned)


def test_its_lora_is_lora(lm):
    """The same factors give the same model and gradients as our own."""
    ours = FineTune(lm, LoRA([0, 1], "mlp", rank=4, alpha=8))
    module = PeftFineTune(lm, {"peft_type": "LORA", "r": 4, "lora_alpha": 8,
                               "target_modules": ["gate_proj", "up_proj", "down_proj"]})  # fmt: skip
    with torch.no_grad():
        for name, leaf in ours.leaves.items():
            leaf += 0.1 * torch.randn(leaf.shape)
            path, factor = name.rsplit(".", 1)
            peft_name = f"{path}.lora_{factor}.default.weight".replace(".", "/")
            module.learned[peft_name].copy_(leaf[0])
    rows = ours.target_rows(PROMPTS, TARGETS)
    rows.losses(lm, [ours.update()]).mean().backward()
    beside = rows.losses(lm, [ours.own_delta()])
    module.edit()
    rows = module.target_rows(PROMPTS, TARGETS)
    losses = rows.losses(lm, [module.update()])
    losses.mean().backward()
    torch.testing.assert_close(losses, beside)
    for name, leaf in ours.leaves.items():
        path, factor = name.rsplit(".", 1)
        peft_name = f"{path}.lora_{factor}.default.weight".replace(".", "/")
        torch.testing.assert_close(module.learned[peft_name].grad, leaf.grad[0])


def test_equal_weights_share_memory(lm):
    module = PeftFineTune(lm, ADAPTERS["LoRA"])
    patch = module.edit()
    adapted = {name: p.data_ptr() for name, p in lm.net.named_parameters() if "base_layer" in name}
    patch.remove()
    assert adapted
    for name, pointer in adapted.items():
        assert lm.net.get_parameter(name.replace("base_layer.", "")).data_ptr() == pointer


def test_blocks_below_the_adapters_run_once(lm):
    above = {"layers_to_transform": [1], "target_modules": ["q_proj"]}
    module = PeftFineTune(lm, {"peft_type": "LORA", **above})
    assert module.target_rows(PROMPTS, TARGETS).tail.layer == 1 == module.edit().lowest_layer


def test_an_edit_made_later_is_removed_first(lm):
    module = PeftFineTune(lm, ADAPTERS["LoRA"])
    first, second = module.edit(), PeftFineTune(lm, ADAPTERS["DoRA"]).edit()
    with pytest.raises(EditError, match="remove"):
        first.remove()
    second.remove(), first.remove()
    assert not lm.handles


@pytest.mark.parametrize(("adapter", "message"), [
    ({"r": 4}, "adapter must have a peft_type that peft knows"),
    ({"peft_type": "MAGIC"}, "adapter must have a peft_type that peft knows"),
    ({"peft_type": "LORA", "ranks": 4}, "unexpected keyword argument 'ranks'"),
    ({"peft_type": "LORA", "target_modules": ["nothing"]}, "peft cannot adapt .*not found"),
    ({"peft_type": "XLORA"}, "loads further adapters by name: choose another"),
    ({"peft_type": "ADALORA"}, "ranks reallocated after every step"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "peft cannot adapt"),
    ({"peft_type": "OSF", "target_modules": ["nothing"]}, "peft finds nothing to adapt|peft cannot adapt"),
])  # fmt: skip
def test_what_peft_cannot_do_is_said_in_one_line(lm, adapter, message):
    with pytest.raises(ValueError, match=message) as caught:
        PeftFineTune(lm, adapter)
    assert "\n" not in str(caught.value)
    assert not lm.handles


def test_without_peft_it_says_what_to_install(lm, monkeypatch):
    monkeypatch.setattr(peft_tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'corrigenda\[peft\]'"):
        PeftFineTune(lm, ADAPTERS["LoRA"])
