"""The picture of the house in docs/architecture.md agrees with the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_module_stands_in_the_picture_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = page.split("```")[1]
    words = set(re.findall(r"[a-z_0-9]+", picture))
    for file in (ROOT / "src" / "unmask").rglob("*.py"):
        if not file.stem.startswith("__"):
            assert file.stem in words, file
    for folder in re.findall(r"^ +([a-z]+)/ ", picture, re.MULTILINE):
        assert list((ROOT / "src" / "unmask").rglob(folder)), folder
    for name in re.findall(r"^ +([a-z_]+)\.py", picture, re.MULTILINE):
        assert (ROOT / "src" / "unmask" / f"{name}.py").is_file(), name


def test_every_module_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for path in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", page.read_text()):
            places = (ROOT / "src" / "unmask" / path, ROOT / "tests" / path, ROOT / "benchmarks" / path, ROOT / path)
            assert any(place.is_file() for place in places), (page.name, path)
