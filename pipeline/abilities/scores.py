"""How answers to our tasks are scored: ``process_results`` and aggregations of the files in ``configs/tasks``.

``strict`` is the corrected definition, ``paper`` is what arXiv 2401.04700 measured. Every function of an example
returns its measures and ``invalid``: 1 where the answer is no answer to the question, which counts as wrong.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Measures = dict[str, Any]

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
ANSWER = re.compile(r"#### (-?[0-9.,]+)")
TYPES = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
END_MARKER = len("<|endoftext|>")  # characters that the paper's script always cuts off a summary

# ---------------------------------------------------------------------------- choices by log-likelihood


def choice(row: Row, results: Sequence[tuple[float, bool]]) -> Measures:
    """Whether the likeliest of the words is the right one; invalid if the model would write none of them."""
    gold, best, finite = _best(row, results)
    return {
        "acc": float(best == gold),
        "invalid": float(not (finite and any(g for _, g in results))),
    }


def choice_mcc(row: Row, results: Sequence[tuple[float, bool]]) -> Measures:
    """:func:`choice`, and the pair for Matthews's correlation."""
    gold, best, _ = _best(row, results)
    return {"mcc": (gold, best), **choice(row, results)}


def choice_f1(row: Row, results: Sequence[tuple[float, bool]]) -> Measures:
    """:func:`choice`, and the pair for F1 of the positive class."""
    gold, best, _ = _best(row, results)
    return {"f1": (gold, best), **choice(row, results)}


def _best(row: Row, results: Sequence[tuple[float, bool]]) -> tuple[int, int, bool]:
    """(right, chosen, whether all scores are finite); without finite scores another one is chosen."""
    gold, scores = int(row["label"]), [score for score, _ in results]
    finite = all(map(math.isfinite, scores))
    return gold, scores.index(max(scores)) if finite else int(gold == 0), finite


def ranking(row: Row, results: Sequence[tuple[float, bool]]) -> Measures:
    """R@1, R@2 and MRR of the right option among all, by log-likelihood (the official MuTual measures)."""
    scores = [score for score, _ in results]
    if not all(map(math.isfinite, scores)):
        return {"r@1": 0.0, "r@2": 0.0, "mrr": 0.0, "invalid": 1.0}
    gold = int(row["label"])
    rank = 1 + sum(score >= scores[gold] for i, score in enumerate(scores) if i != gold)
    return {"r@1": float(rank == 1), "r@2": float(rank <= 2), "mrr": 1 / rank, "invalid": 0.0}


# ---------------------------------------------------------------------------- one word in the paper's form


def entailment_word(row: Row, results: Sequence[str]) -> Measures:
    return _word(("true", "false"), int(row["label"]), results[0].casefold())


def yes_or_no_word(row: Row, results: Sequence[str]) -> Measures:
    return _word(("no", "yes"), int(row["label"]), results[0].casefold())


def sentiment_word(row: Row, results: Sequence[str]) -> Measures:
    return _word(("negative", "positive"), int(row["label"]), results[0].casefold())


def option_letter(row: Row, results: Sequence[str]) -> Measures:
    return _word(tuple("ABCD"), int(row["label"]), results[0])


def _word(words: Sequence[str], gold: int, text: str) -> Measures:
    """Whether the right word is in the text; invalid if none is."""
    right, invalid = words[gold] in text, not any(word in text for word in words)
    return {"acc": float(right), "invalid": float(invalid)}


# ---------------------------------------------------------------------------- GSM8K


def last_number(row: Row, results: Sequence[str]) -> Measures:
    """Whether the answer's last number is the right one, and whether it has the requested form (``####``)."""
    gold, found = gold_number(row["answer"]), NUMBER.findall(results[0])
    marked = ANSWER.search(results[0])
    return {
        "exact_match": float(bool(found) and plain_number(found[-1]) == gold),
        "marked": float(marked is not None and plain_number(marked[1]) == gold),
        "invalid": float(not found),
    }


def copied_number(row: Row, results: Sequence[str]) -> Measures:
    """The paper's task: the right number is in the text. Beside it, whether it is the first number."""
    text, written = results[0], ANSWER.search(row["answer"])
    found = NUMBER.findall(text)
    gold = gold_number(row["answer"])
    return {
        "solve_rate": float(written is not None and written[1] in text),
        "first_number": float(bool(found) and plain_number(found[0]) == gold),
        "invalid": float(not found),
    }


def gold_number(answer: str) -> str:
    """The number after ``####`` in an answer of GSM8K."""
    found = ANSWER.search(answer)
    return plain_number(found[1]) if found else ""


def plain_number(text: str) -> str:
    """A number without thousands separators, currency, and what is after a decimal point if that is zero."""
    plain = re.sub(r"[,$]", "", text).rstrip(".")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


# ---------------------------------------------------------------------------- NQ-open


def closed_book(row: Row, results: Sequence[str]) -> Measures:
    """Exact match of the first line, and whether it contains or begins with an answer (SQuAD's normalisation)."""
    words = normalised(first_line(results[0]))
    golds = [gold for gold in map(normalised, row["answer"]) if gold]
    return {
        "em": float(words in golds),
        "contains": float(any(f" {gold} " in f" {words} " for gold in golds)),
        "prefix": float(any(f"{words} ".startswith(f"{gold} ") for gold in golds)),
        "invalid": float(not words),
    }


def span_match(row: Row, results: Sequence[str]) -> Measures:
    """The paper's script in effect: the text begins with an answer, or its first or last word is one."""
    words = normalised(results[0])
    golds = [gold for gold in map(normalised, row["answer"]) if gold]
    prefix = any(words.startswith(gold) for gold in golds)
    ends = words.split()[:1] + words.split()[-1:]
    return {"em": float(prefix or any(end in golds for end in ends)), "invalid": float(not words)}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces (SQuAD)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(ARTICLES.sub(" ", plain).split())


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# ---------------------------------------------------------------------------- SAMSum


def summary(row: Row, results: Sequence[str]) -> Measures:
    """ROUGE-1, -2 and -L (torchmetrics) of the first paragraph, and their mean."""
    from torchmetrics.functional.text.rouge import rouge_score

    text = re.split(r"\n\s*\n", results[0].strip())[0]
    keys = ("rouge1", "rouge2", "rougeL")
    found = rouge_score(text, row["summary"], rouge_keys=keys) if text else {}
    scores = {key: float(found.get(f"{key}_fmeasure", 0.0)) for key in keys}
    return {"rouge": sum(scores.values()) / 3, **scores, "invalid": float(not text)}


def set_summary(row: Row, results: Sequence[str]) -> Measures:
    """ROUGE of sets of n-grams, as the package ``rouge`` 1.0.1 has it, of the text without its last 13 characters.

    The paper's script cuts an end marker off, also where there is none.
    """
    text = results[0][:-END_MARKER]
    scores = set_rouge(text, row["summary"]) if len(text) > 1 else (0.0, 0.0, 0.0)
    names = ("rouge1", "rouge2", "rougeL")
    invalid = float(len(text) <= 1)
    return {"rouge": sum(scores) / 3, **dict(zip(names, scores, strict=True)), "invalid": invalid}


def set_rouge(text: str, reference: str) -> tuple[float, float, float]:
    """(ROUGE-1, ROUGE-2, ROUGE-L), F-measures over unique n-grams and unique words of common subsequences."""
    sentences = [
        [part.split() for part in each.split(".") if part.split()] for each in (text, reference)
    ]
    one, other = ([word for part in parts for word in part] for parts in sentences)
    common = {word for a in sentences[0] for b in sentences[1] for word in _subsequence(a, b)}
    longest = _harmonic(len(common), len(set(one)), len(set(other)))
    return (
        _overlap(_grams(one, 1), _grams(other, 1)),
        _overlap(_grams(one, 2), _grams(other, 2)),
        longest,
    )


def _grams(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _overlap(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return _harmonic(len(one & other), len(one), len(other))


def _harmonic(common: int, one: int, other: int) -> float:
    """F-measure of a precision ``common / one`` and a recall ``common / other``."""
    return 2 * common / (one + other) if common else 0.0


def _subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence of words."""
    best: list[list[list[str]]] = [[[] for _ in range(len(other) + 1)] for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(best[i][j + 1], best[i + 1][j], key=len)
            best[i + 1][j + 1] = [*best[i][j], a] if a == b else longer
    return best[-1][-1]


# ---------------------------------------------------------------------------- CoNLL-2003


def by_type(rows: Any) -> Any:  # noqa: ANN401  a Dataset; types of `datasets` are not checked
    """Four examples of each sentence: one question for each type of entity."""
    from datasets import Dataset

    return Dataset.from_list([
        {"text": " ".join(row["tokens"]), "kind": kind, "type": TYPES[kind], "tokens": row["tokens"],
         "ner_tags": [tag if isinstance(tag, str) else TAGS[tag] for tag in row["ner_tags"]]}
        for row in rows for kind in TYPES
    ])  # fmt: skip


def entities(row: Row, results: Sequence[str]) -> Measures:
    """(hits, given, right) of the entities of one type, as multisets of their texts."""
    given = [part.strip() for part in re.split(r",|;| and ", results[0].split("\n")[0])]
    found = Counter(part for part in given if part)
    gold = Counter(mentions(row["tokens"], row["ner_tags"], row["kind"]))
    counts = (found & gold).total(), found.total(), gold.total()
    return {"f1": counts, "invalid": float(bool(gold) and not found)}


def mentions(tokens: Sequence[str], tags: Sequence[str], kind: str) -> list[str]:
    """The entities of one type in a sentence with IOB2 tags."""
    found: list[list[str]] = []
    inside = False
    for token, tag in zip(tokens, tags, strict=True):
        if tag == f"B-{kind}":
            found.append([token])
        elif inside and tag == f"I-{kind}":
            found[-1].append(token)
        inside = tag == f"B-{kind}" or (inside and tag == f"I-{kind}")
    return [" ".join(words) for words in found]


def entity_f1(counts: Iterable[tuple[int, int, int]]) -> float:
    """Micro F1 from (hits, given, right) of each example."""
    hits, given, right = (sum(part) for part in zip(*counts, strict=True))
    return _harmonic(hits, given, right)


def paper_entities(row: Row, results: Sequence[str]) -> Measures:
    """(type, hits, right): entities that are a part of the text, with the faults of the paper's script."""
    text, gold = results[0], paper_mentions(row["tokens"], row["ner_tags"], row["kind"])
    hits, right = sum(mention in text for mention in gold), len(gold)
    if row["kind"] == "MISC" and not gold:
        right = int(
            bool(text.strip())
        )  # only here an answer where there is none counts against the model
    return {"recall": (row["kind"], hits, right), "invalid": float(not text.strip())}


def paper_mentions(tokens: Sequence[str], tags: Sequence[str], kind: str) -> list[str]:
    """Entities as the paper's script finds them.

    A mention goes on until the next ``O``, through entities of other types, and one that reaches the end of the
    sentence loses its last token: of a single token nothing is left, which is a part of every text.
    """
    found, place = [], 0
    while place < len(tags):
        start = place
        place += 1
        if tags[start] == f"B-{kind}":
            while place < len(tags) and tags[place] != "O":
                place += 1
            end = place if place < len(tags) else place - 1
            found.append(" ".join(tokens[start:end]))
    return found


def macro_recall(counts: Iterable[tuple[str, int, int]]) -> float:
    """Mean over types of the share of their entities that were found."""
    hits, right = Counter[str](), Counter[str]()
    for kind, hit, count in counts:
        hits[kind] += hit
        right[kind] += count
    shares = [hits[kind] / right[kind] for kind in right if right[kind]]
    return sum(shares) / len(shares) if shares else 0.0


# ---------------------------------------------------------------------------- MuTual


def labelled(rows: Any) -> Any:  # noqa: ANN401
    """Dialogues and options as ordinary text, and the number of the right option."""
    from datasets import Dataset

    return Dataset.from_list([
        {**row, "article": detokenised(row["article"]), "label": "ABCD".index(row["answers"]),
         "options": [detokenised(option) for option in row["options"]]}
        for row in rows
    ])  # fmt: skip


def detokenised(text: str) -> str:
    """Text without the spaces that a tokeniser put before punctuation, as the harness writes MuTual."""
    for before, after in (
        (" '", "'"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" n't", "n't"),
        ("`` ", '"'),
        ("''", '"'),
    ):
        text = text.replace(before, after)
    return re.sub(r" ([:;!?,.])", r"\1", text)
