"""How a setting is described: default, sentence, values, and what others must be for a run to read it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple


class Need(NamedTuple):
    """What another setting must be. says: what follows its name in a message, such as "='joint'"."""

    says: str
    holds: Callable[[Any], bool]


def above(bound: float) -> Need:
    """The other setting is above this number."""
    return Need(f" above {bound}", lambda value: value is not None and value > bound)


SET = Need("", lambda value: value is not None)
"""The other setting has a value."""

LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above", operator.gt), "least": ("at least", operator.ge),
    "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip
"""A limit's name -> its words and what it asks of value and bound."""


def setting(
    default: Any,
    says: str,
    *,
    one_of: tuple[str, ...] = (),
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    of_size: bool = False,
    either: tuple[dict[str, Any], ...] = (),
    **needs: str | tuple[str, ...] | Need,
) -> Any:
    """A dataclass field with its description.

    says: what it is. one_of: the texts that it may be. above, least, most, below: limits of a number. infinite: it may
    be infinity. of_size: where it is None, the parent's size decides. needs: other settings, which come earlier in the
    table -> a value, several values, or a `Need`; a run reads this setting only if all of them hold, and one of
    `either` where that is given.
    """
    bounds = {"above": above, "least": least, "most": most, "below": below}
    metadata = {
        "says": says,
        "one_of": one_of,
        "limits": {name: bound for name, bound in bounds.items() if bound is not None},
        "infinite": infinite,
        "of_size": of_size,
        "needs": _needs(needs),
        "either": tuple(map(_needs, either)),
    }
    return field(default=default, metadata=metadata)


def _needs(named: dict[str, Any]) -> dict[str, Need]:
    return {name: need if isinstance(need, Need) else _value_in(need) for name, need in named.items()}


def _value_in(values: str | tuple[str, ...]) -> Need:
    *others, last = (values,) if isinstance(values, str) else values
    says = f"={', '.join(map(repr, others))} or {last!r}" if others else f"={last!r}"
    return Need(says, lambda value: value == last or value in others)


DIFFUSION = Need(" other than 'ar'", lambda attention: attention != "ar")
"""The run trains a diffusion model, not a next-token one."""
