"""ROME: its mathematics, its search for values, and one fact changed in a small model that knows twenty."""

import logging
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from corrigenda.datamodules.facts import Facts
from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors import key_value, rome, value_search
from corrigenda.modules.editors.key_value import (
    KeyRows,
    keys_and_values,
    sample_contexts,
    solve_update,
)
from corrigenda.modules.editors.rome import ROME, _rank_one
from corrigenda.modules.editors.value_search import searched_together
from corrigenda.modules.evaluation.module import Conditions, EditingModule
from corrigenda.modules.model.hooks import capture
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from tests.samples import LOCATED_EDITS as EDITS
from tests.samples import models_by_family, without_edits_afterwards

CONTEXTS = ["", "It was said. ", "He works in the town. "]
TEXT = [
    f"{subject} {verb} the {thing} {when}."
    for subject in ("The town", "He", "A writer", "São Paulo", "Zorbania")
    for verb in ("is on", "was not", "said that", "has")
    for thing in ("ice", "table", "capital", "story of the year")
    for when in ("in 1984", "and so", "where it was")
]


# --- the solution ---


@pytest.fixture
def problem():
    """A second moment's factor, a direction, a key and a residual, in float64."""
    keys = torch.randn(200, 12).double()
    factor = torch.linalg.cholesky(keys.T @ keys / 200)
    return factor, torch.randn(12).double(), torch.randn(12).double(), torch.randn(5).double()


def test_the_rank_one_update_satisfies_its_constraint(problem):
    """W' k1 = v*; the direction is C^-1 k*, inputs orthogonal to it are untouched, and the scale of C cancels."""
    factor, mean, bare, residual = problem
    change = _rank_one(factor, mean, bare, residual).dense()
    torch.testing.assert_close(change @ bare, residual, rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(change) == 1
    u = torch.linalg.solve(factor @ factor.T, mean)
    torch.testing.assert_close(
        change / change[0, 0], torch.outer(residual, u) / (residual[0] * u[0])
    )
    x = torch.randn(12).double()
    x -= u * (x @ u) / (u @ u)
    assert (change @ x).abs().max() < 1e-10 * change.norm()
    for c in (1e-3, 7.0):
        scaled = _rank_one(factor * c**0.5, mean, bare, residual).dense()
        torch.testing.assert_close(scaled, change, rtol=1e-9, atol=0)


def test_with_one_key_the_update_changes_other_text_least(problem):
    """Any other update with the same output at the key has a larger tr(D C D')."""
    factor, _, bare, residual = problem
    moment = factor @ factor.T
    change = _rank_one(factor, bare, bare, residual).dense()
    torch.testing.assert_close(change @ bare, residual, rtol=0, atol=1e-10)

    def moved(d):
        return torch.einsum("df,fg,dg->", d, moment, d)

    for _ in range(5):
        other = 0.1 * torch.randn(5, 12).double()
        other -= torch.outer(other @ bare, bare) / (bare @ bare)
        assert moved(change + other) > moved(change) < moved(change - other)


@pytest.mark.parametrize("ridge", [0.0, 3.0])
def test_the_solver_agrees_with_the_primal_form(problem, ridge):
    """R K' (ridge A + K K')^-1, and the equality constraint if the ridge is zero."""
    factor, keys, residual = problem[0], torch.randn(12, 3).double(), torch.randn(5, 3).double()
    left, right = solve_update(factor, keys, residual, ridge)
    change = left @ right
    if ridge:
        inverse = torch.linalg.inv(ridge * factor @ factor.T + keys @ keys.T)
        torch.testing.assert_close(change, residual @ keys.T @ inverse, rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(change @ keys, residual, rtol=0, atol=1e-9)
    assert left.dtype == right.dtype == torch.float64


# --- rows, keys and values ---


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    return models_by_family(tiny_lm, num_hidden_layers=3)


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon"])
def lm(request, loaded):
    """A transposed, a gated, a flattened and a parallel MLP."""
    yield from without_edits_afterwards(loaded(request.param))


@pytest.fixture
def gpt2(loaded):
    yield from without_edits_afterwards(loaded("gpt2"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return Corpus(str(path), tokens=2000)


@pytest.fixture
def make(corpus):
    """A ROME with few steps and short contexts."""

    def editor(**changes):
        settings = {"layer": 0, "steps": 5, "contexts": [(3, 2), (5, 1)], "corpus": corpus}
        return ROME(**(settings | changes))

    return editor


@pytest.fixture
def searched(monkeypatch):
    """What every search for values was given and found."""
    calls = []

    def spy(lm, key_rows, tail, site, v0, settings, on_step=None):
        values = value_search.optimise_values(lm, key_rows, tail, site, v0, settings, on_step)
        calls.append((v0, values))
        return values

    monkeypatch.setattr(rome, "optimise_values", spy)
    return calls


def at_lookup(lm, edit, layer, context=""):
    """(key, output) of the output projection at the subject's last token, from one plain forward."""
    name = lm.structure.out_name(layer)
    ids = torch.tensor(lm.tokens.encode([context + edit.text]))
    with torch.no_grad(), capture({name: lm.net.get_submodule(name)}, stop=True) as seen:
        lm.net(ids)
    return [
        t.view(1, ids.shape[1], -1)[0, lm.tokens.subject_end(edit, context)] for t in seen[name]
    ]


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_and_values_are_those_of_plain_forwards(lm, layer):
    key_rows = KeyRows.of(lm, EDITS, CONTEXTS)
    keys, values = keys_and_values(lm, key_rows, key_rows.tail(lm, layer), layer)
    assert keys.shape == (3, 3, lm.structure.inner_width) and values.shape == (3, 3, 32)
    for n, edit in enumerate(EDITS):
        for q, context in enumerate(CONTEXTS):
            key, value = at_lookup(lm, edit, layer, context)
            torch.testing.assert_close(keys[n, q], key, rtol=0, atol=1e-5)
            torch.testing.assert_close(values[n, q], value, rtol=0, atol=1e-5)


def test_text_after_the_subject_changes_neither_key_nor_value(lm):
    """The network is causal."""
    others = [Edit(edit.prompt + " not, and", edit.subject, "rain") for edit in EDITS]
    pairs = []
    for edits in (EDITS, others):
        key_rows = KeyRows.of(lm, edits, CONTEXTS)
        pairs.append(keys_and_values(lm, key_rows, key_rows.tail(lm, 1), 1))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rows_of_some_edits(gpt2):
    key_rows = KeyRows.of(gpt2, EDITS, CONTEXTS)
    assert key_rows.owner_R.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
    part, keep = key_rows.select(torch.tensor([0, 2]))
    assert keep.tolist() == [0, 1, 2, 6, 7, 8, 9, 11]
    assert part.owner_R.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    again = KeyRows.of(gpt2, [EDITS[0], EDITS[2]], CONTEXTS)
    assert torch.equal(part.rows.ids_BT, again.rows.ids_BT)
    assert torch.equal(part.lookup_R, again.lookup_R)
    essence = again.rows.ids_BT[-1][: again.rows.length_B[-1]]
    assert gpt2.tokens.decode(essence) == "Old Humbria is a"


# --- contexts ---


def test_contexts_are_sampled_once_from_the_unedited_model(loaded, make):
    """One bare prompt and 20 others, without braces; the same for a seed, whatever edits are active."""
    lm = loaded("llama")
    default = ROME(layer=0).lengths
    state = torch.get_rng_state()
    contexts = sample_contexts(lm, default, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(contexts) == 21 and contexts[0] == "" and "" not in contexts[1:]
    assert all(text.endswith(". ") for text in contexts[1:])
    assert not any(brace in text for text in contexts for brace in "{}\n")
    assert all(
        text.startswith(s) for text, s in zip(contexts[1:], key_value.STARTS * 4, strict=True)
    )
    patch = WeightPatch(lm, make().propose(lm, EDITS[:1]))
    assert sample_contexts(lm, default, seed=1) == contexts
    patch.remove()
    assert sample_contexts(lm, default, seed=2) != contexts


def test_contexts_have_their_length_and_number():
    """Openings in turn, without braces, line breaks and what ends a sentence; the opening is one token."""
    calls = []

    def generate(prompts, tokens, top_k):
        calls.append((prompts, tokens, top_k))
        return [f" {{a}}\n b{n}.. " for n in range(len(prompts))]

    tokens = SimpleNamespace(as_written=nullcontext)
    lm = SimpleNamespace(pristine=nullcontext, generate=generate, tokens=tokens)
    contexts = sample_contexts(lm, [(10, 2), (3, 6)])
    starts = ["The", "Therefore", "Because", "I", "You", "The"]
    assert calls == [(starts[:2], 9, 5), (starts, 2, 5)]
    expected = [
        f"{start} a b{n}. " for part in (starts[:2], starts) for n, start in enumerate(part)
    ]
    assert contexts == ["", *expected]


def test_preparing_again_does_nothing(gpt2, make, monkeypatch):
    editor = make()
    editor.prepare(gpt2)
    contexts, factor = editor._contexts, editor._factor_FF
    monkeypatch.setattr(value_search, "sample_contexts", None)
    monkeypatch.setattr(rome, "Moments", None)
    editor.prepare(gpt2)
    assert editor._contexts is contexts and editor._factor_FF is factor
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        make(layer=3).prepare(gpt2)


# --- the search for a value ---


def test_one_step_evaluates_the_unchanged_model(lm, make, searched):
    """With one step delta stays 0, and the loss is the NLL of the model itself."""
    editor = make(steps=1)
    delta = editor.propose(lm, EDITS[:1])
    ((_, values),) = searched
    assert not values.delta_ND.any() and values.iterations_N.tolist() == [1]
    prompts = [context + EDITS[0].text for context in editor._contexts]
    scores = lm.score(prompts, [EDITS[0].target_new] * len(prompts))
    nll = -(scores.logprob_BM * scores.mask_BM).sum(1) / scores.mask_BM.sum(1)
    torch.testing.assert_close(values.nll_N[0], nll.mean(), rtol=0, atol=1e-5)
    assert torch.equal(values.nll_N, values.loss_N)
    plain = lm.score(prompts, ["e"] * len(prompts)).logprob_BM
    patch = WeightPatch(lm, delta)
    assert torch.equal(lm.score(prompts, ["e"] * len(prompts)).logprob_BM, plain)
    patch.remove()


def test_the_loss_is_what_the_docstring_says(gpt2, make, searched):
    """Recomputed from the edited outputs alone: NLL over contexts, KL after the essence, decay of the norm."""
    editor = make(steps=4, kl_weight=0.7, weight_decay=0.3, clamp_norm=50.0)
    editor.propose(gpt2, EDITS[:1])
    ((v0, values),) = searched
    short = make(steps=3, kl_weight=0.7, weight_decay=0.3, clamp_norm=50.0)
    short.propose(gpt2, EDITS[:1])
    step = searched[1][1].delta_ND[
        0
    ]  # after two updates; the loss there is that of a third evaluation
    site = gpt2.net.get_submodule(gpt2.structure.out_name(0))

    def logprobs(text, at, change):
        def add(_module, _args, out):
            return out.index_add(1, torch.tensor([at]), change.view(1, 1, -1))

        handle = site.register_forward_hook(add)
        with torch.no_grad():
            out = gpt2.net(torch.tensor(gpt2.tokens.encode([text]))).logits[0].log_softmax(-1)
        handle.remove()
        return out

    edit, nlls = EDITS[0], []
    for context in short._contexts:
        rows = gpt2.tokens.rows([context + edit.text], [edit.target_new])
        row, position = rows.answer_positions()
        out = logprobs(
            f"{context}{edit.text} {edit.target_new}", gpt2.tokens.subject_end(edit, context), step
        )
        nlls.append(-out[position].gather(1, rows.ids_BT[row, position + 1][:, None]).mean())
    essence = Edit("{} is a", edit.subject, "x")
    new, old = (
        logprobs(essence.text, gpt2.tokens.subject_end(essence), d)[-1] for d in (step, 0 * step)
    )
    kl = (new.exp() * (new - old)).sum()
    nll = torch.stack(nlls).mean()
    loss = nll + 0.7 * kl + 0.3 * step.norm() / v0.norm() ** 2
    torch.testing.assert_close(searched[1][1].nll_N[0], nll, rtol=0, atol=1e-4)
    torch.testing.assert_close(searched[1][1].loss_N[0], loss, rtol=0, atol=1e-4)
    assert values.iterations_N.tolist() == [4]


def test_the_change_is_clamped_after_every_step(lm, make, searched):
    """The norm of delta is at most clamp_norm |v0|, whatever the number of steps."""
    for steps in (2, 3, 6):
        make(steps=steps, clamp_norm=0.1).propose(lm, EDITS[:1])
        v0, values = searched[-1]
        assert values.delta_ND.norm() <= 0.1 * v0.norm() * (1 + 1e-6)
    first_step = searched[0][1].delta_ND
    torch.testing.assert_close(first_step.norm(), 0.1 * v0.norm())


def test_an_unclamped_search_lowers_the_loss(lm, make, searched):
    """The NLL at the end is at most that at the start."""
    free = {"layer": 1, "clamp_norm": 100.0, "lr": 0.2, "kl_weight": 0.0, "weight_decay": 0.0}
    for steps in (1, 20):
        make(steps=steps, **free).propose(lm, [Edit("They go to {}", "Old Humbria", "rain")])
    assert searched[1][1].nll_N < 0.8 * searched[0][1].nll_N


@pytest.mark.parametrize("parallel", [8, 2])
def test_values_do_not_depend_on_the_edits_optimised_together(parallel, lm, make):
    """Also if they stop at different steps, one of them immediately."""
    groups = [[edit] for edit in EDITS]
    losses = [
        delta.metadata["notes"][0]["loss"] for delta in make(steps=1).propose_each(lm, groups)
    ]
    together, apart = make(lr=0.2, steps=7, parallel=parallel), make(lr=0.2, steps=7)
    for editor in (together, apart):
        editor.settings = replace(editor.settings, stop_loss=min(losses) + 1e-3)
    iterations = []
    for edit, a in zip(EDITS, together.propose_each(lm, groups), strict=True):
        b = apart.propose(lm, [edit])
        (name,) = a.updates
        key = at_lookup(lm, edit, 0)[0].double()
        torch.testing.assert_close(a.dense(name) @ key, b.dense(name) @ key, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.dense(name), b.dense(name), rtol=1e-3, atol=1e-5)
        notes, expected = a.metadata["notes"][0], b.metadata["notes"][0]
        assert notes["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert notes["iterations"] == expected["iterations"]
        iterations.append(notes["iterations"])
    assert min(iterations) == 1 < max(iterations)


@pytest.mark.parametrize("worth", [1, 10**9])
def test_the_essence_may_run_apart(worth, lm, make, monkeypatch):
    """Where it is longer than what follows the subject, it would bring padding to all other rows."""
    edit = Edit("Yesterday they went to {}", "Old Humbria", "rain")
    plain = make(lr=0.2, steps=3, essence="{} is a kind of thing").propose(lm, [edit])
    monkeypatch.setattr("corrigenda.modules.editors.value_search.WORTH_A_PASS", worth)
    (name,) = plain.updates
    other = make(lr=0.2, steps=3, essence="{} is a kind of thing").propose(lm, [edit])
    torch.testing.assert_close(other.dense(name), plain.dense(name), rtol=1e-3, atol=1e-5)


def test_what_runs_together_is_of_about_the_same_length(lm):
    """Counted from the subject on, whatever stands before it."""
    early = Edit("{} is a place that people go to", "Humbria", "rain")
    late = [Edit(f"{before} they go to {{}}", "Humbria", "rain") for before in ("Today", "As told")]
    assert searched_together(lm, [late[0], early, late[1]], 8) == [[0, 2], [1]]
    assert searched_together(lm, [early] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert searched_together(lm, [], 8) == []


def test_the_frozen_prefix_changes_nothing(tiny_folder, gpt2, make):
    plain = LanguageModel(str(tiny_folder("gpt2", num_hidden_layers=3)), reuse_prefix=False)
    a, b = (make(layer=1).propose(lm, EDITS[:1]) for lm in (gpt2, plain))
    (name,) = a.updates
    torch.testing.assert_close(a.dense(name), b.dense(name), rtol=1e-3, atol=1e-5)


def test_half_precision_finds_nearly_the_same(gpt2, make, searched):
    for precision in ("float32", "bfloat16"):
        make(precision=precision, steps=3).propose(gpt2, EDITS[:1])
    (_, exact), (_, fast) = searched
    assert fast.delta_ND.dtype == torch.float32
    torch.testing.assert_close(fast.nll_N, exact.nll_N, rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(fast.delta_ND, exact.delta_ND).item() > 0.9


# --- the edit ---


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("limit", [1e9, 0.0], ids=["mean key", "bare key"])
def test_the_bare_prompt_gets_the_value(layer, limit, lm, make, searched, caplog):
    """After the edit the projection's output at k1 is v*, and the update has rank one."""
    editor = make(layer=layer, steps=8, largest_change=limit)
    edit = EDITS[0]
    key, before = at_lookup(lm, edit, layer)
    mean = torch.stack([at_lookup(lm, edit, layer, c)[0] for c in make_contexts(editor, lm)]).mean(
        0
    )
    with caplog.at_level(logging.WARNING):
        handle = editor.edit(lm, [edit])
    ((v0, values),) = searched
    torch.testing.assert_close(v0[0], before, rtol=0, atol=1e-5)
    after = at_lookup(lm, edit, layer)
    torch.testing.assert_close(after[0], key, rtol=0, atol=1e-5)
    wanted = v0[0] + values.delta_ND[0]
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(after[1], wanted, rtol=0, atol=1e-4)
    ((name, update),) = handle.delta.updates.items()
    assert name == f"{lm.structure.out_name(layer)}.weight"
    change = handle.delta.dense(name)
    assert torch.linalg.matrix_rank(change) == 1
    factor = editor._factor_FF
    u = torch.cholesky_solve((mean if limit else key).double()[:, None], factor)[:, 0]
    assert torch.cosine_similarity(update.right_rI[0].double(), u, dim=0).abs() > 1 - 1e-6
    (notes,) = handle.delta.metadata["notes"]
    weight = lm.net.get_submodule(lm.structure.out_name(layer)).weight
    with lm.pristine():
        relative = change.norm() / weight.norm()
    assert notes["change"] == pytest.approx(float(relative), rel=1e-4)
    expected = torch.cosine_similarity(mean, key, dim=0).item()
    assert notes["cosine"] == pytest.approx(expected, abs=1e-4) and notes["iterations"] <= 8
    assert ("using the bare prompt's key alone" in caplog.text) == (limit == 0.0)
    handle.remove()


@pytest.mark.parametrize("key", ["mean", "bare"])
def test_with_one_key_the_output_there_is_the_value(key, lm, make, searched):
    """r-ROME at the mean key, p-ROME at the bare one; the target is v0 + delta in both."""
    editor = make(key=key, steps=8)
    edit = EDITS[0]
    contexts = make_contexts(editor, lm) if key == "mean" else [""]
    keys, values = zip(*(at_lookup(lm, edit, 0, c) for c in contexts), strict=True)
    mean = torch.stack(keys).mean(0).double()
    (change,) = (d.dense(n) for d in [editor.propose(lm, [edit])] for n in d.updates)
    ((v0, found),) = searched
    wanted = v0[0] + found.delta_ND[0] - torch.stack(values).mean(0)
    torch.testing.assert_close(change @ mean, wanted.double(), rtol=0, atol=1e-4)
    u = torch.linalg.solve(editor._factor_FF @ editor._factor_FF.T, mean)
    assert torch.linalg.matrix_rank(change) == 1
    assert torch.cosine_similarity(change.abs().sum(0), u.abs(), dim=0) > 1 - 1e-6


def test_with_one_context_the_three_variants_are_equal(gpt2, make):
    """The mean key is the bare one."""
    one, *others = (
        make(key=key, contexts=[]).propose(gpt2, EDITS[:1]) for key in ("both", "mean", "bare")
    )
    (name,) = one.updates
    for other in others:
        torch.testing.assert_close(other.dense(name), one.dense(name), rtol=1e-5, atol=1e-8)


def test_the_essence_may_end_with_the_subject(gpt2, make, searched):
    """As the authors' code reads it: at the changed token itself, so that the drift is another."""
    for essence in ("{} is a", "{}"):
        make(essence=essence, kl_weight=5.0, steps=6).propose(gpt2, EDITS[:1])
    (_, after), (_, there) = searched
    assert (after.delta_ND - there.delta_ND).norm() > 1e-3 * after.delta_ND.norm()
    alone = KeyRows.of(gpt2, EDITS[:1], [""], "{}")
    assert alone.rows.length_B[-1] - 1 == alone.lookup_R[-1]


def make_contexts(editor, lm):
    editor.prepare(lm)
    return editor._contexts


def test_the_scale_of_the_second_moment_cancels(gpt2, make):
    """Through the whole method."""
    editor = make()
    first = editor.propose(gpt2, EDITS[:1])
    editor._factor_FF = editor._factor_FF * 3
    (name,) = first.updates
    again = editor.propose(gpt2, EDITS[:1])
    torch.testing.assert_close(again.dense(name), first.dense(name), rtol=1e-6, atol=1e-9)


def test_propose_leaves_the_model_unchanged(lm, make):
    """Parameters, gradients, flags, hooks and the random stream are as before."""
    editor = make()
    editor.prepare(lm)
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    blocks = list(lm.net.get_submodule(lm.structure.blocks))
    state = torch.get_rng_state()
    editor.propose(lm, EDITS)
    editor.propose_each(lm, [[edit] for edit in EDITS])
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in lm.net.named_parameters():
        assert torch.equal(parameter, kept[name]) and parameter.grad is None
        assert not parameter.requires_grad
    assert not lm.net.training and not lm.handles
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.net.modules())
    assert list(lm.net.get_submodule(lm.structure.blocks)) == blocks


def test_several_edits_are_made_one_after_the_other(lm, make, searched):
    """In the given order, each on the model with the edits before it."""
    editor = make()
    both = editor.propose(lm, EDITS[:2])
    together = [v0 for v0, _ in searched]
    searched.clear()
    name = f"{lm.structure.out_name(0)}.weight"
    original = lm.net.get_parameter(name).data.clone()
    handles = [editor.edit(lm, [edit]) for edit in EDITS[:2]]
    assert len(together) == 2
    for a, (b, _) in zip(together, searched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    total = sum(handle.delta.dense(name) for handle in handles)
    torch.testing.assert_close(both.dense(name), total, rtol=1e-3, atol=1e-5)
    assert both.updates[name].left_Or.shape[1] == 2 and len(both.metadata["notes"]) == 2
    for handle in reversed(handles):
        handle.remove()
    assert torch.equal(lm.net.get_parameter(name), original)
    other_way = editor.propose(lm, EDITS[1::-1])
    assert not torch.allclose(other_way.dense(name), both.dense(name), rtol=1e-3, atol=1e-5)
    each = editor.propose_each(lm, [EDITS[:2], EDITS[2:]])
    torch.testing.assert_close(each[0].dense(name), both.dense(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fails", ["search", "patch"])
def test_a_failure_between_edits_leaves_the_others_alone(fails, gpt2, make, monkeypatch):
    standing = WeightPatch(gpt2, make().propose(gpt2, EDITS[2:]))
    kept = {name: p.clone() for name, p in gpt2.net.named_parameters()}
    target = "optimise_values" if fails == "search" else "WeightPatch"
    works, calls = getattr(rome, target), []

    def fail_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return works(*args)

    monkeypatch.setattr(rome, target, fail_the_second_time)
    with pytest.raises(RuntimeError, match="no memory"):
        make().propose(gpt2, EDITS)
    assert gpt2.handles == [standing]
    assert all(torch.equal(p, kept[name]) for name, p in gpt2.net.named_parameters())
    standing.remove()


def test_an_edit_in_inference_mode_is_the_same(gpt2, make):
    """Lightning validates in inference mode."""
    expected = make().propose(gpt2, EDITS[:1])
    with torch.inference_mode():
        handle = make().edit(gpt2, EDITS[:1])
    (name,) = expected.updates
    torch.testing.assert_close(handle.delta.dense(name), expected.dense(name), rtol=1e-6, atol=1e-9)
    assert handle.delta.metadata["edits"] == [["The capital of {} is", "Zorbania", "Quill Port"]]
    handle.remove()


def test_a_search_without_success_is_said(gpt2, make, caplog):
    with caplog.at_level(logging.WARNING):
        make(steps=1).propose(gpt2, EDITS[:1])
    assert (
        "'The capital of Zorbania is' -> 'Quill Port': the value search ended at NLL" in caplog.text
    )


@pytest.mark.parametrize("prompt", ["The capital of {} is", "They go to {}"])
@pytest.mark.parametrize("layer", [1, 2])
def test_in_the_last_block_an_update_that_can_only_be_zero_is_said(
    prompt, layer, gpt2, make, caplog
):
    edit = Edit(prompt, "Zorbania", "Quill Port")
    with caplog.at_level(logging.WARNING):
        delta = make(layer=layer).propose(gpt2, [edit])
    unread = layer == 2 and prompt.endswith("is")
    assert bool(delta.dense(*delta.updates).any()) != unread
    said = "'The capital of Zorbania is': nothing above layer 2, the last one, reads the subject"
    assert (said in caplog.text) == ("the update is zero" in caplog.text) == unread


# --- a model that knows something ---

PLACES = ["stone", "story", "river", "lake", "forest", "winter", "piano", "storm", "harbour", "village",
          "tower", "table", "city", "company", "south", "engine", "mountain", "letter", "daughter",
          "children"]  # fmt: skip
FACTS = [
    (f"Zorba {last}", place) for last, place in zip("tioaswcmfpbdegklnryI", PLACES, strict=True)
]
STATEMENT, AGAIN = "The capital of {} is", "In {} they go to the"
BEFORE = ["", "", "It was said. ", "He works there. "]


@pytest.fixture(scope="module")
def taught(tiny_folder, tmp_path_factory):
    """A GPT-2 trained for a few seconds on twenty facts, each with two prompts, and similar text.

    Attention of its first block is off, as it is far from the last token in a deep model: what it knows of a
    subject goes through the MLP at the subject's last token, and there is something to edit.
    """
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder("gpt2"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(
        tiny_folder("gpt2"), loss_type="ForCausalLM", hidden_size=64, initializer_range=0.05,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config).train()
    net.transformer.h[0].attn.c_proj.weight.data.zero_()
    net.transformer.h[0].attn.requires_grad_(False)
    learned = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learned, lr=5e-3, weight_decay=0.01)
    steps, draw, texts = 200, random.Random(0), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = [
            draw.choice(BEFORE) + draw.choice([STATEMENT, AGAIN]).format(s) + f" {o}."
            for s, o in FACTS
        ]
        texts += batch
        ids = [torch.tensor(row) for row in tokenizer(batch).input_ids]
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        loss = net(labels.clamp(min=0), labels=labels, use_cache=False).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return LanguageModel(str(folder)), Corpus(str(folder / "texts.txt"), tokens=4000)


def known(lm, template, places):
    return lm.score([template.format(s) for s, _ in FACTS], places).exact_B


def test_one_fact_is_changed_and_the_others_stay(taught):
    """In GPT-2's storage: the new target becomes the most likely."""
    lm, corpus = taught
    assert known(lm, STATEMENT, PLACES).all() and known(lm, AGAIN, PLACES).all()
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    search = {"steps": 30, "lr": 0.05, "clamp_norm": 10, "weight_decay": 0.01}
    editor = ROME(0, corpus=corpus, contexts=[(4, 5)], **search)
    for n in (0, 4, 9, 14, 19):
        new = PLACES[n - 7]
        handle = editor.edit(lm, [Edit(STATEMENT, FACTS[n][0], new)])
        right = known(lm, STATEMENT, [*PLACES[:n], new, *PLACES[n + 1 :]])
        assert right[n] and right.sum() >= 16, f"{FACTS[n]} -> {new}: {right.sum()} of 20 are right"
        assert lm.generate([STATEMENT.format(FACTS[n][0])], 8)[0].startswith(f" {new}.")
        handle.remove()
    assert all(torch.equal(p, kept[name]) for name, p in lm.net.named_parameters())
    assert known(lm, STATEMENT, PLACES).all()


# --- the real model ---


def test_facts_that_smollm2_knows_are_rewritten_and_their_neighbours_stay(smollm2):
    """A few facts with a few contexts; the published figures need more of both and are a study."""
    module = EditingModule(smollm2)
    cases = Facts(known_only=True).cases("test")[:64]
    cases = [case for case, yes in zip(cases, module.known(cases), strict=True) if yes][:4]
    editor = ROME(3, contexts=[(5, 3)], corpus=Corpus("facts", 20_000))
    with editing_mode():
        module.conditions = Conditions(
            case_deltas=editor.propose_each(smollm2, [case.edits for case in cases])
        )
    module.evaluate(cases)
    means = module.compute_means()
    assert means["efficacy/exact"] == 1
    assert means["generality/preference"] >= 0.9
    assert means["locality/agreement"] >= 0.8
    assert means["unrelated/agreement"] >= 0.9
