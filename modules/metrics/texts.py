"""What a model wrote when left alone: where its answer ends, whether it is right, how it degrades.

Two protocols say where an answer ends. ``strict`` stops at a newline or at a period that ends a
sentence; ``paper`` (WILD, arXiv 2502.11177) stops at any period, which cuts "U.S." and "3.5".
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from corrigenda.modules import checks

WORD_PATTERN = r"\w+|[^\w\s]"
"""How `split_words` finds words; entropies under another tokeniser differ by a few points."""

_PERIOD = re.compile(r"(\S+)\.(?=\s+(\S)|\s*$)")
_INITIALS = re.compile(r"([^\W\d_]\.)*[^\W\d_]")
_BEFORE_NAMES = re.compile(
    r"capt|col|dr|fr|ft|gen|gov|hon|lt|maj|mrs?|ms|mt|prof|rep|rev|sen|sgt|ste?|vs", re.IGNORECASE
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _is_abbreviation(word: str) -> bool:
    """True for initials ("U.S", "J") and for short forms that stand before a name ("St")."""
    word = word.lstrip("([\"'")
    return bool(_INITIALS.fullmatch(word) or _BEFORE_NAMES.fullmatch(word))


def wild_answer(text: str) -> str:
    """The answer up to a newline or the first sentence's end, without its final period.

    A period ends a sentence at the end of the line, or before a space and a capital letter unless
    it belongs to an abbreviation: "U.S. Virgin Islands" and "St. Louis" stay whole.
    """
    line = text.split("\n", 1)[0]
    for period in _PERIOD.finditer(line):
        word, following = period.groups()
        if following is None or (following.isupper() and not _is_abbreviation(word)):
            return line[: period.end(1)].strip()
    return line.strip()


def paper_answer(text: str) -> str:
    """The answer up to the first newline or period of any kind."""
    return re.split(r"[.\n]", text, maxsplit=1)[0].strip()


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces; an answer that is nothing but
    an article ("A") keeps it."""
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
    """1 if the words of one answer stand next to each other in the prediction, else 0."""
    return _best(lambda prediction, gold: f" {gold} " in f" {prediction} ", prediction, answers)


def wild_prefix(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction begins with the words of one answer, else 0."""
    return _best(
        lambda prediction, gold: f"{prediction} ".startswith(f"{gold} "), prediction, answers
    )


def wild_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the prediction's words against the answer it matches best, repeated words counted."""
    return _best(_word_f1, prediction, answers)


def _word_f1(prediction: str, gold: str) -> float:
    words, gold_words = prediction.split(), gold.split()
    num_shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * num_shared / (len(words) + len(gold_words))


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of a text, by `WORD_PATTERN`."""
    return re.findall(WORD_PATTERN, text)


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Entropy in bits of a text's n-grams; 0 for a text with fewer than n words."""
    checks.whole(1, n=n)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def generation_entropy(words: Sequence[str]) -> float:
    """Fluency of one text: H2 / 3 + 2 H3 / 3 in bits (tables show it times 100)."""
    return ngram_entropy(words, 2) / 3 + 2 * ngram_entropy(words, 3) / 3


def normalised_word_entropy(texts: Sequence[str]) -> float:
    """Word entropy of all of a case's generations together, over that of equal frequencies.

    Healthy models mostly lie at 0.8 to 0.92, collapsed ones below 0.7; a single word gives 0.
    """
    words = " ".join(texts).lower().replace(".", "").split()
    num_distinct = len(set(words))
    return ngram_entropy(words, 1) / math.log2(num_distinct) if num_distinct > 1 else 0.0
