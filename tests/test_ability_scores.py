"""Scores of the tasks of general abilities, against values worked out by hand."""

import math
import random

import pytest

from corrigenda.pipeline.abilities import scores
from corrigenda.pipeline.abilities.evaluating import jackknife
from corrigenda.pipeline.abilities.ids import chosen, row_id

NAN = math.nan


def measured(function, row, *results):
    return {name: pytest.approx(value, abs=1e-4) for name, value in function(row, results).items()}


# ---------------------------------------------------------------------------- choices


def test_the_likelier_word_counts_and_a_greedy_word_is_an_answer():
    results = (-1.0, True), (-2.0, False)
    assert measured(scores.choice, {"label": 0}, *results) == {"acc": 1.0, "invalid": 0.0}
    assert measured(scores.choice, {"label": True}, *results) == {"acc": 0.0, "invalid": 0.0}


def test_words_that_the_model_would_not_write_are_invalid_but_can_be_right():
    results = (-9.0, False), (-8.0, False)
    assert measured(scores.choice, {"label": 1}, *results) == {"acc": 1.0, "invalid": 1.0}


@pytest.mark.parametrize("label", [0, 1])
def test_scores_that_are_not_finite_are_wrong_and_invalid(label):
    results = ((NAN, False), (NAN, False))
    row = {"label": label}
    assert scores.choice(row, results) == {"acc": 0.0, "invalid": 1.0}
    assert scores.choice_mcc(row, results)["mcc"] == (label, 1 - label)
    assert scores.ranking(row, results) == {"r@1": 0.0, "r@2": 0.0, "mrr": 0.0, "invalid": 1.0}


def test_the_right_option_is_ranked_among_all():
    """Ranks 2 and 1: R@1 .5, R@2 1 and MRR .75 together (evaluation of MuTual)."""
    one = scores.ranking({"label": 2}, [(s, False) for s in (-3.2, -1.1, -2.0, -5.0)])
    two = scores.ranking({"label": 0}, [(s, False) for s in (-0.5, -0.9, -2.2, -3.0)])
    assert one == {"r@1": 0.0, "r@2": 1.0, "mrr": 0.5, "invalid": 0.0}
    assert two == {"r@1": 1.0, "r@2": 1.0, "mrr": 1.0, "invalid": 0.0}


def test_equal_options_are_not_ranked_first():
    assert scores.ranking({"label": 0}, [(-1.0, False)] * 4)["mrr"] == 0.25


# ---------------------------------------------------------------------------- one word


@pytest.mark.parametrize(
    ("function", "label", "text", "right", "invalid"),
    [
        (scores.yes_or_no_word, True, " Yes", 1, 0),
        (scores.yes_or_no_word, False, " not", 1, 0),  # "no" is in it, as the paper's script wants
        (scores.yes_or_no_word, False, " know", 1, 0),
        (scores.yes_or_no_word, True, " maybe", 0, 1),
        (scores.entailment_word, 0, " True", 1, 0),
        (scores.entailment_word, 1, " True", 0, 0),
        (scores.entailment_word, 1, "\n", 0, 1),
        (scores.sentiment_word, 1, " positive", 1, 0),
        (scores.sentiment_word, 0, " neutral", 0, 1),
        (scores.option_letter, 0, " According", 1, 0),  # holds an A
        (scores.option_letter, 3, " D", 1, 0),
        (scores.option_letter, 3, " d", 0, 1),
    ],
)
def test_one_word_in_the_form_of_the_paper(function, label, text, right, invalid):
    assert function({"label": label}, [text]) == {"acc": right, "invalid": invalid}


# ---------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "exact", "marked", "invalid"),
    [
        ("So 9*2=18. #### 1018", 1, 1, 0),
        ("The answer is $1,018.", 1, 0, 0),
        ("I think 1018 dollars in 2 days", 0, 0, 0),
        ("1018.00", 1, 0, 0),
        ("many", 0, 0, 1),
    ],
)
def test_the_last_number_of_a_chain_of_thought(text, exact, marked, invalid):
    expected = {"exact_match": exact, "marked": marked, "invalid": invalid}
    assert scores.last_number({"answer": "18 + 1,000\n#### 1,018"}, [text]) == expected


@pytest.mark.parametrize(
    ("gold", "text", "paper", "strict"),
    [("8", " 18.", 1, 0), ("8", " 8.", 1, 1), ("1,018", " 1018", 0, 1), ("-3", " -3", 1, 1)],
)
def test_a_number_that_is_copied_from_the_prompt(gold, text, paper, strict):
    found = scores.copied_number({"answer": f"reason\n#### {gold}"}, [text])
    assert found == {"solve_rate": paper, "first_number": strict, "invalid": 0}


# ---------------------------------------------------------------------------- short answers


@pytest.mark.parametrize(
    ("text", "words"), [("The Beatles!", "beatles"), ("An A.B.C.", "abc"), ("  a  ", "")]
)
def test_texts_are_compared_without_case_punctuation_and_articles(text, words):
    assert scores.normalised(text) == words


@pytest.mark.parametrize(
    ("text", "em", "contains", "prefix", "paper"),
    [
        (" Paris", 1, 1, 1, 1),
        ("Paris, the capital", 0, 1, 1, 1),
        ("It is Paris", 0, 1, 0, 1),  # the last word
        ("It is Paris now", 0, 1, 0, 0),
        ("Parisian", 0, 0, 0, 1),  # begins with the letters
        ("\nRome\nParis", 0, 0, 0, 1),  # a later line
    ],
)
def test_answers_of_a_few_words(text, em, contains, prefix, paper):
    row = {"answer": ["Paris", "City of Paris"]}
    expected = {"em": em, "contains": contains, "prefix": prefix, "invalid": 0}
    assert scores.closed_book(row, [text]) == expected
    assert scores.span_match(row, [text])["em"] == paper


def test_an_answer_without_words_is_invalid():
    assert scores.closed_book({"answer": ["Paris"]}, [" .\n"])["invalid"] == 1
    assert scores.span_match({"answer": ["Paris"]}, ["the"])["invalid"] == 1


# ---------------------------------------------------------------------------- summaries


def test_rouge_counts_repetitions_and_sets_do_not():
    row = {"summary": "the cat is on the mat"}
    strict = measured(scores.summary, row, " the cat sat on the mat\n\nmore")
    assert strict == {
        "rouge": 0.75556,
        "rouge1": 0.83333,
        "rouge2": 0.6,
        "rougeL": 0.83333,
        "invalid": 0,
    }
    assert scores.set_rouge("the cat sat on the mat", row["summary"]) == pytest.approx(
        (0.8, 0.6, 0.8)
    )


def test_rouge_of_sets_ignores_that_words_are_repeated():
    assert scores.set_rouge("the the the cat", "the cat") == pytest.approx((1.0, 2 / 3, 1.0))


@pytest.mark.parametrize("text", ["", "..", " "])
def test_rouge_of_nothing_is_zero(text):
    assert scores.set_rouge(text, "the cat") == (0.0, 0.0, 0.0)
    assert scores.summary({"summary": "the cat"}, [text.strip(". ")])["invalid"] == 1


def test_the_paper_cuts_thirteen_characters_off_every_summary():
    row = {"summary": "the cat"}
    assert scores.set_summary(row, ["the cat<|endoftext|>"])["rouge"] == pytest.approx(1.0)
    assert scores.set_summary(row, ["the cat"]) == {
        "rouge": 0, "rouge1": 0, "rouge2": 0, "rougeL": 0, "invalid": 1,
    }  # fmt: skip


# ---------------------------------------------------------------------------- entities

TOKENS = ["Ann", "Lee", "of", "the", "UN", "went", "to", "New", "York"]
TAGS = ["B-PER", "I-PER", "O", "O", "B-ORG", "O", "O", "B-LOC", "I-LOC"]


def sentence(kind, tokens=TOKENS, tags=TAGS):
    return {"tokens": tokens, "ner_tags": tags, "kind": kind}


def test_entities_are_whole_mentions():
    assert [scores.mentions(TOKENS, TAGS, kind) for kind in ("PER", "LOC", "MISC")] == [
        ["Ann Lee"], ["New York"], [],
    ]  # fmt: skip
    assert scores.mentions(["A", "B"], ["B-LOC", "B-LOC"], "LOC") == ["A", "B"]


def test_entities_of_an_answer_are_compared_as_multisets():
    answers = scores.entities(sentence("PER"), [" Ann Lee, UN and Ann Lee\nBob"])
    assert answers == {"f1": (1, 3, 1), "invalid": 0.0}
    assert scores.entities(sentence("PER"), ["\n"]) == {"f1": (0, 0, 1), "invalid": 1.0}
    assert scores.entities(sentence("MISC"), [""]) == {"f1": (0, 0, 0), "invalid": 0.0}


def test_micro_f1_of_entities():
    """4 given, 3 right, 2 of them found: P .5, R .66667."""
    assert scores.entity_f1([(1, 1, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0)]) == pytest.approx(
        0.57143, abs=1e-5
    )
    assert scores.entity_f1([(0, 0, 0)]) == 0.0


def test_the_papers_mentions_lose_the_last_token_of_a_sentence():
    assert scores.paper_mentions(TOKENS, TAGS, "LOC") == ["New"]
    assert scores.paper_mentions(["in", "Rome"], ["O", "B-LOC"], "LOC") == [""]
    assert scores.paper_mentions(["A", "B", "."], ["B-LOC", "B-ORG", "O"], "LOC") == ["A B"]


def test_the_papers_recall_is_the_mean_over_types():
    rows = [
        scores.paper_entities(sentence("PER"), [" Ann Lee"])["recall"],
        scores.paper_entities(sentence("LOC", ["in", "Rome"], ["O", "B-LOC"]), ["x"])["recall"],
        scores.paper_entities(sentence("ORG"), ["none"])["recall"],
        scores.paper_entities(sentence("MISC"), ["none"])["recall"],
    ]
    assert rows == [("PER", 1, 1), ("LOC", 1, 1), ("ORG", 0, 1), ("MISC", 0, 1)]
    assert scores.macro_recall(rows) == 0.5


# ---------------------------------------------------------------------------- standard errors


def test_the_standard_error_of_a_mean_is_the_usual_one():
    """Four answers, half of them right: s / root n = .57735 / 2."""

    def mean(values):
        return sum(values) / len(values)

    assert jackknife(mean, [1, 0, 1, 0]) == pytest.approx(0.288675, abs=1e-6)
    assert math.isnan(jackknife(mean, [1]))


def test_the_standard_error_of_another_measure_leaves_out_each_answer():
    """Of [1, 0, 0], the squares of the means without each are 0, 1/4 and 1/4."""

    def squared(values):
        return (sum(values) / len(values)) ** 2

    assert jackknife(squared, [1, 0, 0]) == pytest.approx(math.sqrt(2 / 3 * (1 / 36 + 2 / 144)))


def test_the_standard_error_of_many_answers_leaves_out_groups():
    """Of a mean, groups of five give about the usual error."""

    def average(values):
        return sum(values) / len(values)

    source = random.Random(0)
    values = [source.random() < 0.3 for _ in range(1000)]
    assert jackknife(average, values) == pytest.approx((0.3 * 0.7 / 1000) ** 0.5, rel=0.15)


# ---------------------------------------------------------------------------- rows of a profile


def test_rows_are_taken_from_each_class_in_turn():
    assert chosen(["d", "b", "a", "c", "e"], [1, 0, 0, 1, 0]) == ["a", "c", "b", "d"]


def test_an_id_is_the_same_for_a_number_and_its_text():
    assert row_id(12) == row_id("12") != row_id(13)
