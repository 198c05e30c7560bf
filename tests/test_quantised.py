"""Editing a base model in 4 or 8 bit: dequantised, edited, left in floating point or requantised, and restored."""

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.kn import KN
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.delta import Delta, EditError, LowRank
from corrigenda.modules.model.hooks import capture
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import ModelError, hash_weights
from corrigenda.modules.model.structure import is_quantised, read_parameter, read_weight, sizes
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.moments import Moments

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}  # in whole blocks
KINDS = ("nf4", "fp4", "int8")
EDITS = [
    Edit("The capital of {} is", "Zorbania", "Quill Port"),
    Edit("{} said that", "Otto Vane", "the ice"),
]
PROMPTS, TARGETS = ["The capital of Zorbania is", "He said"], ["Quill Port", "that"]


@pytest.fixture(scope="module", autouse=True)
def quantised(tiny_folder):
    """``quantised(kind, family)``: a tiny model in 4 or 8 bit."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    try:
        LanguageModel(str(tiny_folder("llama", **WIDE)), quantization="nf4")
    except (RuntimeError, NotImplementedError) as error:  # no backend for the processor
        pytest.skip(f"bitsandbytes does not run here: {error}")

    def load(kind="nf4", family="llama", **options):
        folder = str(tiny_folder(family, **WIDE))
        return LanguageModel(folder, quantization=kind, **options)

    return load


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    names = ("The town", "He", "A writer", "Otto", "Zorbania", "Mira", "The sea", "She")
    things = ("ice", "table", "capital", "story of the year", "lake", "old port")
    lines = [f"{a} said {b} of {c}" for a in names for b in things for c in names]
    path.write_text("\n".join(lines), encoding="utf-8")
    return Corpus(str(path), tokens=3000)


def a_delta(lm, layer=1, size=0.3, bias=False):
    name = lm.structure.out_name(layer)
    inputs, outputs = sizes(lm.net.get_submodule(name))
    left, right = torch.randn(outputs, 2), torch.randn(2, inputs)
    weight = read_weight(lm.net.get_submodule(name))
    scale = size * weight.norm() / (left @ right).norm()
    updates = {f"{name}.weight": LowRank(scale * left, right)}
    if bias:
        updates[f"{name}.bias"] = 0.2 * torch.randn(outputs)
    return Delta(updates)


def logprobs(lm, deltas=None):
    owners = None if deltas is None else [0, 0]
    return lm.score(PROMPTS, TARGETS, deltas, owners).logprob_BM


# ---------------------------------------------------------------------------- one view of a weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_weight_that_is_read_is_the_one_that_runs(quantised, tiny_lm, kind, base):
    lm, plain = quantised(kind, base), tiny_lm(base, **WIDE)
    for name in lm.structure.mlp_names(1):
        module = lm.net.get_submodule(name)
        assert is_quantised(module)
        weight, true = read_weight(module), read_parameter(plain.net, f"{name}.weight")
        assert weight.shape == true.shape == sizes(module)[::-1] and weight.is_floating_point()
        assert 0 < (weight - true).norm() / true.norm() < (0.02 if kind == "int8" else 0.16)
        x = torch.randn(7, sizes(module)[0])
        y = module(x) - (0 if module.bias is None else module.bias)
        error = (y - x @ weight.T).norm() / y.norm()
        assert error < (0.02 if kind == "int8" else 1e-5)  # int8 also rounds its input


@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_change_by_being_used(quantised, kind):
    lm = quantised(kind)
    before = hash_weights(lm.net)
    logprobs(lm)
    lm.net.state_dict()
    assert hash_weights(lm.net) == before == lm.weights_hash == quantised(kind).weights_hash
    scale = lm.net.get_submodule(lm.structure.out_name(0))
    if kind == "int8":
        scale.state.SCB[0] *= 1.5
    else:
        scale.weight.quant_state.absmax[0] *= 1.5
    assert hash_weights(lm.net) != before  # quantised numbers mean nothing without their scales


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_edited_layer_stays_in_floating_point(quantised, kind, base):
    lm = quantised(kind, base)
    name = lm.structure.out_name(1)
    module, before, untouched = lm.net.get_submodule(name), lm.weights_hash, logprobs(lm)
    weight, data = read_weight(module).clone(), module.weight.data.clone()
    delta = a_delta(lm, bias=base == "gpt2")
    beside = logprobs(lm, [delta])
    patch = WeightPatch(lm, delta)
    edited = lm.net.get_submodule(name)
    assert type(edited) is torch.nn.Linear and edited.weight.dtype == lm.net.dtype
    wanted = weight + delta.dense(f"{name}.weight", torch.float32)
    torch.testing.assert_close(edited.weight, wanted, rtol=0, atol=1e-6)
    close = {"rtol": 0, "atol": 0.1 if kind == "int8" else 1e-4}
    torch.testing.assert_close(logprobs(lm), beside, **close)
    assert (beside - untouched).abs().max() > 0.2
    with lm.pristine():
        assert lm.net.get_submodule(name) is module and torch.equal(logprobs(lm), untouched)
    assert not patch.delta.metadata and hash_weights(lm.net) != before
    patch.remove()
    assert lm.net.get_submodule(name) is module and torch.equal(module.weight.data, data)
    assert hash_weights(lm.net) == before and torch.equal(logprobs(lm), untouched)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_edited_layer_can_be_requantised(quantised, kind, base):
    """What is lost on the way is in the metadata."""
    lm = quantised(kind, base, requantize=True)
    name = lm.structure.out_name(1)
    module, before, untouched = lm.net.get_submodule(name), lm.weights_hash, logprobs(lm)
    weight = read_weight(module).double()
    lost = []
    for size in (0.02, 0.3):  # a small update drowns in the steps between quantised values
        delta = a_delta(lm, size=size)
        update = delta.dense(f"{name}.weight")
        patch = WeightPatch(lm, delta)
        edited = lm.net.get_submodule(name)
        assert type(edited) is type(module) and edited.weight.dtype == module.weight.dtype
        assert edited.bias is module.bias
        error = ((read_weight(edited).double() - weight - update).norm() / update.norm()).item()
        assert patch.delta.metadata["requantized"] == [{f"{name}.weight": pytest.approx(error)}]
        x = torch.randn(7, sizes(module)[0])
        y = edited(x) - (0 if module.bias is None else module.bias)
        tolerance = 0.02 if kind == "int8" else 1e-5
        assert (y - x @ read_weight(edited).T).norm() < tolerance * y.norm()
        lost.append(error)
        patch.remove()
        assert lm.net.get_submodule(name) is module and hash_weights(lm.net) == before
    assert lost[0] > 2 * lost[1] > 0
    assert torch.equal(logprobs(lm), untouched)


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_on_top_of_each_other(quantised, kind, requantize):
    lm = quantised(kind, requantize=requantize)
    before, states = lm.weights_hash, [hash_weights(lm.net)]
    name = f"{lm.structure.out_name(1)}.weight"
    patches = []
    for _ in range(3):
        patches.append(WeightPatch(lm, a_delta(lm)))
        states.append(hash_weights(lm.net))
    assert len(set(states)) == 4
    patches.pop().remove()
    assert hash_weights(lm.net) == states[2]
    patches[0].absorb(patches[1])
    assert hash_weights(lm.net) == states[2]
    if requantize:  # of both
        assert len(patches[0].delta.metadata["requantized"]) == 2
    with lm.pristine():
        assert hash_weights(lm.net) == before
    saved = patches[0].state()
    saved["edited"] = {name: tensor.clone() for name, tensor in saved["edited"].items()}
    patches[0].remove()
    assert hash_weights(lm.net) == before
    again = WeightPatch.restore(lm, saved)
    if kind == "fp4" and requantize:  # it has two zeros, which are the same number
        assert torch.equal(read_parameter(lm.net, name), saved["edited"][name])
    else:
        assert hash_weights(lm.net) == states[2]
    again.remove()
    assert hash_weights(lm.net) == before


def test_a_state_below_a_later_edit(quantised):
    lm = quantised(requantize=True)
    older = WeightPatch(lm, a_delta(lm))
    name, written = lm.structure.out_name(1), hash_weights(lm.net)
    value = read_weight(lm.net.get_submodule(name)).clone()
    newer = WeightPatch(lm, a_delta(lm))
    saved = older.state()
    assert torch.equal(saved["edited"][f"{name}.weight"], value)
    newer.remove()
    older.remove()
    WeightPatch.restore(lm, saved)
    assert hash_weights(lm.net) == written


def test_blocks_across_rows_are_refused(quantised, tiny_folder):
    with pytest.raises(ModelError, match="80 inputs, no multiple of the block size 64; use int8"):
        folder = tiny_folder("llama", hidden_size=64, intermediate_size=80)
        LanguageModel(str(folder), quantization="nf4")


def test_an_update_of_another_size_is_refused(quantised):
    lm = quantised()
    name = f"{lm.structure.out_name(1)}.weight"
    with pytest.raises(EditError, match=r"shape \(128, 64\), the parameter \(64, 128\)"):
        WeightPatch(lm, Delta({name: torch.zeros(128, 64)}))
    assert not lm.handles


# ---------------------------------------------------------------------------- methods


@pytest.mark.parametrize("kind", KINDS)
def test_rome_writes_its_value(quantised, tiny_lm, corpus, kind):
    """W' k1 = v* with the dequantised W: keys, values and moments are those of the quantised model."""
    lm = quantised(kind, "gpt2")
    before, name = lm.weights_hash, lm.structure.out_name(1)
    editor = ROME(layer=1, steps=6, contexts=[(3, 2)], corpus=corpus)
    weight = read_weight(lm.net.get_submodule(name)).double()
    editor.prepare(lm)
    plain = tiny_lm("gpt2", **WIDE)
    ours, theirs = (Moments(m, corpus).moment(1) for m in (lm, plain))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.5  # its own keys, close to the base's
    together = editor.propose_each(lm, [[edit] for edit in EDITS])
    for edit, delta in zip(EDITS, together, strict=True):
        (note,) = delta.metadata["notes"]
        change = delta.dense(f"{name}.weight")
        assert note["change"] == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-4)
        module = lm.net.get_submodule(name)
        ids = torch.tensor(lm.tokens.encode([edit.text]))
        with torch.no_grad(), capture({name: module}, stop=True) as seen:
            lm.net(ids)
        key = seen[name][0][0, lm.tokens.subject_end(edit)]
        patch = editor.edit(lm, [edit])
        alone = patch.delta.dense(f"{name}.weight")
        tolerance = 0.2 if kind == "int8" else 1e-3  # rows of a batch share the rounding of inputs
        assert (alone - change).norm() < tolerance * change.norm()
        with torch.no_grad(), capture({name: lm.net.get_submodule(name)}, stop=True) as edited:
            lm.net(ids)
        got = edited[name][1][0, lm.tokens.subject_end(edit)]
        bias = module.bias
        torch.testing.assert_close(
            got.double(), (weight + alone) @ key.double() + bias, rtol=0, atol=1e-3
        )
        gained = lm.score([edit.text], [edit.target_new]).logprob_BM.sum()
        with lm.pristine():
            gained -= lm.score([edit.text], [edit.target_new]).logprob_BM.sum()
        assert gained > 0.5
        with pytest.raises(EditError, match="with its dtype and quantization"):
            WeightPatch(plain, patch.delta)
        patch.remove()
        assert hash_weights(lm.net) == before


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_with_quantised_weights(quantised, kind):
    lm = quantised(kind, "gpt2")
    before = lm.weights_hash
    patch = FT([1, 2], projections="mlp", steps=15, lr=2e-2).edit(lm, EDITS[:1])
    kinds = {name.rpartition(".")[2] for name in patch.delta.updates}
    assert kinds == {"weight", "bias"}
    assert lm.score([EDITS[0].text], [EDITS[0].target_new]).exact_B.all()
    patch.remove()
    assert hash_weights(lm.net) == before


def test_knowledge_neurons_of_a_quantised_base_are_turned_off(quantised):
    lm = quantised("nf4")
    before = logprobs(lm)
    patch = KN(action="suppress", points=4).edit(lm, EDITS[:1])
    for layer, j, _ in patch.delta.metadata["notes"][0]["neurons"]:
        assert not read_weight(lm.net.get_submodule(lm.structure.out_name(layer)))[:, j].any()
    assert not torch.equal(logprobs(lm), before)
    patch.remove()
    assert torch.equal(logprobs(lm), before)
