"""GRACE: the codebook's rules on points of the plane, and prompts inside and outside every radius."""

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editors.grace import GAP, GRACE, SLACK, Codebook
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import (
    distances,
    last_states,
    neighbour_distance,
    read_states,
    unrelated_prompts,
)
from tests.samples import OTHERS, prompts_and_targets, scores_of
from tests.samples import SHORT_EDITS as EDITS

PROMPTS, TARGETS = prompts_and_targets(EDITS)


@pytest.fixture
def make(data_files):
    def editor(**changes):
        return GRACE(
            **({"layer": 1, "corpus": Corpus(data_files.text), "num_prompts": 32} | changes)
        )

    return editor


answers = scores_of(PROMPTS, TARGETS)


# ---------------------------------------------------------------------------- the table


@pytest.fixture
def book():
    """A codebook in the plane with one key at the origin, radius 1, answer [7, 8]."""
    book = Codebook(["x"], inputs=2, outputs=1, replace="last")
    assert book.place(torch.zeros(2), torch.tensor([0.5]), [7, 8], 1.0) == 0
    return book


def at(x, y=0.0):
    return torch.tensor([x, y])


def test_far_is_a_new_key(book):
    assert book.place(at(2.5), torch.ones(1), [7, 8], 1.0) == 1
    assert book.radius_J.tolist() == [1.0, 1.0] and book.key_JI[1].tolist() == [2.5, 0.0]
    assert book.label_JM.tolist() == [[7, 8], [7, 8]]


def test_near_with_another_answer_halves_both_radii(book):
    assert book.place(at(1.6), torch.ones(1), [7], 1.0) == 1
    assert book.radius_J.tolist() == pytest.approx([0.8 - GAP, 0.8], abs=1e-7)
    assert book.lookup(torch.stack([at(0), at(1.6), at(0.79), at(0.81), at(5)])).tolist() == [
        0,
        1,
        0,
        1,
        -1,
    ]


def test_near_with_the_same_answer_widens(book):
    assert book.place(at(1.6), torch.ones(1), [7, 8], 1.0) == 0
    assert book.radius_J.tolist() == pytest.approx([1.6 * (1 + SLACK)])
    assert len(book.key_JI) == 1 and book.value_JO.tolist() == [[0.5]]
    assert book.lookup(at(1.6)[None]).tolist() == [0]


def test_inside_with_the_same_answer_changes_nothing(book):
    assert book.place(at(0.5), torch.ones(1), [7, 8], 1.0) == 0
    assert book.radius_J.tolist() == [1.0] and book.key_JI.tolist() == [[0.0, 0.0]]


def test_of_two_edits_of_one_prompt_the_last_counts(book):
    book.place(at(30.0), torch.ones(1), [5], 1.0)
    key = book.place(at(30.0 + 1e-5), torch.ones(1), [6, 6, 6], 1.0)
    assert key == 1 and len(book.key_JI) == 2
    assert book.label_JM.tolist() == [[7, 8, -1], [6, 6, 6]]
    assert book.lookup(at(30.0 + 2e-5)[None]).tolist() == [1]


@pytest.mark.parametrize("label", [[8, 7], [15], [7, 8, 0], [7]])
def test_answers_are_compared_token_by_token(book, label):
    """Neither equal sums, nor equal means, nor one as part of the other make answers equal."""
    assert book.place(at(0.5), torch.ones(1), label, 1.0) == 1


def test_a_conflict_lets_no_radius_grow(book):
    book.place(at(0.4), torch.ones(1), [1], 1.0)
    assert book.radius_J.tolist() == pytest.approx([0.2 - GAP, 0.2], abs=1e-7)
    book.place(at(0, 1.0), torch.ones(1), [2], 1.0)
    assert book.radius_J.tolist() == pytest.approx([0.2 - GAP, 0.2, 0.5], abs=1e-7)


@pytest.mark.parametrize(
    ("replace", "whole", "alone"),
    [("last", [0, 0, 1, 0], [0]), ("prompt", [0, 1, 1, 0], [0]), ("all", [1] * 4, [1])],
)
def test_where_a_value_stands_in(replace, whole, alone):
    """A prompt of two tokens behind one of padding; then one generated token with a cache, and without."""
    book = Codebook(["x"], inputs=2, outputs=1, replace=replace)
    book.place(torch.zeros(2), torch.tensor([9.0]), [1], 1.0)
    batch = PromptBatch(torch.tensor([[False, True, True]]))
    x = torch.tensor([[[5.0, 5], [5, 5], [0, 0], [5, 5]]])
    y = torch.zeros(1, 4, 1)
    assert book("x", x[:, :3], y[:, :3], batch).flatten().tolist() == [9.0 * v for v in whole[:3]]
    assert book("x", x[:, 3:], y[:, 3:], batch).flatten().tolist() == [9.0 * v for v in alone]
    assert book("x", x, y, batch).flatten().tolist() == [9.0 * v for v in whole]


# ---------------------------------------------------------------------------- in a model


def test_outside_all_balls_the_base_is_bit_exact(lm, make):
    base, others = answers(lm), answers(lm, OTHERS, TARGETS)
    patch = make().edit(lm, EDITS)
    assert lm.score(PROMPTS, TARGETS).exact_B.all()
    site = lm.structure.out_name(1)
    query = last_states(lm, OTHERS, site)
    assert (patch.adapter.lookup(query) == -1).all()
    assert torch.equal(answers(lm, OTHERS, TARGETS), others)
    patch.remove()
    assert torch.equal(answers(lm), base)


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_a_query_in_the_ball_gets_the_value(llama, make, replace):
    patch = make(replace=replace, steps=3).edit(llama, EDITS[:1])
    site = llama.structure.out_name(1)
    rows = llama.tokens.rows(PROMPTS[:1], TARGETS[:1])
    ((_, states),) = read_states(llama, rows, site, output=True)
    value = patch.adapter.value_JO[0]
    same = (states[0] == value).all(-1)
    start, length = int(rows.start_B[0]), int(rows.length_B[0])
    wanted = {"last": {start - 1}, "prompt": set(range(start)), "all": set(range(length))}[replace]
    assert set(same.nonzero()[:, 0].tolist()) == wanted


def test_the_target_does_not_route(llama, make):
    """Whatever the target, an edit's prompt is inside its ball and another prompt is not."""
    others = answers(llama, OTHERS[:2], [TARGETS[0], "x"])
    patch = make().edit(llama, EDITS[:1])
    wide = ["x", "in", "the town in the year of 1984"]
    for target in wide:
        with llama.pristine():
            base = answers(llama, PROMPTS[:1], [target])
        assert not torch.equal(answers(llama, PROMPTS[:1], [target]), base)
    assert torch.equal(answers(llama, OTHERS[:2], [TARGETS[0], "x"]), others)
    patch.remove()


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_generation_routes_by_the_prompt(lm, make, replace, uncached):
    """Generated tokens are the same with a cache, batched and padded on the left, as without, one by one."""
    make(replace=replace, steps=40).edit(lm, EDITS)
    prompts = PROMPTS + OTHERS
    for prompt, text in zip(prompts, lm.generate(prompts, 6), strict=True):
        assert uncached(lm, prompt, 6) == text
    assert lm.generate(PROMPTS[:1], 12)[0].strip().startswith(TARGETS[0])


def test_edits_together_find_what_they_find_alone(llama, make):
    """Values are searched side by side, each as if the others did not exist."""
    together = make(steps=6, parallel=8).edit(llama, EDITS)
    values = together.adapter.value_JO
    together.remove()
    for n, edit in enumerate(EDITS):
        alone = make(steps=6).edit(llama, [edit])
        torch.testing.assert_close(alone.adapter.value_JO[0], values[n], atol=1e-3, rtol=1e-3)
        alone.remove()


def test_one_after_the_other_extends_the_codebook(llama, make):
    editor, base = make(), answers(llama)
    states = []
    for n, edit in enumerate(EDITS, start=1):
        patch = editor.edit(llama, [edit])
        states.append(answers(llama))
        assert len(patch.adapter.key_JI) == n
    assert llama.score(PROMPTS, TARGETS).exact_B.all()
    again = editor.edit(llama, EDITS)  # all of it is known
    assert len(again.adapter.key_JI) == 3 and again.num_parameters == 0
    assert [note["key"] for note in again.metadata["notes"][-3:]] == [None] * 3
    again.remove()
    for state in reversed(states):
        assert torch.equal(answers(llama), state)
        llama.handles[-1].remove()
    assert torch.equal(answers(llama), base)


def test_the_same_prompt_can_be_edited_again(llama, make):
    editor = make()
    editor.edit(llama, EDITS[:1])
    second = Edit(EDITS[0].prompt, EDITS[0].subject, "on")
    patch = editor.edit(llama, [second])
    assert len(patch.adapter.key_JI) == 1
    assert llama.score([second.text], [second.target_new]).exact_B.all()
    patch.remove()
    assert llama.score(PROMPTS[:1], TARGETS[:1]).exact_B.all()
    together = editor.edit(llama, [Edit(second.prompt, second.subject, "x"), second])
    assert llama.score([second.text], [second.target_new]).exact_B.all()
    together.remove()


def test_values_may_stand_at_the_input_projection_where_there_is_one(tiny_lm, make):
    lm = tiny_lm("gpt2", num_hidden_layers=3)
    patch = make(projection="in").edit(lm, EDITS[:1])
    assert patch.adapter.value_JO.shape == (1, lm.structure.inner_width)
    assert lm.score(PROMPTS[:1], TARGETS[:1]).exact_B.all()
    with pytest.raises(ValueError, match="2 input projections"):
        make(projection="in").prepare(tiny_lm("llama"))


# ---------------------------------------------------------------------------- the radius


def test_the_radius_is_calibrated_on_unrelated_prompts(lm, make):
    editor = make(scale=0.25)
    editor.prepare(lm)
    prompts, site = unrelated_prompts(editor.corpus, 32, lm), lm.structure.out_name(1)
    assert len(set(prompts)) == 32 and prompts[0].endswith("near the")
    queries = []
    for prompt in prompts:
        ((_, states),) = read_states(lm, lm.tokens.rows([prompt]), site)
        queries.append(states[0, -1])
    nearest = [min((a - b).norm().item() for b in queries if b is not a) for a in queries]
    median = sorted(nearest)[15]
    assert median > 0 and editor.epsilon == pytest.approx(0.25 * median, rel=1e-3)
    patch = make(steps=1).edit(lm, EDITS)
    assert neighbour_distance(lm, prompts, site) == pytest.approx(median, rel=1e-3)
    patch.remove()


def test_distances_of_near_points_are_exact():
    a = 1e3 * torch.ones(40, 64)
    b = a.clone()
    b[:, 0] += 0.5
    torch.testing.assert_close(distances(a, b), torch.full((40, 40), 0.5), atol=1e-4, rtol=0)


def test_too_little_text_is_an_error(llama, make, tmp_path):
    (tmp_path / "one.txt").write_text("The town is here.")
    with pytest.raises(ValueError, match="fewer than two distinct texts"):
        make(corpus=Corpus(str(tmp_path / "one.txt"))).prepare(llama)
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        make(layer=9).prepare(llama)
