"""Numbers of numpy as Python's, so that they do not overflow, and JSON holds them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A scalar of numpy as Python's, also inside a list or tuple; everything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def plain_fields(instance: Any) -> None:
    """Replace the scalars of numpy in a frozen dataclass: the first line of its `__post_init__`."""
    for entry in fields(instance):
        object.__setattr__(instance, entry.name, plain(getattr(instance, entry.name)))
