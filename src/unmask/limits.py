"""Whether a value that a user gave is a number within limits; the errors name the value and the limit."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

LARGEST = 2**31 - 1
"""The largest count: of tokens, rows, steps. Sizes of tensors and C libraries hold no more."""

MOST_SAMPLES = 4096
"""Masks that estimate a bound, at most: each is a forward."""

MOST_ROUNDS = 1000
"""Timed rounds of a measurement, at most."""


def check_whole(name: str, value: Any, least: float = 1, most: float = LARGEST, why: str = "") -> None:
    """Raise TypeError for what is no whole number, ValueError for one outside [least, most].

    None is no value, and passes. why: what follows the sentence, such as ": it is how many rows decode at a time".
    """
    if value is None:
        return
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} {value!r} must be a whole number{why}")
    if number < least:
        raise ValueError(f"{name} {number} must be at least {least}{why}")
    if number > most:
        raise ValueError(f"{name} {number} must be at most {most:,}{why}")


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The numbers of a list; TypeError for what is no list of whole numbers."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise TypeError(f"{name} {values!r} must be a list of whole numbers")
    found = tuple(values)
    for value in found:
        if value is None:
            raise TypeError(f"{name} {values!r} must be a list of whole numbers")
        check_whole(name, value, least=-math.inf, most=math.inf)
    return tuple(map(int, found))


_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def number_of_tokens(text: Any, name: str = "number of tokens") -> int:
    """A number of tokens as people write it: 50M, 1.5B, 1_000_000, 1e9; name: of the value in the error."""
    unit = _UNITS.get(str(text)[-1:], 1)
    try:
        number = float(str(text)[:-1] if unit > 1 else text) * unit
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf or number != int(number):
        raise ValueError(f"{name} {text!r} is no number of tokens: write 50M, 10B or 1000000")
    return int(number)


def check_function(name: str, value: Any, such_as: str) -> None:
    """Raise TypeError for what cannot be called; None passes."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} {value!r} must be a function such as {such_as}")


def check_seed(seed: Any) -> None:
    """Raise TypeError for what is no whole number: any size and sign will do."""
    check_whole("seed", seed, least=-math.inf, most=math.inf)


def check_number(name: str, value: Any) -> None:
    """Raise TypeError for what is no number, ValueError for one that no float holds; None passes."""
    if value is None:
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} {value!r} must be a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} {value} must be finite") from None
