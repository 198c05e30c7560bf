"""Edits as data, side by side, and active: always the same edited model, and the original one afterwards."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import WeightEditor, editing_mode
from corrigenda.modules.editing.text_patch import TextPatch
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import (
    FORMAT,
    Delta,
    EditError,
    LowRank,
    add_deltas,
    side_branches,
)
from corrigenda.modules.model.structure import UnsupportedModel, sizes
from tests.samples import models_by_family

PROMPTS = ["The capital of Zorbania is", "He said:", "In São Paulo, the people are", "I"]
TARGETS = ["Quill Port", "the ice", "proud", "think that it will rain"]
NEAR = {"atol": 2e-5, "rtol": 1e-4}
# a square map of each kind of storage, beside the MLP output projection
SQUARE = {"gpt2": "transformer.h.0.attn.c_proj", "llama": "model.layers.0.self_attn.o_proj"}


def low(module, rank=1, scale=0.2, dtype=torch.float32):
    inner, outer = sizes(module)
    left, right = torch.randn(outer, rank, dtype=dtype), torch.randn(rank, inner, dtype=dtype)
    return LowRank(scale * left, right)


def full(module, scale=0.2):
    inner, outer = sizes(module)
    return scale * torch.randn(outer, inner)


def snapshot(lm):
    return {name: p.detach().clone() for name, p in lm.net.named_parameters()}


def same(lm, kept):
    return [n for n, p in lm.net.named_parameters() if not torch.equal(p, kept[n])] == []


def logits(lm, rows):
    with torch.no_grad():
        return lm.net(rows.ids_BT, attention_mask=rows.mask_BT).logits


def written(lm, delta, rows):
    """Logits with the delta in the weights; the model is as before."""
    kept = snapshot(lm)
    patch = WeightPatch(lm, delta)
    out = logits(lm, rows)
    patch.remove()
    assert same(lm, kept)
    return out


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    """One model per family for all tests here, which must remove their edits."""
    return models_by_family(tiny_lm)


@pytest.fixture(params=["gpt2", "llama"])
def lm(request, loaded):
    yield (found := loaded(request.param))
    assert not found.handles


def two_layers(lm, rank=2):
    """Low-rank changes of both blocks' output projections."""
    names = [lm.structure.out_name(layer) for layer in (0, 1)]
    return Delta({f"{n}.weight": low(lm.net.get_submodule(n), rank) for n in names}, {"n": 1})


# --- side by side ---


def test_side_branches_are_the_written_updates(family, loaded):
    """Row b runs through the model edited by its own delta: low-rank, dense, bias, several, none."""
    lm = loaded(family)
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    first, *_, out = lm.structure.mlp_names(0)
    other = lm.structure.out_name(1)
    modules = {name: lm.net.get_submodule(name) for name in (first, out, other)}
    deltas = [
        Delta({f"{out}.weight": low(modules[out], rank=3)}),
        Delta({f"{out}.weight": full(modules[out]), f"{other}.weight": low(modules[other])}),
        Delta({f"{first}.weight": low(modules[first], rank=2, dtype=torch.float64)}),
        Delta({}),
    ]
    if modules[out].bias is not None:
        deltas[0].updates[f"{out}.bias"] = torch.randn(32)
        deltas[2].updates[f"{other}.bias"] = torch.randn(32)
    plain = logits(lm, rows)
    for owner in ([0, 1, 2, 3], [2, 2, 0, 1], [3, 0, 3, 0], [1, 1, 1, 1]):
        with side_branches(lm.net, deltas, torch.tensor(owner)):
            together = logits(lm, rows)
        for b, index in enumerate(owner):
            real = rows.mask_BT[b].bool()
            alone = written(lm, deltas[index], rows)[b]
            torch.testing.assert_close(together[b][real], alone[real], **NEAR)
            assert (index == 3) == torch.allclose(together[b][real], plain[b][real], atol=1e-3)
    assert torch.equal(logits(lm, rows), plain)


KINDS = ["low", "dense", "bias", "all low", "none at all"]
WITH = [
    (family, kind) for family in SQUARE for kind in KINDS if (family, kind) != ("llama", "bias")
]


@pytest.mark.parametrize("kind_of_model, kind", WITH)
def test_every_kind_alone_and_in_company(kind_of_model, kind, loaded):
    """Also where all are low-rank, of different ranks (one product for all rows), and a single one."""
    lm, name = loaded(kind_of_model), SQUARE[kind_of_model]
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    module = lm.net.get_submodule(name)
    assert sizes(module) == (32, 32)
    make = {
        "low": lambda i: full(module) if i else low(module),
        "dense": lambda i: full(module),
        "bias": lambda i: torch.randn(32),
        "all low": lambda i: low(module, rank=i + 1),
        "none at all": lambda i: None,
    }[kind]
    parameter = f"{name}.{'bias' if kind == 'bias' else 'weight'}"
    updates = [make(0), make(1), make(2), None]
    deltas = [Delta({} if u is None else {parameter: u}) for u in updates]
    for some, owner in ((deltas, [3, 0, 2, 1]), (deltas[:1], [0, 0, 0, 0])):
        with side_branches(lm.net, some, torch.tensor(owner)):
            together = logits(lm, rows)
        for b, index in enumerate(owner):
            real = rows.mask_BT[b].bool()
            torch.testing.assert_close(
                together[b][real], written(lm, some[index], rows)[b][real], **NEAR
            )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_reach_the_factors(kind, count, loaded):
    """They are those of the update in the weights: dL/dleft = G right', dL/dright = left' G."""
    lm = loaded(kind)
    name = lm.structure.out_name(0)
    module = lm.net.get_submodule(name)
    factors = [low(module, rank=2) for _ in range(count)]
    leaves = [t.requires_grad_() for f in factors for t in (f.left_Or, f.right_rI)]
    deltas = [Delta({f"{name}.weight": f}) for f in factors]
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    owner = [b % count for b in range(4)]
    read = rows.answer_positions()

    def loss(tail):
        return -tail.logits(*read).log_softmax(-1)[:, 7].sum()

    with side_branches(lm.net, deltas, torch.tensor(owner)):
        loss(lm.reuse.tail(rows, 0)).backward()
    for index in range(count):
        patch = WeightPatch(lm, deltas[index])
        module.weight.requires_grad_(True)
        mine = torch.tensor([b for b in range(4) if owner[b] == index])
        some = rows.select(mine)
        read = some.answer_positions()
        (gradient,) = torch.autograd.grad(loss(lm.reuse.tail(some, 0)), module.weight)
        module.weight.requires_grad_(False)
        patch.remove()
        gradient = gradient if gradient.shape == (32, lm.structure.inner_width) else gradient.T
        close = {"rtol": 1e-3, "atol": 1e-4 * float(gradient.norm())}
        left, right = leaves[2 * index : 2 * index + 2]
        torch.testing.assert_close(left.grad, gradient @ right.detach().T, **close)
        torch.testing.assert_close(right.grad, left.detach().T @ gradient, **close)
    assert not any(m._forward_hooks for m in lm.net.modules())


# --- active ---


def test_the_weights_become_weight_plus_update(lm):
    """Conv1D stores the transpose; square weights give no shape error when one forgets it."""
    for name in (
        SQUARE[lm.net.config.model_type],
        lm.structure.out_name(1),
    ):
        module = lm.net.get_submodule(name)
        delta = Delta({f"{name}.weight": low(module, rank=2)})
        x = torch.randn(5, sizes(module)[0])
        before, kept = module(x), snapshot(lm)
        patch = WeightPatch(lm, delta)
        change = x.double() @ delta.dense(f"{name}.weight").T
        torch.testing.assert_close(module(x) - before, change.float(), **NEAR)
        changed = [n for n, p in lm.net.named_parameters() if not torch.equal(p, kept[n])]
        assert changed == [f"{name}.weight"]
        assert patch.lowest_layer == lm.structure.layer_of(name)
        patch.remove()


def test_removing_an_edit_is_bit_exact(lm):
    """After remove, swap and pristine every parameter is bit-exact."""
    states = [snapshot(lm)]
    patches = []
    for _ in range(3):
        patches.append(WeightPatch(lm, two_layers(lm)))
        states.append(snapshot(lm))
    with lm.pristine():
        assert same(lm, states[0])
        with pytest.raises(RuntimeError, match="inside"), lm.pristine():
            raise RuntimeError("inside")
    assert same(lm, states[3])
    patches[2].swap()
    assert same(lm, states[2])
    patches[2].swap()
    assert same(lm, states[3])
    for count in (2, 1, 0):
        patches[count].remove()
        assert same(lm, states[count]) and not same(lm, states[count + 1])
    assert not any(p.requires_grad for p in lm.net.parameters()) and not lm.net.training
    assert not any(m._forward_hooks for m in lm.net.modules())


def test_edits_come_off_newest_first(lm):
    first, second, third = (WeightPatch(lm, two_layers(lm)) for _ in range(3))
    kept = snapshot(lm)
    with pytest.raises(EditError, match=r"2 later edit\(s\) depend on this one.*newest first"):
        first.remove()
    assert same(lm, kept) and lm.handles == [first, second, third]
    for patch in (third, second, first):
        patch.remove()
    with pytest.raises(EditError, match="already been removed"):
        first.remove()


def test_absorbed_edits_are_one(lm):
    """Also where the newer edit touches other parameters and a lower block."""
    before = snapshot(lm)
    name = f"{lm.structure.out_name(1)}.weight"
    older = WeightPatch(
        lm, Delta({name: low(lm.net.get_submodule(lm.structure.out_name(1)))}, {"edits": ["a"]})
    )
    between = snapshot(lm)
    newer = WeightPatch(lm, two_layers(lm))
    after = snapshot(lm)
    with pytest.raises(EditError, match="only the newest edit"):
        newer.absorb(older)
    older.absorb(newer)
    assert lm.handles == [older] and older.lowest_layer == 0 and same(lm, after)
    for parameter in before:
        if parameter in older.delta.updates:
            update = older.delta.dense(parameter)
            stored = update.T if "c_proj" in parameter else update
            change = (after[parameter] - before[parameter]).double()
            torch.testing.assert_close(change, stored, atol=1e-6, rtol=1e-4)
    with lm.pristine():
        assert same(lm, before)
    assert same(lm, after) and not same(lm, between)
    with pytest.raises(EditError, match="already been removed"):
        newer.remove()
    older.remove()
    assert same(lm, before)


def test_active_edits_can_be_restored_after_a_crash(lm):
    """Each is restored bit-exactly, also below later ones."""
    states, patches = [snapshot(lm)], []
    for _ in range(2):
        patches.append(WeightPatch(lm, two_layers(lm)))
        states.append(snapshot(lm))
    saved = copy.deepcopy([patch.state() for patch in patches])
    for patch in reversed(patches):
        patch.remove()
    restored = [WeightPatch.restore(lm, state) for state in saved]
    for count in (2, 1):
        assert same(lm, states[count])
        restored[count - 1].remove()
    assert same(lm, states[0])
    assert restored[0].delta.metadata == patches[0].delta.metadata


def test_tied_embeddings_stay_tied_and_untouched(loaded, tmp_path):
    """FAM-9: also in a state dict, which lists the shared weight twice."""
    lm = loaded("gpt2")
    kept = snapshot(lm)
    patch = WeightPatch(lm, two_layers(lm))
    assert torch.equal(lm.net.transformer.wte.weight, kept["transformer.wte.weight"])
    fresh = type(lm.net)(lm.net.config)
    fresh.load_state_dict(lm.net.state_dict())
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    patch.remove()
    patch = WeightPatch(lm, Delta({"transformer.wte.weight": torch.ones(404, 32)}))
    assert torch.equal(lm.net.lm_head.weight, kept["transformer.wte.weight"] + 1)
    patch.remove()
    assert lm.net.lm_head.weight is lm.net.transformer.wte.weight and same(lm, kept)


def test_half_precision_comes_back_too(tiny_lm):
    lm = tiny_lm("llama")
    lm.net.bfloat16()
    kept = snapshot(lm)
    patch = WeightPatch(lm, two_layers(lm))
    name = f"{lm.structure.out_name(0)}.weight"
    exact = kept[name].double() + patch.delta.dense(name)
    assert torch.equal(lm.net.get_parameter(name), exact.bfloat16())  # rounded once, from float64
    patch.remove()
    assert same(lm, kept)


def test_updates_that_do_not_fit_are_refused(loaded):
    lm = loaded("llama")
    kept = snapshot(lm)
    name, missing = lm.structure.out_name(0), "model.layers.7.mlp.down_proj.weight"
    cases = {
        r"weight has shape \(80, 32\), the parameter \(32, 80\)": {
            f"{name}.weight": torch.ones(80, 32)
        },
        f"has no parameter {missing}": {missing: torch.ones(1)},
        f"has no parameter {name}.bias": {f"{name}.bias": torch.ones(32)},
        "has no parameter weight": {"weight": torch.ones(1)},
    }
    for message, updates in cases.items():
        good = {f"{lm.structure.out_name(1)}.weight": torch.ones(32, 80)}
        with pytest.raises(EditError, match=message):
            WeightPatch(lm, Delta(good | updates))
    assert same(lm, kept) and not lm.handles
    with pytest.raises(EditError, match=r"factors do not fit: \(3, 2\) @ \(1, 4\)"):
        LowRank(torch.ones(3, 2), torch.ones(1, 4))


def test_weights_quantised_in_an_unknown_way_are_refused(tiny_lm):
    lm = tiny_lm("llama")
    module = lm.net.get_submodule(lm.structure.out_name(0))
    module.weight = nn.Parameter(torch.zeros(1280, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedModel, match="Linear stores its weight .* load the model without"
    ):
        WeightPatch(lm, two_layers(lm))


def test_tied_weights_are_written_once(tiny_lm):
    """Whichever name a delta uses; both names in one delta, or in two, add up."""
    lm = tiny_lm("gpt2", tie_word_embeddings=True)
    assert lm.structure.tied
    names = (f"{lm.structure.head}.weight", "transformer.wte.weight")
    head, embedding = (lm.net.get_parameter(name) for name in names)
    base = embedding.data.clone()
    changes = [0.1 * torch.randn(base.shape) for _ in names]
    one, other = (Delta({n: change}) for n, change in zip(names, changes, strict=True))

    def is_base_with(*added):
        torch.testing.assert_close(embedding.data, base + sum(added), rtol=0, atol=1e-6)
        return head.data_ptr() == embedding.data_ptr()

    for delta in (one, other):
        patch = WeightPatch(lm, delta)
        assert is_base_with(*delta.updates.values())
        patch.remove()
        assert torch.equal(embedding.data, base) and head.data_ptr() == embedding.data_ptr()
    both = WeightPatch(lm, add_deltas([one, other]))
    assert is_base_with(*changes)
    with lm.pristine():
        assert torch.equal(embedding.data, base)
    assert is_base_with(*changes)
    both.remove()
    assert torch.equal(embedding.data, base)
    older, newer = WeightPatch(lm, one), WeightPatch(lm, other)
    with pytest.raises(EditError, match="1 later edit"):
        older.remove()
    assert is_base_with(*changes)
    older.absorb(newer)
    with lm.pristine():
        assert torch.equal(embedding.data, base)
    saved = older.state()
    older.remove()
    assert torch.equal(embedding.data, base)
    again = WeightPatch.restore(lm, saved)
    assert is_base_with(*changes)
    again.remove()
    assert torch.equal(embedding.data, base) and head.data_ptr() == embedding.data_ptr()


# --- as data ---


def test_a_saved_delta_gives_identical_logits(lm, tiny_lm, tmp_path):
    """A delta that is saved, loaded and applied to a fresh copy of the base model gives the same logits."""
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    name = f"{lm.structure.mlp_names(0)[0]}.weight"
    dense = {name: full(lm.net.get_submodule(lm.structure.mlp_names(0)[0]))}
    delta = Delta(
        two_layers(lm).updates | dense, {"base": lm.weights_hash, "edits": [["ä {}", "b", "c"]]}
    )
    delta.save(tmp_path / "new" / "edit.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["edit.safetensors"]
    loaded = Delta.load(tmp_path / "new" / "edit.safetensors")
    assert loaded.metadata == delta.metadata and loaded.updates.keys() == delta.updates.keys()
    assert loaded.num_parameters == delta.num_parameters == sum(
        lm.net.get_parameter(n).numel() for n in delta.updates
    )  # fmt: skip
    expected = written(lm, delta, rows)
    fresh = tiny_lm(lm.net.config.model_type)
    assert torch.equal(written(fresh, loaded, rows), expected)


def test_a_delta_of_another_model_is_refused(tiny_lm, tmp_path):
    lm, other = tiny_lm("llama"), tiny_lm("llama", seed=1)
    delta = Delta(two_layers(lm).updates, {"base": lm.weights_hash})
    with pytest.raises(
        EditError, match=f"weights {lm.weights_hash}, not to .* with weights {other.weights_hash}"
    ):
        WeightPatch(other, delta)
    assert not other.handles
    patch = WeightPatch(lm, delta)
    WeightPatch(lm, delta).remove()  # active edits do not change the base model's hash
    patch.remove()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "no such delta file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "not a readable safetensors file"),
        (lambda path: path.write_text("not at all " * 40), "not a readable safetensors file"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "not a delta of this project"),
        (lambda path: save_file({"a": torch.ones(1)}, path, {"format": "corrigenda-delta-0"}),
         f"format 'corrigenda-delta-0', wanted '{FORMAT}'"),
        (lambda path: save_file({"a.left": torch.ones(2, 1)}, path, {"format": FORMAT, "delta": "{}"}),
         "damaged delta file"),
        (lambda path: save_file({"a.dense": torch.ones(1)}, path, {"format": FORMAT, "delta": "{"}),
         "damaged delta file"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files_are_named(damage, message, tmp_path):
    path = tmp_path / "edit.safetensors"
    Delta({"a.weight": LowRank(torch.ones(8, 2), torch.ones(2, 8))}).save(path)
    assert Delta.load(path).dense("a.weight").sum() == 128
    damage(path)
    with pytest.raises(EditError, match=message) as caught:
        Delta.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_deltas_add_up():
    module = nn.Linear(6, 4)
    parts = [
        Delta({"a": low(module, 2), "b": low(module)}, {"base": "x", "notes": [1], "edits": ["p"]}),
        Delta(
            {"a": low(module, 1, dtype=torch.float64)}, {"notes": [2, 3], "edits": ["q"], "more": 1}
        ),
        Delta({"b": full(module), "c": full(module)}, {"base": "y"}),
        Delta({"b": low(module), "c": full(module)}),
    ]
    total = add_deltas(parts)
    assert total.updates["a"].left_Or.shape == (4, 3)
    for name in "abc":
        expected = sum(d.dense(name) for d in parts if name in d.updates)
        torch.testing.assert_close(total.dense(name), expected, atol=1e-6, rtol=1e-5)
    assert total.metadata == {"base": "x", "notes": [1, 2, 3], "edits": ["p", "q"], "more": 1}
    assert parts[0].metadata["notes"] == [1]
    assert add_deltas([]) == Delta({}, {})


def test_keys_go_where_their_edit_goes(lm, tiny_lm, tmp_path):
    """Into sums, files, patches, checkpoints and absorbed patches; they change no answer."""
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    name = f"{lm.structure.out_name(1)}.weight"
    width = lm.structure.inner_width
    parts = [Delta(two_layers(lm).updates, {}, {name: torch.randn(n, width)}) for n in (2, 1)]
    both = torch.cat([part.keys[name] for part in parts])
    plain = written(lm, Delta(parts[0].updates), rows)
    assert torch.equal(written(lm, parts[0], rows), plain)
    total = add_deltas([Delta({}), *parts])
    assert list(total.keys) == [name] and torch.equal(total.keys[name], both)
    total.detach().save(tmp_path / "edit.safetensors")
    assert torch.equal(Delta.load(tmp_path / "edit.safetensors").keys[name], both)
    first = WeightPatch(lm, parts[0])
    first.absorb(WeightPatch(lm, parts[1]))
    assert torch.equal(first.delta.keys[name], both)
    again = WeightPatch.restore(tiny_lm(lm.net.config.model_type), first.state())
    assert torch.equal(again.delta.keys[name], both)
    assert again.delta.updates.keys() == first.delta.updates.keys()
    first.remove()


def test_a_detached_delta_has_no_graph():
    delta = Delta(
        {
            "a": LowRank(torch.ones(2, 1, requires_grad=True), torch.ones(1, 2)),
            "b": torch.ones(2, requires_grad=True),
        }
    )
    cut = delta.detach()
    assert cut.updates["a"].left_Or.requires_grad is cut.updates["b"].requires_grad is False
    assert delta.updates["b"].requires_grad


# --- methods ---


class OneStep(WeightEditor):
    """One gradient step on the MLP output projection of block 1."""

    def __init__(self):
        self.prepared = 0

    def prepare(self, lm):
        self.prepared += 1

    def propose(self, lm, edits):
        name = lm.structure.out_name(1)
        update = torch.zeros(32, lm.structure.inner_width, requires_grad=True)
        delta = Delta({f"{name}.weight": update}, {"notes": ["one step"]})
        rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
        row, position = rows.answer_positions()
        with side_branches(lm.net, [delta], torch.zeros(len(edits), dtype=torch.long)):
            logprob = lm.reuse.tail(rows, 1).logits(row, position).log_softmax(-1)
        wanted = logprob.gather(1, rows.ids_BT[row, position + 1][:, None])
        (gradient,) = torch.autograd.grad(wanted.sum(), update)
        return Delta({f"{name}.weight": 0.1 * gradient}, delta.metadata)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_edit_does_not_depend_on_the_grad_mode_or_autocast(mode, lm):
    """Lightning validates under no_grad or inference mode; autocast would round keys."""
    edits = [Edit("The capital of {} is", "Zorbania", "Quill"), Edit("{} said", "He", "so")]
    editor = OneStep()
    expected = editor.propose(lm, edits).updates
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        handle = editor.edit(lm, edits)
    for name, update in expected.items():
        assert torch.equal(handle.delta.updates[name], update) and update.abs().max() > 0
    assert editor.prepared == 1
    assert handle.delta.metadata == {
        "notes": ["one step"],
        "base": lm.weights_hash,
        "model": lm.name,
        "editor": "OneStep",
        "edits": [["The capital of {} is", "Zorbania", "Quill"], ["{} said", "He", "so"]],
    }
    json.dumps(handle.delta.metadata)
    assert not any(t.is_inference() for t in handle.delta.tensors().values())
    logits(lm, rows)
    handle.remove()


def test_each_proposal_knows_nothing_of_the_others(lm):
    groups = [[Edit("{} is", "Zorbania", "old")], [Edit("{} said", "He", "so")]]
    editor = OneStep()
    for delta, group in zip(editor.propose_each(lm, groups), groups, strict=True):
        for name, update in editor.propose(lm, group).updates.items():
            assert torch.equal(delta.updates[name], update)


def test_editing_mode_turns_off_autocast_and_inference():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), editing_mode():
        x = torch.ones(2, 2, requires_grad=True)
        y = x @ x
        assert y.dtype == torch.float32 and y.requires_grad and not y.is_inference()


def test_a_single_delta_needs_no_owner(lm):
    delta = two_layers(lm)
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    with lm.edits.side_by_side([delta], None):
        found = logits(lm, rows)
    real = rows.mask_BT.bool()
    torch.testing.assert_close(found[real], written(lm, delta, rows)[real], **NEAR)


class Prefixed(TextPatch):
    """Puts a text in front of every prompt."""

    def __init__(self, lm, prefix):
        self.prefix = prefix
        super().__init__(lm)

    def rewrite(self, prompts):
        return [self.prefix + prompt for prompt in prompts]


def test_text_patches_answer_newest_first_and_leave_no_trace(tiny_lm):
    lm = tiny_lm()
    prompt, whole = "capital is", "The capital is"

    def score(text):
        return lm.score([text], ["Quill Port"]).logprob_BM

    plain, both, said = score(prompt), score(whole), lm.generate([whole], 3)
    outer = Prefixed(lm, "The ")
    inner = Prefixed(lm, "")
    assert torch.equal(score(prompt), both)
    assert not torch.equal(both, plain)
    assert lm.generate([prompt], 3) == said
    with lm.pristine():
        assert torch.equal(score(prompt), plain)
    inner.remove()
    assert torch.equal(score(prompt), both)
    outer.remove()
    assert torch.equal(score(prompt), plain)


def test_the_newest_text_patch_rewrites_first(tiny_lm):
    lm = tiny_lm()
    Prefixed(lm, "The ")
    Prefixed(lm, "capital ")
    edited = lm.score(["is"], ["proud"]).logprob_BM
    with lm.pristine():
        assert torch.equal(edited, lm.score(["The capital is"], ["proud"]).logprob_BM)


def test_a_text_patch_set_aside_stays_so_under_pristine(tiny_lm):
    lm = tiny_lm()
    patch = Prefixed(lm, "The ")
    with patch.set_aside():
        assert patch.answering is None
        with lm.pristine():
            assert patch.answering is None
        assert patch.answering is None
    assert patch.answering is not None
    with lm.pristine(), patch.set_aside():
        assert patch.answering is None
    assert patch.answering is not None


def test_handles_save_what_they_consist_of(tiny_lm, tmp_path):
    lm = tiny_lm()
    delta = two_layers(lm)
    written = WeightPatch(lm, delta)
    written.save(tmp_path / "edits" / "St. Louis.safetensors")
    again = Delta.load(tmp_path / "edits" / "St. Louis.safetensors")
    assert {n: t.tolist() for n, t in again.tensors().items()} == {
        n: t.tolist() for n, t in delta.tensors().items()
    }
