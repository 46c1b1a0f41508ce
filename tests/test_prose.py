"""Words of README, docs and code: spelt right, and none of those that say nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks

PLACES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "src", "examples", "benchmarks", "configs")
EMPTY = ("simply", "just", "easily", "obviously", "of course", "basically", "very", "quite", "please", "leverage",
         "utilize", "seamless", "powerful", "state-of-the-art", "e.g.", "i.e.", "in order to", "note that")  # fmt: skip


def test_nothing_is_misspelt() -> None:
    """By codespell's list of mistakes; pyproject.toml has the words that it does not know."""
    line = [sys.executable, "-m", "codespell_lib", "--skip", "*.svg,*.ipynb,*.pyc", *PLACES]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_word_is_empty(page: Path) -> None:
    text = page.read_text()
    for block in blocks(page):
        text = text.replace(block.text, "")
    text = re.sub(r"`[^`]*`|^\|.*refused.*", "", text, flags=re.MULTILINE)  # a refusal may quote another program
    found = [word for word in EMPTY if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)]
    assert not found, f"{page.name}: leave out {found}"
