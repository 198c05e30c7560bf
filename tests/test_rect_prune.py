"""RECT and PRUNE: what another editor's updates become."""

import logging
import math

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.prune import PRUNE
from corrigenda.modules.editors.rect import RECT, largest_changes
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.delta import Delta, LowRank, svd
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.model.structure import read_parameter, sizes
from corrigenda.modules.statistics.corpus import Corpus

EDITS = [
    Edit("The capital of {} is", "Zorbania", "Quill Port"),
    Edit("{} said that", "Otto Vane", "the ice"),
    Edit("In the year of {} it was called", "Old Humbria", "e"),
    Edit("{} comes from", "The Tin Owl", "Paris"),
]


class Growing(WeightEditor):
    """Rank-one updates, different for each edit, that depend on the weights they are computed on."""

    def __init__(self, size: float, bias: bool = False) -> None:
        self.size, self.bias = size, bias

    def propose(self, lm, edits):
        name = lm.structure.out_name(1)
        weight = read_parameter(lm.net, f"{name}.weight").double()
        left, right = 0, 0
        for edit in edits:
            noise = torch.Generator().manual_seed(len(edit.text))
            right = right + torch.randn(weight.shape[1], generator=noise).double()
        left = weight @ right + right[: len(weight)]
        factors = LowRank(self.size * left[:, None] / left.norm(), right[None] / right.norm())
        updates = {f"{name}.weight": factors}
        if self.bias:
            updates[f"{name}.bias"] = torch.full((len(weight),), 0.1)
        return Delta(updates, {"notes": [{"size": self.size}]})


@pytest.fixture(params=["gpt2", "llama"])
def lm(request, tiny_lm):
    return tiny_lm(request.param)


def where(lm):
    return f"{lm.structure.out_name(1)}.weight"


def sigma_of(lm):
    return torch.linalg.svdvals(read_parameter(lm.net, where(lm)).double())[0].item()


def restrained(update, sigma, base):
    """The whole formula, on all singular values."""
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    low = s.log() / math.log(base) - math.log(sigma) / math.log(base) + sigma
    return u * torch.where(s < sigma, s, low) @ v


# ---------------------------------------------------------------------------- RECT


@pytest.mark.parametrize("keep", [0.0, 0.07, 0.2, 0.5, 1.0])
def test_the_largest_relative_changes_survive(keep):
    """Exactly the requested number of entries survives unchanged; all others have a smaller relative change."""
    update, weight = torch.randn(10, 30), torch.randn(10, 30)
    weight[0, 0] = 0.0
    kept = largest_changes(update, weight, keep)
    survive = kept != 0
    assert survive.sum() == math.ceil(round(keep * 300, 6))
    assert torch.equal(kept[survive], update[survive])
    relative = (update / weight).abs()
    if 0 < keep < 1:
        assert relative[survive].min() >= relative[~survive].max() and survive[0, 0]


def test_the_sign_of_a_small_weight_does_not_matter():
    update, weight = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-2e-8, 1.0, 1.0]])
    assert torch.equal(largest_changes(update, weight, 1 / 3), torch.tensor([[1.0, 0, 0]]))
    assert torch.equal(largest_changes(update, -weight, 1 / 3), torch.tensor([[1.0, 0, 0]]))


def test_rect_regularises_what_another_editor_proposes(lm):
    inner, before = Growing(0.5), hash_weights(lm.net)
    editor, name = RECT(inner, keep=0.25), where(lm)
    whole = inner.propose(lm, EDITS[:1])
    part = editor.propose(lm, EDITS[:1])
    outputs, inputs = whole.dense(name).shape
    kept = part.dense(name, torch.float32)
    assert kept.shape == sizes(lm.net.get_submodule(name.removesuffix(".weight")))[::-1]
    assert (kept != 0).sum() == outputs * inputs / 4
    original = whole.dense(name, torch.float32)
    assert torch.equal(kept[kept != 0], original[kept != 0])
    relative = original.abs() / read_parameter(lm.net, name).abs()
    assert relative[kept != 0].min() > relative[kept == 0].max()
    assert part.metadata == whole.metadata
    assert RECT(inner, keep=1).propose(lm, EDITS[:1]).updates[name].left_Or.shape == (outputs, 1)
    assert not RECT(inner, keep=0).propose(lm, EDITS[:1]).dense(name).any()
    assert hash_weights(lm.net) == before


def test_rect_compares_with_the_weights_as_they_are(lm):
    """Of an edited model, that is with the edited weights."""
    inner, name = Growing(0.5), where(lm)
    edited = WeightPatch(lm, Delta({name: 5 * torch.randn(*read_parameter(lm.net, name).shape)}))
    kept = RECT(inner, 0.1).propose(lm, EDITS[:1]).dense(name)
    relative = inner.propose(lm, EDITS[:1]).dense(name).abs() / read_parameter(lm.net, name).abs()
    assert relative[kept != 0].min() > relative[kept == 0].max()
    edited.remove()


def test_rect_side_by_side_is_one_after_the_other(lm):
    editor, before = RECT(FT([0, 1], steps=4, lr=1e-2), 0.3), hash_weights(lm.net)
    together = editor.propose_each(lm, [[edit] for edit in EDITS])
    for edit, delta in zip(EDITS, together, strict=True):
        alone = editor.propose(lm, [edit])
        for name in alone.updates:  # biases, too
            a, b = alone.dense(name), delta.dense(name)
            assert (a != 0).sum() == (b != 0).sum() == math.ceil(round(0.3 * a.numel(), 6))
            assert (a - b).norm() < 0.05 * a.norm()
    patch = editor.edit(lm, EDITS[:1])
    assert patch.delta.metadata["editor"] == "RECT" and hash_weights(lm.net) != before
    patch.remove()
    assert hash_weights(lm.net) == before


# ---------------------------------------------------------------------------- PRUNE


def test_the_rule_for_singular_values():
    """Continuous at sigma, increasing, inverted exactly, and equal to the two figures of the published example."""
    s = torch.linspace(0.1, 60, 5000).double()
    for base, sigma, figure in ((math.e, 5.0, 7.30), (1.2, 5.0, 17.63), (1.2, 20.0, None)):
        prune = PRUNE(Growing(1), base)
        above = s[s > sigma]
        low = prune._restrain(above, sigma)
        assert (low.diff() > 0).all()
        assert low[0] - sigma < 2 * (above[0] - sigma) / (sigma * math.log(base)) + 1e-9
        if figure:
            assert prune._restrain(torch.tensor(50.0), sigma).item() == pytest.approx(
                figure, abs=5e-3
            )
        restrains = sigma * math.log(base) >= 1
        assert bool((low <= above).all()) == restrains
        torch.testing.assert_close(prune._loosen(low, sigma), above)


def test_nothing_changes_while_all_is_small(lm):
    inner, name = Growing(0.9 * sigma_of(lm), bias=True), where(lm)
    if "gpt2" not in lm.name:
        inner.bias = False
    plain, same = inner.propose(lm, EDITS[:1]), PRUNE(inner).propose(lm, EDITS[:1])
    assert same.updates.keys() == plain.updates.keys()
    assert torch.equal(same.updates[name].left_Or, plain.updates[name].left_Or)
    assert torch.equal(same.updates[name].right_rI, plain.updates[name].right_rI)
    assert same.metadata == plain.metadata | {"restrained": 1.2}


@pytest.mark.parametrize("base", [1.2, math.e, 20.0])
def test_only_large_singular_values_are_restrained(lm, base):
    """The truncated way gives what the whole formula gives; singular vectors stay."""
    sigma, name = sigma_of(lm), where(lm)
    outputs, inputs = read_parameter(lm.net, name).shape
    u, _, v = torch.linalg.svd(torch.randn(outputs, inputs).double(), full_matrices=False)
    values = torch.linspace(4 * sigma, 0.1 * sigma, len(u)).double()
    wanted = restrained(u * values @ v, sigma, base)

    class Fixed(WeightEditor):
        def __init__(self, update):
            self.update = update

        def propose(self, lm, edits):
            return Delta({name: self.update})

    for update in (u * values @ v, LowRank(u * values, v), (u * values @ v).float()):
        got = PRUNE(Fixed(update), base).propose(lm, EDITS[:1])
        torch.testing.assert_close(got.dense(name), wanted, rtol=0, atol=1e-5)
        inner, small = svd(got.updates[name])[0], values <= sigma
        torch.testing.assert_close((inner.T @ u).abs().amax(0), torch.ones(len(u)).double(),
                                   rtol=0, atol=1e-4)  # fmt: skip
        spectrum = ((u.T @ got.dense(name)) * v).sum(1)
        torch.testing.assert_close(spectrum[small], values[small], rtol=0, atol=1e-5)


def test_a_bias_is_left_as_it_is(tiny_lm):
    lm = tiny_lm("gpt2")
    delta = PRUNE(Growing(5 * sigma_of(lm), bias=True)).propose(lm, EDITS[:1])
    bias = delta.updates[f"{lm.structure.out_name(1)}.bias"]
    assert torch.equal(bias, torch.full((32,), 0.1))
    assert svd(delta.updates[where(lm)])[1][0] < 5 * sigma_of(lm)


def raw_stream(lm, inner, edits):
    """The update that a sequence of edits adds up to without restraint."""
    total = 0
    patches = []
    for edit in edits:
        patches.append(inner.edit(lm, [edit]))
        total = total + patches[-1].delta.dense(where(lm))
    for patch in reversed(patches):
        patch.remove()
    return total


@pytest.mark.parametrize("absorbed", [True, False])
def test_a_stream_is_restrained_and_its_edits_do_not_notice(lm, absorbed):
    """After each step f(D) is active, where D is the sum of the same edits without restraint."""
    name, sigma, before = where(lm), sigma_of(lm), hash_weights(lm.net)
    base_weight = read_parameter(lm.net, name).double().clone()
    inner, base = Growing(0.8 * sigma), 5.0
    totals = [raw_stream(lm, inner, EDITS[: n + 1]) for n in range(len(EDITS))]
    assert torch.linalg.matrix_norm(totals[0], 2) < sigma < torch.linalg.matrix_norm(totals[-1], 2)
    patches, editor = [], PRUNE(inner, base)
    for edit, total in zip(EDITS, totals, strict=True):
        patches.append(editor.edit(lm, [edit]))
        if absorbed and len(patches) > 1:
            patches[0].absorb(patches.pop())
        change = read_parameter(lm.net, name).double() - base_weight
        torch.testing.assert_close(change, restrained(total, sigma, base), rtol=0, atol=2e-5)
        in_force = sum(patch.delta.dense(name) for patch in patches)
        torch.testing.assert_close(in_force, change, rtol=0, atol=2e-5)
        assert len(lm.handles) == len(patches)  # nothing of the loosened update is left
    for patch in reversed(patches):
        patch.remove()
    assert hash_weights(lm.net) == before
    with_feedback = []
    for edit in EDITS:  # each edit restrained on its own: another model
        delta = PRUNE(inner, base).propose(lm, [edit])
        delta.metadata.pop("restrained")
        with_feedback.append(WeightPatch(lm, delta))
    change = read_parameter(lm.net, name).double() - base_weight
    assert (change - restrained(totals[-1], sigma, base)).abs().max() > 1e-3
    for patch in reversed(with_feedback):
        patch.remove()


def test_a_stream_resumes(lm):
    """A resumed run needs nothing but the active edits."""
    name, sigma = where(lm), sigma_of(lm)
    inner, patches = Growing(1.5 * sigma), []

    def steps(editor, edits):
        for edit in edits:
            patches.append(editor.edit(lm, [edit]))
            if len(patches) > 1:
                patches[0].absorb(patches.pop())

    steps(PRUNE(inner, 5.0), EDITS)
    wanted = read_parameter(lm.net, name).clone()
    patches.pop().remove()
    steps(PRUNE(inner, 5.0), EDITS[:2])
    state = patches[0].state()
    state["edited"] = {key: tensor.clone() for key, tensor in state["edited"].items()}
    patches.pop().remove()
    patches.append(WeightPatch.restore(lm, state))
    steps(PRUNE(inner, 5.0), EDITS[2:])
    torch.testing.assert_close(read_parameter(lm.net, name), wanted, rtol=0, atol=2e-5)


def test_a_failed_edit_leaves_the_restraint_active(lm):
    class Failing(Growing):
        def propose(self, lm, edits):
            if edits == [EDITS[2]]:
                raise ValueError("no luck")
            return super().propose(lm, edits)

    editor = PRUNE(Failing(2 * sigma_of(lm)), 5.0)
    editor.edit(lm, EDITS[:1])
    before = hash_weights(lm.net)
    with pytest.raises(ValueError, match="no luck"):
        editor.edit(lm, [EDITS[2]])
    assert hash_weights(lm.net) == before and len(lm.handles) == 1


def test_each_edit_is_restrained_on_its_own(tiny_lm, tmp_path):
    """Side by side as one after the other, with ROME inside, whose updates are large here."""
    text = [f"{a} said {b} of {c}" for a in ("He", "She", "Otto") for b in ("ice", "a lake", "rain")
            for c in ("the town", "Zorbania", "the year", "an owl")]  # fmt: skip
    (tmp_path / "text.txt").write_text("\n".join(text))
    lm = tiny_lm("gpt2")
    rome = ROME(layer=0, steps=4, contexts=[], corpus=Corpus(str(tmp_path / "text.txt"), 900))
    name, groups = f"{lm.structure.out_name(0)}.weight", [[edit] for edit in EDITS]
    plain = rome.propose_each(lm, groups)
    sigma = sorted(svd(delta.updates[name])[1][0].item() for delta in plain)[1] / 1.5
    editor = PRUNE(rome, 5.0)
    editor._sigma[lm.weights_hash, name] = sigma
    together = editor.propose_each(lm, groups)
    assert [delta.metadata["notes"] for delta in together] == [d.metadata["notes"] for d in plain]
    changed = 0
    for group, delta, whole in zip(groups, together, plain, strict=True):
        wanted = restrained(whole.dense(name), sigma, 5.0)
        torch.testing.assert_close(delta.dense(name), wanted, rtol=0, atol=1e-6)
        alone = editor.propose(lm, group).dense(name)
        assert (alone - delta.dense(name)).norm() < 1e-3 * alone.norm()
        changed += not torch.equal(delta.dense(name), whole.dense(name))
    assert changed >= 3


def test_a_rule_that_would_strengthen_is_said_to(lm, caplog):
    sigma = sigma_of(lm)
    weak, strong = math.exp(0.5 / sigma), math.exp(2 / sigma)
    with caplog.at_level(logging.WARNING):
        PRUNE(Growing(0.1), strong).propose(lm, EDITS[:1])
        assert not caplog.messages
        PRUNE(Growing(0.1), weak).propose(lm, EDITS[:1])
    (message,) = caplog.messages
    assert f"choose a base above {math.exp(1 / sigma):.2f}" in message


@pytest.mark.parametrize("base", [1.0, 0.5])
def test_settings_that_make_no_sense(base):
    with pytest.raises(ValueError, match="base must be above 1"):
        PRUNE(Growing(1), base)
    with pytest.raises(ValueError, match="keep must be between 0 and 1, got 40"):
        RECT(Growing(1), keep=40)


# ---------------------------------------------------------------------------- as they are run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["RECT", "PRUNE"])
@pytest.mark.parametrize("schedule", ["each", "epoch", "stream"])
def test_by_the_command_line(corrigenda, tiny_folder, data_files, tmp_path, wrapper, schedule):
    args = ["fit" if schedule == "stream" else "validate", "--model", "EditingModule",
            "--model.lm.name", tiny_folder("gpt2"), "--data", "ZsRE", "--data.path", data_files.zsre,
            "--data.limit", "2", "--data.batch_size", "1", "--edit.schedule", schedule,
            "--edit.editor", wrapper, "--edit.editor.editor", "FT",
            "--edit.editor.editor.layers", "[1]", "--edit.editor.editor.steps", "2",
            "--wandb", "off", "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false", "--run_dir", "a"]  # fmt: skip
    assert corrigenda(*args) == 0
    files = list((tmp_path / "a" / "edits").glob("*.safetensors"))
    assert len(files) == (1 if schedule == "epoch" else 2)
    for file in files:
        delta = Delta.load(file)
        assert delta.metadata["editor"] == wrapper
        weight = delta.dense("transformer.h.1.mlp.c_proj.weight")
        if wrapper == "RECT":
            assert (weight != 0).sum() == math.ceil(round(0.4 * weight.numel(), 6))
        else:
            assert delta.metadata["restrained"] == 1.2
