"""The optimiser of a run and the type of its weights: 8-bit moments, bfloat16, and what they go with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import interrupted, logged

import unmask
from unmask.recipe import load_recipe
from unmask.training.optimizer import make_optimizer, step_if

RUN: dict[str, Any] = {"recipe": "efficient-dlm", "max_tokens": 1500, "max_length": 32, "block_size": 4,
                       "batch_size": 6, "learning_rate": 1e-3, "log_every": 1, "eval_documents": 2,
                       "show_progress": False}  # fmt: skip
SMALL = {"max_tokens": 600}
NAMES = ("adamw", "adamw-8bit")


def optimizer_on(name: str, *shapes: tuple[int, ...]) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimiser as a run makes it, and the parameters that it changes."""
    model = torch.nn.ParameterList([torch.ones(*shape) for shape in shapes])
    settings = load_recipe("ar", optimizer=name)
    return make_optimizer(model, settings), list(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    optimizer, parameters = optimizer_on(name, (80, 64), (7,))
    prepared = SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)
    for gradient in (1.0, 0.5, torch.nan, 1.0):
        before = [p.detach().clone() for p in parameters]
        states = [{k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in parameters]
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        finite = torch.tensor(gradient).isfinite()
        step_if(prepared, finite, scaled=False)
        for p, old, state in zip(parameters, before, states, strict=True):
            assert p.grad is None
            assert torch.equal(p, old) == (not finite)
            if not finite:
                assert all(torch.equal(optimizer.state[p][k], value) for k, value in state.items())


def test_moments_of_8_bits_take_2_bytes_a_parameter() -> None:
    optimizer, (large, small) = optimizer_on("adamw-8bit", (80, 64), (7,))
    for p in (large, small):
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[large]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert optimizer.state[small]["state1"].dtype == torch.float32


def test_a_run_with_8_bit_moments_resumes_bit_for_bit(tmp_path: Path, tokenizer_and_model: Path, stories: Path) -> None:
    run = RUN | {"optimizer": "adamw-8bit", "save_every": 3, "keep_checkpoints": 9}
    whole = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "whole", **run)
    folder = interrupted(tmp_path / "whole", tmp_path / "cut", 3)
    again = unmask.adapt(tokenizer_and_model, stories, output_dir=folder, resume=True, **run)
    assert logged(folder) == logged(tmp_path / "whole")
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    plain = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "plain", **RUN)
    assert plain.model.dtype == torch.float32
    losses = [[row["loss"] for row in logged(tmp_path / name)] for name in ("whole", "plain")]
    assert losses[0] != losses[1]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.02)


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(
        ValueError, match=r"optimizer='adamw-8bit' needs bitsandbytes, .* pip install 'unmask\[quant\]'"
    ):
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "run", optimizer="adamw-8bit")


BFLOAT16: dict[str, dict[str, Any]] = {
    "all": {},
    "bf16 passes": {"mixed_precision": "bf16"},
    "joint": {"recipe": "tri-mode", "teacher": "parent"},
    "lora": {"lora_rank": 2},
    "lora, bf16 passes": {"lora_rank": 2, "mixed_precision": "bf16"},
    "adapter": {"lora_rank": 2, "lora_merge": False},
    "drafter": {"recipe": "drafter"},
    "drafter, bf16 passes": {"recipe": "drafter", "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("way", BFLOAT16)
def test_weights_in_bfloat16_learn_as_in_float32(
    way: str, tmp_path: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    """Up to what bfloat16 rounds away; adapters beside such weights are float32."""
    run = RUN | SMALL | BFLOAT16[way]
    for name in ("float32", "bfloat16"):
        lm = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / name, dtype=name, **run)
        assert lm.model.dtype == getattr(torch, name)
        lm.generate("Once", max_new_tokens=4)
    losses = [[row["loss"] for row in logged(tmp_path / name) if "loss" in row] for name in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    if lm.drafter is not None:
        assert {p.dtype for p in lm.drafter.parameters()} == {torch.float32}
    unmask.load(tmp_path / "bfloat16").generate("Once", max_new_tokens=4)


def test_a_model_in_memory_has_its_own_type(tmp_path: Path, tokenizer_and_model: Path, stories: Path) -> None:
    lm = unmask.load(tokenizer_and_model, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype='bfloat16' is chosen when .* with 'float64': .* load it with dtype"):
        unmask.adapt(lm, stories, output_dir=tmp_path / "run", dtype="bfloat16", **RUN)
    unmask.adapt(lm, stories, output_dir=tmp_path / "run", **RUN | SMALL)
    assert lm.model.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "optimizer='adamw-8bit': bitsandbytes does not know sharded parameters"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': FSDP2 keeps weights that learn in float32"),
        ({"quantize": "nf4", "lora_rank": 2}, "quantize='nf4': packed weights are not sharded"),
    ],
)
def test_what_shards_do_not_go_with_is_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    tokenizer_and_model: Path, stories: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=message):
        unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "run", **RUN | settings)


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path: Path, tokenizer_and_model: Path, stories: Path) -> None:
    run = RUN | SMALL | {"save_every": 2, "keep_checkpoints": 9, "output_dir": tmp_path / "whole"}
    unmask.adapt(tokenizer_and_model, stories, **run)
    folder = interrupted(tmp_path / "whole", tmp_path / "cut", 2)
    record = json.loads((folder / "run.json").read_text())
    for name in ("optimizer", "dtype", "half_life", "lora_merge"):
        del record["settings"][name]
    (folder / "run.json").write_text(json.dumps(record))
    unmask.adapt(tokenizer_and_model, stories, **run | {"output_dir": folder, "resume": True})
    assert logged(folder) == logged(tmp_path / "whole")
