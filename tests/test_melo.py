"""MELO: clusters of prompts on points of the plane, and blocks that are active only for their prompts."""

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editors.melo import GAP, MELO, SLACK, Blocks
from corrigenda.modules.model.handle import PromptBatch
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.states import last_states
from tests.samples import OTHERS, prompts_and_targets, scores_of
from tests.samples import SHORT_EDITS as EDITS

PROMPTS, TARGETS = prompts_and_targets(EDITS)


@pytest.fixture
def make(data_files):
    def editor(**changes):
        quick = {"steps": 20, "lr": 3e-2, "corpus": Corpus(data_files.text), "num_prompts": 32}
        return MELO(0, [1, 2], **(quick | changes))

    return editor


answers = scores_of(PROMPTS, TARGETS)


# ---------------------------------------------------------------------------- clusters


@pytest.fixture
def blocks():
    """One cluster at the origin, radius 1, answer [7, 8], block 0."""
    made = Blocks(["r", "t"], query=2, shapes=[(2, 1)], rank=1, scale=2.0)
    made.place(torch.zeros(2), [7, 8], 1.0, 0)
    return made


def at(x, y=0.0):
    return torch.tensor([x, y])


def looked_up(blocks, *points):
    return blocks.lookup(torch.stack(points)).tolist()


def test_far_is_a_new_cluster(blocks):
    blocks.place(at(2.5), [7, 8], 1.0, 1)
    assert blocks.radius_C.tolist() == [1.0, 1.0] and blocks.cluster_P.tolist() == [0, 1]
    assert looked_up(blocks, at(0.9), at(1.2), at(2.0), at(9)) == [0, -1, 1, -1]


def test_the_same_answer_joins(blocks):
    blocks.place(at(1.6), [7, 8], 1.0, 1)
    assert blocks.centre_CH.tolist() == [[pytest.approx(0.8), 0.0]]
    assert blocks.radius_C.tolist() == [
        1.0
    ]  # both points are 0.8 away: no less than the first radius
    blocks.place(at(-0.8), [7, 8], 1.0, 2)
    centre = (0 + 1.6 - 0.8) / 3
    assert blocks.centre_CH[0, 0].item() == pytest.approx(centre)
    assert blocks.radius_C.tolist() == [pytest.approx((1.6 - centre) * (1 + SLACK))]
    assert looked_up(blocks, at(0.1), at(1.5), at(-0.7), at(3)) == [0, 1, 2, -1]  # nearest point


def test_another_answer_halves_and_forgets(blocks):
    blocks.place(at(1.6), [7, 8], 1.0, 1)  # centre 0.8
    blocks.place(at(2.0), [7], 1.0, 2)  # 1.2 from it
    # Both old points were outside and are gone, and with them their cluster.
    assert looked_up(blocks, at(2.0), at(1.6)) == [2, 2]
    assert blocks.radius_C.tolist() == pytest.approx([-1, 0.6])
    assert blocks.block_P.tolist() == [2] and looked_up(blocks, at(0.8)) == [-1]


def test_another_answer_nearby_leaves_what_is_inside(blocks):
    blocks.place(at(1.0), [9], 1.0, 1)
    assert blocks.radius_C.tolist() == pytest.approx([0.5 - GAP, 0.5], abs=1e-6)
    assert looked_up(blocks, at(0), at(0.4), at(0.6), at(1.4)) == [0, 0, 1, 1]


def test_of_two_edits_of_one_prompt_the_last_counts(blocks):
    for label, block in (([5], 1), ([7, 8], 2)):
        blocks.place(at(0.0), label, 1.0, block)
        assert looked_up(blocks, at(0.0), at(0.9)) == [block, block]
    blocks.place(at(0.0), [7, 8], 1.0, 3)  # the same answer again, in a newer block
    assert looked_up(blocks, at(0.0)) == [3] and len(blocks.block_P) == 1


def test_the_block_of_the_prompt_holds_at_every_token(blocks):
    blocks.down0_KrI, blocks.up0_KOr = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0]]])
    batch = PromptBatch(torch.tensor([[False, True, True], [True, True, True]]))
    routing = torch.tensor([[[9.0, 9], [9, 9], [0, 0]], [[0, 0], [0, 0], [9, 9]]])
    assert blocks("r", routing, routing, batch) is routing
    x, y = torch.tensor([[[1.0, 5]] * 3] * 2), torch.zeros(2, 3, 1)
    assert blocks("t", x, y, batch).flatten().tolist() == [6.0, 6.0, 6.0, 0, 0, 0]
    later = torch.tensor([[[9.0, 9]], [[0, 0]]])  # a generated token does not choose again
    blocks("r", later, later, batch)
    assert blocks("t", x[:, :1], y[:, :1], batch).flatten().tolist() == [6.0, 0.0]


# ---------------------------------------------------------------------------- in a model


def test_without_a_hit_the_base_is_bit_exact(lm, make):
    """Prompts outside all clusters get the base model's output, also in a batch with prompts inside one."""
    prompts, targets = PROMPTS + OTHERS, TARGETS * 2
    base = answers(lm, prompts, targets)
    patch = make().edit(lm, EDITS)
    queries = last_states(lm, prompts, lm.structure.out_name(0), output=True)
    hit = patch.adapter.lookup(queries) >= 0
    assert hit[:3].all() and not hit[3:].all()
    after = answers(lm, prompts, targets)
    moved = (after - base).abs().amax((1, 2)) > 0
    assert torch.equal(moved, hit) and torch.equal(after[~hit], base[~hit])


def test_a_block_is_a_low_rank_update(llama, make):
    patch = make(scale=0.5, rank=3).edit(llama, EDITS[:1])
    after = answers(llama, PROMPTS[:1], TARGETS[:1])
    made = patch.adapter
    patch.remove()
    with torch.no_grad():
        for site, (down, up) in zip(made.sites[1:], made.factors(), strict=True):
            product = getattr(made, up)[0] @ getattr(made, down)[0]
            assert torch.linalg.matrix_rank(product) == 3
            llama.net.get_submodule(site).weight += 0.5 * product
    written = answers(llama, PROMPTS[:1], TARGETS[:1])
    torch.testing.assert_close(written, after, atol=1e-4, rtol=0)


def test_a_further_block_changes_no_other(llama, make):
    editor = make(edits_per_block=2)
    first = editor.edit(llama, EDITS)
    assert first.adapter.block_P.tolist() == [0, 0, 1]
    assert [note["block"] for note in first.metadata["notes"]] == [0, 0, 1]
    second = editor.edit(llama, [Edit("{} said", "He", "on")])
    for names in first.adapter.factors():
        for name in names:
            old, new = getattr(first.adapter, name), getattr(second.adapter, name)
            assert torch.equal(new[:2], old) and len(new) == 3 and new[2].any()


def test_the_radius_is_given_or_calibrated(llama, make):
    given, calibrated = make(epsilon=0.7), make(epsilon_scale=0.25)
    twice = make(epsilon_scale=0.5)
    for editor in (given, calibrated, twice):
        editor.prepare(llama)
    assert given.epsilon == 0.7
    assert twice.epsilon == pytest.approx(2 * calibrated.epsilon) and calibrated.epsilon > 0


def test_blocks_below_the_routing_block_are_refused():
    with pytest.raises(ValueError, match="above the routing block 1"):
        MELO(1, [1, 0])
