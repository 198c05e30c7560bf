"""FT, FT-L, FT-M and LoRA, one edit at a time, side by side, and through ``fit``."""

import copy
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.hooks import hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import is_linear
from corrigenda.modules.training import gradient_editor
from corrigenda.modules.training.target_rows import TargetRows
from corrigenda.modules.training.tuning import FineTune

EDITS = [
    Edit("The capital of {} is", "Ruritania", "Strelsau"),
    Edit("{} was written by", "The Voyage Out", "Iris Vane"),
    Edit("The language of {} is called", "the Glass Islands", "Old High Fenwick"),
    Edit("{} plays the", "Ada", "oboe"),
]
EACH = [[edit] for edit in EDITS]
EDITORS = {
    "FT-M": lambda **rest: FT([1], steps=4, lr=5e-3, **rest),
    "FT-L": lambda **rest: FT([0, 1], "mlp", 6e-3, steps=4, lr=5e-3, loss="prompt_last", **rest),
    "LoRA": lambda **rest: LoRA(steps=4, lr=5e-3, **rest),
}
every_editor = pytest.mark.parametrize("make", EDITORS.values(), ids=list(EDITORS))


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


def logprob(lm, edits=EDITS, deltas=None, owners=None):
    """Mean log-probability of each target's tokens."""
    scores = lm.score([e.text for e in edits], [e.target_new for e in edits], deltas, owners)
    return scores.logprob_BM.sum(1) / scores.mask_BM.sum(1)


def dense(delta):
    return torch.cat([delta.dense(name).flatten() for name in sorted(delta.updates)])


def difference(a, b):
    return ((dense(a) - dense(b)).norm() / dense(b).norm()).item()


def weights(lm):
    return {name: parameter.detach().clone() for name, parameter in lm.net.named_parameters()}


# ---------------------------------------------------------------------------- every method


@every_editor
def test_editing_raises_the_targets_and_removes_bit_exactly(lm, make):
    before, base, editor = logprob(lm), weights(lm), make()
    handle = editor.edit(lm, EDITS)
    assert (logprob(lm) > before).sum() >= 3 and logprob(lm).mean() > before.mean()
    for name, value in weights(lm).items():
        assert torch.equal(value, base[name]) == (name not in handle.delta.updates), name
    handle.remove()
    assert all(torch.equal(value, base[name]) for name, value in weights(lm).items())


@every_editor
def test_computing_leaves_the_model_alone(lm, make):
    base = weights(lm)
    make().propose_each(lm, EACH)
    assert all(torch.equal(value, base[name]) for name, value in weights(lm).items())
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    assert not any(module._forward_hooks for module in lm.net.modules())


@every_editor
def test_side_by_side_is_one_at_a_time(lm, make):
    groups = [[EDITS[0]], EDITS[1:3], [EDITS[3]]]
    together = make().propose_each(lm, groups)
    alone = [make().propose(lm, group) for group in groups]
    apart = make(parallel=1).propose_each(lm, groups)
    for one, two, three in zip(together, alone, apart, strict=True):
        assert difference(one, two) < 1e-5 and difference(three, two) < 1e-5
    assert difference(together[0], together[2]) > 0.1


@every_editor
def test_the_written_weights_are_the_side_branch(lm, make):
    delta = make().propose(lm, EDITS)
    beside = logprob(lm, deltas=[delta])
    with torch.no_grad():
        WeightPatch(lm, delta)
    torch.testing.assert_close(logprob(lm), beside, atol=1e-5, rtol=0)


@every_editor
def test_the_shared_lower_blocks_change_nothing(tiny_folder, make):
    plain = LanguageModel(str(tiny_folder("llama")), reuse_prefix=False)
    quick = LanguageModel(str(tiny_folder("llama")))
    for a, b in zip(
        make().propose_each(plain, EACH), make().propose_each(quick, EACH), strict=True
    ):
        assert difference(a, b) < 1e-5


@every_editor
def test_a_batch_in_pieces_is_the_same_batch(lm, make, monkeypatch):
    whole, each = make().propose(lm, EDITS), make().propose_each(lm, EACH)
    monkeypatch.setattr(gradient_editor, "CHUNK_TOKENS", 30)
    monkeypatch.setattr(gradient_editor, "MAX_ELEMENTS", 1)
    assert difference(make().propose(lm, EDITS), whole) < 1e-5
    for a, b in zip(make().propose_each(lm, EACH), each, strict=True):
        assert difference(a, b) < 1e-5


@every_editor
def test_an_edit_that_has_stopped_does_not_move(lm, make):
    easy, hard = EDITS[3], EDITS[2]
    editor = make()
    losses = [editor.propose(lm, [edit]).metadata["notes"][0]["loss"] for edit in (easy, hard)]
    editor.steps, editor.stop_loss = 40, min(losses) - 0.3
    both = editor.propose_each(lm, [[easy], [hard]])
    first, second = (delta.metadata["notes"][0] for delta in both)
    assert first["updates"] != second["updates"]
    index = 0 if first["updates"] < second["updates"] else 1
    notes = both[index].metadata["notes"][0]
    assert 0 < notes["updates"] < 40 and notes["loss"] < editor.stop_loss
    editor.steps, editor.stop_loss = notes["updates"], 0.0
    assert difference(both[index], editor.propose(lm, [(easy, hard)[index]])) < 1e-5


@every_editor
def test_edits_that_stop_at_different_times_do_not_meet(lm, make):
    editor = make()
    editor.steps, editor.stop_loss = 12, 5.0
    together, alone = editor.propose_each(lm, EACH), [editor.propose(lm, edits) for edits in EACH]
    notes, apart = ([delta.metadata["notes"][0] for delta in each] for each in (together, alone))
    assert len({note["updates"] for note in notes}) >= 3
    assert notes == [pytest.approx(note, rel=1e-4) for note in apart]
    for a, b in zip(together, alone, strict=True):
        assert difference(a, b) < 1e-4


@every_editor
def test_the_loss_of_a_group_is_the_mean_of_its_edits(lm, make, monkeypatch):
    monkeypatch.setattr(gradient_editor, "CHUNK_TOKENS", 30)
    editor = make()
    editor.steps = 1
    noted = [delta.metadata["notes"][0]["loss"] for delta in editor.propose_each(lm, EACH)]
    together = editor.propose(lm, EDITS).metadata["notes"][0]["loss"]
    assert together == pytest.approx(sum(noted) / len(noted), rel=1e-5)
    if editor.loss == "target":
        assert noted == pytest.approx((-logprob(lm)).tolist(), rel=1e-4)


@every_editor
def test_an_edit_that_is_there_already_is_left_alone(lm, make):
    (delta,) = make(stop_loss=1e3).propose_each(lm, EACH[:1])
    assert delta.metadata["notes"][0]["updates"] == 0
    assert not dense(delta).any()


@every_editor
def test_same_seed_same_result_and_the_file_is_the_edit(lm, make, tmp_path):
    delta = make().propose(lm, EDITS)
    delta.save(tmp_path / "delta.safetensors")
    assert torch.equal(dense(Delta.load(tmp_path / "delta.safetensors")), dense(delta))
    assert torch.equal(dense(make().propose(lm, EDITS)), dense(delta))


@every_editor
def test_a_bfloat16_model_learns_in_float32(tiny_folder, make):
    lm = LanguageModel(str(tiny_folder("gpt2")), dtype="bfloat16")
    delta = make().propose(lm, EDITS)
    assert {leaf.dtype for leaf in make().start(lm, 1).values()} == {torch.float32}
    assert logprob(lm, deltas=[delta]).mean() > logprob(lm).mean()


def test_every_family_can_be_tuned(tiny_lm, family):
    lm = tiny_lm(family)
    for editor in (FT([1], steps=4, lr=5e-3), LoRA(targets="all", steps=4)):
        delta = editor.propose(lm, EDITS)
        assert logprob(lm, deltas=[delta]).mean() > logprob(lm).mean() + 0.05


def test_a_loss_that_is_not_finite_is_reported(lm, caplog):
    FT([1], lr=1e30, loss="target").propose(lm, EDITS[:1])
    assert "try a smaller lr" in caplog.text


def test_a_layer_that_does_not_exist_is_named(lm):
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        FT([7]).propose(lm, EDITS)


# ---------------------------------------------------------------------------- the losses


def piece(lm, loss, edits=EDITS):
    rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
    owner_R = torch.arange(len(edits))
    return rows, TargetRows.of(lm, rows, owner_R, 1, loss)


def nothing(lm):
    editor = FT([1])
    return editor.deltas(lm, editor.start(lm, len(EDITS)))


def test_target_loss_is_the_models_own_on_target_labels(lm):
    rows, part = piece(lm, "target")
    column = torch.arange(rows.ids_BT.shape[1])
    labels = rows.ids_BT.masked_fill((column < rows.start_B[:, None]) | (rows.mask_BT == 0), -100)
    assert len(part.target_N) == (labels != -100).sum()  # m tokens, m labels
    wanted = [
        lm.net(ids[None, : m.sum()], labels=label[None, : m.sum()]).loss
        for ids, m, label in zip(rows.ids_BT, rows.mask_BT, labels, strict=True)
    ]
    torch.testing.assert_close(part.losses(lm, nothing(lm)), torch.stack(wanted), atol=1e-5, rtol=0)


def test_prompt_last_loss_is_a_bag_of_target_tokens_at_one_position(lm):
    rows, part = piece(lm, "prompt_last")
    losses = part.losses(lm, nothing(lm))
    for edit, ids, start, mask, loss in zip(
        EDITS, rows.ids_BT, rows.start_B, rows.mask_BT, losses, strict=True
    ):
        (prompt,) = lm.tokens.encode([edit.text])
        assert ids[:start].tolist() == prompt
        logprob_V = lm.net(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(-logprob_V[ids[start : mask.sum()]].mean(), loss)


@pytest.mark.parametrize("keep", [[1, 2], [0, 3], [2]])
def test_rows_that_are_left_keep_their_losses(lm, keep):
    _, part = piece(lm, "target")
    active_E = torch.zeros(len(EDITS), dtype=torch.bool)
    active_E[keep] = True
    left = part.select(active_E)
    assert left.owner_R.tolist() == keep
    torch.testing.assert_close(
        left.losses(lm, nothing(lm)), part.losses(lm, nothing(lm))[keep], atol=1e-5, rtol=0
    )
    assert part.select(torch.zeros_like(active_E)) is None


@pytest.mark.parametrize("loss", ["target", "prompt_last"])
def test_the_gradient_reaches_label_positions_only(tiny_folder, loss):
    lm = LanguageModel(str(tiny_folder("gpt2")), reuse_prefix=False)
    rows, part = piece(lm, loss)
    seen = []
    with hooked([(lm.net.get_output_embeddings(), lambda *args: seen.append(args[-1]))]):
        losses = part.losses(lm, nothing(lm))
    (gradient_BTV,) = torch.autograd.grad(losses.sum(), seen)
    reached_BT = gradient_BTV.abs().sum(-1) > 0
    column = torch.arange(rows.ids_BT.shape[1])
    first_B1 = rows.start_B[:, None] - 1
    last_B1 = first_B1 if loss == "prompt_last" else rows.length_B[:, None] - 2
    assert torch.equal(reached_BT, (column >= first_B1) & (column <= last_B1))


# ---------------------------------------------------------------------------- FT, FT-L


def test_ft_is_adam_on_the_weights_themselves(lm):
    """Against a plain loop that writes into a copy of the network."""
    edit, steps, lr = EDITS[1], 6, 2e-3
    net = copy.deepcopy(lm.net)
    module = net.get_submodule(lm.structure.out_name(1))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    rows = lm.tokens.rows([edit.text], [edit.target_new])
    labels = rows.ids_BT.clone()
    labels[0, : rows.start_B[0]] = -100
    for _ in range(steps):
        optimizer.zero_grad()
        net(rows.ids_BT, labels=labels).loss.backward()
        optimizer.step()
    delta = FT([1], steps=steps, lr=lr).propose(lm, [edit])
    name = lm.structure.out_name(1)
    assert set(delta.updates) == {f"{name}.weight", f"{name}.bias"}
    for kind, stored in module.named_parameters():
        wanted = (stored.detach() - start[kind]).T if kind == "weight" else stored - start[kind]
        torch.testing.assert_close(delta.updates[f"{name}.{kind}"], wanted, atol=2e-5, rtol=1e-2)


def test_weight_decay_pulls_the_update_to_zero(lm):
    sizes = [
        dense(FT([1], lr=1e-2, weight_decay=decay).propose(lm, EDITS)).norm() for decay in (0, 1.0)
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_ft_trains_the_given_projections(tiny_lm):
    lm = tiny_lm("llama")
    assert set(FT([1]).start(lm, 1)) == {"model.layers.1.mlp.down_proj.weight"}
    shapes = {name: tuple(leaf.shape) for name, leaf in FT([1, 0], "mlp").start(lm, 2).items()}
    assert shapes == {
        f"model.layers.{layer}.mlp.{name}.weight": (2, *shape)
        for layer in (0, 1)
        for name, shape in {
            "gate_proj": (80, 32),
            "up_proj": (80, 32),
            "down_proj": (32, 80),
        }.items()
    }


@pytest.mark.parametrize("loss", ["target", "prompt_last"])
def test_the_box_holds_entry_by_entry(lm, loss):
    eps = 2e-3
    editor = FT([0, 1], norm_constraint=eps, lr=1e-3, loss=loss)
    base, handle = weights(lm), editor.edit(lm, EDITS)
    for name, value in weights(lm).items():
        moved = (value.double() - base[name].double()).abs().max().item()
        if name in handle.delta.updates:
            assert handle.delta.updates[name].abs().max() <= eps + 1e-9
            assert 0.9 * eps < moved <= eps + 1e-6  # the sum is rounded to float32
        else:
            assert moved == 0


def test_a_wide_box_is_none(lm):
    free = FT([1], lr=1e-3).propose(lm, EDITS)
    assert torch.equal(dense(FT([1], lr=1e-3, norm_constraint=1e9).propose(lm, EDITS)),
                       dense(free))  # fmt: skip


def test_an_int_is_honoured_as_a_constraint(lm):
    assert FT([1], norm_constraint=1).norm_constraint == 1.0
    delta = FT([1], norm_constraint=1, lr=2.0, steps=2).propose(lm, EDITS)
    assert dense(delta).abs().max() == 1.0


@pytest.mark.parametrize("wrong", ["5e-4", True, [5e-4]])
def test_what_is_no_number_is_refused_as_a_constraint(wrong):
    with pytest.raises(ValueError, match="norm_constraint must be a number"):
        FT([0], norm_constraint=wrong)


@pytest.mark.parametrize("wrong", [0, -5e-4, float("nan")])
def test_a_constraint_is_positive(wrong):
    with pytest.raises(ValueError, match="norm_constraint must be positive"):
        FT([0], norm_constraint=wrong)


@pytest.mark.parametrize(("written", "value"), [("5e-4", 5e-4), ("1", 1.0), ("null", None)])
def test_the_constraint_comes_out_of_yaml_as_a_number(written, value):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(FT, "ft")
    config = parser.parse_string(f"ft: {{layers: [0], norm_constraint: {written}}}")
    assert parser.instantiate(config).ft.norm_constraint == value


# ---------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_lora_starts_as_the_model_itself(tiny_lm, family, targets):
    lm, editor = tiny_lm(family), LoRA(targets=targets)
    (delta,) = editor.deltas(lm, editor.start(lm, 1))
    assert torch.equal(logprob(lm, deltas=[delta]), logprob(lm))
    for name, update in delta.updates.items():
        module = lm.net.get_submodule(name.removesuffix(".weight"))
        assert is_linear(module) and update.right_rI.shape[0] == 8
        bound = update.right_rI.shape[1] ** -0.5
        assert 0.9 * bound < update.right_rI.abs().max() <= bound


def test_lora_finds_query_and_value(tiny_lm):
    found = {
        "llama": {"q_proj", "v_proj"},
        "opt": {"q_proj", "v_proj"},
        "gpt_neo": {"q_proj", "v_proj"},
        "gpt2": {"c_attn"},
        "bloom": {"query_key_value"},
        "phi3": {"qkv_proj"},
        "qwen3_5_text": {"in_proj_qkv", "q_proj", "v_proj"},  # two kinds of attention
    }
    for family, wanted in found.items():
        lm, editor = tiny_lm(family), LoRA()
        (delta,) = editor.deltas(lm, editor.start(lm, 1))
        assert {name.split(".")[-2] for name in delta.updates} == wanted, family
        assert {lm.structure.layer_of(name) for name in delta.updates} == {0, 1}


def test_lora_without_query_and_value_asks_for_all_layers(tiny_lm):
    lm = tiny_lm("gpt2")
    lm.net.transformer.h[1].attn = nn.ModuleDict({"one": nn.Linear(32, 32)})
    with pytest.raises(ValueError, match="no query or value projection among"):
        LoRA(layers=[1]).start(lm, 1)


def test_the_product_of_lora_is_low_rank_and_scaled(lm):
    editor = LoRA(layers=[1], rank=3, alpha=6.0, steps=3)
    leaves = editor.start(lm, 1)
    (name,) = {leaf.rpartition(".")[0] for leaf in leaves}
    with torch.no_grad():
        leaves[f"{name}.B"].normal_()
    (delta,) = editor.deltas(lm, leaves)
    wanted = 2.0 * leaves[f"{name}.B"][0] @ leaves[f"{name}.A"][0]
    torch.testing.assert_close(delta.dense(f"{name}.weight", torch.float32), wanted)
    assert isinstance(delta.updates[f"{name}.weight"], LowRank)


def test_lora_draws_are_its_own(lm):
    torch.manual_seed(1)
    one = LoRA().start(lm, 2)
    torch.manual_seed(2)
    two, other = LoRA().start(lm, 1), LoRA(seed=1).start(lm, 1)
    for name in one:
        assert torch.equal(one[name][0], two[name][0]) and torch.equal(one[name][1], two[name][0])
        assert torch.equal(other[name], two[name]) == name.endswith(".B")


@every_editor
def test_conv1d_and_linear_learn_the_same(lm, make):
    """GPT-2 with its transposed maps against the same network with ordinary ones."""
    twin = SimpleNamespace(lm=copy.deepcopy(lm)).lm
    for name, module in list(twin.net.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.clone(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(twin.net.get_submodule(parent), child, linear.requires_grad_(False))
    a, b = make().propose(lm, EDITS), make().propose(twin, EDITS)
    assert difference(a, b) < 1e-5
    WeightPatch(lm, a), WeightPatch(twin, b)
    torch.testing.assert_close(logprob(lm), logprob(twin), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- through fit


CASES = [
    EditCase(
        str(number),
        (edit,),
        {
            "efficacy": (Probe(edit.text, edit.target_new, "the sea"),),
            "locality": (Probe("The colour of snow is", "white", "black"),),
        },
    )
    for number, edit in enumerate(EDITS)
]


class Cases(LightningDataModule):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def train_dataloader(self):
        return DataLoader(CASES, batch_size=2, collate_fn=list)

    val_dataloader = train_dataloader


def trainer(folder, **rest):
    return Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **rest,
    )


@every_editor
def test_fit_lowers_the_loss_and_leaves_the_base_alone(lm, make, tmp_path):
    base, before = weights(lm), logprob(lm)
    module = FineTune(lm, make())
    start = module.own_delta()
    assert torch.equal(logprob(lm, deltas=[start]), before)
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(module, Cases())
    after = logprob(lm, deltas=[module.own_delta()])
    assert after.mean() > before.mean() + 0.05
    assert all(torch.equal(value, base[name]) for name, value in weights(lm).items())
    assert torch.equal(logprob(lm), before)
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    assert module.means["locality/kl"] > 0  # against the true base model


@every_editor
def test_the_checkpoint_holds_what_was_learned_and_validates(tiny_folder, make, tmp_path):
    module = FineTune(LanguageModel(str(tiny_folder("gpt2"))), make())
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, Cases())
    path = tmp_path / "one.ckpt"
    fit.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert set(saved) == {f"learned.{name}" for name in module.learned}
    assert sum(t.numel() for t in saved.values()) == sum(
        leaf.numel() for leaf in make().start(module.lm, 1).values()
    )
    again = FineTune(LanguageModel(str(tiny_folder("gpt2"))), make())
    trainer(tmp_path).validate(again, Cases(), ckpt_path=path, verbose=False, weights_only=True)
    assert again.means == module.means


def test_fit_keeps_to_the_box(lm, tmp_path):
    module = FineTune(lm, FT([1], norm_constraint=1e-3, lr=5e-3))
    trainer(tmp_path, max_epochs=2).fit(module, Cases())
    assert dense(module.own_delta()).abs().max().item() == pytest.approx(1e-3, rel=1e-6)


def test_fit_takes_another_optimizer(lm, tmp_path):
    module = FineTune(lm, FT([1], lr=5e-3), lambda params: torch.optim.SGD(params, lr=0.1))
    trainer(tmp_path, max_epochs=1).fit(module, Cases())
    assert dense(module.own_delta()).abs().max() > 0
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)
    assert FineTune(lm, FT([1], lr=5e-3)).configure_optimizers().param_groups[0]["lr"] == 5e-3


@every_editor
def test_one_full_batch_epoch_is_one_step_of_propose(lm, make, tmp_path):
    class Whole(Cases):
        def train_dataloader(self):
            return DataLoader(CASES, batch_size=len(CASES), collate_fn=list)

    editor = make()
    module = FineTune(lm, editor)
    trainer(tmp_path, max_epochs=editor.steps, limit_val_batches=0).fit(module, Whole())
    assert difference(module.own_delta(), editor.propose(lm, EDITS)) < 1e-4


def test_the_product_of_fit_can_be_written(lm, tmp_path):
    module = FineTune(lm, EDITORS["LoRA"]())
    trainer(tmp_path, max_epochs=1).fit(module, Cases())
    delta, beside = module.delta(EDITS), logprob(lm, deltas=[module.own_delta()])
    assert delta.metadata["base"] == lm.weights_hash and delta.metadata["editor"] == "LoRA"
    assert len(delta.metadata["edits"]) == len(EDITS)
    with torch.no_grad():
        next(iter(module.learned.values())).zero_()
    WeightPatch(lm, delta)
    torch.testing.assert_close(logprob(lm), beside, atol=1e-5, rtol=0)


def test_fine_tuning_is_configured_by_its_signature(tiny_folder):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(FineTune, "model")
    config = parser.parse_object({"model": {
        "class_path": "corrigenda.modules.training.tuning.FineTune",
        "init_args": {
            "lm": {"class_path": "corrigenda.modules.model.lm.LanguageModel",
                   "init_args": {"name": str(tiny_folder("gpt2"))}},
            "method": {"class_path": "corrigenda.modules.editors.lora.LoRA", "init_args": {"rank": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    }})  # fmt: skip
    module = parser.instantiate(config).model
    assert module.method.rank == 2 and module.trains_on == "edits"
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 0.01
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(module.learned)
