"""KE: its equations on tiny models, the constraint of its training, and that training learns."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from corrigenda.datamodules.records import Edit
from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.structure import to_storage
from tests.samples import EDITS, FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def ke(lm, **settings):
    return KE(lm, **({"layers": [0, 1], "hidden": 8, "condition": 12} | settings))


def gradients(lm, edit, names):
    """Autograd's gradients in [out, in] of the mean token NLL, on an ordinary copy."""
    net = copy.deepcopy(lm.net).requires_grad_(True)
    ids = torch.tensor(lm.tokens.encode([f"{edit.text} {edit.target_new}"]))
    start = len(lm.tokens.encode([edit.text])[0])
    logits = net(ids).logits[0, start - 1 : -1].float()
    nn.functional.cross_entropy(logits, ids[0, start:]).backward()
    modules = {name: net.get_submodule(name) for name in names}
    return {name: to_storage(m, m.weight.grad).clone() for name, m in modules.items()}


def conditions(editor, edits):
    rows = editor.lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
    return editor.condition(editor.lm.reuse.tail(rows, editor.lowest_layer), rows)


def proposed(editor, groups):
    with editing_mode():
        return editor.propose_each(editor.lm, groups)


def close(actual, expected, rtol=1e-4):
    bound = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0, check_dtype=False)


@FAMILIES
def test_the_factors_are_the_dense_formula(tiny_lm, kind):
    """sigma(eta) * s_max * (G o A + B), entry by entry."""
    lm = tiny_lm(kind)
    editor = ke(lm, max_scale=3.0)
    with torch.no_grad():
        condition_BC = conditions(editor, EDITS)
    for e, delta in enumerate(proposed(editor, [[edit] for edit in EDITS])):
        wanted = gradients(lm, EDITS[e], editor.names)
        assert set(delta.updates) == {f"{name}.weight" for name in editor.names}
        for head, name in zip(editor.heads, editor.names, strict=True):
            a_col, a_row, b_col, b_row, eta = (
                part.detach()[0] for part in head(condition_BC[e : e + 1])
            )
            dense = wanted[name] * torch.outer(a_row, a_col) + torch.outer(b_row, b_col)
            close(delta.dense(f"{name}.weight"), 3.0 * eta.sigmoid() * dense)
            assert a_row.sum().item() == pytest.approx(1) and b_row.min() > 0


def fixed(head, eta, a_col, b_col):
    """A head that says the same whatever it reads; rows are uniform."""
    last = head.net[-1]
    last.parametrizations.weight.original0.data.zero_()
    inputs, outputs = head.widths[:2]
    parts = [torch.full((inputs,), a_col), torch.zeros(outputs), torch.full((inputs,), b_col),
             torch.zeros(outputs), torch.tensor([eta])]  # fmt: skip
    last.bias.data = torch.cat(parts)


def test_a_closed_gate_changes_nothing_and_a_constant_mask_is_a_gradient_step(tiny_lm):
    """A closed gate gives no update; a constant mask without the term B gives a scaled gradient."""
    lm = tiny_lm("gpt2")
    editor = ke(lm)
    for head in editor.heads:
        fixed(head, -1e9, 1.0, 1.0)
    (closed,) = proposed(editor, [EDITS[:1]])
    assert not any(closed.dense(name).any() for name in closed.updates)
    for head in editor.heads:
        fixed(head, 0.0, -0.3, 0.0)
    (step,) = proposed(editor, [EDITS[:1]])
    for name, gradient in gradients(lm, EDITS[0], editor.names).items():
        close(step.dense(f"{name}.weight"), 0.5 * -0.3 / len(gradient) * gradient)
    for head in editor.heads:
        fixed(head, 0.0, 0.0, 2.0)
    (free,) = proposed(editor, [EDITS[:1]])  # without any gradient there is still B
    for name in free.updates:
        dense = free.dense(name)
        close(dense, torch.full_like(dense, 0.5 * 2.0 / len(dense)))


def test_the_condition_reads_prompt_target_and_old_answer(tiny_lm):
    lm = tiny_lm("llama")
    editor = ke(lm)
    texts = []
    embed = lm.net.get_input_embeddings()
    handle = embed.register_forward_hook(
        lambda _m, args, _o: texts.append(args[0]) if args[0].dim() == 1 else None
    )
    with torch.no_grad():
        together = conditions(editor, EDITS)
    handle.remove()
    for edit, ids in zip(EDITS, texts, strict=True):
        greedy = lm.score([edit.text], [edit.target_new]).greedy_BM[0]
        assert torch.equal(ids[: len(greedy)], greedy)
        assert lm.tokens.decode(ids[len(greedy) :]) == f" >>  {edit.target_new} || {edit.text}"
    with torch.no_grad():  # padding and neighbours have no part in it
        alone = torch.cat([conditions(editor, [edit]) for edit in EDITS])
        other = conditions(editor, [Edit(EDITS[0].prompt, EDITS[0].subject, "Zenda")])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other[0], alone[0], atol=1e-3)


@FAMILIES
def test_side_by_side_is_one_at_a_time_and_together_is_the_sum(tiny_lm, kind):
    lm = tiny_lm(kind)
    editor = ke(lm)
    each = proposed(editor, [[edit] for edit in EDITS])
    alone = [proposed(editor, [[edit]])[0] for edit in EDITS]
    with editing_mode():
        whole = editor.propose(lm, EDITS)
    for name in whole.updates:
        for a, b in zip(each, alone, strict=True):
            close(a.dense(name), b.dense(name))
        close(whole.dense(name), sum(delta.dense(name) for delta in each))
    texts = [e.text for e in EDITS], [e.target_new for e in EDITS]
    beside = lm.score(*texts, each, [0, 1, 2]).logprob_BM
    weights = {name: p.clone() for name, p in lm.net.named_parameters()}
    for e, edit in enumerate(EDITS):
        handle = editor.edit(lm, [edit])
        torch.testing.assert_close(lm.score(*texts).logprob_BM[e], beside[e], atol=1e-4, rtol=0)
        handle.remove()
    assert all(torch.equal(p, weights[name]) for name, p in lm.net.named_parameters())


# ---------------------------------------------------------------------------- training


def test_alpha_rises_while_the_drift_is_above_the_margin(tiny_lm, monkeypatch):
    """The multiplier alpha stays at least 0 and rises while the drift exceeds the margin."""
    editor = ke(tiny_lm("gpt2"), margin=0.5, lr_alpha=0.2)
    editor.trainer = Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(editor, "log", lambda *_: None)
    seen = []
    for kl in (1.0, 2.0, 0.5, 0.0, torch.nan, 0.0, *[0.0] * 20):
        loss = editor.objective(torch.tensor(3.0), torch.tensor(kl))
        if kl == kl:
            expected = 3.0 + editor.multiplier.item() * (kl - 0.5)
            assert loss.item() == pytest.approx(expected)
        editor.on_before_optimizer_step(None)
        seen.append(editor.multiplier.item())
    assert seen[:6] == pytest.approx([1.1, 1.4, 1.4, 1.3, 1.3, 1.2])
    assert seen[-1] == 0.0 and min(seen) >= 0


def test_alpha_goes_by_all_batches_of_a_step(tiny_lm, monkeypatch):
    editor = ke(tiny_lm("gpt2"), margin=0.5, lr_alpha=0.2)
    editor.trainer = Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(editor, "log", lambda *_: None)
    for kl in (1.0, 3.0):
        editor.objective(torch.tensor(3.0), torch.tensor(kl))
    editor.on_before_optimizer_step(None)
    assert editor.multiplier.item() == pytest.approx(1 + 0.2 * 1.5)


def test_the_margin_shrinks_when_edits_are_made(tiny_lm, monkeypatch):
    editor = ke(tiny_lm("gpt2"), margin=1.0, least_margin=0.6)
    monkeypatch.setattr(editor, "log", lambda *_, **__: None)
    monkeypatch.setattr(KE, "global_step", 1)
    script = iter([0.95, 0.5, 0.91, 1.0, 1.0])
    monkeypatch.setattr(editor, "compute_means", lambda: {"efficacy/exact": next(script)})
    margins = []
    for _ in range(5):
        editor.on_validation_epoch_end()
        margins.append(editor.margin.item())
    assert margins == pytest.approx([0.8, 0.8, 0.64, 0.6, 0.6])


def test_training_lowers_the_loss(tiny_lm, data_files, tmp_path):
    lm = tiny_lm("llama")
    base = lm.weights_hash
    editor = ke(lm, hidden=16, lr=3e-3, warm_up=1, margin=0.05)
    data = ZsRE(data_files.zsre, data_files.zsre_train, batch_size=4, val_fraction=0.2)
    cases = data.read(data_files.zsre_train)
    editor.trainer = Trainer(accelerator="cpu", logger=False, max_steps=1)
    chosen = editor._choose(cases)
    start = editor._losses(*chosen)[0].item()
    trainer = Trainer(
        accelerator="cpu", max_steps=30, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(editor, datamodule=data)
    assert editor._losses(*chosen)[0].item() < 0.9 * start
    assert editor.training_seconds > 0 and editor.num_skipped == 0
    assert editor.multiplier != 1
    del lm.edits.weights_hash
    assert lm.weights_hash == base
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())
    delta = editor.edit(lm, EDITS[:1]).delta
    delta.save(tmp_path / "edit.safetensors")
    assert Delta.load(tmp_path / "edit.safetensors").metadata["editor"] == "KE"
