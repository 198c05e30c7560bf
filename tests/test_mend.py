"""MEND: its equations on a tiny model, what training may change, and a run that is stopped and resumed."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn

from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.mend import MEND, GradientTransform
from corrigenda.modules.editors.trained import Trained
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.structure import is_linear, to_storage
from corrigenda.modules.training.gradients import Normaliser, gradient_factors
from tests.samples import CASES, EDITS, FAMILIES, LOCAL, OUTER

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def mend(lm, **settings):
    return MEND(lm, **({"layers": [0, 1], "rank": 4, "alpha": 0.05} | settings))


def trained_a_bit(editor):
    """Its weights are no longer those of the start, so that every part of it counts."""
    generator = torch.Generator().manual_seed(5)
    for parameter in editor.transforms.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return editor


def own_rows(lm, edits):
    rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
    return rows, torch.arange(len(edits))


def factors(editor, edits):
    rows, _ = own_rows(editor.lm, edits)
    tail = editor.lm.reuse.tail(rows, editor.lowest_layer)
    return gradient_factors(editor.lm, tail, rows, editor.names)


def plain_gradients(lm, edits, names):
    """Autograd's gradients in [out, in] of the mean token NLL of each edit, on an ordinary copy."""
    net = copy.deepcopy(lm.net).requires_grad_(True)
    gradients = []
    for edit in edits:
        ids = torch.tensor(lm.tokens.encode([f"{edit.text} {edit.target_new}"]))
        start = len(lm.tokens.encode([edit.text])[0])
        logits = net(ids).logits[0, start - 1 : -1].float()
        net.zero_grad()
        nn.functional.cross_entropy(logits, ids[0, start:]).backward()
        modules = {name: net.get_submodule(name) for name in names}
        gradients.append({n: to_storage(m, m.weight.grad).clone() for n, m in modules.items()})
    return gradients


def close(actual, expected, rtol=1e-4):
    """Equal up to ``rtol`` of the largest entry."""
    bound = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0, check_dtype=False)


# ---------------------------------------------------------------------------- equations


@FAMILIES
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 2e-6)])
def test_factors_are_the_gradient(tiny_lm, kind, dtype, rtol):
    lm = tiny_lm(kind)
    lm.net.to(dtype)
    editor = mend(lm)
    wanted = plain_gradients(lm, EDITS, editor.names)
    for name, (x_BTI, d_BTO) in factors(editor, EDITS).items():
        for edit, gradients in enumerate(wanted):
            close(d_BTO[edit].T @ x_BTI[edit], gradients[name], rtol)


@FAMILIES
def test_an_untrained_edit_is_one_step_of_gradient_descent(tiny_lm, kind):
    """With statistics of mean 0 and deviation 1, W' = W - alpha grad W."""
    lm = tiny_lm(kind)
    editor = mend(lm, alpha=0.03)
    for transform in editor.transforms.values():
        for normaliser in (transform.normalise_x, transform.normalise_d):
            normaliser.seen.fill_(11)
            normaliser.squares.fill_(10)
    wanted = plain_gradients(lm, EDITS, editor.names)
    with editing_mode():
        deltas = editor.propose_each(lm, [[edit] for edit in EDITS])
    for delta, gradients in zip(deltas, wanted, strict=True):
        assert set(delta.updates) == {f"{name}.weight" for name in gradients}
        for name, gradient in gradients.items():
            close(delta.dense(f"{name}.weight"), -0.03 * gradient)


def test_edits_that_are_made_together_add_up(tiny_lm):
    """What the editor reads of one does not depend on how many others there are."""
    lm = tiny_lm("llama")
    editor = mend(lm)
    editor.observe(CASES)
    with editing_mode():
        together = editor.propose(lm, EDITS)
        alone = editor.propose_each(lm, [[edit] for edit in EDITS])
    for name in together.updates:
        close(together.dense(name), sum(delta.dense(name) for delta in alone))


def test_the_untrained_network_is_the_identity_on_normalised_inputs():
    """Also with other statistics."""
    transform = GradientTransform(6, 3, count=1, rank=2)
    x, d = 3 + torch.randn(40, 6), 0.1 * torch.randn(40, 3)
    transform.normalise_x.update(x, 0)
    transform.normalise_d.update(d, 0)
    new_x, new_d = transform(x, d, 0)
    torch.testing.assert_close(new_x, (x - x.mean(0)) / x.std(0))
    torch.testing.assert_close(new_d, (d - d.mean(0)) / d.std(0))
    far, _ = transform(x + 1e6, d, 0)
    assert (far == 10).all()  # clamped
    constant = Normaliser(1, 2)
    constant.update(torch.ones(5, 2), 0)
    assert constant(torch.tensor([1.0, 2.0]), 0).tolist() == [[0.0, 10.0]][0]


def test_every_map_has_statistics_of_its_own():
    """A map whose gradients are a thousand times longer says nothing about the others."""
    transform = GradientTransform(6, 3, count=3, rank=2)
    x, d = torch.randn(40, 6), torch.randn(40, 3)
    for index, scale in enumerate((1.0, 1e3)):
        transform.normalise_x.update(scale * x, index)
        transform.normalise_d.update(scale * d, index)
    plain = transform(x, d, 0)
    for a, b in zip(plain, transform(1e3 * x, 1e3 * d, 1), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip((x, d), transform(x, d, 2), strict=True):  # of the third nothing is known
        assert torch.equal(a, b)
    index_n = torch.tensor([0] * 20 + [1] * 20)
    scale_n1 = torch.tensor([1.0, 1e3])[index_n][:, None]
    for a, b in zip(plain, transform(scale_n1 * x, scale_n1 * d, index_n), strict=True):
        torch.testing.assert_close(a, b)


def test_the_network_acts_on_every_token_independently():
    """Permuting the rows permutes the outputs and leaves the update as it is."""
    transform = GradientTransform(6, 3, count=2, rank=2)
    for parameter in transform.parameters():
        parameter.data += torch.randn_like(parameter)
    x, d, order = torch.randn(5, 6), torch.randn(5, 3), torch.tensor([3, 0, 4, 1, 2])
    once, shuffled = transform(x, d, 1), transform(x[order], d[order], 1)
    for a, b in zip(once, shuffled, strict=True):
        torch.testing.assert_close(a[order], b)
    torch.testing.assert_close(once[1].T @ once[0], shuffled[1].T @ shuffled[0])


def test_edits_in_a_batch_do_not_see_each_other(tiny_lm):
    lm = tiny_lm("gpt2")
    editor = trained_a_bit(mend(lm))
    editor.observe(CASES)
    with editing_mode():
        together = editor.propose_each(lm, [[edit] for edit in EDITS])
        for edit, delta in zip(reversed(EDITS), reversed(together), strict=True):
            alone = editor.propose(lm, [edit])
            for name in delta.updates:
                close(delta.dense(name), alone.dense(name), 1e-5)


def test_parameters_initialised_to_zero_get_a_gradient(tiny_lm):
    """With relu instead of clamp their gradient would be zero."""
    editor = mend(tiny_lm("gpt2"))
    editor.observe(CASES)
    with torch.enable_grad():
        edit_loss, kl = editor._losses(EDITS, OUTER, LOCAL)
        (edit_loss + kl).backward()
    for transform in editor.transforms.values():
        # Both layers read the same input at first, and the second one's output is added to the first's.
        assert all(up.grad.abs().max() > 0 for up in transform.up)
        assert all(not down.grad.any() for down in transform.down)
    assert editor.log_alpha.grad.abs().min() > 0
    assert all(p.grad is None for p in editor.lm.parameters())


@pytest.mark.parametrize("observed", [False, True])
def test_an_update_has_a_term_per_token_with_gradient(tiny_lm, observed):
    """Tokens without a gradient add nothing, also with statistics."""
    lm = tiny_lm("gpt2")
    editor = trained_a_bit(mend(lm, layers=[1]))
    if observed:
        editor.observe(CASES)
    rows, _ = own_rows(lm, EDITS)
    with editing_mode():
        deltas = editor.propose_each(lm, [[edit] for edit in EDITS])
    for delta, label_rows in zip(deltas, (rows.length_B - rows.start_B).tolist(), strict=True):
        for name, update in delta.updates.items():  # in the last block only answers have gradient
            assert update.left_Or.shape[1] == label_rows
            assert torch.linalg.matrix_rank(delta.dense(name)) <= label_rows


@FAMILIES
@pytest.mark.parametrize("together", [1, 2])
def test_the_training_loss_is_that_of_the_written_edits(tiny_lm, kind, together):
    """Side branches, through which training differentiates, give the loss of the edited model."""
    lm = tiny_lm(kind)
    editor = trained_a_bit(mend(lm, together=together))
    editor.observe(CASES)
    before = lm.weights_hash
    with torch.enable_grad():
        edit_loss, kl = editor._losses(EDITS, OUTER, LOCAL)
    losses, drifts = [], []
    for n, (outer, local) in enumerate(zip(OUTER, LOCAL, strict=True)):
        rows = lm.tokens.rows([local.prompt], [local.target])
        base = lm.net(rows.ids_BT).logits.log_softmax(-1)
        begin = n // together * together
        handle = editor.edit(lm, EDITS[begin : begin + together])
        scores = lm.score([outer.prompt], [outer.target])
        losses.append(-scores.logprob_BM.sum() / scores.mask_BM.sum())
        edited = lm.net(rows.ids_BT).logits.log_softmax(-1)
        drifts.append((base.exp() * (base - edited)).sum(-1).mean())
        handle.remove()
    torch.testing.assert_close(edit_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kl, torch.stack(drifts).mean(), atol=1e-5, rtol=1e-4)
    del lm.edits.weights_hash
    assert lm.weights_hash == before


def test_a_step_size_of_zero_gives_no_drift(tiny_lm):
    """The locality KL is positive, and 0 if alpha is 0."""
    editor = trained_a_bit(mend(tiny_lm("llama")))
    with torch.no_grad():
        assert editor._losses(EDITS, OUTER, LOCAL)[1] > 0
        editor.log_alpha.fill_(-torch.inf)
        assert editor._losses(EDITS, OUTER, LOCAL)[1] == 0


@pytest.mark.parametrize("cuts", [(20,), (1, 19), (7, 7, 6), (1,) * 20])
def test_statistics_merge_exactly(cuts):
    """Statistics of batches merge to the mean and deviation of all tokens."""
    x = 50 + torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1e-3, 1, 5, 100])
    parts = Normaliser(2, 4)
    for part in x.split(cuts):
        parts.update(part, 1)
    saved = Normaliser(2, 4)
    saved.load_state_dict(parts.state_dict())
    for normaliser in (parts, saved):
        assert normaliser.seen.tolist() == [0, 20]
        torch.testing.assert_close(normaliser.mean[1], x.mean(0), atol=1e-10, rtol=1e-12)
        std = (normaliser.squares[1] / 19).sqrt()
        torch.testing.assert_close(std, x.std(0), atol=1e-10, rtol=1e-10)


def test_statistics_are_of_tokens_with_gradient_and_come_from_observe_alone(tiny_lm):
    """Neither padding nor edits change them."""
    lm = tiny_lm("gpt2")
    editor = mend(lm, layers=[1], projections="out", num_normalising=2)
    editor.observe(CASES)
    (name,) = editor.names
    x_BTI, d_BTO = factors(editor, EDITS[:2])[name]
    used = d_BTO.abs().sum(-1) > 0
    (transform,) = editor.transforms.values()
    assert transform.normalise_x.seen == used.sum()
    close(transform.normalise_x.mean[0], x_BTI[used].mean(0), 1e-5)
    close(transform.normalise_d.squares[0], d_BTO[used].var(0) * (used.sum() - 1), 1e-5)
    kept = copy.deepcopy(editor.state_dict())
    editor.edit(lm, EDITS).remove()
    assert all(torch.equal(value, kept[name]) for name, value in editor.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_matrices_of_one_shape_share_all_but_scale_and_offset(tiny_lm, kind):
    """Two matrices of the same shape have the same parameters except for scale and offset."""
    lm = tiny_lm(kind)
    editor = mend(lm)
    shapes = {tuple(lm.net.get_submodule(n).weight.shape) for n in editor.names}
    assert len(editor.transforms) == len(shapes) < len(editor.names)
    for name, transform in editor.transforms.items():
        count = editor.transform_of.count(name)
        assert sorted(i for i, n in zip(editor.index, editor.transform_of, strict=True) if n == name) \
            == list(range(count))  # fmt: skip
        assert all(part.shape[0] == count for part in (*transform.scale, *transform.offset))
        for up in transform.up:
            up.data.normal_()
        x, d = torch.randn(2, transform.inputs), torch.randn(2, up.shape[0] - transform.inputs)
        first, second = (torch.cat(transform(x, d, i), -1) for i in (0, 1))
        assert torch.equal(first, second)
        transform.scale[0].data[1] *= 2
        assert not torch.equal(torch.cat(transform(x, d, 1), -1), first)
        assert torch.equal(torch.cat(transform(x, d, 0), -1), first)


def test_which_matrices(tiny_lm):
    lm = tiny_lm("llama")
    every = [n for layer in (0, 1) for n in lm.structure.mlp_names(layer)]
    assert MEND(lm, rank=2).names == every  # the last three blocks, where there are as many
    assert MEND(lm, layers=[1], projections="out", rank=2).names == [lm.structure.out_name(1)]
    assert all(is_linear(lm.net.get_submodule(name)) for name in every)
    with pytest.raises(ValueError, match="layer 2 does not exist: the model has 2 blocks"):
        MEND(lm, layers=[2])


# ---------------------------------------------------------------------------- training


def fit(editor, data_files, folder, **settings):
    data = ZsRE(data_files.zsre, data_files.zsre_train, batch_size=2, val_fraction=0.2)
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, inference_mode=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=folder, limit_val_batches=0, **settings,
    )  # fmt: skip
    trainer.fit(editor, datamodule=data)
    return trainer


def parts(editor):
    """All that a checkpoint keeps of an editor but its counts."""
    kept = {
        n: v.detach().clone() for n, v in editor.state_dict().items() if not n.startswith("lm.")
    }
    return {n: v for n, v in kept.items() if n not in ("training_time", "num_skipped")}


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    tiny_lm, data_files, tmp_path, monkeypatch, broken
):
    editor = mend(tiny_lm("gpt2"), lr=1e-2, warm_up=1)
    base, states, losses = editor.lm.weights_hash, [], MEND._losses

    def second_is_broken(self, *chosen):
        states.append(parts(self))
        edit_loss, kl = losses(self, *chosen)
        if len(states) == 2 and broken == "loss":
            edit_loss = edit_loss * torch.nan
        elif len(states) == 2:  # the loss is finite, its gradient in one parameter is not
            hook = self.log_alpha.register_hook(lambda grad: (hook.remove(), grad * torch.inf)[1])
        return edit_loss, kl

    monkeypatch.setattr(MEND, "_losses", second_is_broken)
    fit(editor, data_files, tmp_path)
    first, second, third, last = *states, parts(editor)
    moved = [any(not torch.equal(a[n], b[n]) for n in a)
             for a, b in ((first, second), (second, third), (third, last))]  # fmt: skip
    assert moved == [True, False, True]
    assert editor.num_skipped == 1
    assert all(torch.isfinite(value).all() for value in last.values())
    del editor.lm.edits.weights_hash
    assert editor.lm.weights_hash == base


def test_training_lowers_the_loss(tiny_lm, data_files, tmp_path):
    editor = mend(tiny_lm("gpt2"), lr=3e-3, lr_alpha=0.1, warm_up=1, alpha=1e-3)
    data = ZsRE(data_files.zsre, data_files.zsre_train)
    cases = data.read(data_files.zsre_train)
    editor.observe(cases)
    editor.trainer = Trainer(accelerator="cpu", logger=False, max_steps=1)
    chosen = editor._choose(cases)
    start = editor._losses(*chosen)[0].item()
    trainer = fit(editor, data_files, tmp_path)
    assert trainer.global_step == 3 and editor.training_seconds > 0
    assert editor._losses(*chosen)[0].item() < start
    assert not any(p.requires_grad or p.grad is not None for p in editor.lm.parameters())


def test_a_case_is_chosen_for_by_run_epoch_and_case_alone(tiny_lm, data_files, monkeypatch):
    editor = mend(tiny_lm("gpt2"))
    data = ZsRE(data_files.zsre, data_files.zsre_train, val_fraction=0)
    cases = data.cases("train")
    editor.trainer = SimpleNamespace(datamodule=data, current_epoch=0)

    def chosen(editor, cases, epoch=0):
        monkeypatch.setattr(editor.trainer, "current_epoch", epoch)
        return list(zip(*editor._choose(cases), strict=True))

    first = chosen(editor, cases)
    torch.manual_seed(9)
    assert chosen(editor, cases) == first and chosen(editor, cases[::-1]) == first[::-1]
    assert chosen(editor, cases[2:3]) == first[2:3]
    assert chosen(editor, cases, 1) != first
    other = mend(editor.lm)  # of a run with another seed
    other.trainer = editor.trainer
    assert chosen(other, cases) != first
    outer = {probe.prompt for _, probe, _ in first}
    assert any(prompt.startswith("Who made") for prompt in outer)  # the edit's own prompt
    assert any(prompt.endswith("the work of whom?") for prompt in outer)  # and rephrasings


def test_a_case_without_anything_that_must_stay_borrows_another_one(tiny_lm):
    editor = mend(tiny_lm("gpt2"))
    data = SimpleNamespace(cases=lambda split: {"train": CASES}[split])
    editor.trainer = SimpleNamespace(datamodule=data, current_epoch=0)
    _, _, local = editor._choose(CASES)
    for case, probe in zip(CASES, local, strict=True):
        (other,) = (c for c in CASES if c.edits[0].text == probe.prompt)
        assert other is not case and probe.target == other.edits[0].target_new
    assert editor._choose(CASES[1:2])[2] == local[1:2]
    data.cases = lambda _: CASES[:1]
    assert editor._choose(CASES[:1])[2][0].prompt == EDITS[0].text  # there is no other


# ---------------------------------------------------------------------------- runs


def config(tiny_folder, data_files, **trainer):
    """A training run of nine steps, in epochs of three, with a validation after every second step."""
    return {
        "model": {"class_path": "MEND", "init_args": {
            "lm": {"name": str(tiny_folder("gpt2"))}, "layers": [1], "rank": 4, "lr": 1e-2, "warm_up": 2,
            "alpha": 1e-2, "num_normalising": 4}},
        "data": {"class_path": "ZsRE", "init_args": {
            "path": data_files.zsre, "train_path": data_files.zsre_train, "batch_size": 2,
            "val_fraction": 0.2}},
        "trainer": {"max_steps": 9, "val_check_interval": 2, "check_val_every_n_epoch": None,
                    "enable_progress_bar": False, "log_every_n_steps": 1, "accelerator": "cpu"} | trainer,
        "wandb": "off",
    }  # fmt: skip


@pytest.fixture
def run_mend(corrigenda, tiny_folder, data_files, tmp_path):
    """``run_mend(folder, *args, **trainer)``: fits MEND as a command."""

    def run(folder, *args, **settings):
        file = tmp_path / "mend.yaml"
        file.write_text(yaml.safe_dump(config(tiny_folder, data_files, **settings)))
        return corrigenda("fit", "-c", file, "--run_dir", folder, *args)

    return run


def load(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def rows(folder):
    """What the report reads: of equal (case, phase, number of edits) the last."""
    lines = map(json.loads, (folder / "cases.jsonl").read_text().splitlines())
    return [line | {"edits": None} for line in lines]


@pytest.mark.parametrize(
    ("where", "call", "kept_every", "kept"),
    [
        ("training_step", 5, 0, 5),
        ("training_step", 5, 60, 4),  # what was evaluated is kept at once
        ("training_step", 8, 60, 8),
        ("on_validation_epoch_start", 1, 0, 3),
        ("on_validation_epoch_start", 3, 0, 7),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    run_mend, tmp_path, monkeypatch, where, call, kept_every, kept
):
    """Stopped in the second or third epoch, in a step or in an evaluation, which is then made."""
    monkeypatch.setattr("corrigenda.pipeline.checkpointing.SAVE_EVERY", kept_every)
    assert run_mend(tmp_path / "whole") == 0
    calls, stopped = iter(range(99)), getattr(MEND, where)

    def stop_once(self, *args):
        if next(calls) == call:
            raise KeyboardInterrupt
        return stopped(self, *args)

    monkeypatch.setattr(MEND, where, stop_once)
    assert run_mend(tmp_path / "cut") == 130
    saved = load(tmp_path / "cut")
    assert saved["global_step"] == kept
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert run_mend(tmp_path / "cut", "--ckpt_path", "last") == 0

    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    assert whole["global_step"] == cut["global_step"] == 9
    for name, value in whole["state_dict"].items():
        assert name == "training_time" or torch.equal(value, cut["state_dict"][name]), name
    for a, b in zip(whole["optimizer_states"][0]["state"].values(),
                    cut["optimizer_states"][0]["state"].values(), strict=True):  # fmt: skip
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert whole["lr_schedulers"] == cut["lr_schedulers"]
    means = [
        json.loads((tmp_path / n / "summary.json").read_text())["means"] for n in ("whole", "cut")
    ]
    assert means[0] == means[1] and means[0]["efficacy/accuracy"] is not None
    assert rows(tmp_path / "cut")[-2:] == rows(tmp_path / "whole")[-2:]
    assert {str(row) for row in rows(tmp_path / "cut")} == {
        str(r) for r in rows(tmp_path / "whole")
    }


@pytest.fixture
def trained(run_mend, tmp_path):
    """The folder of a short finished training run."""
    assert run_mend(tmp_path / "trained", max_steps=3) == 0
    return tmp_path / "trained"


def test_a_checkpoint_holds_the_editor_alone(trained, tiny_folder, tmp_path):
    saved = load(trained)
    assert saved["state_dict"] and not any(name.startswith("lm.") for name in saved["state_dict"])
    assert set(saved["base_model"]) == {"name", "hash"}
    editor = sum(value.numel() for value in saved["state_dict"].values())
    moments = sum(
        v.numel() for s in saved["optimizer_states"][0]["state"].values() for v in s.values()
    )
    size = (trained / "checkpoints" / "last.ckpt").stat().st_size
    assert size < 4 * (editor + moments) + 60_000  # names and numbers around the tensors
    initial = load(trained, "initial")["state_dict"]
    assert not any(initial[f"transforms.128x32.up.{i}"].any() for i in (0, 1))
    assert (initial["transforms.128x32.normalise_x.seen"] > 0).all()


def test_a_checkpoint_edits_as_the_editor_did(
    trained, corrigenda, tiny_folder, data_files, tmp_path
):
    def validate(name, *args):
        status = corrigenda(
            "validate", "-c", trained / "config.yaml", "--run_dir", tmp_path / name, *args
        )
        assert status == 0
        return json.loads((tmp_path / name / "summary.json").read_text())

    last = validate("last", "--ckpt_path", trained / "checkpoints" / "last.ckpt")
    again = validate("again", "--ckpt_path", trained / "checkpoints" / "last.ckpt")
    first = validate("first", "--ckpt_path", trained / "checkpoints" / "initial.ckpt")
    assert last["means"] == again["means"] != first["means"]
    assert last["editor"] == "MEND" and last["budget"]["training_seconds"] > 0
    assert last["budget"]["num_edits"] == 5
    # Which of two folders a run writes into depends on --run_dir alone.
    assert not (trained / "logs" / "version_1").exists() and (tmp_path / "last" / "logs").is_dir()


def test_a_checkpoint_alone_gives_the_trained_editor(trained, data_files):
    """Loaded from Python without any setting, it makes the edits of the module that was trained."""
    path = trained / "checkpoints" / "last.ckpt"
    loaded = MEND.load_from_checkpoint(path)
    saved = load(trained)["state_dict"]
    assert loaded.trained and loaded.names == load(trained)["matrices"]
    for name, tensor in loaded.state_dict().items():
        assert name.startswith("lm.") or torch.equal(tensor, saved[name])
    delta = loaded.propose(loaded.lm, EDITS[:1])
    through = Trained(str(path))
    assert (
        through.stamp(loaded.lm, through.propose(loaded.lm, EDITS[:1]), EDITS).metadata["editor"]
        == "MEND"
    )
    for name, tensor in through.propose(loaded.lm, EDITS[:1]).tensors().items():
        assert torch.equal(tensor, delta.tensors()[name])
    assert MEND.load_from_checkpoint(path, loaded.lm, scale=0.5).scale == 0.5
    with pytest.raises(EditError, match="is of a MEND, which is not a KE"):
        KE.load_from_checkpoint(path)


def test_a_trained_editor_edits_a_stream_as_it_edits_a_batch(trained, corrigenda, tmp_path):
    """With fit and the schedule stream as with validate and its own configuration."""
    path = trained / "checkpoints" / "last.ckpt"
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config |= {
        "model": {
            "class_path": "EditingModule",
            "init_args": {"lm": config["model"]["init_args"]["lm"]},
        }
    }
    config["data"]["init_args"] |= {"batch_size": 5}
    config["trainer"] = {"accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    stream = [
        "--edit.editor",
        "Trained",
        "--edit.editor.checkpoint",
        path,
        "--edit.schedule",
        "stream",
    ]
    assert (
        corrigenda("fit", "-c", tmp_path / "stream.yaml", *stream, "--run_dir", tmp_path / "a") == 0
    )
    batch = ["-c", trained / "config.yaml", "--data.batch_size", "5", "--edit.schedule", "batch"]
    assert corrigenda("validate", *batch, "--ckpt_path", path, "--run_dir", tmp_path / "b") == 0
    one, other = (
        json.loads((tmp_path / run / "summary.json").read_text())["means"] for run in "ab"
    )
    assert {k: one[k] for k in one if k in other} == pytest.approx(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ["--model.lm.name", "{other}"],
            ["trained for", "weights", "use the same --model.lm.name"],
        ),
        (
            ["--model.rank", "5"],
            ["shape (4, 160)", "(5, 160)", "settings that it was trained with"],
        ),
        (
            ["--model.layers", "[0]"],
            ["edits transformer.h.1.mlp.c_fc", "use the same --model.layers"],
        ),
        (["--model.projections", "out"], ["log_alpha has shape (2,)", "(1,) in this MEND"]),
        (["--model", "EditingModule"], ["use the class and the settings"]),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_line(
    trained, corrigenda, tiny_folder, tmp_path, capsys, change, words
):
    change = [word.format(other=tiny_folder("gpt2", seed=1)) for word in change]
    capsys.readouterr()
    status = corrigenda(
        "validate", "-c", trained / "config.yaml", "--run_dir", tmp_path / "other",
        "--ckpt_path", trained / "checkpoints" / "last.ckpt", *change,
    )  # fmt: skip
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize("interrupted", [False, True])
def test_early_stopping_saves_the_best_of_a_sequence(run_mend, tmp_path, monkeypatch, interrupted):
    """Of a scripted sequence of values, of which larger ones are better."""
    script = [0.2, 0.5, 0.4, *([None] if interrupted else []), 0.45, 0.3, 0.9, 0.9]

    def scripted(_):
        value = script.pop(0)
        if value is None:
            raise KeyboardInterrupt
        return {"all/balance": value}

    monkeypatch.setattr(EditingModule, "compute_means", scripted)
    (tmp_path / "stop.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "  - class_path: ModelCheckpoint\n"
        "    init_args: {filename: best, monitor: val/all/balance, mode: max, enable_version_counter: false}\n"
        "  - class_path: EarlyStopping\n"
        "    init_args: {monitor: val/all/balance, mode: max, patience: 3}\n"
    )
    folder = tmp_path / "run"
    rest, settings = ["-c", tmp_path / "stop.yaml"], {"max_steps": 20, "val_check_interval": 1}
    if interrupted:
        assert run_mend(folder, *rest, **settings) == 130
        rest += ["--ckpt_path", "last"]
    assert run_mend(folder, *rest, **settings) == 0
    assert load(folder, "best")["global_step"] == 2
    assert load(folder)["global_step"] == 5  # three validations without a better one
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["means"] == {"all/balance": 0.3}


def test_a_delta_of_mend_is_a_file_like_any_other(trained, tiny_lm):
    delta = Delta.load(next((trained / "edits").glob("*.safetensors")))
    assert delta.metadata["editor"] == "MEND"
    lm = tiny_lm("gpt2")
    WeightPatch(lm, delta).remove()
