"""What is less than one asked for is said: text that ends at the context, data below a row, text of the model's own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES

import unmask
from unmask.cli.app import main
from unmask.progress import Note

CONTEXT = 128
RUN: dict[str, Any] = {"max_length": 32, "block_size": 4, "batch_size": 2, "eval_documents": 0, "show_progress": False}


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_text_that_ends_at_the_context_is_said_to(converted: Path, mode: str) -> None:
    lm = unmask.load(converted)
    length = len(lm.prompt_ids("Once")[0])
    lm.model.generation_config.eos_token_id = None
    lm.tokenizer.eos_token = None
    expected = (
        rf"max_new_tokens=2000 .* has room for {CONTEXT - length} behind a prompt of {length}, and the text is cut"
    )
    with pytest.warns(Note, match=expected) as said:
        out = lm.generate(["Once", "Once there"], mode=mode, max_new_tokens=2000)
    assert len(said) == 1
    assert int(out.num_new_tokens[0]) == CONTEXT - length
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        lm.generate("Once", mode=mode, max_new_tokens=CONTEXT - length)
        lm.model.generation_config.eos_token_id = int(out.sequences[0, length])  # ends what is asked for at once
        lm.generate("Once", mode=mode, max_new_tokens=2000)


def test_the_command_says_it_in_a_line(
    tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tokenizer_and_model), "Once", "--max-new-tokens", "2000", "--json"]
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    cut = json.loads(out)["num_new_tokens"] > 100
    assert ("note: max_new_tokens=2000 does not fit" in err) == cut
    assert "warnings.warn" not in err


@pytest.mark.parametrize(
    ("more", "effect"), [({"max_tokens": 60}, "each row repeats it"), ({}, "the rest of the row is padding")]
)
def test_data_below_a_row_is_said(more: dict[str, Any], effect: str, tokenizer_and_model: Path, tmp_path: Path) -> None:
    with pytest.warns(Note, match=rf"the training text has \d+ tokens, less than a row of max_length=32: {effect}"):
        unmask.adapt(tokenizer_and_model, ["A cat sat."], "ar", tmp_path / "run", **RUN, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        unmask.adapt(tokenizer_and_model, STORIES, "ar", tmp_path / "long", **RUN, max_tokens=60)


@pytest.mark.parametrize("more", [{"self_every": 2}, {"self_every": 2, "max_tokens": 200}, {}])
def test_text_of_the_models_own_has_the_length_that_was_asked(
    more: dict[str, Any], tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    """Not that of the file with its beginnings, which is far longer."""
    unmask.adapt(tokenizer_and_model, "self", "drafter", tmp_path / "run", self_prompts=str(stories), self_tokens=500,
                 drafter_rank=2, **RUN, **more)  # fmt: skip
    tokens = json.loads((tmp_path / "run" / "run.json").read_text())["tokens"]
    asked = more.get("max_tokens", 500)
    assert asked <= tokens < asked + 64 * 32  # rollouts are written in batches of 64 rows, and learnt whole
