"""MALMEN: its regression, the pulled-back gradients against autograd, and editing many facts together."""

import pytest
import torch
from lightning.pytorch import Trainer

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editors.malmen import MALMEN, Ridge
from corrigenda.modules.model.delta import Delta, LowRank
from tests import samples
from tests.samples import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

EDITS = [
    *samples.EDITS,
    Edit("{} is in the town of", "The Tin Owl", "a"),
    Edit("Who made {}?", "the ice", "Otto Vane of Port Larch"),
]
CASES = [EditCase(str(i), (edit,)) for i, edit in enumerate(EDITS)]
OUTER = [Probe(f"Tell me, {edit.text}", edit.target_new) for edit in EDITS]
LOCAL = [*samples.LOCAL, Probe("He said that the", "war was over"), Probe("It", "is")]


def malmen(lm, **settings):
    editor = MALMEN(lm, **({"layers": [0, 1], "rank": 4, "eta": 1e-2, "micro_batch": 2} | settings))
    generator = torch.Generator().manual_seed(5)
    for parameter in editor.network.parameters():  # no longer as at the start: every part counts
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    editor.observe(CASES)
    return editor


def proposed(editor, groups):
    with editing_mode():
        return editor.propose_each(editor.lm, groups)


def close(actual, expected, rtol=1e-4):
    bound = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0, check_dtype=False)


# ---------------------------------------------------------------------------- regression


@pytest.fixture
def problem():
    keys, values = torch.randn(7, 12).double(), torch.randn(7, 5).double()
    return keys, values, torch.tensor(0.4).double()


def test_the_dual_is_the_ridge_solution(problem):
    """D K' (K K' + lambda I)^-1, and no change of it fits better for its size."""
    keys, values, log_lambda = problem
    strength = log_lambda.exp()
    delta = Ridge(keys, log_lambda).solve(values).T @ keys
    primal = values.T @ keys @ torch.linalg.inv(keys.T @ keys + strength * torch.eye(12).double())
    torch.testing.assert_close(delta, primal, rtol=0, atol=1e-12)

    def cost(d):
        return (d @ keys.T - values.T).square().sum() + strength * d.square().sum()

    for _ in range(5):
        change = 1e-2 * torch.randn(5, 12).double()
        assert cost(delta + change) > cost(delta) < cost(delta - change)


def test_one_key_has_a_closed_form(problem):
    """One key gives Delta k = d k'k / (k'k + lambda), which tends to zero as lambda grows."""
    keys, values, log_lambda = problem
    key, value = keys[:1], values[:1]
    norm = (key @ key.T).item()
    delta = Ridge(key, log_lambda).solve(value).T @ key
    wanted = value[0] * norm / (norm + log_lambda.exp())
    torch.testing.assert_close(delta @ key[0], wanted, rtol=0, atol=1e-12)
    none = Ridge(keys, torch.tensor(60.0)).solve(values).T @ keys
    assert none.abs().max() < 1e-20


@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_gradient_through_the_solution_is_that_of_autograd(count):
    """In float64, with fewer and with more tokens than the width of the keys."""
    keys, values = torch.randn(count, 12).double(), torch.randn(count, 5).double()
    log_lambda = torch.tensor(-0.3).double().requires_grad_()
    values.requires_grad_()
    gradient = torch.randn(5, 12).double()
    inverse = torch.linalg.inv(keys.T @ keys + log_lambda.exp() * torch.eye(12).double())
    wanted = torch.autograd.grad(
        (gradient * (values.T @ keys @ inverse)).sum(), [values, log_lambda]
    )
    ridge = Ridge(keys, log_lambda)
    found = ridge.pull_back(gradient, ridge.solve(values))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------- training


@FAMILIES
def test_pulled_back_losses_are_those_of_plain_autograd(tiny_lm, kind):
    """Values and every gradient, against one graph through regression and language model."""
    lm = tiny_lm(kind)
    editor = malmen(lm)
    losses = editor._losses(EDITS, OUTER, LOCAL)

    rows = lm.tokens.rows([e.text for e in EDITS], [e.target_new for e in EDITS])
    pairs, _ = editor.keys_and_gradients(lm.reuse.tail(rows, 0), rows)
    updates = {}
    for i, (name, (keys, gradients)) in enumerate(pairs.items()):
        gram = keys.T @ keys + editor.log_lambda[i].exp() * torch.eye(keys.shape[1])
        updates[f"{name}.weight"] = torch.linalg.solve(
            gram, keys.T @ editor.values(keys, gradients, i)
        ).T
    delta = Delta(updates)

    def logprobs(probes, edited):
        found = []
        for probe in probes:
            some = lm.tokens.rows([probe.prompt], [probe.target])
            with lm.edits.side_by_side([delta] if edited else None, None):
                found.append((some, lm.net(some.ids_BT).logits[0].log_softmax(-1)))
        return found

    nlls = []
    for some, logprob in logprobs(OUTER, True):
        start = int(some.start_B)
        nlls.append(-logprob[start - 1 : -1].gather(1, some.ids_BT[0, start:, None]).mean())
    kls = [
        (base.exp() * (base - now)).sum(-1).mean()
        for (_, base), (_, now) in zip(logprobs(LOCAL, False), logprobs(LOCAL, True), strict=True)
    ]
    plain = torch.stack(nlls).mean(), torch.stack(kls).mean()
    parameters = [p for p in editor.parameters() if p.requires_grad]
    for found, wanted in zip(losses, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        mine = torch.autograd.grad(found, parameters, retain_graph=True)
        its = torch.autograd.grad(wanted, parameters, retain_graph=True)
        for a, b in zip(mine, its, strict=True):
            close(a, b, 1e-3)
    assert min(loss.item() for loss in losses) > 1e-4


def test_results_do_not_depend_on_the_micro_batch_size(tiny_lm):
    """Neither the update nor the gradients depend on it, also if it does not divide the number of edits."""
    lm = tiny_lm("llama")
    editor, found = malmen(lm), []
    for size in (1, 3, 99):
        editor.micro_batch = size
        losses = editor._losses(EDITS, OUTER, LOCAL)
        parameters = [p for p in editor.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(losses), parameters)
        with editing_mode():
            delta = editor.propose(lm, EDITS)
        found.append([*losses, *gradients, *(delta.dense(name) for name in delta.updates)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(a, b, 1e-4)


def test_training_lowers_the_loss(tiny_lm, data_files, tmp_path):
    lm = tiny_lm("gpt2")
    base = lm.weights_hash
    editor = MALMEN(lm, layers=[0, 1], rank=8, eta=1e-3, lr=3e-3, lr_scales=0.1, warm_up=1,
                    num_normalising=8, micro_batch=3)  # fmt: skip
    data = ZsRE(data_files.zsre, data_files.zsre_train, batch_size=4, val_fraction=0.2)
    cases = data.read(data_files.zsre_train)
    editor.trainer = Trainer(accelerator="cpu", logger=False, max_steps=1)
    chosen = editor._choose(cases)
    trainer = Trainer(
        accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(editor, datamodule=data)
    initial = torch.load(tmp_path / "checkpoints" / "initial.ckpt", weights_only=True)
    trained = editor._losses(*chosen)[0].item()
    editor.load_state_dict(initial["state_dict"], strict=False)
    assert trained < 0.9 * editor._losses(*chosen)[0].item()
    assert editor.num_skipped == 0
    del lm.edits.weights_hash
    assert lm.weights_hash == base
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())


# ---------------------------------------------------------------------------- editing


@FAMILIES
def test_side_by_side_is_one_at_a_time(tiny_lm, kind):
    lm = tiny_lm(kind)
    editor = malmen(lm)
    each = proposed(editor, [[edit] for edit in EDITS])
    alone = [proposed(editor, [[edit]])[0] for edit in EDITS]
    texts = [e.text for e in EDITS], [e.target_new for e in EDITS]
    beside = lm.score(*texts, each, list(range(len(EDITS)))).logprob_BM
    plain = lm.score(*texts).logprob_BM
    weights = {name: p.clone() for name, p in lm.net.named_parameters()}
    for e, edit in enumerate(EDITS):
        for name in each[e].updates:
            close(each[e].dense(name), alone[e].dense(name))
        handle = editor.edit(lm, [edit])
        now = lm.score(*texts).logprob_BM[e]
        torch.testing.assert_close(now, beside[e], atol=1e-4, rtol=0)
        assert not torch.allclose(now, plain[e], atol=1e-3)
        handle.remove()
    assert all(torch.equal(p, weights[name]) for name, p in lm.net.named_parameters())


def test_together_is_the_regression_over_all_their_tokens(tiny_lm):
    """Not the sum of single updates; and dense where there are more tokens than the matrix has rows."""
    lm = tiny_lm("gpt2")
    editor = malmen(lm)
    with editing_mode():
        few, many = editor.propose(lm, EDITS[:2]), editor.propose(lm, EDITS * 4)
    rows = lm.tokens.rows([e.text for e in EDITS[:2]], [e.target_new for e in EDITS[:2]])
    pairs, row_n = editor.keys_and_gradients(lm.reuse.tail(rows, 0), rows)
    assert row_n.bincount().tolist() == (rows.length_B - rows.start_B).tolist()
    singles = proposed(editor, [[edit] for edit in EDITS[:2]])
    for i, (name, (keys, gradients)) in enumerate(pairs.items()):
        values = editor.values(keys, gradients, i).detach().double()
        keys = keys.double()
        gram = keys.T @ keys + editor.log_lambda[i].exp().double() * torch.eye(keys.shape[1])
        wanted = torch.linalg.solve(gram, keys.T @ values).T.detach()
        close(few.dense(f"{name}.weight"), wanted)
        total = sum(delta.dense(f"{name}.weight") for delta in singles)
        assert (total - wanted).norm() > 1e-3 * wanted.norm()
        low, dense = few.updates[f"{name}.weight"], many.updates[f"{name}.weight"]
        assert isinstance(low, LowRank) and low.right_rI.shape[0] == len(keys)
        assert isinstance(dense, torch.Tensor) and dense.shape == wanted.shape
