"""Checks of constructor arguments, with one-line errors: the argument's name, what it must be, and what it is.

``None`` passes: it means "not given", and the argument's type says whether that is allowed. NaN and infinity never
pass, nor does a bool or a string where a number is expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TypeGuard

MOST_SEED = 2**32 - 1  # as in Lightning


def number(what: str, fits: Callable[[float], bool], **values: object) -> None:
    """Finite numbers for which ``fits`` is true; the error says that they must be ``what``."""
    for name, value in values.items():
        if value is None:
            continue
        if not _is(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (abs(value) < math.inf and fits(value)):
            raise ValueError(f"{name} must be {what}, got {value!r}")


def positive(**values: object) -> None:
    """Finite numbers above 0."""
    number("positive", lambda x: x > 0, **values)


def at_least(least: float, **values: object) -> None:
    """Finite numbers not below ``least``."""
    number(f"at least {least:g}", lambda x: x >= least, **values)


def between(low: float, high: float, **values: object) -> None:
    """Numbers from ``low`` to ``high``, both allowed."""
    number(f"between {low:g} and {high:g}", lambda x: low <= x <= high, **values)


def share(**values: object) -> None:
    """Fractions above 0 and at most 1."""
    number("above 0 and at most 1", lambda x: 0 < x <= 1, **values)


def whole(least: int, **values: object) -> None:
    """Whole numbers not below ``least``."""
    for name, value in values.items():
        if value is not None:
            _whole(name, value, least)


def seeds(**values: object) -> None:
    """Seeds of random numbers."""
    whole(0, **values)
    number(f"at most {MOST_SEED}", lambda x: x <= MOST_SEED, **values)


def blocks(**values: object) -> None:
    """Lists of block indices, from 0, in any order. Whether the model has them, its structure checks."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} must be a list of blocks, for example [3], got {value!r}")
        if not value:
            raise ValueError(f"{name} must name at least one block, for example [3], got []")
        for layer in value:
            _whole(f"each block of {name}", layer, 0)
        if len(set(value)) < len(value):
            raise ValueError(f"{name} must name each block once, got {list(value)}")


def contexts(**values: object) -> None:
    """Lists of pairs [tokens, how many] for sampled texts; an empty list samples none."""
    for name, value in values.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} must be a list of pairs [tokens, how many], got {value!r}")
        for pair in value:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"{name} must be pairs [tokens, how many], got {pair!r}")
            _whole(f"tokens of each pair of {name}", pair[0], 2)
            _whole(f"texts of each pair of {name}", pair[1], 1)


def with_slot(**values: object) -> None:
    """Texts with exactly one ``{}``."""
    for name, value in values.items():
        if not isinstance(value, str) or value.count("{}") != 1:
            raise ValueError(f"{name} must be a text with exactly one {{}}, got {value!r}")


def _whole(name: str, value: object, least: int) -> None:
    if not _is(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    at_least(least, **{name: value})


def _is(value: object, kind: type) -> TypeGuard[float]:
    return isinstance(value, kind) and not isinstance(value, bool)
