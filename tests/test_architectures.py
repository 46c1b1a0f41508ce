"""A handful of the classes of tests/architectures, whose command examines all of them."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "architectures"
sys.path.insert(0, str(FOLDER))
from checks import examine  # noqa: E402


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_text"])
def test_accepted_classes_are_read_right(name: str) -> None:
    row = examine(name)
    assert (row.verdict, row.reason) == ("accepted", "")


@pytest.mark.parametrize(("name", "reason"), [("mamba", "recurrent state"), ("qwen3_next", "'linear_attention'")])
def test_refused_classes_are_refused_for_what_was_measured(name: str, reason: str) -> None:
    row = examine(name)
    assert row.verdict == "refused"
    assert reason in row.reason


def test_the_command_refuses_what_is_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(FOLDER / "__main__.py"))
    with pytest.raises(SystemExit):
        command["main"](["llamma"])
    assert "'llamma' is no model type" in capsys.readouterr().err


def test_a_class_that_takes_its_process_along_is_a_crash() -> None:
    command = runpy.run_path(str(FOLDER / "__main__.py"))
    command["in_a_process"].__globals__["examine"] = lambda _: os._exit(3)
    row = command["in_a_process"]("llama")
    assert (row.verdict, row.reason) == ("crash", "its process ended with 3")
    assert "| `llama` | crash |  |  | its process ended with 3 |" in command["page"]([row])
