"""Causal tracing: every effect against plain forwards, and the roles of tokens."""

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.model.hooks import capture, first, hooked, replace_first
from corrigenda.modules.statistics.tracing import LAST_SUBJECT, ROLES, _Fact, _role, causal_trace
from tests.samples import models_by_family

FACTS = [
    Edit("The capital of {} is", "Zorbania", "x", "the table"),
    Edit("{} said that", "São Paulo", "x", "it"),
]


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    return models_by_family(tiny_lm, num_hidden_layers=3)


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon", "gemma2"])
def lm(request, loaded):
    """Among them flattened, parallel and normalised MLPs, and a scaled embedding."""
    return loaded(request.param)


def by_hand(lm, edit, noise_SKD, names=(), position=None):
    """Mean probability of the answer over the noise, by whole forwards, one sample at a time."""
    rows = lm.tokens.rows([edit.text], [edit.target_true])
    start, length = int(rows.start_B[0]), int(rows.length_B[0])
    begin, end = lm.tokens.subject_span(edit.text, edit.subject_start, edit.subject)
    ids = rows.ids_BT
    modules = {name: lm.net.get_submodule(name) for name in names}
    with torch.no_grad(), capture(modules) as clean:
        lm.net(ids)

    def noisy(sample):
        def hook(_module, _args, output):
            return torch.cat(
                [output[:, :begin], output[:, begin : end + 1] + sample, output[:, end + 1 :]], 1
            )

        return hook

    def put_back(name):
        def hook(_module, _args, output):
            hidden = first(output).reshape(length, -1).clone()
            hidden[position] = first(clean[name][1]).reshape(length, -1)[position]
            return replace_first(output, hidden.view(first(output).shape))

        return hook

    found = []
    for sample in noise_SKD:
        hooks = [(lm.net.get_input_embeddings(), noisy(sample))]
        hooks += [(module, put_back(name)) for name, module in modules.items()]
        with torch.no_grad(), hooked(hooks):
            logprob = lm.net(ids).logits[0].log_softmax(-1)
        found.append(logprob[start - 1 : length - 1].gather(1, ids[0, start:, None]).sum().exp())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("edit", FACTS, ids=lambda edit: edit.subject)
def test_every_effect_is_that_of_plain_forwards(lm, edit):
    fact = _Fact(lm, edit)
    noise = 0.3 * torch.randn(3, *fact.subject_KD.shape)
    with torch.no_grad():
        fact.corrupt(noise)
        assert fact.clean == pytest.approx(by_hand(lm, edit, 0 * noise[:1]), rel=1e-3)
        assert fact.corrupted == pytest.approx(by_hand(lm, edit, noise), rel=1e-3)
        assert fact.clean != pytest.approx(fact.corrupted, rel=1e-2)
        for layer in range(3):
            hidden, mlp = (fact.restored(site, layer, 2) for site in ("hidden", "mlp"))
            for p, position in enumerate(fact.positions):
                names = [lm.structure.block_name(layer)]
                expected = by_hand(lm, edit, noise, names, position)
                assert float(hidden[p]) == pytest.approx(expected, rel=2e-3)
                names = [lm.structure.out_name(n) for n in (layer - 1, layer) if n >= 0]
                expected = by_hand(lm, edit, noise, names, position)
                assert float(mlp[p]) == pytest.approx(expected, rel=2e-3)


def test_the_last_state_of_all_holds_the_answer(lm):
    """What the last block gives out at the last token is all that the head sees of a one-token answer."""
    edit = Edit(FACTS[1].prompt, FACTS[1].subject, "x", "a")
    trace = causal_trace(lm, [edit], samples=3)
    (last,) = trace.effect["hidden"][ROLES.index("last token"), -1:]
    rows = lm.tokens.rows([edit.text], ["a"])
    assert int(rows.length_B[0] - rows.start_B[0]) == 1
    assert float(last) == pytest.approx(trace.clean - trace.corrupted, rel=1e-4)
    assert trace.effect["hidden"][LAST_SUBJECT, -1].abs() < 1e-6


def test_facts_are_averaged_by_role(loaded):
    lm = loaded("llama")
    traces = [causal_trace(lm, [edit], samples=2, noise=1e-6) for edit in FACTS]
    both = causal_trace(lm, FACTS, samples=2, noise=1e-6)
    assert both.facts == 2
    assert both.clean == pytest.approx((traces[0].clean + traces[1].clean) / 2)
    assert both.corrupted == pytest.approx(
        both.clean, rel=1e-3
    )  # almost no noise, nothing to restore
    assert all(
        effect.nan_to_num().abs().max() < 1e-3 * both.clean for effect in both.effect.values()
    )
    assert both.effect["mlp"].shape == (len(ROLES), 3)


def test_roles():
    names = [ROLES[_role(position, 2, 4, 8)] for position in range(2, 9)]
    assert names == ["first subject token", "inner subject tokens", "last subject token",
                     "first token after", "further tokens", "further tokens", "last token"]  # fmt: skip
    assert ROLES[_role(3, 3, 3, 5)] == "last subject token"
    assert ROLES[_role(4, 3, 3, 4)] == "last token"


def test_roles_that_no_token_has_are_not_numbers(loaded):
    lm = loaded("gpt2")
    trace = causal_trace(lm, [Edit("This is {}", "e", "x", "the table")], samples=2)
    known = [ROLES[i] for i in range(len(ROLES)) if not trace.effect["mlp"][i].isnan().any()]
    assert known == ["last subject token"]


def test_the_frozen_prefix_and_the_seed(loaded, monkeypatch):
    lm = loaded("gpt2")
    one, same = (causal_trace(lm, FACTS, samples=2, seed=1) for _ in range(2))
    other = causal_trace(lm, FACTS, samples=2, seed=2)
    monkeypatch.setattr(lm.reuse, "enabled", False)
    plain = causal_trace(lm, FACTS, samples=2, seed=1)
    for site in ("hidden", "mlp"):
        assert torch.equal(one.effect[site].nan_to_num(), same.effect[site].nan_to_num())
        assert not torch.equal(one.effect[site].nan_to_num(), other.effect[site].nan_to_num())
        torch.testing.assert_close(
            one.effect[site], plain.effect[site], rtol=1e-3, atol=1e-6, equal_nan=True
        )


def test_nothing_is_left_behind(lm):
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    blocks = list(lm.net.get_submodule(lm.structure.blocks))
    state = torch.get_rng_state()
    causal_trace(lm, FACTS, samples=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, kept[name]) for name, p in lm.net.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.net.modules())
    assert list(lm.net.get_submodule(lm.structure.blocks)) == blocks


@pytest.mark.parametrize(
    ("edits", "changes", "words"),
    [
        ([], {}, "no facts"),
        ([Edit("{} is", "Zembla", "x")], {}, "'Zembla is' has no true answer"),
        (FACTS, {"samples": 0}, "samples must be at least 1"),
        (FACTS, {"window": 0}, "window must be at least 1"),
        (FACTS, {"noise": 0.0}, "noise must be positive"),
    ],
)
def test_what_cannot_be_traced(loaded, edits, changes, words):
    with pytest.raises(ValueError, match=words):
        causal_trace(loaded("gpt2"), edits, **changes)
