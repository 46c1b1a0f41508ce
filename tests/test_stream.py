"""Text in pieces as it becomes final: joined it is the text of `generate`, in every mode."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES

import unmask
from unmask.sampling import Random, Remask, WholeCanvas
from unmask.streaming import FinalText

TEXT = STORIES[0][:20]
OPTIONS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "confidence_threshold": 1.0},
    {"mode": "diffusion", "confidence_threshold": 0.0},
    {"mode": "diffusion", "select": Random(2), "temperature": 1.5, "seed": 3},
    {"mode": "diffusion", "window": 3},
    {"mode": "ar", "temperature": 2.0, "seed": 1},
]


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_pieces_are_the_text_of_generate(options: dict[str, Any], lm: unmask.DiffusionLM) -> None:
    for more in ({}, {"stop_strings": "th"}, {"stop_strings": ["e ", "day", " l"]}):
        text = lm.generate(TEXT, max_new_tokens=24, **options, **more).texts[0]
        shown = list(lm.stream(TEXT, max_new_tokens=24, **options, **more))
        assert "".join(shown) == text
        assert all(shown)
        if options["mode"] == "ar" and not more:
            assert len(shown) > 8


def test_what_follows_an_end_token_is_not_shown(lm: unmask.DiffusionLM) -> None:
    """Every token in turn is made the end token, in blocks that are committed at once."""
    options: dict[str, Any] = {"mode": "diffusion", "confidence_threshold": 0.0, "temperature": 2.0, "seed": 1}
    row = lm.prompt_ids(TEXT)[0]
    new = lm.generate(TEXT, max_new_tokens=16, **options).sequences[0, len(row) :].tolist()
    assert len(set(new)) > 8
    before = lm.model.generation_config.eos_token_id
    try:
        for end in dict.fromkeys(new):
            lm.model.generation_config.eos_token_id = end
            text = lm.generate(TEXT, max_new_tokens=16, **options).texts[0]
            assert "".join(lm.stream(TEXT, max_new_tokens=16, **options)) == text
    finally:
        lm.model.generation_config.eos_token_id = before


def test_text_comes_while_it_is_decoded(lm: unmask.DiffusionLM) -> None:
    """The first piece is there long before the last token, and a callback is called as ever."""
    commits: list[int] = []
    stream = lm.stream(TEXT, "ar", max_new_tokens=60, callback=lambda _row, positions, _new: commits.extend(positions))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(commits) < 60
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if "work" in t.name]
    assert lm.generate(TEXT, "ar", max_new_tokens=4).texts  # the model is free again


def test_tokens_that_change_again_come_at_the_end(stories: Path, tokenizer_and_model: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(tokenizer_and_model, stories, "diffullama", tmp_path, max_tokens=300, max_length=32, batch_size=2,
                      show_progress=False)  # fmt: skip
    decoder = WholeCanvas(max_denoising_steps=8, remask=Remask())
    text = lm.generate(TEXT, decoder, max_new_tokens=12, seed=1, temperature=1.0).texts[0]
    assert list(lm.stream(TEXT, decoder, max_new_tokens=12, seed=1, temperature=1.0)) == [text]
    assert "".join(lm.stream(TEXT, max_new_tokens=12)) == lm.generate(TEXT, max_new_tokens=12).texts[0]


def test_ids_and_bad_input(lm: unmask.DiffusionLM) -> None:
    ids = lm.prompt_ids(TEXT)[0]
    assert "".join(lm.stream(ids, max_new_tokens=5)) == lm.generate(TEXT, max_new_tokens=5).texts[0]
    with pytest.raises(ValueError, match="stream takes one prompt, not 2"):
        lm.stream([TEXT, TEXT])
    with pytest.raises(ValueError, match="stop string '' is empty"):
        list(lm.stream(TEXT, stop_strings=""))
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        list(lm.stream(TEXT, max_new_tokens=0))


def test_a_stream_has_the_threads_of_its_caller(lm: unmask.DiffusionLM) -> None:
    torch.set_num_threads(1)
    seen: list[int] = []
    list(lm.stream(TEXT, max_new_tokens=3, callback=lambda *_: seen.append(torch.get_num_threads())))
    assert set(seen) == {1}


def test_a_stop_string_is_held_back_until_it_is_known() -> None:
    """Tokens are characters here; no piece holds any of a stop string, in any order of commits."""
    for order in (range(11), reversed(range(11)), (3, 0, 1, 2, 5, 4, 6, 9, 7, 8, 10)):
        shown: list[str] = []
        live = FinalText(lambda new: "".join(map(chr, new)), 5, shown.append, stop_strings=["lo w", "rld!"])
        for i in order:
            live(0, [5 + i], [ord("hello world"[i])])
        assert "".join(shown) == "hel"
        assert live.rest("hel") == ""
    shown = []
    live = FinalText(lambda new: "".join(map(chr, new)), 0, shown.append, stop_strings=["rld!"])
    for i in range(11):
        live(0, [i], [ord("hello world"[i])])
    assert "".join(shown) == "hello wo"
    assert live.rest("hello world") == "rld"
