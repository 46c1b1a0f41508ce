"""The examples run, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import chat_lora
import convert_and_serve
import drafter
import fill_buffer
import nbformat
import pytest
import training_loop
from nbclient import NotebookClient

import unmask

ROOT = Path(__file__).resolve().parents[1]
TINY = {"max_length": 32, "batch_size": 2, "show_progress": False}


def test_convert_and_serve(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    """What is served is the conversion: the parent has no diffusion mode, and writes another text."""
    from fastapi.testclient import TestClient

    words = (str(tokenizer_and_model), str(stories), str(tmp_path / "q"), "300")
    settings = {"block_size": 4, "learning_rate": 0.05, **TINY}
    texts = {}
    with TestClient(convert_and_serve.main(*words, **settings)) as client:
        for mode in ("ar", "diffusion"):
            asked = {"model": "converted", "prompt": "Once", "max_tokens": 8, "mode": mode}
            texts[mode] = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    lm = unmask.load(tmp_path / "q")
    for mode, text in texts.items():
        assert text == lm.generate("Once", mode, max_new_tokens=8).texts[0]
    assert texts["ar"] != unmask.load(tokenizer_and_model).generate("Once", "ar", max_new_tokens=8).texts[0]
    steps = (tmp_path / "q" / "metrics.jsonl").read_text()
    with TestClient(convert_and_serve.main(*words, **settings)) as client:  # which finds it finished
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == texts["diffusion"]
    assert (tmp_path / "q" / "metrics.jsonl").read_text() == steps


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


def test_the_notebook_runs(tmp_path: Path) -> None:
    """On fewer tokens; it is kept without outputs, and shows its replay."""
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", nbformat.NO_CONVERT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    (convert,) = (cell for cell in code if "TOKENS = 100_000" in cell.source)
    convert.source = convert.source.replace("TOKENS = 100_000", "TOKENS = 1_000")
    (tmp_path / "models").symlink_to(ROOT / "models")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in code for output in cell.outputs]
    assert any("<iframe" in output.get("data", {}).get("text/html", "") for output in shown)
    assert "reverse c n h b d k > k d b h n c" in "".join(output.get("text", "") for output in shown)
