"""WISE: what goes through a side memory and what does not, masks, merging, and the loss of its margins."""

import math

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editors.wise import WISE, SideMemories, activation, ties
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import read_states, unrelated_prompts
from tests.samples import OTHERS, prompts_and_targets, scores_of
from tests.samples import SHORT_EDITS as EDITS

PROMPTS, TARGETS = prompts_and_targets(EDITS)


@pytest.fixture
def make(data_files):
    """A quick WISE; on a random model everything is about everything, so thresholds start high."""

    def editor(**changes):
        quick = {"steps": 15, "lr": 0.3, "contexts": [(3, 2)], "num_prompts": 8, "act_ratio": 1.0}
        return WISE(1, corpus=Corpus(data_files.text), **(quick | changes))

    return editor


answers = scores_of(PROMPTS, TARGETS)


def concerns(lm, patch, prompts, memory=0):
    """Each prompt alone, from a plain forward."""
    found = []
    for prompt in prompts:
        ((_, x),) = read_states(lm, lm.tokens.rows([prompt]), patch.adapter.sites[0])
        found.append((x[0] @ patch.adapter.delta_SOI[memory].T).norm(dim=-1).mean())
    return torch.stack(found)


# ---------------------------------------------------------------------------- by hand


@pytest.fixture
def memories():
    """Two memories on the plane: the first answers to the first input, the second to the second."""
    made = SideMemories(["x"], inputs=2, outputs=1)
    for column in range(2):
        made.add_memory()
        made.delta_SOI[column, 0, column] = 1.0 + column
    made.threshold_S = torch.tensor([1.0, 1.0])
    return made


def test_a_prompt_goes_where_it_concerns_most(memories):
    x = torch.tensor([[[2.0, 0], [0, 0]], [[2.0, 2], [2, 2]], [[0.5, 0.4], [0.5, 0.4]]])
    prompt = torch.ones(3, 2).bool()
    assert activation(memories.delta_SOI[0], x, prompt).tolist() == [1.0, 2.0, 0.5]
    assert activation(memories.delta_SOI[1], x, prompt).tolist() == [0.0, 4.0, pytest.approx(0.8)]
    assert memories.route(x, prompt).tolist() == [0, 1, -1]
    memories.threshold_S = torch.tensor([1.0, 5.0])  # the nearer one does not let it in
    assert memories.route(x, prompt).tolist() == [0, 0, -1]


def test_routing_depends_on_the_prompt_and_holds_for_generated_tokens(memories):
    x = torch.tensor([[[9.0, 9], [2, 0], [0, 9]]])  # padding, prompt, target
    batch = PromptBatch(torch.tensor([[False, True, False]]))
    y = torch.zeros(1, 3, 1)
    assert memories("x", x, y, batch).flatten().tolist() == [9.0, 2.0, 0.0]
    later = torch.tensor([[[1.0, 7.0]]])
    assert memories("x", later, y[:, :1], batch).flatten().tolist() == [1.0]
    out = PromptBatch(torch.tensor([[False, False, True]]))
    assert memories("x", torch.zeros(1, 3, 2), y, out) is y


def test_ties_of_one_memory_with_itself():
    delta = torch.randn(4, 6)
    torch.testing.assert_close(ties(torch.stack([delta] * 3), 1.0), delta)


def test_ties_trims_elects_and_averages():
    a, b = torch.tensor([[4.0, 0.1, -3.0, 2.0]]), torch.tensor([[2.0, 0.2, 5.0, -1.0]])
    assert ties(torch.stack([a, b]), 0.75).tolist() == [[3.0, pytest.approx(0.0), 5.0, 2.0]]
    assert ties(torch.stack([a, b]), 0.25).tolist() == [[4.0, 0.0, 5.0, 0.0]]


# ---------------------------------------------------------------------------- in a model


def test_a_memory_at_its_start_changes_nothing_either_way(lm, make):
    base = answers(lm)
    editor = make()
    memory = editor.empty(lm)
    memory.add_memory()
    for threshold in (0.0, math.inf):
        memory.threshold_S = torch.tensor([threshold])
        patch = ModulePatch(lm, memory)
        assert torch.equal(answers(lm), base)
        patch.remove()


def test_an_edit_is_learned_within_its_mask_and_bounds(lm, make):
    for bound in (1.0, 0.01):
        editor = make(norm_constraint=bound, act_ratio=0.9)
        before = lm.score(PROMPTS[:1], TARGETS[:1]).logprob_BM[0, 0]
        patch = editor.edit(lm, EDITS[:1])
        delta, mask = patch.adapter.delta_SOI[0], editor._mask(patch.adapter)
        assert 0.15 < mask.float().mean() < 0.25
        assert not delta[~mask].any() and delta[mask].any() and delta.abs().max() <= bound
        if bound == 1.0:
            assert lm.score(PROMPTS[:1], TARGETS[:1]).logprob_BM[0, 0] > before + 1
        else:
            assert delta.abs().max() == bound
        patch.remove()


def test_below_all_thresholds_the_base_is_bit_exact(lm, make):
    """Prompts that activate a memory enough are not."""
    prompts, targets = PROMPTS + OTHERS, TARGETS + TARGETS
    base = answers(lm, prompts, targets)
    patch = make().edit(lm, EDITS[:1])
    size = concerns(lm, patch, prompts)
    threshold = patch.adapter.threshold_S[0]
    torch.testing.assert_close(threshold, size[0], rtol=1e-4, atol=0)  # act_ratio is 1
    patch.adapter.threshold_S[0] = threshold = 0.5 * (size.median() + size.sort().values[3])
    after = answers(lm, prompts, targets)
    moved = (after - base).abs().amax((1, 2)) > 0
    assert torch.equal(moved, size >= threshold) and moved.any() and not moved.all()
    assert torch.equal(after[~moved], base[~moved])
    patch.remove()
    assert torch.equal(answers(lm, prompts, targets), base)


def test_the_threshold_is_a_part_of_the_least_concern(llama, make):
    patch = make(act_ratio=0.5, together=3).edit(llama, EDITS)
    least = concerns(llama, patch, PROMPTS).min()
    torch.testing.assert_close(patch.adapter.threshold_S[0], 0.5 * least, rtol=1e-4, atol=0)
    assert patch.adapter.count_S.tolist() == [3]
    notes = [note["concern"] for note in patch.metadata["notes"]]
    torch.testing.assert_close(torch.tensor(notes), concerns(llama, patch, PROMPTS))


def test_the_margins_are_what_the_docstring_says(llama, make):
    editor = make(margins=(0.1, 2.0, 1.5), unit=0.5, steps=4)
    patch = editor.edit(llama, EDITS[:1])
    delta = patch.adapter.delta_SOI[0]
    prompts = [context + PROMPTS[0] for context in editor._contexts]
    inside = concerns(llama, patch, prompts) / 0.5
    outside = editor._unrelated.activation(delta) / 0.5
    assert editor.unit == 0.5 and len(outside) == 8
    loss = (outside - 0.1).relu().mean() + (2.0 - inside).relu().mean()
    loss += (1.5 - (inside - outside.mean())).relu().mean()
    note = patch.metadata["notes"][0]
    assert note["loss"] - note["nll"] == pytest.approx(0.5 * loss.item(), abs=1e-4)
    scores = llama.score(prompts, TARGETS[:1] * len(prompts))
    patch.adapter.threshold_S[0] = 0.0  # all of them through the memory, as in learning
    scores = llama.score(prompts, TARGETS[:1] * len(prompts))
    assert note["nll"] == pytest.approx(-scores.logprob_BM.mean().item(), abs=1e-4)


def test_the_unit_is_the_size_of_an_output(lm, make):
    editor = make()
    editor.prepare(lm)
    site, sizes = lm.structure.out_name(1), []
    for prompt in unrelated_prompts(editor.corpus, 8, lm):
        ((_, y),) = read_states(lm, lm.tokens.rows([prompt]), site, output=True)
        sizes += y[0].norm(dim=-1).tolist()
    assert editor.unit == pytest.approx(sorted(sizes)[(len(sizes) - 1) // 2], rel=1e-4)


def test_margins_part_an_edit_from_the_unrelated(llama, make, monkeypatch):
    """With them an edit concerns its memory more than an unrelated prompt does than without them."""
    gaps = []
    for _ in range(2):
        editor = make(steps=60, lr=0.1, stop_loss=1e-6)
        patch = editor.edit(llama, EDITS[:1])
        outside = editor._unrelated.activation(patch.adapter.delta_SOI[0]).mean()
        gaps.append(concerns(llama, patch, PROMPTS[:1])[0] / outside)
        patch.remove()
        monkeypatch.setattr(WISE, "_margins", lambda self, delta_OI, inside: 0 * delta_OI.sum())
    assert gaps[0] - 1 > 1.4 * (gaps[1] - 1), gaps


def test_generation_keeps_the_way_of_its_prompt(lm, make, uncached):
    patch = make().edit(lm, EDITS[:1])
    prompts = PROMPTS + OTHERS
    size = concerns(lm, patch, prompts)
    patch.adapter.threshold_S[0] = 0.5 * (size.median() + size.sort().values[3])
    for prompt, text in zip(prompts, lm.generate(prompts, 6), strict=True):
        assert uncached(lm, prompt, 6) == text


def test_memories_fill_up_and_are_merged(llama, make):
    editor = make(save_freq=2, merge_freq=4, steps=3)
    edits = [*EDITS, *(Edit("{} is", subject, "on") for subject in ("He", "The town", "It"))]
    base, kept, masks = answers(llama), [], []
    for edit in edits:
        patch = editor.edit(llama, [edit])
        kept.append((answers(llama), patch.adapter.count_S.tolist()))
        masks.append(editor._mask(patch.adapter))
    assert [count for _, count in kept] == [[1], [2], [2, 1], [4], [4, 1], [4, 2]]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    before = llama.handles[2].adapter
    assert not before.delta_SOI[1][~masks[2]].any()
    merged = llama.handles[3].adapter
    assert merged.threshold_S.shape == (1,) and torch.isfinite(merged.threshold_S).all()
    assert torch.equal(llama.handles[4].adapter.delta_SOI[0], merged.delta_SOI[0])
    for state, _ in reversed(kept):
        assert torch.equal(answers(llama), state)
        llama.handles[-1].remove()
    assert torch.equal(answers(llama), base)
    at_once = editor.edit(llama, edits)  # in one call as in six
    assert at_once.adapter.count_S.tolist() == [4, 2]
    assert torch.equal(answers(llama), kept[-1][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margins": (2.0, 1.0, 0.5)}, "alpha below beta"),
        ({"mask_ratio": 0.0}, "mask_ratio must be above 0"),
        ({"density": 1.5}, "density must be above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
