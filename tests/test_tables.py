"""Tables and lines on narrow screens: no word is broken, nothing is lost; what a program reads stays as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from unmask.tables import aligned, fitted, wrapped

ROWS = [
    ["layout", "rows", "total GB", "tokens/s"],
    ["whole on each device", "4", "0.1", "19,615,001"],
    ["whole, checkpointed", "4", "-", "14,711,251"],
]


def test_a_table_that_does_not_fit_says_its_cells_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(ROWS) == aligned(ROWS)  # read by a program
    monkeypatch.setenv("COLUMNS", "60")
    assert fitted(ROWS) == aligned(ROWS)
    monkeypatch.setenv("COLUMNS", "36")
    assert fitted(ROWS) == (
        "layout: whole on each device\n  rows: 4; total GB: 0.1; tokens/s:\n  19,615,001\n"
        "layout: whole, checkpointed\n  rows: 4; tokens/s: 14,711,251"
    )


def test_lines_go_on_indented(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "nll    1.2345 nats/token  0.9876 bits/byte  (AR mode, exact)"
    assert wrapped(line) == line
    monkeypatch.setenv("COLUMNS", "40")
    assert wrapped(line, "       ") == "nll    1.2345 nats/token  0.9876\n       bits/byte  (AR mode, exact)"


@pytest.mark.parametrize("arguments", [("recipes",), ("plan", "models/tasks-base", "--tokens", "10M")])
def test_commands_fit_a_narrow_screen(run: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(__file__.rsplit("/", 2)[0])
    wide = run(*arguments)[1]
    monkeypatch.setenv("COLUMNS", "60")
    code, narrow, err = run(*arguments)
    assert code == 0, err
    assert max(map(len, narrow.splitlines())) <= 60
    words, kept = (set(re.findall(r"\w[\w.,%-]*\w", text)) for text in (wide, narrow))
    assert words <= kept  # none broken, none lost
