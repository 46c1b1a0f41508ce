"""Nothing that is not finite: settings, options, a step's loss and gradient, weights, what is written as JSON."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.core.finite import StepWatch, bad_weight
from unmask.core.objectives import LossOutput
from unmask.plain_json import to_json
from unmask.sampling import EntropyBound
from unmask.settings import Settings
from unmask.training import loop as training
from unmask.training.checkpoints import latest_checkpoint, read_state

RUN = {"max_tokens": 1500, "max_length": 64, "block_size": 4, "batch_size": 4, "log_every": 1, "save_every": 2,
       "show_progress": False, "eval_documents": 0}  # fmt: skip


def rows(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def broken(tokenizer_and_model: Path, tmp_path: Path) -> Path:
    """A model folder with one NaN in its weights."""
    folder = tmp_path / "broken"
    shutil.copytree(tokenizer_and_model, folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- training


@pytest.mark.parametrize("settings", [{"learning_rate": 1e9}, {"learning_rate": 1e30}, {"learning_rate": 3e38}])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, settings: dict
) -> None:
    chosen = RUN | settings | {"max_tokens": 3000, "save_every": 1, "keep_checkpoints": 1}
    with pytest.raises(ValueError, match=r"step \d+ .*learning rate"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", **chosen)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    if (tmp_path / "run" / "metrics.jsonl").exists():
        rows(tmp_path / "run")


def test_the_command_ends_with_code_2_and_one_line(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unmask.cli", "adapt", str(tokenizer_and_model), "--data", str(stories),
               "--output", str(tmp_path / "run"), "learning_rate=1e30",
               *(f"{k}={v}" for k, v in RUN.items() if k != "show_progress")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"unmask: error: step \d+ .*learning rate", done.stderr.splitlines()[-1])


def spoilt(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss, and with it the gradient, NaN at these steps, counted from 0."""
    plain = training.step_loss

    def step_loss(*given, **named):
        loss = plain(*given, **named)
        step = named["step"] if "step" in named else given[4]
        return LossOutput(loss.sum * math.nan, loss.count) if step in steps else loss

    monkeypatch.setattr(training, "step_loss", step_loss)


def test_a_step_that_is_not_finite_is_skipped_where_that_is_allowed(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RUN | {"log_every": 2}
    spoilt(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"step 2 has a loss of nan at learning rate \S+: .*max_nonfinite_steps"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "none", **options)
    for name in ("first", "second"):
        lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / name, max_nonfinite_steps=1,
                          **options)  # fmt: skip
        assert bad_weight(lm.model) is None
    logged = rows(tmp_path / "first")
    assert logged == rows(tmp_path / "second")
    assert all(math.isfinite(row["loss"]) for row in logged)
    spoilt(monkeypatch, 1, 3)
    with pytest.raises(ValueError, match="step 4 has a loss of nan"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "two", max_nonfinite_steps=1, **options)
    state = read_state(latest_checkpoint(tmp_path / "two"))
    assert (state.step, state.skipped) == (2, 1)


def test_a_skipped_step_changes_no_weight() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    watch = StepWatch(allowed=1)
    for gradient, moved in ((1.0, True), (math.nan, False), (1.0, True)):
        before = parameter.detach().clone()
        parameter.grad = torch.full((3, 3), gradient)
        finite = watch.look(1, 1e-3, torch.zeros(()), parameter.grad.norm())
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        assert torch.equal(before, parameter.detach()) != moved
        assert parameter.isfinite().all()
    watch.settle()
    assert watch.skipped == 1


def test_a_scaler_skips_its_own_overflows_but_no_loss() -> None:
    watch = StepWatch()
    assert watch.look(1, 1.0, torch.zeros(()), torch.tensor(math.inf), scaled=True)
    watch.settle()
    assert not watch.look(2, 1.0, torch.tensor(math.inf), torch.zeros(()), scaled=True)
    with pytest.raises(ValueError, match="step 2 has a loss of inf"):
        watch.settle()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_is_judged_without_a_wait() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    watch, loss, gradient = StepWatch(allowed=1), torch.zeros((), device="cuda"), torch.ones(3, 3, device="cuda")

    def step(number: int) -> None:
        parameter.grad = gradient
        finite = watch.look(number, 1e-3, loss, gradient.norm())
        optimizer.found_inf = (~finite).float()
        optimizer.step()

    step(0)  # what is allocated once may wait
    watch.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = parameter.detach().clone()
    gradient = gradient * math.nan
    step(2)
    watch.settle(but_last=True)
    assert watch.skipped == 0
    watch.settle()
    assert watch.skipped == 1
    assert torch.equal(before, parameter.detach())


# --- weights


def test_weights_that_are_not_finite_are_refused(broken: Path, stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model .*broken.* not finite"):
        unmask.load(broken)
    with pytest.raises(ValueError, match="not finite"):
        unmask.adapt(broken, stories, "efficient-dlm", tmp_path / "run", **RUN)


def test_weights_that_stop_being_finite_in_memory_are_refused(converted: Path) -> None:
    lm = unmask.load(converted)
    lm.generate("Once", max_new_tokens=1)
    with torch.no_grad():
        next(iter(lm.model.parameters())).view(-1)[5] = math.inf
    for use in (
        lambda: lm.generate("Once", max_new_tokens=1),
        lambda: lm.infill("Once", "cat", 2),
        lambda: lm.embed("Once"),
        lambda: lm.nll("Once"),
        lambda: lm.nelbo("Once"),
    ):
        with pytest.raises(ValueError, match="not finite"):
            use()


# --- settings and options


@pytest.mark.parametrize("setting", [
    {"learning_rate": math.inf}, {"learning_rate": math.nan}, {"weight_decay": math.nan}, {"weight_decay": -0.1},
    {"alpha": math.inf}, {"beta1": 1.0}, {"beta2": math.nan}, {"warmup_ratio": 1.5}, {"warmup_ratio": -0.1},
    {"min_learning_rate_ratio": 2.0}, {"max_grad_norm": math.inf}, {"half_life": math.nan}, {"lora_alpha": math.inf},
    {"drafter_scale": math.inf}, {"self_temperature": math.nan}, {"min_noise_level": math.nan},
    {"eval_documents": -1}, {"max_nonfinite_steps": -1},
])  # fmt: skip
def test_settings_are_finite_and_in_range(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}="):
        Settings("test", **setting)


def test_infinite_half_life_is_uniform_masking() -> None:
    assert Settings("test", half_life=math.inf).half_life == math.inf


@pytest.mark.parametrize("option", [
    {"temperature": math.inf}, {"temperature": math.nan}, {"guidance_scale": math.nan}, {"guidance_scale": math.inf},
    {"guidance_scale": -1.0}, {"top_p": math.nan},
])  # fmt: skip
def test_options_are_finite_and_in_range(converted: Path, option: dict) -> None:
    lm, (name,) = unmask.load(converted), option
    with pytest.raises(ValueError, match=name):
        lm.generate("Once", max_new_tokens=2, **option)
    with pytest.raises(ValueError, match=name):
        lm.infill("Once", "cat", 2, **option)
    with pytest.raises(ValueError, match="entropy_bound"):
        EntropyBound(math.inf)


# --- JSON


def test_json_holds_no_constants_of_its_own() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, None)], "b": {"c": -math.inf, "d": "inf"}, "e": True}
    assert json.loads(to_json(value)) == {"a": [None, 1.5, [None, None]], "b": {"c": None, "d": "inf"}, "e": True}


def test_all_json_is_written_in_one_place() -> None:
    source = Path(unmask.__file__).parent
    used = {str(p.relative_to(source)) for p in source.rglob("*.py") if re.search(r"json\.dumps?\(", p.read_text())}
    assert used == {"plain_json.py", "hf/tiny.py"}  # the latter makes a key, which nobody reads
