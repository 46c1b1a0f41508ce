"""The examples run, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import chat_lora
import convert_and_serve
import drafter
import fill_buffer
import pytest
import training_loop

import unmask

TINY = {"max_length": 32, "batch_size": 2, "show_progress": False}


def test_convert_and_serve(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    words = (str(tokenizer_and_model), str(stories), str(tmp_path / "q"), "300")
    with TestClient(convert_and_serve.main(*words, block_size=4, **TINY)) as client:
        asked = {"model": "converted", "prompt": "Once", "max_tokens": 4}
        answer = client.post("/v1/completions", json=asked).json()
    lm = unmask.load(tmp_path / "q")
    assert answer["choices"][0]["text"] == lm.generate("Once", max_new_tokens=4).texts[0]


def test_chat_lora(converted: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a mouse"}]
    data = tmp_path / "chat.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    sizes = TINY | {"max_length": 64}
    answer = chat_lora.main(str(converted), str(data), str(tmp_path / "chat"), "a dog?", "300", **sizes)
    assert isinstance(answer, str)
    assert unmask.load(tmp_path / "chat").tokenizer.chat_template == chat_lora.TEMPLATE


def test_drafter(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    words = (str(tokenizer_and_model), str(stories), str(tmp_path / "d"), "Once", "300")
    assert drafter.main(*words, block_size=4, **TINY) >= 0.5
    assert (tmp_path / "d" / "drafter.safetensors").is_file()


def test_fill_buffer(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once there was<|> day.")
    text = fill_buffer.main(str(converted), str(tmp_path / "story.txt"))
    lm = unmask.load(converted)
    assert text == lm.infill("Once there was<gap:4,8,16> day.", attention="bidirectional", seed=0).filled[0]
    with pytest.raises(SystemExit, match="no cursor '@@'"):
        fill_buffer.main(str(converted), str(tmp_path / "story.txt"), "@@")


def test_training_loop(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    losses = training_loop.main(str(tokenizer_and_model), str(stories), str(tmp_path / "mine"), "12")
    assert sum(losses[-4:]) < sum(losses[:4])
    assert unmask.load(tmp_path / "mine").default_mode == "diffusion"
