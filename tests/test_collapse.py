"""Detectors of collapse and distances, against values computed by hand."""

import math

import pytest
import torch

from corrigenda.modules.metrics import collapse
from corrigenda.modules.metrics.texts import word_entropy

NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------------- weights


def test_how_far_a_weight_has_moved():
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    after = torch.tensor([[3.3, 4.4], [0.0, 1.2]])
    found = collapse.weight_changes(before, after)
    assert found == pytest.approx({
        "distance": 1.3 / 4, "frobenius": 1.3, "relative": 1.3 / 5, "l1": 0.3 + 0.4 + 1.2,
        "share_077": 3 / 4, "share_171": 1 / 4,  # 0 -> 1.2 is an infinite change, 0 -> 0 is none
    }, abs=1e-6)  # fmt: skip
    assert set(collapse.weight_changes(before, before).values()) == {0.0}


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1\) and \(2, 2\)"):
        collapse.weight_changes(torch.ones(2, 1), torch.ones(2, 2))


def test_drift_is_relative_to_the_unedited_states():
    assert collapse.drift(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(0.2)


# ---------------------------------------------------------------------------- forgetting


def test_a_fact_forgotten_once_stays_counted():
    first = [1, 1, 0, 1]
    held_at = [
        [1],
        [0, 1],
        [1, 1, 0, 1],
    ]  # the first edit fails at two edits and is recalled at four
    shares = collapse.lost_by(held_at, first)
    assert shares == [(0, 0), (1 / 2, 1 / 2), (1 / 3, 1 / 4)]  # the third was never right
    assert collapse.forgetting_lengths([1, 2, 4], held_at, first) == [1]


def test_nothing_can_be_forgotten_where_no_edit_succeeded():
    assert collapse.lost_by([[0], [0, 0]], [0, 0]) == [(0, 0), (0, 0)]


def test_retention_by_age():
    matrix = collapse.age_matrix([1, 3, 4], [[1], [0, 1, 1], [0, 1, 0, 1]])
    expected = [[1, NAN, NAN], [0, 1, NAN], [0, 0.5, 1]]
    for row, wanted in zip(matrix, expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)


# ---------------------------------------------------------------------------- detectors


@pytest.mark.parametrize(
    ("distances", "found"),
    [
        ([1, 2, 3, 4, 5, 26], 6),  # a step of 21 after five of 1
        ([1, 2, 3, 4, 5, 25], None),  # a step of 20 is no jump
        ([1, 2, 3, 4, 100], None),  # only four earlier steps
        ([1, 2, 3, 2, 1, 22], 6),  # steps back count by their size
        ([1, NAN], 2),
        ([0, 0, 0, 0, 0, 0, 1], None),  # edits of other layers
        ([], None),
    ],
)
def test_a_jump_of_the_distance(distances, found):
    assert collapse.first_jump(distances) == found


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ([0.8, 0.7, 0.3, 0.2, 0.1], 20),
        ([0.8, 0.3, 0.7, 0.7, 0.1], 40),  # one low score in between is noise, at the end it is not
        ([0.8, 0.7, 0.6, 0.5, 0.4], None),
        ([0.8, NAN, NAN, 0.7, 0.7], 10),
    ],
)
def test_a_task_is_lost(scores, found):
    assert collapse.first_lost_task([0, 10, 20, 30, 40], scores) == found


def test_without_the_unedited_model_no_task_is_lost():
    assert collapse.first_lost_task([10, 20], [0.9, 0.0]) is None
    assert collapse.first_lost_task([], []) is None


def test_facts_are_forgotten_at_once():
    counts = [1, 10, 20, 30]
    assert collapse.first_forgotten(counts, [0.0, 0.2, 0.45, 0.8]) == 30
    assert collapse.first_forgotten(counts, [0.0, 0.2, 0.4, 0.6]) is None
    assert collapse.first_forgotten([5], [0.5]) == 5


def test_new_edits_fail():
    right = [1.0] * 50 + [0.0] * 6
    assert collapse.first_failing(right) == 56  # 44 of the last 50 are right: .88
    assert collapse.first_failing([0.0] * 49) is None  # fewer than the window
    assert collapse.first_failing([1, 0, 1, 0], window=2, least=0.75) == 2


@pytest.mark.parametrize(
    ("counts", "retained", "found"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 0.5, 0], 4),
        ([1, 2, 3, 4, 5, 6], [1, 0.9, 0.8, 0.7, 0.3, 0.0], 4),
        ([1, 2, 3, 4, 5, 6], [1, 0.9, 0.8, 0.7, 0.6, 0.5], None),  # one straight line
        ([1, 2, 3, 4, 5, 6], [1, 0.6, 0.2, 0.2, 0.2, 0.2], None),  # bends up
        ([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 0.9, 0.8], None),  # falls too little
        ([1, 2, 3], [1, 1, 0], None),  # too few counts
    ],
)
def test_where_retention_bends(counts, retained, found):
    assert collapse.inflection_point(counts, retained) == found


def test_all_detectors_of_a_stream():
    distances = {"low": [1, 2, 3, 4, 5, 6, 7], "high": [1, 2, 3, 4, 5, 60, 61]}
    found = collapse.detected(
        counts=[2, 6, 10, 14], retained=[1, 1, 0.9, 0], forgotten=[0, 0, 0.1, 1],
        right_N=[1] * 14, operations=[2, 4, 6, 8, 10, 12, 14], distances=distances,
        tasks={"sst2": ([0, 6, 14], [0.9, 0.8, 0.0]), "rte": ([0, 6], [0.5, 0.1])},
    )  # fmt: skip
    assert found == {"T_dist": 12, "T_down": 14, "T_forget": 14, "T_edit": None, "inflection": 10}
    nothing = collapse.detected([], [], [], [], [], {}, {})
    assert set(nothing.values()) == {None}


def test_an_edit_that_breaks_the_model_alone():
    norms = [1.0, 2.0, 3.0, 41.0, NAN, 1.0, 1.0]
    entropies = [0.9, 0.9, None, 0.9, 0.9, 0.69, 0.7]
    found = collapse.disabling_edits(norms, entropies, calibration=3)  # the median is 2
    assert found == [False, False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("perplexity", "before", "jumped", "kind"),
    [
        (10.9, 10.0, False, None),
        (11.1, 10.9, False, "gradual"),
        (20.0, 10.0, False, "gradual"),
        (20.1, 10.0, False, "catastrophic"),
        (10.0, 10.0, True, "catastrophic"),
        (INF, 10.0, False, "catastrophic"),
        (NAN, 10.0, False, "catastrophic"),
        (NAN, NAN, False, "catastrophic"),
    ],
)
def test_the_kind_of_collapse(perplexity, before, jumped, kind):
    found = collapse.kind_of_collapse(perplexity, before, 10.0, jumped, increase=0.1, factor=2.0)
    assert found == kind


def test_entropy_of_words():
    assert word_entropy(["Italy italy italy.", "italy rome is a city"]) == pytest.approx(
        0.86135, abs=1e-5
    )
    assert word_entropy(["italy " * 8]) == word_entropy([""]) == word_entropy([]) == 0
    assert word_entropy(["a b c d"]) == pytest.approx(1)


def test_other_tasks_count_where_sst2_was_not_measured():
    tasks = {"rte": ([0, 6, 9], [0.5, 0.1, 0.1]), "boolq": ([0, 9], [0.6, 0.0])}
    assert collapse.detected([], [], [], [], [], {}, tasks)["T_down"] == 6
