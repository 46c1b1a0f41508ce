"""What objects say they are, what the package shows, and a model that moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unmask
from unmask.recipe import load_recipe
from unmask.resolve import resolve

TEXT = "Once there was a"


def test_the_package_shows_its_surface() -> None:
    code = "import sys, unmask; print(*dir(unmask)); print('torch' in sys.modules)"
    shown, torch_is_there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown.split() == sorted(unmask.__all__)
    assert torch_is_there == "False"
    assert all(getattr(unmask, name) is not None for name in dir(unmask))
    with pytest.raises(AttributeError, match="module 'unmask' has no attribute 'laod'"):
        _ = unmask.laod


def test_a_model_says_what_it_is(tokenizer_and_model: Path, converted: Path) -> None:
    plain, lm = unmask.load(tokenizer_and_model), unmask.load(converted)
    size = sum(p.numel() for p in lm.model.parameters())
    assert repr(plain).endswith("parameters, an untouched AR model, torch.float32 on cpu)")
    assert repr(lm) == (
        f"DiffusionLM({str(converted)!r}: LlamaForCausalLM of {size:,} parameters, efficient-dlm, two_stream in blocks "
        "of 4 with a block_causal clean half, torch.float32 on cpu)"
    )


def test_a_drafter_names_its_base(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path, drafter_rank=2, max_tokens=200, max_length=32,
                      block_size=4, batch_size=2, show_progress=False)  # fmt: skip
    assert f"a drafter on {str(tokenizer_and_model)!r}" in repr(lm)


def test_outputs_and_settings_are_short(converted: Path) -> None:
    out = unmask.load(converted).generate([TEXT, TEXT], "ar", max_new_tokens=3)
    assert repr(out) == f"SampleOutput({', '.join([f'{out.texts[0]!r} (3 new tokens in 3 forwards)'] * 2)})"
    settings = load_recipe("efficient-dlm", block_size=8)
    assert repr(settings).startswith("Settings(recipe='efficient-dlm', ")
    assert "block_size=8" in repr(settings)
    assert "log_every" not in repr(settings)
    assert repr(resolve(settings, 10**6, 128)).startswith("Resolved(recipe='efficient-dlm', ")


def test_a_model_moves(converted: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.load(converted)
    texts = lm.generate(TEXT, max_new_tokens=6).texts
    assert lm.to(torch.float64) is lm
    assert lm.model.dtype == torch.float64
    assert lm.to("cpu").generate(TEXT, max_new_tokens=6).texts == texts
    assert lm.to("cpu", torch.float32).generate(TEXT, max_new_tokens=6).texts == texts
    assert lm.to(dtype=torch.bfloat16).model.dtype == torch.bfloat16
    drafter = unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path, drafter_rank=2, max_tokens=200,
                           max_length=32, block_size=4, batch_size=2, show_progress=False)  # fmt: skip
    drafter.to(torch.float64)
    assert {p.dtype for p in drafter.drafter.parameters()} == {torch.float64}
    ar, fast = (drafter.generate(TEXT, mode, max_new_tokens=9) for mode in ("ar", "speculative"))
    assert torch.equal(ar.sequences, fast.sequences)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_named(device: str, converted: Path) -> None:
    for act in (lambda: unmask.load(converted).to(device), lambda: unmask.load(converted, device=device)):
        with pytest.raises(ValueError, match=f"device {device!r} is not there") as raised:
            act()
        assert "\n" not in str(raised.value)
