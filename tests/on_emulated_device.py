"""What a GPU would wait for, counted on an emulated device of real values; run by `test_emulated_device.py`.

The emulator changes torch for the whole process (a backend, `torch.inference_mode`), so these tests run apart.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, random_tokens, tiny_model
from decode import sample_bidirectional

from unmask import hf
from unmask.core.network import DiffusionConfig
from unmask.core.noise import Key, uniforms
from unmask.sampling import Ancestral, Canvas, Confidence, ConfidenceAmongAll, Remask

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "shared" / "tools"))
import emulated_device as emulated

CONFIG = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")


def run(net: Any, **options: Any) -> Any:
    canvases = [Canvas.around(random_tokens(n, seed=n), k, random_tokens(2)) for n, k in ((3, 6), (5, 4), (2, 5))]
    return sample_bidirectional(net, CONFIG, canvases, seed=3, **options)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0},
    {"select": Confidence(1)}, {"select": Ancestral(), "max_denoising_steps": 5}, {"guidance_scale": 2.0},
    {"select": ConfidenceAmongAll(), "max_denoising_steps": 4, "temperature": 0.7},
    {"remask": Remask("cap", 0.3), "max_denoising_steps": 9},
    {"remask": Remask("confidence"), "max_denoising_steps": 9},
])  # fmt: skip
def test_a_canvas_waits_for_the_device_once_a_forward_and_samples_the_same(options: dict[str, Any]) -> None:
    expected = run(hf.as_network(tiny_model(SUPPORTED["llama"]()), MASK), **options)
    with emulated.Device() as device:
        net = hf.as_network(tiny_model(SUPPORTED["llama"]()).to("emu"), MASK)
        made, original = [], net.make_masks
        net.make_masks = lambda *arguments: made.append(arguments) or original(*arguments)
        device.waits.clear()
        got = run(net, **options)
        waits = dict(device.waits)
    assert got.new_tokens == expected.new_tokens
    assert torch.equal(got.num_forwards, expected.num_forwards)
    steps = options.get("max_denoising_steps", int(got.num_forwards.max()) // (2 if "guidance_scale" in options else 1))
    assert sum(waits.values()) <= steps, waits
    assert len(made) <= 3  # a row that ends makes the layout anew


def test_the_device_draws_the_same_bits_and_floats() -> None:
    keys: list[Key] = [("token", 0, 0, 0, 0), ("token", -5, 3, 7, 1), ("level", 2**70, 1, 2)]
    with emulated.Device():
        found = uniforms(keys, 37, torch.device("emu")).cpu()
    assert torch.equal(found, uniforms(keys, 37))
