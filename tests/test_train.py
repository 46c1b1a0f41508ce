"""Training: the same step for every split, the same run after an interruption, a model that learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import STORIES, block_config, network, random_tokens
from torch._dynamo.utils import counters

import unmask
from unmask.core.attention import PADDING, Layout
from unmask.core.batch import Batch
from unmask.hf.layers import layers_of
from unmask.settings import Settings
from unmask.training.step import learning_rate_at, step_loss


def ragged_batch(rows: int = 8, length: int = 16) -> Batch:
    """Packed rows with different documents and padding in each."""
    cut = torch.arange(rows)[:, None] + 3
    index = torch.arange(length).expand(rows, length)
    position = torch.where(index < cut, index, index - cut)
    document = (index >= cut).long()
    document[:, -3:] = torch.where(torch.arange(rows)[:, None] % 2 == 0, PADDING, document[:, -3:])
    return Batch(random_tokens(rows, length), Layout.of(position, document))


@pytest.mark.parametrize("settings", [
    {}, {"half_life": 0.1}, {"masking": "bernoulli"}, {"complementary": True}, {"noise_level": "sequence"},
])  # fmt: skip
def test_every_split_of_a_batch_gives_the_same_loss_and_gradient(settings: dict) -> None:
    net, config, batch = network(), block_config(4), ragged_batch()
    chosen = Settings("test", block_size=4, batch_size=8, max_length=16, **settings)

    def step(sizes: list[int]) -> tuple[float, int, list[torch.Tensor]]:
        total, count, start = 0.0, 0, 0
        net.model.zero_grad()
        for size in sizes:
            part = batch.rows(start, start + size)
            loss = step_loss(net, chosen, config, part, 5, torch.arange(start, start + size))
            loss.sum.backward()
            total, count, start = total + float(loss.sum.detach()), count + int(loss.count), start + size
        return total, count, [p.grad.clone() for p in net.model.parameters()]

    whole = step([8])
    for sizes in ([4, 4], [1] * 8, [3, 5], [7, 1]):
        total, count, gradients = step(sizes)
        assert total == pytest.approx(whole[0], rel=1e-10)
        assert count == whole[1]
        for a, b in zip(gradients, whole[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in unmask.load(folder).model.state_dict().items()}


RUN = {"max_tokens": 3000, "max_length": 64, "block_size": 4, "batch_size": 4, "log_every": 1, "save_every": 3,
       "eval_every": 4, "show_progress": False}  # fmt: skip


def test_micro_batches_give_the_same_run(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    for name, micro in (("whole", 4), ("split", 1)):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / name, micro_batch_size=micro, **RUN)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "split"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "split")
    assert all((first[k] - second[k]).abs().max() < 1e-3 for k in first)


def test_rows_spread_over_threads_give_the_same_run(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for name, threads in (("one", 1), ("three", 3)):
            torch.set_num_threads(threads)
            unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / name, **RUN, first_block_size=2)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "three"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert all((first[k] - second[k]).abs().max() < 1e-3 for k in first)


def test_a_killed_run_resumes_bit_for_bit(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    straight = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "straight", **RUN)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "unmask.cli", "adapt", str(tokenizer_and_model), "--recipe", "efficient-dlm",
               "--data", str(stories), "--output", str(killed),
               *(f"{k}={v}" for k, v in RUN.items() if k != "show_progress")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-6").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run ended before it could be killed"
    with pytest.raises(ValueError, match="already holds a run"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", killed, **RUN)
    resumed = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", killed, resume=True, **RUN)
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert rows(killed) == rows(tmp_path / "straight")
    before = (killed / "model.safetensors").stat().st_mtime_ns
    again = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", killed, resume=True, **RUN)
    assert (killed / "model.safetensors").stat().st_mtime_ns == before  # a finished run is loaded, not repeated
    assert again.diffusion == resumed.diffusion


def test_a_folder_that_holds_something_else_is_left_alone(
    converted: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"different run: its seed is 0, not 1"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", converted, resume=True, show_progress=False,
                     max_tokens=4000, max_length=64, block_size=4, batch_size=4, seed=1)  # fmt: skip
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path, show_progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_converted_model_goes_on_with_its_own_recipe(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    few = RUN | {"max_tokens": 500, "block_size": None}
    first = unmask.adapt(tokenizer_and_model, stories, "diffullama", tmp_path / "first", anneal_steps=1, **few)
    again = unmask.adapt(tmp_path / "first", stories, output_dir=tmp_path / "again", anneal_steps=1, **few)
    assert again.diffusion == first.diffusion
    assert json.loads((tmp_path / "again" / "run.json").read_text())["settings"]["recipe"] == "diffullama"


def test_resume_without_a_checkpoint_starts_over(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    few = RUN | {"max_tokens": 500}
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "new", resume=True, **few)
    assert lm.diffusion is not None


def test_a_run_leaves_what_the_interface_says(converted: Path) -> None:
    run = json.loads((converted / "run.json").read_text())
    assert run["finished"]
    assert set(run["versions"]) == {"unmask", "torch", "transformers"}
    assert run["settings"]["half_life"] is not None
    assert run["data"]["fingerprint"]
    assert run["tokens"] >= 4000
    logged = rows(converted)
    assert all({"step", "tokens"} <= set(row) for row in logged)
    assert any("nelbo" in row for row in logged)
    assert (converted / "checkpoint-15" / "state.json").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in converted.iterdir()}


def test_training_learns_and_beats_the_unigram_entropy(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", show_progress=False,
                      max_tokens=60_000, max_length=64, block_size=4, batch_size=8, learning_rate=1e-2)  # fmt: skip
    counts = torch.bincount(torch.cat([torch.tensor(lm.tokenizer(s)["input_ids"][1:]) for s in STORIES])).double()
    p = counts[counts > 0] / counts.sum()
    outputs = lm.nelbo(STORIES[:16], exact=True)
    bound = sum(o.nats for o in outputs) / sum(o.num_tokens for o in outputs)
    assert bound < 0.5 * float(-(p * p.log()).sum())


def test_ar_recipe_lowers_the_parents_nll(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    def per_token(lm: unmask.DiffusionLM) -> float:
        outputs = lm.nll(STORIES[:8])
        return sum(o.nats for o in outputs) / sum(o.num_tokens for o in outputs)

    before = per_token(unmask.load(tokenizer_and_model))
    lm = unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "ar", **(RUN | {"learning_rate": 1e-2}))
    assert lm.diffusion is None
    assert per_token(lm) < 0.7 * before
    assert unmask.load(tmp_path / "ar").diffusion is None


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_memory_savers_stay_close_to_the_plain_run(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, settings: dict
) -> None:
    """In processes of their own: Accelerate fixes the precision once per process."""
    losses = []
    for name, chosen in (("plain", {}), ("saving", settings)):
        options = {k: v for k, v in (RUN | chosen).items() if k != "show_progress"}
        command = [sys.executable, "-m", "unmask.cli", "adapt", str(tokenizer_and_model), "--data", str(stories),
                   "--output", str(tmp_path / name), *(f"{k}={json.dumps(v)}" for k, v in options.items())]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        losses.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if "gradient_checkpointing" in settings else 3e-2)


def test_training_learns_where_gradients_are_switched_off(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "on", **RUN)
    with torch.no_grad():
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "off", **RUN)
    assert [row["loss"] for row in rows(tmp_path / "off") if "loss" in row] == [
        row["loss"] for row in rows(tmp_path / "on") if "loss" in row
    ]


def test_compiled_layers_give_the_same_run(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced once for all layers, and run by torch's own kernels; what is compiled in earnest is the same trace."""
    inductor = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: inductor(function, backend="aot_eager"))
    for chosen in ({"recipe": "efficient-dlm"}, {"recipe": "tri-mode-published", "complementary": True}):
        torch._dynamo.reset()
        counters.clear()
        losses = []
        for compiled in (False, True):
            folder = tmp_path / f"{chosen['recipe']}-{compiled}"
            options = RUN | chosen | {"eval_every": 1000}
            lm = unmask.adapt(tokenizer_and_model, stories, output_dir=folder, compile_layers=compiled, **options)
            losses.append([row["loss"] for row in rows(folder) if "loss" in row])
            assert all(layer._compiled_call_impl is None for layer in layers_of(lm.model))
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


# --- the learning rate


def test_schedule_warms_up_and_falls_to_its_floor() -> None:
    chosen = Settings("test", learning_rate=1.0, min_learning_rate_ratio=0.1, warmup_ratio=0.1)
    rates = [learning_rate_at(chosen, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
