"""T-Patcher and CaliNET: neurons that are nothing until they fire, and what each of them learns from."""

import copy

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.neurons import SideNeurons
from corrigenda.modules.editors.calinet import CaliNET
from corrigenda.modules.editors.t_patcher import TPatcher, scope_loss
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import read_states
from tests.samples import prompts_and_targets, scores_of

EDITS = [Edit("The capital of {} is", "Ruritania", "in"), Edit("{} speak", "He", "the house")]
PROMPTS, TARGETS = prompts_and_targets(EDITS)


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon"])
def lm(request, tiny_lm):
    return tiny_lm(request.param, num_hidden_layers=3)


@pytest.fixture
def make(data_files):
    def editor(**changes):
        settings = {"steps": 60, "lr": 3e-2, "corpus": Corpus(data_files.text, 300)}
        return TPatcher(**(settings | changes))

    return editor


answers = scores_of(PROMPTS, TARGETS)


def neurons(lm, layer, count):
    """Random neurons beside one MLP."""
    made = SideNeurons.beside(lm, [layer])
    made.grow([layer] * count)
    width = lm.structure.width
    made.replace(torch.randn(count, width), torch.randn(count), torch.randn(count, width))
    return made


# ---------------------------------------------------------------------------- neurons


def test_inactive_or_zero_neurons_change_nothing(lm):
    """A neuron with a negative pre-activation on all tokens, or with value zero, leaves the output bit-exact."""
    base = answers(lm)
    for silent in (True, False):
        made = neurons(lm, 1, 4)
        if silent:
            made.bias_P -= 1e4
        else:
            made.value_PD.zero_()
        patch = ModulePatch(lm, made)
        assert torch.equal(answers(lm), base)
        patch.remove()
    ModulePatch(lm, neurons(lm, 1, 4))
    assert not torch.equal(answers(lm), base)


def test_neurons_are_a_wider_mlp(tiny_lm):
    """In a family whose own neurons are relus: the same as widening both of its linear layers."""
    lm = tiny_lm("opt", num_hidden_layers=3)
    wide = copy.deepcopy(lm)
    made = neurons(lm, 1, 5)
    block = wide.net.get_submodule(wide.structure.block_name(1))
    with torch.no_grad():
        for linear, weight in (
            (block.fc1, torch.cat([block.fc1.weight, made.key_PD])),
            (block.fc2, torch.cat([block.fc2.weight, made.value_PD.T], 1)),
        ):
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        bias = torch.cat([block.fc1.bias, made.bias_P])
        block.fc1.bias = torch.nn.Parameter(bias, requires_grad=False)
    ModulePatch(lm, made)
    torch.testing.assert_close(answers(lm), answers(wide), atol=1e-4, rtol=0)


def test_a_pass_that_nobody_announced_runs_them_too(llama):
    ids = torch.tensor(llama.tokens.encode(PROMPTS[:1]))
    with torch.no_grad():
        base = llama.net(ids).logits
        ModulePatch(llama, neurons(llama, 1, 4))
        assert not torch.equal(llama.net(ids).logits, base)


# ---------------------------------------------------------------------------- T-Patcher


def test_a_neuron_per_mistake_at_its_own_position(lm, make):
    """The activation on its own input is 1; P neurons add P (2 D + 1) parameters, and a layer index each."""
    patch = make(max_neurons=3).edit(lm, EDITS[1:])
    made, layer = patch.adapter, lm.structure.num_layers - 1
    rows = lm.tokens.rows(PROMPTS[1:], TARGETS[1:])
    with lm.pristine():
        ((_, h),) = read_states(lm, rows, lm.structure.mlp_names(layer)[0])
        greedy = lm.score(PROMPTS[1:], TARGETS[1:])
    wrong = (greedy.greedy_BM != greedy.target_BM)[0].nonzero()[:, 0][:3]
    own = h[0, rows.start_B[0] - 1 + wrong]
    assert made.layer_P.tolist() == [layer] * len(wrong)
    torch.testing.assert_close(
        (own * made.key_PD).sum(1) + made.bias_P, torch.ones(len(wrong)), atol=1e-4, rtol=0
    )
    width = lm.structure.width
    numbers = sum(t.numel() for t in (made.key_PD, made.bias_P, made.value_PD))
    assert numbers == len(wrong) * (2 * width + 1)
    assert made.seen_MD.shape == (int(rows.length_B[0]), width)


def test_out_of_scope_the_base_is_bit_exact(llama, make, data_files):
    """No token of the text that the neurons must not fire on fires them."""
    with open(data_files.text, encoding="utf-8") as file:
        prompts = [next(file).strip() for _ in range(8)]
    base = answers(llama, prompts, ["x"] * 8)
    patch = make(steps=300).edit(llama, EDITS)
    assert [note["fired_by"] for note in patch.metadata["notes"]] == [0, 0]
    assert torch.equal(answers(llama, prompts, ["x"] * 8), base)


def test_earlier_neurons_stay_and_are_silent_on_earlier_inputs(llama, make):
    editor = make(steps=300)
    first = editor.edit(llama, EDITS[:1])
    second = editor.edit(llama, EDITS[1:])
    count = len(first.adapter.bias_P)
    for name in ("key_PD", "bias_P", "value_PD"):
        old, new = getattr(first.adapter, name), getattr(second.adapter, name)
        assert torch.equal(new[:count], old) and len(new) > count
    newer = second.adapter.key_PD[count:], second.adapter.bias_P[count:]
    assert not (first.adapter.seen_MD @ newer[0].T + newer[1] > 0).any()


def test_what_is_right_needs_no_patch(llama, make):
    prompts = ["The sea", "He was", "It is", "The town of", "In the", "They said"]
    own = [(p, t.strip()) for p, t in zip(prompts, llama.generate(prompts, 1), strict=True)]
    own = [(p, t) for p, t in own if t and llama.score([p], [t]).exact_B[0]]
    assert own
    patch = make().edit(llama, [Edit.from_text(p, p.split()[0], t) for p, t in own])
    assert patch.metadata["notes"] == [{"neurons": 0}] * len(own)
    assert not len(patch.adapter.bias_P) and len(patch.adapter.seen_MD)


def test_the_same_prompt_can_be_edited_again(llama, make):
    """Its own inputs are among the earlier edit's; they do not stand in the way."""
    editor = make(steps=200)
    editor.edit(llama, EDITS[:1])
    again = Edit(EDITS[0].prompt, EDITS[0].subject, "on")
    before = llama.score(PROMPTS[:1], ["on"]).logprob_BM
    patch = editor.edit(llama, [again])
    assert llama.score(PROMPTS[:1], ["on"]).logprob_BM > before + 0.3
    assert patch.metadata["notes"][-1]["neurons"] == 1


def test_the_loss_of_scope():
    others = torch.tensor([[-3.0, 0.5], [1.0, -9.0]])
    wanted = (others - 1 + 3).exp().mean() + (others + 3).exp().mean()
    torch.testing.assert_close(scope_loss(others), wanted)
    assert scope_loss(torch.zeros(0, 2)) == 0
    many = torch.cat([torch.full((1000, 1), 2.0), torch.full((5000, 1), -50.0)])
    torch.testing.assert_close(scope_loss(many), scope_loss(many[:1000]))


# ---------------------------------------------------------------------------- CaliNET


def calinet(**changes):
    settings = {"layers": [1, 2], "slots": 8, "steps": 30, "lr": 1e-2, "contexts": [(3, 2)]}
    return CaliNET(**(settings | changes))


def test_untrained_slots_change_nothing(lm):
    """The first loss is that of the unedited model."""
    base = answers(lm)
    patch = calinet(steps=1, stop_loss=1e9).edit(lm, EDITS)
    made = patch.adapter
    assert made.layer_P.tolist() == [1] * 8 + [2] * 8 and made.key_PD.any()
    assert not made.value_PD.any() and not made.bias_P.any()
    assert torch.equal(answers(lm), base)


def test_all_edits_are_trained_together(lm):
    before = lm.score(PROMPTS, TARGETS).logprob_BM.sum(1)
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    patch = calinet(steps=60).edit(lm, EDITS)
    assert (lm.score(PROMPTS, TARGETS).logprob_BM.sum(1) > before + 1).all()
    assert all(torch.equal(p, kept[name]) for name, p in lm.net.named_parameters())
    assert patch.metadata["notes"][0]["nll"] < 6


def test_a_further_call_trains_further_slots(llama):
    first = calinet().edit(llama, EDITS[:1])
    second = calinet().edit(llama, EDITS[1:])
    assert len(second.adapter.bias_P) == 32
    for name in ("key_PD", "value_PD", "layer_P"):
        assert torch.equal(getattr(second.adapter, name)[:16], getattr(first.adapter, name))
    assert not torch.equal(second.adapter.key_PD[16:], second.adapter.key_PD[:16])


def test_a_pass_is_over_every_prompt_in_every_context(llama):
    editor = calinet(batch_size=4)
    editor.prepare(llama)
    batches = editor._batches(llama, EDITS, torch.Generator().manual_seed(0))
    assert [len(batch.owner_R) for batch in batches] == [4, 2]
    assert len(editor._contexts) == 3 and editor._contexts[0] == ""
