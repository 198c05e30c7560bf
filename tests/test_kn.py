"""KN: exact attributions, the neurons they select, and what becomes of their values."""

from dataclasses import replace

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editors.kn import KN, attributions
from corrigenda.modules.model.hooks import capture, hooked
from tests.samples import models_by_family, without_edits_afterwards

EDITS = [
    Edit("The capital of {} is", "Zorbania", "the table", "Paris"),
    Edit("{} said that", "São Paulo", "rain", "it is"),
]


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    return models_by_family(tiny_lm)


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon"])
def lm(request, loaded):
    """A transposed, a gated, a flattened and a parallel MLP."""
    yield from without_edits_afterwards(loaded(request.param))


@pytest.fixture
def gpt2(loaded):
    yield from without_edits_afterwards(loaded("gpt2"))


def short(**changes):
    return KN(**({"contexts": [(3, 2)], "points": 4} | changes))


# --- attribution ---


def probability(lm, prompt, target, layer=None, keys=1.0):
    """Of the target, with one layer's keys multiplied at the positions that predict it; by a plain forward."""
    rows = lm.tokens.rows([prompt], [target])
    start, length = int(rows.start_B[0]), int(rows.length_B[0])
    pairs = []
    if layer is not None:
        module = lm.net.get_submodule(lm.structure.out_name(layer))

        def scale(_module, args, output):
            key = args[0].reshape(length, -1).clone()
            key[start - 1 : length - 1] *= keys
            return module.forward(key).reshape(output.shape)

        pairs = [(module, scale)]
    with torch.no_grad(), hooked(pairs):
        logits = lm.net(rows.ids_BT).logits[0].double()
    logprob = logits.log_softmax(-1)[start - 1 : length - 1]
    return float(logprob.gather(1, rows.ids_BT[0, start:, None]).sum().exp())


def likeliest(lm, prompt, tokens=2):
    """A continuation that the model itself generates, so that its probability is not negligible."""
    for _ in range(tokens):
        (more,) = lm.generate([prompt], tokens)
        if more.strip():
            return more.strip()
    return "e"


def test_attributions_of_a_layer_sum_to_the_gain_in_probability(lm):
    """Per layer they sum to P(1) - P(0). The midpoint rule's error falls as the square of the number of points if
    the path is smooth, which it is except below OPT's ReLU."""
    prompts = ["The capital of Zorbania is", "It was said. São Paulo"]
    targets = [likeliest(lm, prompt) for prompt in prompts]
    rows = lm.tokens.rows(prompts, targets)
    layers = range(lm.structure.num_layers)
    change = torch.zeros(2, len(layers))
    for r, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        whole = probability(lm, prompt, target)
        for layer in layers:
            assert probability(lm, prompt, target, layer, 1.0) == pytest.approx(whole, rel=1e-4)
            change[r, layer] = 1 - probability(lm, prompt, target, layer, 0.0) / whole
    assert change.abs().min() > 0.05
    errors = {}
    for points in (10, 20, 40, 320):
        scale = torch.tensor(
            [[probability(lm, p, t)] for p, t in zip(prompts, targets, strict=True)]
        )
        sums = attributions(lm, rows, points).sum(-1) / scale
        errors[points] = (sums - change).abs().amax(0)
    top = [float(error[-1]) for error in errors.values()]
    assert top[0] > 3 * top[1] > 9 * top[2] and top[1] < 0.02, errors
    assert errors[320].max() < 0.01, errors


def test_they_are_gradients_along_the_way(gpt2):
    """One neuron's attribution, by finite differences of its own activation along the path of all."""
    prompt, target, layer, j = "The capital of Zorbania is", "it", 1, 5
    rows = gpt2.tokens.rows([prompt], [target])
    (attr,) = attributions(gpt2, rows, 8)[:, layer]
    module = gpt2.net.get_submodule(gpt2.structure.out_name(layer))
    position = int(rows.start_B[0]) - 1
    total = 0.0
    for point in range(8):
        pair = []
        for step in (1e-2, -1e-2):

            def scale(_module, args, _output, step=step, point=point):
                key = args[0].clone()
                key[0, position] *= (point + 0.5) / 8
                key[0, position, j] += step * args[0][0, position, j]
                return module.forward(key)

            with torch.no_grad(), hooked([(module, scale)]):
                logits = gpt2.net(rows.ids_BT).logits[0, position].double()
            pair.append(float(logits.softmax(-1)[rows.ids_BT[0, position + 1]]))
        total += (pair[0] - pair[1]) / 2e-2 / 8
    assert float(attr[j]) == pytest.approx(total, rel=1e-2)


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_the_neurons_do_not_depend_on_the_batch_size(lm, batch_rows):
    """Attributions are the same however the points of the integral are batched and padded."""
    prompts, targets = ["The capital of Zorbania is", "It"], ["the table", "e"]
    together = attributions(lm, lm.tokens.rows(prompts, targets), 4)
    again = attributions(lm, lm.tokens.rows(prompts, targets), 4, batch_rows)
    torch.testing.assert_close(again, together, rtol=1e-3, atol=1e-5 * float(together.abs().max()))
    for r in range(2):
        (alone,) = attributions(lm, lm.tokens.rows(prompts[r : r + 1], targets[r : r + 1]), 4)
        torch.testing.assert_close(
            alone, together[r], rtol=1e-3, atol=1e-5 * float(alone.abs().max())
        )


def test_the_frozen_prefix_changes_nothing(gpt2, monkeypatch):
    rows = gpt2.tokens.rows(["The capital of Zorbania is"], ["the table"])
    first = attributions(gpt2, rows, 3)
    monkeypatch.setattr(gpt2.reuse, "enabled", False)
    plain = attributions(gpt2, rows, 3)
    torch.testing.assert_close(first, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


# --- selection ---


def test_thresholds_select_neurons():
    """0 selects all with a non-negative attribution, 1 only the largest; a share compares several prompts."""
    attr = torch.randn(1, 2, 10)
    everything = KN(threshold=0.0, fewest=1, most=20).select(attr)
    assert everything == [tuple(pair) for pair in (attr[0] >= 0).nonzero().tolist()]
    (only,) = KN(threshold=1.0, fewest=1).select(attr)
    assert attr[0][only] == attr.max()
    attr = torch.zeros(4, 2, 10)
    attr[:, 0, 3] = 1.0
    attr[:3, 1, 4] = 0.5
    attr[:2, 1, 5] = 0.5
    attr[:, 1, 6] = 0.1
    assert KN(share=0.7, fewest=1).select(attr) == [(0, 3), (1, 4)]
    assert KN(share=1.0, fewest=1).select(attr) == [(0, 3)]
    assert KN(share=0.7, fewest=3).select(attr) == [(0, 3), (1, 4), (1, 5)]  # down to 0.5
    assert KN(share=0.7, fewest=1, most=1).select(attr) == [(0, 3)]  # up to 0.8


def test_without_a_shared_neuron_the_strongest_is_taken(caplog):
    attr = torch.eye(3)[:, None]
    attr[2] *= 2
    assert KN(share=1.0).select(attr) == [(0, 2)]
    assert "share no neuron" in caplog.text


@pytest.fixture
def wired(tiny_lm):
    """A model in which three neurons alone do something: (0, 4) and (1, 7) for one word, (1, 9) against it."""

    def make(family):
        lm = tiny_lm(family, seed=3)
        for name, parameter in lm.net.get_submodule(lm.structure.final_norm).named_parameters():
            parameter.data.fill_(float(name == "weight"))
        rows_V = lm.net.get_output_embeddings().weight.data
        rows_V -= rows_V.mean(1, keepdim=True)  # what a norm takes off
        rows_V /= rows_V.norm(dim=1, keepdim=True)
        prompts = [EDITS[0].text]
        answer = lm.tokens.rows(prompts, [EDITS[0].target_true])
        first = int(answer.ids_BT[0, int(answer.start_B[0])])
        word = lm.net.get_output_embeddings().weight.data[first]
        names = [lm.structure.out_name(layer) for layer in (0, 1)]
        with torch.no_grad():
            for name in names:
                lm.net.get_submodule(name).weight.zero_()
            for layer, j, size in ((0, 4, 1.0), (1, 7, 1.0), (1, 9, -1.0)):
                module = lm.net.get_submodule(names[layer])
                with capture({"out": module}, stop=True) as seen:
                    lm.net(torch.tensor(lm.tokens.encode(prompts)))
                key = seen["out"][0].reshape(-1, module_width(lm))[-1, j]
                column = size * word / word.norm() / key
                if family == "gpt2":
                    module.weight[j] = column
                else:
                    module.weight[:, j] = column
        return lm

    return make


def module_width(lm):
    return lm.structure.inner_width


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_neurons_that_do_it_are_found(wired, kind):
    lm = wired(kind)
    editor = short(contexts=[], threshold=0.05)
    delta = editor.propose(lm, EDITS[:1])
    (notes,) = delta.metadata["notes"]
    found = [(layer, j) for layer, j, _ in notes["neurons"]]
    assert set(found) <= {(0, 4), (1, 7)} and (1, 7) in found
    attr = attributions(lm, lm.tokens.rows([EDITS[0].text], [EDITS[0].target_true]), 4)[0]
    assert attr[1, 9] < 0 < attr[1, 7]
    idle = torch.ones_like(attr, dtype=torch.bool)
    idle[0, 4] = idle[1, 7] = idle[1, 9] = False
    assert (attr[idle] == 0).all()


# --- the edit ---


def key_signs(lm, edit, layer):
    """Signs of a block's mean activations where the true answer is predicted, in the editor's own contexts."""
    editor = short()
    editor.prepare(lm)
    found = []
    with lm.pristine(), torch.no_grad():
        for context in editor._contexts:
            rows = lm.tokens.rows([context + edit.text], [edit.target_true])
            module = lm.net.get_submodule(lm.structure.out_name(layer))
            with capture({"out": module}, stop=True) as seen:
                lm.net(rows.ids_BT)
            keys = seen["out"][0].reshape(-1, module_width(lm))
            found.append(keys[int(rows.start_B[0]) - 1 : -1])
    return torch.cat(found).mean(0).sign()


@pytest.mark.parametrize("action", ["update", "suppress", "enhance", "erase"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_only_the_selected_columns_change(loaded, kind, action):
    """The selected columns follow the formula, all others are byte-identical; removal is bit-exact."""
    lm = loaded(kind)
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    handle = short(action=action, erase_scale=0.5, write_scale=3.0).edit(lm, EDITS[:1])
    (notes,) = handle.delta.metadata["notes"]
    assert notes["neurons"]
    head = lm.net.get_output_embeddings().weight.double()
    answers = []
    for target in (EDITS[0].target_true, EDITS[0].target_new):
        rows = lm.tokens.rows([EDITS[0].text], [target])
        answers.append(head[rows.ids_BT[0, int(rows.start_B[0]) :]].mean(0))
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in kept.items()}
    for layer, j, _ in notes["neurons"]:
        name = f"{lm.structure.out_name(layer)}.weight"
        at = (j,) if kind == "gpt2" else (slice(None), j)
        old = kept[name][at].double()
        old_e, new_e = ((old.norm() / e.norm()) * e for e in answers)
        sign = key_signs(lm, EDITS[0], layer)[j]
        expected = {"update": old + sign * (3 * new_e - 0.5 * old_e), "enhance": 2 * old}
        torch.testing.assert_close(
            lm.net.get_parameter(name)[at].double(),
            expected.get(action, 0 * old),
            rtol=1e-5,
            atol=1e-7,
        )
        touched[name][at] = True
    for name, parameter in lm.net.named_parameters():
        assert torch.equal(parameter[~touched[name]], kept[name][~touched[name]])
    handle.remove()
    assert all(torch.equal(p, kept[name]) for name, p in lm.net.named_parameters())


def test_a_silenced_neuron_is_missing_from_the_output(lm):
    """At every token the projection's output is lower by a_j W_j."""
    ids = torch.tensor(lm.tokens.encode(["The capital of Zorbania is the town."]))
    handle = short(action="suppress").edit(lm, EDITS[:1])
    (notes,) = handle.delta.metadata["notes"]
    layer = min(layer for layer, _, _ in notes["neurons"])
    module = lm.net.get_submodule(lm.structure.out_name(layer))

    def output():
        with torch.no_grad(), capture({"out": module}, stop=True) as seen:
            lm.net(ids)
        return [t.reshape(ids.shape[1], -1) for t in seen["out"]]

    key, after = output()
    with lm.pristine():
        key_before, before = output()
    torch.testing.assert_close(key, key_before)  # lower layers are as they were
    missing = torch.zeros_like(before)
    name = f"{lm.structure.out_name(layer)}.weight"
    with lm.pristine():
        for _, j, _ in (n for n in notes["neurons"] if n[0] == layer):
            missing += key[:, j, None] * handle.delta.dense(name, torch.float32)[:, j]
    torch.testing.assert_close(after, before + missing, rtol=1e-4, atol=1e-5)
    assert missing.abs().max() > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_become_likelier_and_less_likely(wired, kind):
    lm = wired(kind)
    edit = replace(EDITS[0], target_new="e")
    new, true = edit.target_new, edit.target_true
    before = {t: probability(lm, edit.text, t) for t in (new, true)}
    after = {}
    for action in ("update", "suppress", "enhance"):
        handle = short(action=action, contexts=[], threshold=0.05).edit(lm, [edit])
        after[action] = {t: probability(lm, edit.text, t) for t in before}
        handle.remove()
    assert after["update"][new] > 2 * before[new]
    assert after["suppress"][true] < before[true] < after["enhance"][true]


def test_some_activations_of_a_gated_mlp_are_negative(loaded):
    """So the sign in the formula above is not one for show."""
    lm = loaded("llama")
    (notes,) = short().propose(lm, EDITS[:1]).metadata["notes"]
    signs = {float(key_signs(lm, EDITS[0], layer)[j]) for layer, j, _ in notes["neurons"]}
    assert signs == {-1.0, 1.0}


def test_the_update_is_a_few_columns(lm):
    """One factor holds the changes, the other says where; it is saved and read as any other."""
    delta = short().propose(lm, EDITS)
    assert len(delta.metadata["notes"]) == 2
    neurons = {(layer, j) for note in delta.metadata["notes"] for layer, j, _ in note["neurons"]}
    for name, update in delta.updates.items():
        layer = lm.structure.layer_of(name)
        mine = sorted(j for n, j in neurons if n == layer)
        assert update.right_rI.nonzero().tolist() == [[r, j] for r, j in enumerate(mine)]
        assert update.left_Or.shape == (lm.structure.width, len(mine))
    assert sum(u.left_Or.shape[1] for u in delta.updates.values()) == len(neurons)


def test_facts_that_share_neurons(gpt2):
    """Turning off twice changes nothing; two answers are added; a relation's neurons are those of all prompts."""
    same = [EDITS[0], Edit(EDITS[0].prompt, EDITS[0].subject, "rain", EDITS[0].target_true)]
    for action in ("suppress", "enhance"):
        one, two = (short(action=action).propose(gpt2, edits) for edits in (same[:1], same))
        assert one.updates.keys() == two.updates.keys()
        assert all(torch.equal(one.dense(name), two.dense(name)) for name in one.updates)
    first, second, both = (short().propose(gpt2, edits) for edits in (same[:1], same[1:], same))
    for name in both.updates:
        torch.testing.assert_close(both.dense(name), first.dense(name) + second.dense(name))
    editor = short(action="erase")
    delta = editor.propose(gpt2, EDITS)
    (notes,) = delta.metadata["notes"]
    pooled = torch.cat([attributions(gpt2, editor._rows(gpt2, edit), 4) for edit in EDITS])
    assert [(layer, j) for layer, j, _ in notes["neurons"]] == editor.select(pooled)


def test_side_by_side_is_one_at_a_time(lm):
    deltas = short().propose_each(lm, [[edit] for edit in EDITS])
    together = lm.score([e.text for e in EDITS], [e.target_new for e in EDITS], deltas, [0, 1])
    for n, edit in enumerate(EDITS):
        handle = short().edit(lm, [edit])
        alone = lm.score([edit.text], [edit.target_new])
        mask = alone.mask_BM[0]
        torch.testing.assert_close(
            together.logprob_BM[n, : len(mask)][mask],
            alone.logprob_BM[0][mask],
            rtol=1e-4,
            atol=1e-4,
        )
        handle.remove()


def test_without_a_true_answer_the_likeliest_token_is_the_old_one(lm):
    edit = Edit("The capital of {} is", "Zorbania", "the table")
    editor = short()
    editor.prepare(lm)
    rows = editor._rows(lm, edit)
    with torch.no_grad():
        logits = lm.net(torch.tensor(lm.tokens.encode([edit.text]))).logits[0, -1]
    assert len(rows.ids_BT) == 3
    for r in range(3):
        assert int(rows.length_B[r] - rows.start_B[r]) == 1
        assert int(rows.ids_BT[r, int(rows.start_B[r])]) == int(logits.argmax())
    assert editor.propose(lm, [edit]).updates


def test_propose_leaves_the_model_unchanged(lm):
    """Parameters, gradients, flags, hooks and the random stream are as before."""
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    editor = short()
    editor.prepare(lm)
    state = torch.get_rng_state()
    with torch.no_grad():  # as inside a validation loop
        editor.propose(lm, EDITS)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in lm.net.named_parameters():
        assert torch.equal(parameter, kept[name]) and parameter.grad is None
        assert not parameter.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.net.modules())


# --- mistakes ---


@pytest.mark.parametrize("changes", [{"threshold": 1.5}, {"share": -1.0}, {"fewest": 4, "most": 2}])
def test_settings_without_sense_are_refused(changes):
    with pytest.raises(ValueError, match="must be (at least|between)"):
        KN(**changes)
