"""The oldest versions of other libraries that this one runs with; `python tests/versions` runs it with them."""

from __future__ import annotations

import re

OLDEST = {"torch": "2.9", "transformers": "5.0", "accelerate": "1.10", "datasets": "4.0", "safetensors": "0.5"}
"""As pyproject.toml has them."""


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    from importlib import metadata  # a fifth of the time that --help takes

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def too_old(package: str, version: str) -> bool:
    """Whether this version of a package is older than the oldest that this library runs with."""
    return package in OLDEST and is_before(version, OLDEST[package])


def is_before(version: str, other: str) -> bool:
    """Whether a version comes before another, by their first two numbers."""
    return _release(version) < _release(other)


def _release(version: str) -> list[int]:
    """ "2.13.0+cpu" -> [2, 13]; pre-releases ("5.0.0rc1", "2.9.0a0") count as the release."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def check() -> None:
    """Refuse libraries that are too old, before they fail somewhere inside with an error that says nothing."""
    for package, oldest in OLDEST.items():
        version = installed(package)
        if version is not None and too_old(package, version):
            raise ImportError(
                f"{package} {version} is too old for unmask, which needs {oldest} or later: "
                f'pip install --upgrade "{package}>={oldest}"'
            )
