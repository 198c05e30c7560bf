"""Measures of freely generated answers: where an answer ends, and whether it is right.

An answer ends at a newline or at a period that ends a sentence. (WILD, arXiv 2502.11177, ends it at any period,
which cuts off "U.S." and "3.5".)
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_PERIOD = re.compile(r"(\S+)\.(?=\s+(\S)|\s*$)")
_INITIALS = re.compile(r"([^\W\d_]\.)*[^\W\d_]")
_BEFORE_NAMES = re.compile(
    r"capt|col|dr|fr|ft|gen|gov|hon|lt|maj|mrs?|ms|mt|prof|rep|rev|sen|sgt|ste?|vs", re.IGNORECASE
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _is_abbreviation(word: str) -> bool:
    """True for initials ("U.S", "J") and for abbreviations that precede a name ("St")."""
    word = word.lstrip("([\"'")
    return bool(_INITIALS.fullmatch(word) or _BEFORE_NAMES.fullmatch(word))


def wild_answer(text: str) -> str:
    """The first sentence of the first line, without its final period.

    A period ends a sentence at the end of the line, or before a space and a capital letter unless it belongs to an
    abbreviation, as in "U.S. Virgin Islands" and "St. Louis".
    """
    line = text.split("\n", 1)[0]
    for period in _PERIOD.finditer(line):
        word, following = period.groups()
        if following is None or (following.isupper() and not _is_abbreviation(word)):
            return line[: period.end(1)].strip()
    return line.strip()


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces; an answer that consists of an article ("A") is
    not changed."""
    text = unicodedata.normalize("NFC", text).lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split() or text.split())


def _best(compare: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The best comparison of a normalised prediction with any acceptable answer."""
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of strings, got the string {answers!r}")
    prediction, golds = normalise_answer(prediction), map(normalise_answer, answers)
    return max((float(compare(prediction, gold)) for gold in golds if gold), default=0.0)


def wild_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the normalised answers, else 0."""
    return _best(lambda prediction, gold: prediction == gold, prediction, answers)


def wild_contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction contains the words of one answer as a sequence, else 0."""
    return _best(lambda prediction, gold: f" {gold} " in f" {prediction} ", prediction, answers)


def wild_prefix(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction starts with the words of one answer, else 0."""
    return _best(
        lambda prediction, gold: f"{prediction} ".startswith(f"{gold} "), prediction, answers
    )


def wild_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the prediction's words against the best matching answer, counting repeated words."""
    return _best(_word_f1, prediction, answers)


def _word_f1(prediction: str, gold: str) -> float:
    words, gold_words = prediction.split(), gold.split()
    num_shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * num_shared / (len(words) + len(gold_words))


def word_entropy(texts: Sequence[str]) -> float:
    """Entropy of the words of all texts, divided by its largest value for as many distinct words, from 0 to 1.

    Words are in lower case, without periods, and separated by spaces. 0 for at most one distinct word. Texts of a
    broken model repeat themselves and stay below .7 (arXiv 2403.07175).
    """
    counts = Counter(word for text in texts for word in text.lower().replace(".", "").split())
    if len(counts) < 2:
        return 0.0
    shares = [count / counts.total() for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares) / math.log2(len(counts))
