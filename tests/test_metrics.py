"""Metrics against values computed by hand."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from corrigenda.modules import metrics
from corrigenda.modules.evaluation.running_means import RunningMeans
from corrigenda.modules.metrics import CaseMean, FactsForgotten, HopAccuracy, MultiHopAccuracy

CPU = torch.device("cpu")
LN2, NAN, INF = math.log(2), math.nan, math.inf
CASE_METRICS = [CaseMean, MultiHopAccuracy, HopAccuracy]
EVERY_METRIC = [*CASE_METRICS, FactsForgotten]


def near(expected):
    return pytest.approx(expected, abs=1e-4, nan_ok=True)


def column(*nlls):
    """Log-probabilities and mask of one-token targets with these negative log-likelihoods."""
    return -torch.tensor(nlls)[:, None], torch.ones(len(nlls), 1, dtype=torch.bool)


def padded(rows, pad):
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows]), mask


def cases(*indices):
    return torch.tensor(indices, dtype=torch.long)


def case_mean(values, *case_indices):
    """Mean over cases of the mean over a case's probes."""
    metric = CaseMean()
    metric.update(torch.as_tensor(values), cases(*case_indices))
    return metric.compute()


# --- teacher forced ---


@pytest.mark.parametrize("target, rival", [("true", "new"), ("new", "true")])
def test_a_tie_is_no_preference(target, rival):
    nll = {"true": column(0.5, 2.0, 1.0), "new": column(1.0, 1.0, 1.0)}
    assert case_mean(metrics.preference(*nll[target], *nll[rival]), 0, 1, 2) == near(0.3333)


def test_preference_and_margin_of_paraphrases():
    new, true = column(math.log(3), LN2), column(math.log(10), math.log(5))
    assert metrics.preference(*new, *true).mean() == near(1.0)
    assert case_mean(metrics.margin(*new, *true), 0, 0) == near(0.26667)


def test_means_are_over_a_case_first():
    hits = column(1, 1, 1, 3, 3)
    preferred = metrics.preference(*hits, *column(*[2.0] * 5))
    assert case_mean(preferred, 7, 7, 3, 3, 9) == near(0.5)


def test_preference_compares_means_over_tokens():
    one, three = column(-math.log(0.2)), (torch.full((1, 3), 0.5).log(), torch.ones(1, 3))
    assert metrics.preference(*three, *one).item() == 1.0  # although 0.5 ** 3 < 0.2
    assert metrics.margin(*three, *one).item() == near(0.3)


@pytest.mark.parametrize("pad, dtype", [(0, torch.bool), (-100, torch.long), (9, torch.float)])
def test_accuracy_of_tokens_and_of_whole_targets(pad, dtype):
    target, mask = padded([[5, 6, 7], [5, 8]], pad)
    greedy, _ = padded([[5, 6, 7], [5, 9]], pad)
    mask = mask.to(dtype)
    assert metrics.token_accuracy(greedy, target, mask).tolist() == near([1.0, 0.5])
    assert case_mean(metrics.token_accuracy(greedy, target, mask), 0, 1) == near(0.75)
    assert case_mean(metrics.exact_match(greedy, target, mask), 0, 1) == near(0.5)


def test_cases_with_more_tokens_weigh_no_more():
    target, mask = padded([[1, 2], [1, 2, 3, 4]], 0)
    greedy, _ = padded([[1, 2], [1, 9, 9, 9]], 0)
    assert case_mean(metrics.token_accuracy(greedy, target, mask), 0, 1) == near(0.625)
    assert case_mean(metrics.exact_match(greedy, target, mask), 0, 1) == near(0.5)


def test_teacher_forcing_hides_errors():
    gold, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4)
    forced, free = torch.tensor([[0, 2, 3, 4]]), torch.tensor([[0, 9, 9, 9]])
    assert metrics.token_accuracy(forced, gold, mask).item() == near(0.75)
    assert metrics.token_accuracy(free, gold, mask).item() == 0
    assert metrics.exact_match(free, gold, mask).item() == 0


def test_agreement_is_not_accuracy():
    before, after = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 8]])
    gold, mask = torch.tensor([[5, 6, 9, 9]]), torch.ones(1, 4)
    assert metrics.agreement(after, before, mask).item() == near(0.75)
    assert metrics.token_accuracy(before, gold, mask).item() == near(0.5)
    assert metrics.token_accuracy(after, gold, mask).item() == near(0.75)


def test_kl_of_two_coins():
    # 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.14384; the second token did not change.
    before = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]]).log()
    after = torch.tensor([[[0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [0.7, 0.2, 0.1]]]).log()
    mask = torch.tensor([[1, 1, 0]])
    assert metrics.kl(before, after, mask).item() == near(0.07192)
    assert metrics.kl(after, torch.full_like(after, NAN), mask).item() == INF


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_collapsed_model_fails_without_an_exception(bad):
    broken, mask = torch.tensor([[-1.0, bad]]), torch.ones(1, 2)
    fine, ids = column(1.0), torch.tensor([[1, 0]])  # argmax of NaN logits may well be 0
    assert metrics.exact_match(ids, ids, mask, broken).item() == 0
    assert metrics.token_accuracy(ids, ids, mask, broken).item() == near(0.5)
    assert metrics.agreement(ids, ids, mask, broken * bad).item() == 0
    assert metrics.mean_logprob(broken, mask).item() == -INF
    for pair in [(broken, mask, *fine), (*fine, broken, mask), (broken, mask, broken, mask)]:
        assert metrics.preference(*pair).item() == 0
        assert metrics.margin(*pair).item() == 0
    vocabulary = torch.zeros(1, 2, 3).log_softmax(-1)
    assert metrics.kl(vocabulary, vocabulary * bad, mask).item() == INF


def test_values_at_padding_are_ignored():
    logprob, mask = torch.tensor([[-1.0, -3.0, NAN]]), torch.tensor([[1, 1, 0]])
    assert metrics.mean_logprob(logprob, mask).item() == near(-2.0)
    assert metrics.mean_logprob(logprob.half(), mask).item() == near(-2.0)
    assert metrics.preference(logprob, mask, *column(2.5)).item() == 1


def test_a_probe_without_tokens_fails():
    empty, ids = torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[1, 2]])
    assert metrics.exact_match(ids, ids, empty).item() == 0
    assert metrics.preference(torch.zeros(1, 2), empty, *column(1.0)).item() == 0
    assert metrics.kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), empty).item() == INF


def test_results_are_float32_vectors():
    logprob, mask = torch.full((2, 3), -1.0, dtype=torch.bfloat16), torch.ones(2, 3)
    ids = torch.ones(2, 3, dtype=torch.long)
    results = [metrics.token_accuracy(ids, ids, mask), metrics.mean_logprob(logprob, mask)]
    results.append(metrics.margin(logprob, mask, logprob[:, :1], mask[:, :1]))
    results.append(metrics.kl(logprob[..., None], logprob[..., None], mask))
    assert all(r.shape == (2,) and r.dtype == torch.float32 for r in results)


def test_wrong_shapes_are_named():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"^values and mask need one shape, got \(2, 3\) and \(2, 1\)"
    ):
        metrics.token_accuracy(ids, ids, torch.ones(2, 1))
    with pytest.raises(
        ValueError, match=r"values and case indices .* got \(2,\) values and \(3,\)"
    ):
        metrics.case_means(torch.ones(2), cases(0, 1, 2), 3)
    one, full = torch.zeros(2, 1), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"ids need one shape, got \(2, 3\) and \(2, 1\)"):
        metrics.token_accuracy(ids, ids[:, :1], full)
    with pytest.raises(ValueError, match="^ids and log-probabilities need one shape"):
        metrics.token_accuracy(ids, ids, full, one)
    for values, mask in ((one, full), (full, one)):
        with pytest.raises(ValueError, match="values and mask need one shape"):
            metrics.mean_logprob(values, mask)
    with pytest.raises(ValueError, match="log-probabilities need one shape"):
        metrics.kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), full)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.trailing_mean([1.0], 0), "^window must be at least 1, got 0"),
        (
            lambda: metrics.bootstrap_interval([1.0], 0, level=1.0),
            "^level must be strictly between",
        ),
        (
            lambda: metrics.bootstrap_interval([1.0], 0, level=0.0),
            "^level must be strictly between",
        ),
        (
            lambda: metrics.bootstrap_interval([1.0], 0, num_resamples=0),
            "^num_resamples must be at",
        ),
        (lambda: metrics.harmonic_score(), "^a harmonic score needs at least one value$"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_empty_input_is_allowed():
    none = torch.zeros(0, 0)
    assert metrics.token_accuracy(none, none, none).shape == (0,)
    assert metrics.case_means(none[0:0, 0:0].flatten(), cases(), 0).shape == (0,)
    assert metrics.case_means(torch.zeros(0), cases(), 2).isnan().all()
    assert metrics.bootstrap_interval([], seed=0) == near((NAN, NAN))
    assert metrics.paired_difference([], [], seed=0) == near((NAN, NAN, NAN))
    assert metrics.trailing_mean([], 3) == []
    assert metrics.facts_forgotten(torch.zeros(0), torch.zeros(0)) == 0
    assert metrics.wild_exact("", ["Paris"]) == metrics.wild_f1("Paris", []) == 0


def test_a_probe_does_not_depend_on_the_others_in_its_batch():
    logprob = torch.tensor([[-1.0, -3.0], [-1.0, -9.0], [-1.0, -1.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert metrics.mean_logprob(logprob, mask).tolist() == near([-2, -1, -INF])


def test_kl_is_infinite_where_a_token_becomes_impossible():
    before = torch.tensor([[[0.5, 0.5]]]).log()
    after = torch.tensor([[[1.0, 0.0]]]).log()
    assert metrics.kl(before, after, torch.ones(1, 1)).tolist() == [INF]


def test_a_case_without_probes_is_absent():
    means = metrics.case_means(torch.tensor([1.0, 0.0, 1.0]), cases(0, 2, 0), 3)
    assert means.tolist() == near([1.0, NAN, 0.0])


# --- freely generated ---


@pytest.mark.parametrize(
    "text, answer, exact, contains",
    [
        ("Paris. It is", "Paris", 1, 1),
        (" the Paris\nQ: next", "Paris", 1, 1),
        ("Paris Paris Paris", "Paris", 0, 1),
        ("U.S. Virgin Islands", "U.S. Virgin Islands", 1, 1),
        ("St. Louis. He was", "St. Louis", 1, 1),
        ("3.5 million", "3.5 million", 1, 1),
        ("J. K. Rowling.", "J. K. Rowling", 1, 1),
        ("", "Paris", 0, 0),
    ],
)
def test_where_an_answer_ends(text, answer, exact, contains):
    assert metrics.wild_exact(metrics.wild_answer(text), [answer]) == exact
    assert metrics.wild_contains(metrics.wild_answer(text), [answer]) == contains


def test_an_answer_ends_with_its_first_line():
    assert metrics.wild_answer("Paris\nRome\nOslo") == "Paris"


@pytest.mark.parametrize("text", ["(St. Louis) is the place", '"J. Smith" it was', "X. Smith"])
def test_abbreviations_in_brackets_and_quotes(text):
    assert metrics.wild_answer(text) == text


@pytest.mark.parametrize(
    "text, expected",
    [("The Beatles!", "beatles"), ("An A.B.C.", "abc"), ("  a  b ", "b"), ("A", "a")],
)
def test_normalised_answers(text, expected):
    assert metrics.normalise_answer(text) == expected


@pytest.mark.parametrize(
    "prediction, answers, exact, prefix, contains, f1",
    [
        ("Paris, the capital", ["Paris"], 0, 1, 1, 0.66667),
        ("It is Paris", ["Paris"], 0, 0, 1, 0.5),
        ("Paris France", ["Paris", "City of Paris"], 0, 1, 1, 0.66667),
        ("I know", ["no"], 0, 0, 0, 0.0),
        ("paris", ["Rome", "Paris"], 1, 1, 1, 1.0),
        ("anything", [], 0, 0, 0, 0.0),
        ("", ["!"], 0, 0, 0, 0.0),
    ],
)
def test_verdicts_on_generated_answers(prediction, answers, exact, prefix, contains, f1):
    assert metrics.wild_exact(prediction, answers) == exact
    assert metrics.wild_prefix(prediction, answers) == prefix
    assert metrics.wild_contains(prediction, answers) == contains
    assert metrics.wild_f1(prediction, answers) == near(f1)


def test_one_string_is_not_a_list_of_answers():
    with pytest.raises(ValueError, match="got the string 'Paris'"):
        metrics.wild_exact("P", "Paris")


def test_wild_measures_average_probes_then_cases():
    generated = ["Paris", "in Paris", "Rome", "Rome"]
    answers = [["Paris"], ["Paris"], ["Rome"], ["Rome"]]
    expected = {"wild_exact": 0.75, "wild_prefix": 0.75, "wild_contains": 1.0, "wild_f1": 0.91667}
    for name, value in expected.items():
        values = [*map(getattr(metrics, name), map(metrics.wild_answer, generated), answers)]
        assert case_mean(values, 1, 1, 2, 2) == near(value)


# --- whole runs ---


@pytest.mark.parametrize(
    "values, expected",
    [
        ((100, 96.4, 75.4), 89.190),
        ((22.2, 24.7, 78.1), 30.508),
        ((0.9, 0.6, 0.3), 0.49091),
        ((100, 100, 0), 0),
        ((1.0, NAN, 0.0), NAN),
    ],
)
def test_harmonic_score(values, expected):
    assert metrics.harmonic_score(*values) == pytest.approx(expected, abs=5e-4, nan_ok=True)


def test_the_harmonic_score_is_of_dataset_means():
    """Efficacy 0.9, generality 0.6 and locality 0.3, whose means over cases are taken first."""
    scored, values = RunningMeans(), (0.9, 0.6, 0.3)
    for criterion, mean in zip(("efficacy", "generality", "locality"), values, strict=True):
        assert "all/score" not in scored.compute(CPU)
        name = f"{criterion}/preference"
        scored.update(name, torch.tensor([1.0, 1.0, 2 * mean - 1]), cases(0, 0, 1))
    scored.update("portability/preference", torch.zeros(1), cases(0))
    assert scored.compute(CPU)["all/score"] == near(0.49091)


def test_drawdown():
    assert metrics.drawdown(0.80, 0.76) == near(0.04)
    before, after = torch.tensor([1.0, 0.6]), torch.tensor([0.92, 0.6])
    assert case_mean(metrics.drawdown(before, after), 0, 1) == near(0.04)


def test_facts_stay_forgotten():
    sticky = FactsForgotten()
    ids = [str(number) for number in range(1, 11)]
    ok_at_5, ok_at_10 = torch.tensor([0, 1, 0, 0, 1]), torch.ones(10)
    ok_at_10[2] = 0
    sticky.update(ids[:5], torch.tensor([1, 1, 0, 1, 1]), "current")
    assert sticky.compute() == 0
    sticky.update(ids[:5], ok_at_5, "retention")
    assert sticky.compute() == near(0.5)
    assert ok_at_5.float().mean() == near(0.4)
    sticky.update(ids[5:], torch.ones(5), "current")
    sticky.update(ids[::-1], ok_at_10.flip(0), "retention")
    assert sticky.compute() == near(0.22222)
    assert ok_at_10.mean() == near(0.9)


def test_an_edit_that_failed_at_first_is_never_forgotten():
    metric = FactsForgotten()
    metric.update(["a"], torch.zeros(1), "current")
    metric.update(["a"], torch.ones(1), "retention")
    metric.update(["a"], torch.zeros(1), "retention")
    assert metric.compute() == 0
    again = FactsForgotten()
    again.update(["a"], torch.zeros(1), "current")  # and made once more, with success
    again.update(["a"], torch.ones(1), "current")
    assert again.compute() == 0
    again.update([], torch.zeros(0), "retention")
    assert again.compute() == 0 and dim_zero_cat(again.lost).dtype == torch.long


def test_facts_forgotten_as_a_function():
    held, lost = torch.tensor([1, 1, 0, 1, 1]), torch.tensor([1, 0, 1, 1, 0])
    assert metrics.facts_forgotten(held, lost) == near(0.5)
    assert metrics.facts_forgotten(torch.zeros(2), torch.ones(2)) == 0


def test_facts_forgotten_survives_checkpoint_and_merge():
    parts = [FactsForgotten(), FactsForgotten()]
    parts[0].update(["1", "2"], torch.ones(2), "current")
    parts[1].update(["3", "4"], torch.ones(2), "current")
    parts[1].update(["2"], torch.zeros(1), "retention")  # made on one rank, lost on another
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == near(0.25)
    resumed = FactsForgotten()
    resumed.load_state_dict(parts[0].state_dict())
    assert resumed.compute() == near(0.25)
    with pytest.raises(ValueError, match="got 'later'"):
        resumed.update(["1"], torch.ones(1), "later")


def test_trailing_mean():
    assert metrics.trailing_mean([1, NAN, 0], 1) == near([1, NAN, 0])
    assert metrics.trailing_mean([1, 0, 0, 1, 1], 3) == near([1, 0.5, 0.3333, 0.3333, 0.6667])
    assert metrics.trailing_mean([NAN, 1, NAN, 0], 2) == near([NAN, 1, 1, 0])


def test_bootstrap_interval():
    values = [1.0] * 120 + [0.0] * 80
    low, high = metrics.bootstrap_interval([*values, NAN], seed=0)
    assert (low, high) == pytest.approx((0.53, 0.66), abs=0.02)
    assert metrics.bootstrap_interval([*values, NAN], seed=0) == (low, high)
    assert metrics.bootstrap_interval([NAN], seed=0) == near((NAN, NAN))
    assert metrics.bootstrap_interval([INF, INF], seed=0) == (INF, INF)


def test_intervals_are_quantiles_of_resampled_means():
    """By hand; without ``level`` and ``num_resamples`` 2000 resamples and 95 % of their means."""
    values = np.random.default_rng(1).normal(size=30)
    for level, count, given in [
        (0.95, 2000, {}),
        (0.8, 2000, {"level": 0.8}),
        (0.6, 1, {"level": 0.6, "num_resamples": 1}),
        (0.8, 99, {"level": 0.8, "num_resamples": 99}),
    ]:
        rng = np.random.default_rng(3)
        means = [rng.choice(values, size=30).mean() for _ in range(count)]
        cut = [(1 - level) / 2, 1 - (1 - level) / 2]
        wanted = tuple(np.quantile(means, cut, method="inverted_cdf").tolist())
        assert metrics.bootstrap_interval(values, 3, **given) == wanted
        zeros = np.zeros(30)
        assert metrics.paired_difference(values, zeros, 3, **given) == (values.mean(), *wanted)


@pytest.mark.filterwarnings("error")
def test_cases_infinite_on_both_sides_are_left_out_without_a_warning():
    assert metrics.paired_difference([INF, 1.0], [INF, 0.0], seed=0) == (1.0, 1.0, 1.0)


def test_a_paired_difference_is_significant_where_two_intervals_overlap():
    # The same 120 of 200 plus 10 more: 0.05 with sd sqrt(.05 * .95 / 200) = 0.0154.
    before, after = [1.0] * 120 + [0.0] * 80, [1.0] * 130 + [0.0] * 70
    mean, low, high = metrics.paired_difference([*after, NAN], [*before, 1.0], seed=0)
    assert mean == near(0.05)
    assert (low, high) == pytest.approx((0.02, 0.08), abs=0.02)
    with pytest.raises(ValueError, match="got 1 and 2"):
        metrics.paired_difference([1.0], [1.0, 0.0], seed=0)


# --- the classes as torchmetrics ---


@pytest.mark.parametrize("cls", EVERY_METRIC)
def test_an_empty_metric_is_nan_without_a_warning(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cls().compute().isnan()
    assert isinstance(cls.higher_is_better, bool)
    assert cls().protocol in {"tf_tok", "tf_exact", "cf_prob", "wild", "kl"}


@pytest.mark.parametrize("copy", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("cls", CASE_METRICS)
def test_summed_states_equal_one_metric(cls, copy):
    values, index = torch.tensor([1.0, 0.25, 1.0, 0.0, 1.0]), cases(0, 1, 1, 2, 2)
    whole, parts = cls(), [copy(cls()), copy(cls())]
    whole.update(values, index)
    for part, rows in zip(parts, (slice(0, 1), slice(1, 5)), strict=True):
        part.update(values[rows], index[rows])
    summed = {name: sum(p.metric_state[name] for p in parts) for name in ("total", "count")}
    assert summed["total"] / summed["count"] == near(whole.compute().item())
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == near(whole.compute().item())


def test_every_state_reduces():
    for cls in EVERY_METRIC:
        assert all(reduction is not None for reduction in cls()._reductions.values()), cls


def test_a_perfect_first_batch_does_not_tie_metrics_together():
    collection = MetricCollection({"any": MultiHopAccuracy(), "all": HopAccuracy()})
    for values in ([1.0, 1.0], [1.0, 0.0]):
        collection.update(torch.tensor(values), cases(0, 0))
    assert collection.compute() == {"any": near(1.0), "all": near(0.5)}


def test_metrics_of_different_protocols_are_not_tied_together_either():
    assert CaseMean("tf_tok").metric_state.keys() != CaseMean("tf_exact").metric_state.keys()


@pytest.mark.parametrize("cls", EVERY_METRIC)
def test_what_torchmetrics_takes_is_passed_on(cls):
    assert cls(compute_on_cpu=True).compute_on_cpu


def test_every_protocol_has_its_name():
    for cls in EVERY_METRIC:
        assert cls(protocol="mine").protocol == "mine"


def test_sums_are_in_double_precision():
    assert all(cls().total.dtype == torch.float64 for cls in CASE_METRICS)


@pytest.mark.parametrize("measure", ["token_accuracy", "exact_match", "agreement"])
def test_tokens_whose_probability_is_not_finite_are_wrong(measure):
    ids, logprob = torch.ones(2, 1, dtype=torch.long), torch.tensor([[-1.0], [NAN]])
    assert getattr(metrics, measure)(ids, ids, ids, logprob).tolist() == [1, 0]


def test_forward_gives_the_batch_and_compute_the_whole():
    metric: Metric = CaseMean()
    assert metric(torch.tensor([1.0, 1.0]), cases(0, 0)) == 1
    assert metric(torch.tensor([0.0, 1.0]), cases(0, 0)) == near(0.5)
    assert metric.compute() == near(0.75)
    metric.reset()
    assert metric.compute().isnan()
