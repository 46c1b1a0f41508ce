"""What the device decides of a run: precision and attention, as a pure function, and that a run computes so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import interrupted, logged

import unmask
from unmask import hf
from unmask.conversion import job
from unmask.recipe import load_recipe, recipe_names
from unmask.resolve import of_device, resolve, uses_tf32
from unmask.training import devices

H100, T4 = ("cuda", (9, 0)), ("cuda", (7, 5))
OTHERS: tuple[tuple[str, tuple[int, int] | None], ...] = (T4, ("cpu", None), ("mps", None), ("xpu", None))
RUN: dict[str, Any] = {"recipe": "efficient-dlm", "max_tokens": 600, "max_length": 32, "block_size": 4, "batch_size": 6,
                       "learning_rate": 1e-3, "log_every": 1, "eval_documents": 2}  # fmt: skip


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_gpu_computes_what_is_unset_in_the_fast_way(recipe: str) -> None:
    settings = load_recipe(recipe)
    fast = of_device(settings, *H100, takes_flex=True)
    assert (settings.mixed_precision or fast["mixed_precision"]) == "bf16"
    assert fast.get("attn_implementation") == ("flex_attention" if settings.anneal_steps == 1 else None)
    assert "attn_implementation" not in of_device(settings, *H100, takes_flex=False)
    for device in OTHERS:
        assert of_device(settings, *device, takes_flex=True) == {}
    resolved = resolve(settings, 10**9, 4096)
    assert resolved.mixed_precision == (settings.mixed_precision or "no")  # without a device, float32


def test_what_is_set_wins() -> None:
    settings = load_recipe("tri-mode", mixed_precision="no", attn_implementation="eager")
    assert of_device(settings, *H100, takes_flex=True) == {}


@pytest.mark.parametrize(("precision", "device", "tf32"), [
    ("bf16", H100, True), ("fp16", H100, True), ("no", H100, False), ("bf16", T4, False),
    ("bf16", ("cpu", None), False),
])  # fmt: skip
def test_float32_products_are_short_beside_short_passes_alone(precision: str, device: Any, tf32: bool) -> None:
    assert uses_tf32(load_recipe("ar", mixed_precision=precision), *device) == tf32


def test_models_that_take_flex(tokenizer_and_model: Path) -> None:
    model = unmask.load(tokenizer_and_model).model
    config = model.config
    assert hf.takes_flex(model) == (config.hidden_size // config.num_attention_heads >= 16)
    config.head_dim = 64
    assert hf.takes_flex(model)
    config.head_dim = 8
    assert not hf.takes_flex(model)
    config.head_dim = 64
    config._attn_implementation = "eager"
    assert not hf.takes_flex(model)
    config._attn_implementation = "sdpa"
    model._supports_flex_attn = False
    assert not hf.takes_flex(model)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this machine take for fast what a CPU can do too."""
    monkeypatch.setattr(job, "of_device", lambda *_, **__: {"mixed_precision": "bf16", "attn_implementation": "eager"})


@pytest.mark.usefixtures("fast")
def test_steps_alone_compute_in_the_fast_way(
    tmp_path: Path, tokenizer_and_model: Path, stories: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ways: dict[bool, set[str]] = {True: set(), False: set()}
    run = hf.HFNetwork._run

    def watched(network: Any, *given: Any, **named: Any) -> Any:
        ways[torch.is_grad_enabled()].add(network.config._attn_implementation)
        return run(network, *given, **named)

    monkeypatch.setattr(hf.HFNetwork, "_run", watched)
    lm = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "run", eval_data=str(stories), **RUN)
    assert ways == {True: {"eager"}, False: {"sdpa"}}
    assert lm.model.config._attn_implementation == "sdpa"
    assert "passes in bf16, attention by eager" in capsys.readouterr().err.replace("\n", " ")
    asked = {"mixed_precision": "bf16", "attn_implementation": "eager"}
    unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "asked", **RUN | asked)
    losses = [[row["loss"] for row in logged(tmp_path / name) if "loss" in row] for name in ("run", "asked")]
    assert losses[0] == losses[1]


def test_a_resumed_run_keeps_its_precision(
    tmp_path: Path, tokenizer_and_model: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUN | {"save_every": 2, "keep_checkpoints": 9, "show_progress": False}
    with monkeypatch.context() as other:
        other.setattr(job, "of_device", lambda *_, **__: {"mixed_precision": "bf16"})
        unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "run", **run)
    folder = interrupted(tmp_path / "run", tmp_path / "cut", 2)
    unmask.adapt(tokenizer_and_model, stories, output_dir=folder, resume=True, **run)
    assert logged(folder) == logged(tmp_path / "run")
    assert json.loads((folder / "run.json").read_text())["settings"]["mixed_precision"] == "bf16"


def test_the_precision_of_products_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_recipe("ar", mixed_precision="bf16")
    before = torch.get_float32_matmul_precision()
    with devices.products_of(settings):
        assert torch.get_float32_matmul_precision() == before
    monkeypatch.setattr(devices, "uses_tf32", lambda *_: True)
    with devices.products_of(settings):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
