"""Rows of token ids and what is read at them, by hand: no model has a part in it."""

import pytest
import torch

from corrigenda.modules.model.rows import Rows, TargetScores, common_prefix, padded_left

CPU = torch.device("cpu")
IDS = [[1, 5, 6, 7], [1, 5, 8], [1, 5, 6, 9, 4, 3]]  # their targets begin at 2, 2 and 5


@pytest.fixture
def rows():
    return Rows.of(IDS, [2, 2, 5], CPU)


def test_rows_are_padded_on_the_right(rows):
    assert rows.ids_BT.tolist() == [[1, 5, 6, 7, 0, 0], [1, 5, 8, 0, 0, 0], [1, 5, 6, 9, 4, 3]]
    assert rows.mask_BT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    assert rows.length_B.tolist() == [4, 3, 6] and rows.start_B.tolist() == [2, 2, 5]
    assert rows.unpadded() == IDS and rows.depth_BT is None
    assert rows.mask_BT.dtype == torch.long


def test_prompts_end_where_targets_begin(rows):
    assert rows.prompt_BT.tolist() == [
        [True, True, False, False, False, False],
        [True, True, False, False, False, False],
        [True, True, True, True, True, False],
    ]


def test_targets_and_the_positions_that_predict_them(rows):
    row_N, position_N = rows.answer_positions()
    assert row_N.tolist() == [0, 0, 1, 2] and position_N.tolist() == [1, 2, 1, 4]
    target_BM, mask_BM = rows.targets()
    assert target_BM.tolist() == [[6, 7], [8, 0], [3, 0]]
    assert mask_BM.tolist() == [[True, True], [True, False], [True, False]]
    assert target_BM.dtype == torch.long


def test_nothing_is_predicted_where_there_is_no_target():
    rows = Rows.of(IDS, [4, 3, 6], CPU)
    assert rows.answer_positions()[0].tolist() == []
    assert rows.prompt_BT.sum(1).tolist() == [4, 3, 6]


def test_a_target_from_the_second_token_on():
    rows = Rows.of([[1, 2, 3]], [1], CPU)
    assert rows.answer_positions()[1].tolist() == [0, 1]
    assert rows.targets()[0].tolist() == [[2, 3]]


def test_target_tokens_stand_in_their_order():
    rows = Rows.of([[1, 2, 3, 4, 5], [1, 2, 9]], [1, 2], CPU)
    assert rows.targets()[0].tolist() == [[2, 3, 4, 5], [9, 0, 0, 0]]


def test_the_last_token_of_an_answer_is_not_read(rows):
    assert rows.without_last().length_B.tolist() == [3, 2, 5]
    assert rows.without_last(1).length_B.tolist() == [3, 3, 6]
    some = rows.without_last(2)
    assert some.length_B.tolist() == [3, 2, 6] and some.ids_BT is rows.ids_BT
    assert some.mask_BT.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert some.start_B.tolist() == [2, 2, 5] and rows.length_B.tolist() == [4, 3, 6]


def test_rows_of_parts_are_padded_to_the_longest(rows):
    both = Rows.cat([rows.select(torch.tensor([1])), Rows.of([[2, 2, 2, 2]], [1], CPU)])
    assert both.ids_BT.tolist() == [[1, 5, 8, 0], [2, 2, 2, 2]]
    assert both.mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert both.start_B.tolist() == [2, 1]


def test_selected_rows_lose_the_columns_of_padding(rows):
    some = rows.select(torch.tensor([1, 0]))
    assert some.ids_BT.tolist() == [[1, 5, 8, 0], [1, 5, 6, 7]]
    assert some.mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert some.start_B.tolist() == [2, 2] and some.depth_BT is None


def test_depths_of_a_tree_go_with_their_rows():
    depth_BT = torch.arange(18).view(3, 6)
    rows = Rows(
        *(getattr(Rows.of(IDS, [2, 2, 5], CPU), n) for n in ("ids_BT", "mask_BT", "start_B")),
        depth_BT,
    )
    assert rows.select(torch.tensor([1])).depth_BT.tolist() == [[6, 7, 8]]


def test_widened_rows_have_padding_behind(rows):
    wide = rows.widened(8)
    assert wide.ids_BT.shape == wide.mask_BT.shape == (3, 8)
    assert (
        wide.unpadded() == IDS
        and wide.ids_BT[:, 6:].eq(0).all()
        and wide.mask_BT[:, 6:].eq(0).all()
    )
    assert wide.start_B.tolist() == [2, 2, 5]


@pytest.mark.parametrize(
    ("ids", "starts", "wanted"),
    [
        (IDS, [3, 3, 5], 2),  # two tokens are the same
        (IDS, [2, 2, 5], 1),  # the one that predicts the first target is left out
        (IDS, [1, 1, 1], 0),
        ([[1, 2, 3], [1, 2, 3, 4]], [3, 4], 2),
        ([[1, 2, 3, 4], [1, 2, 3]], [4, 4], 3),  # padding is not alike
        ([[1, 2, 3, 0], [1, 2, 3]], [4, 4], 3),  # not even where the token looks like it
        ([[1, 2, 3, 7], [1, 9, 3, 7]], [4, 4], 1),  # what is alike again does not count
        ([[2, 2], [3, 2]], [2, 2], 0),
        ([[3, 2], [2, 2]], [2, 2], 0),
    ],
)
def test_what_all_rows_begin_with(ids, starts, wanted):
    assert Rows.of(ids, starts, CPU).common_start() == wanted


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1], [1, 2], 1),
        ([], [1], 0),
        ([3, 1], [2, 1], 0),
        ([1, 2, 3], [1, 5, 3], 1),
    ],
)
def test_how_far_two_texts_are_alike(left, right, wanted):
    assert common_prefix(left, right) == wanted


@pytest.mark.parametrize(
    ("start", "ids", "mask"),
    [
        (0, [[0, 0, 1, 5, 6, 7], [0, 0, 0, 1, 5, 8], [1, 5, 6, 9, 4, 3]],
         [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1] * 6]),
        (2, [[1, 5, 0, 0, 6, 7], [1, 5, 0, 0, 0, 8], [1, 5, 6, 9, 4, 3]],
         [[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1], [1] * 6]),
    ],
)  # fmt: skip
def test_rows_that_end_together(start, ids, mask):
    ids_BT, mask_BT = padded_left(IDS, start, CPU)
    assert ids_BT.tolist() == ids and mask_BT.tolist() == mask
    assert ids_BT.dtype == mask_BT.dtype == torch.long


@pytest.fixture
def scores():
    mask_BM = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    target_BM = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]])
    greedy_BM = torch.tensor([[1, 2, 3], [4, 9, 9], [5, 7, 0]])
    full_BMV = torch.arange(36.0).view(3, 3, 4)
    return TargetScores(-torch.arange(9.0).view(3, 3), greedy_BM, target_BM, mask_BM, full_BMV)


def test_a_target_is_exact_where_all_of_its_tokens_are(scores):
    assert scores.exact_B.tolist() == [True, True, False]
    swapped = TargetScores(
        scores.logprob_BM, scores.target_BM, scores.greedy_BM, scores.mask_BM, None
    )
    assert swapped.exact_B.tolist() == [True, True, False]  # neither less nor more will do


@pytest.mark.parametrize("which", [[1, 2], slice(1, 3)])
def test_scores_of_some_rows(scores, which):
    some = scores[which]
    assert some.logprob_BM.tolist() == [[-3, -4], [-6, -7]]
    assert some.greedy_BM.tolist() == [[4, 9], [5, 7]] and some.target_BM.tolist() == [
        [4, 0],
        [5, 6],
    ]
    assert some.mask_BM.tolist() == [[True, False], [True, True]]
    assert some.full_BMV.tolist() == scores.full_BMV[1:, :2].tolist()
    assert scores[[]].logprob_BM.shape == (0, 0)


def test_scores_without_the_vocabulary_have_none_for_some_rows_either(scores):
    parts = scores.logprob_BM, scores.greedy_BM, scores.target_BM, scores.mask_BM
    some = TargetScores(*parts)[[0]]
    assert some.full_BMV is None and some.target_BM.tolist() == [[1, 2, 3]]
