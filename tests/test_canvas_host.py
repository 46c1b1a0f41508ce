"""Whole-canvas sampling: one look at the device a forward, rows by themselves, and what remasking keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, network, random_tokens, tiny_model

from unmask import hf
from unmask.denoiser import DiffusionConfig
from unmask.sampling import Ancestral, Canvas, Confidence, Remask, sample_bidirectional, sample_canvases
from unmask.settings import load_recipe

CONFIG = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")


def run(net: Any, **options: Any) -> Any:
    canvases = [Canvas.around(random_tokens(n, seed=n), k, random_tokens(2)) for n, k in ((3, 6), (5, 4), (2, 5))]
    return sample_bidirectional(net, CONFIG, canvases, seed=3, **options)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0},
    {"select": Confidence(1)}, {"select": Ancestral(), "max_denoising_steps": 5}, {"guidance_scale": 2.0},
    {"remask": Remask("cap", 0.3), "max_denoising_steps": 9},
    {"remask": Remask("confidence"), "max_denoising_steps": 9},
])  # fmt: skip
def test_a_canvas_looks_at_the_device_once_a_forward_and_samples_the_same(
    options: dict[str, Any], emulated: Any
) -> None:
    expected = run(hf.HFNetwork(tiny_model(SUPPORTED["llama"]()), MASK), **options)
    with emulated.Device() as device:
        net = hf.HFNetwork(tiny_model(SUPPORTED["llama"]()).to("emu"), MASK)
        made, form = [], net.form
        net.form = lambda *given: made.append(given) or form(*given)
        device.waits.clear()
        got = run(net, **options)
        waits = dict(device.waits)
    assert got.new_tokens == expected.new_tokens
    assert torch.equal(got.num_forwards, expected.num_forwards)
    steps = options.get("max_denoising_steps", int(got.num_forwards.max()) // (2 if "guidance_scale" in options else 1))
    assert sum(waits.values()) <= steps, waits
    assert len(made) <= 3  # a row that ends makes the layout anew


def test_ancestral_near_the_context_does_not_depend_on_its_batch_mates() -> None:
    net = network()
    prompts = [random_tokens(n, seed=n) for n in (21, 4, 20)]
    options: dict[str, Any] = {"max_new_tokens": 10, "context_length": 24, "max_denoising_steps": 10,
                               "select": Ancestral(), "temperature": 1.0, "seed": 5}  # fmt: skip
    together = sample_canvases(net, CONFIG, prompts, **options)
    one = prompts[0]
    alone = sample_canvases(net, CONFIG, [one], **options)
    assert alone.new_tokens[0] == together.new_tokens[0]
    assert alone.num_forwards[0] == together.num_forwards[0]


def test_remasking_by_confidence_takes_back_the_limit_and_reveals_no_faster() -> None:
    rule, revealed = Remask("confidence"), torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    confidence = torch.rand(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for progress, after in ((0.2, 0.3), (0.5, 0.6), (0.9, 1.0)):
        reveal, again = rule.rates(progress, after, revealed, confidence)
        limit = min(1.0, (1 - after) / progress)
        torch.testing.assert_close(again.sum(-1), limit * revealed.any(-1).double())
        torch.testing.assert_close(reveal, torch.full_like(reveal, (after - progress) / (1 - progress)))


@pytest.mark.parametrize(("recipe", "options", "message"), [
    ("tri-mode", {"loss_normaliser": "masked"}, "loss_normaliser='masked' would divide the AR term"),
    ("efficient-dlm", {"min_noise_level": 0.1}, "min_noise_level=0.1 makes the weights n / k"),
])  # fmt: skip
def test_wrong_weights_are_refused(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, **options)


def test_a_checkpoint_whose_clean_rows_are_an_ar_models_embeds_causally(tokenizer_and_model: Path) -> None:
    import unmask

    lm = unmask.load(tokenizer_and_model)
    lm.diffusion = block_config(clean="causal")
    assert torch.equal(lm.embed("Once there was a cat"), lm.embed("Once there was a cat", "causal"))
    lm.diffusion = block_config()
    assert torch.equal(lm.embed("Once there was a cat"), lm.embed("Once there was a cat", "bidirectional"))
