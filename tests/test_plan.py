"""What a run takes, beside what was measured on a GPU, and the command that says so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from unmask.cli import main
from unmask.hf.sizes import Sizes, sizes_of, sizes_of_model
from unmask.limits import number_of_tokens
from unmask.plan import LAYOUTS, estimates, fastest, memory_of, passes, rate_of, trainable
from unmask.recipe import load_recipe
from unmask.resolve import Resolved, resolve

MODEL = Path(__file__).resolve().parents[1] / "models" / "tasks-base"
ROWS = Path(__file__).resolve().parents[1] / "results" / "gpu" / "rows.jsonl"
GIB = 2**30


def qwen3_600m() -> Sizes:
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return sizes_of_model(AutoModelForCausalLM.from_config(config))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `unmask plan`."""
    monkeypatch.setattr("sys.argv", ["unmask", "plan", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def settings_of(recipe: str, sizes: Sizes, **chosen: Any) -> Resolved:
    return resolve(load_recipe(recipe, mixed_precision="bf16", **chosen), sizes.num_parameters, sizes.context)


def measured() -> dict[str, dict[str, Any]]:
    rows = map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())
    return {row["case"]: row for row in rows if row.get("peak_gib") and not row["compiled"]}


@pytest.mark.parametrize(
    ("case", "recipe", "chosen"),
    [
        ("two_stream_4096", "efficient-dlm", {}),
        ("bidirectional_4096", "diffullama", {}),
        ("drafter_4096", "drafter", {"drafter_rank": 16}),
    ],
)
def test_memory_lies_within_a_fifth_of_what_was_measured(case: str, recipe: str, chosen: dict[str, Any]) -> None:
    sizes = qwen3_600m()
    settings = settings_of(recipe, sizes, max_length=4096, **chosen)
    total = sum(memory_of(sizes, settings, LAYOUTS[0], 1, rows=2)) / GIB
    assert total == pytest.approx(measured()[case]["peak_gib"]["diffusion"], rel=0.2)


def test_speed_is_the_measured_one_and_falls_with_parameters() -> None:
    sizes = qwen3_600m()
    settings = settings_of("efficient-dlm", sizes)
    assert rate_of(sizes, settings) == pytest.approx(42_200, rel=0.01)
    assert rate_of(sizes._replace(active=2 * sizes.active), settings) == pytest.approx(21_100, rel=0.01)
    assert rate_of(sizes, settings, tflops=685 / 2) == pytest.approx(21_100, rel=0.01)


def test_what_is_sharded_and_what_is_not() -> None:
    sizes = qwen3_600m()
    settings = settings_of("efficient-dlm", sizes)
    whole, sharded = (memory_of(sizes, settings, layout, 4, rows=1) for layout in (LAYOUTS[0], LAYOUTS[2]))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, part) == getattr(whole, part) / 4
    assert sharded.activations == whole.activations
    assert sharded.gathered > whole.gathered == 0
    again = memory_of(sizes, settings, LAYOUTS[1], 4, rows=1)
    assert again.activations < whole.activations / 5


def test_adapters_learn_little_and_a_teacher_is_a_second_model() -> None:
    sizes = qwen3_600m()
    drafter = settings_of("drafter", sizes, drafter_rank=16)
    assert trainable(sizes, drafter) == 28 * 16 * (2 * 1024 + 2 * 2048 + 2 * 2048 + 3 * 4096)
    assert passes(drafter) == 2
    kept = memory_of(sizes, settings_of("tri-mode", sizes), LAYOUTS[0], 1, 1)
    assert kept.teacher == kept.weights / 2  # in bfloat16, as passes are
    assert memory_of(sizes, drafter, LAYOUTS[0], 1, 1).teacher == 0


def test_types_of_weights_and_moments_that_are_asked_for_are_counted() -> None:
    sizes = qwen3_600m()
    count, maps = sizes.num_parameters, sum(rows * columns for rows, columns in sizes.maps)

    def parts(recipe: str, **chosen: Any) -> tuple[float, ...]:
        return memory_of(sizes, settings_of(recipe, sizes, **chosen), LAYOUTS[0], 1, 1)[:3]

    assert parts("efficient-dlm") == (4 * count, 4 * count, 8 * count)
    assert parts("efficient-dlm", optimizer="adamw-8bit") == (4 * count, 4 * count, 2 * count)
    assert parts("efficient-dlm", dtype="bfloat16") == (2 * count, 2 * count, 4 * count)
    assert parts("efficient-dlm", dtype="bfloat16", optimizer="adamw-8bit") == (2 * count, 2 * count, 2 * count)
    plain, half = (parts("drafter", dtype=dtype) for dtype in (None, "bfloat16"))
    assert half[0] == plain[0] / 2
    assert half[1:] == plain[1:]  # adapters are float32
    assert parts("drafter", quantize="nf4")[0] == pytest.approx(4 * (count - maps) + maps / 2)
    for chosen in ({"optimizer": "adamw-8bit"}, {"dtype": "bfloat16"}, {"quantize": "int8", "lora_rank": 8}):
        layouts = [e.layout for e in estimates(sizes, settings_of("efficient-dlm", sizes, **chosen), 8, 1e12, 1e9)]
        assert layouts == [layout for layout in LAYOUTS if not layout.sharded]


def test_experts_that_a_token_does_not_meet_cost_no_time() -> None:
    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = sizes_of_model(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0
    assert sizes.active == sizes.num_parameters - experts * 6 // 8


def test_the_fastest_layout_that_fits_is_chosen() -> None:
    sizes = qwen3_600m()
    settings = settings_of("efficient-dlm", sizes)
    needed = sum(memory_of(sizes, settings, LAYOUTS[0], 1, 1))
    assert [e.layout.name for e in estimates(sizes, settings, 1, 1e12, 1e9)] == [
        x.name for x in LAYOUTS if not x.sharded
    ]
    best = fastest(estimates(sizes, settings, 1, 2 * needed, 1e9))
    assert best is not None
    assert not best.layout.checkpointing
    tight = fastest(estimates(sizes, settings, 1, needed, 1e9))
    assert tight is not None
    assert tight.layout.checkpointing
    assert fastest(estimates(sizes, settings, 1, needed / 100, 1e9)) is None
    rows = estimates(sizes, replace(settings, micro_batch_size=8, batch_size=8), 1, 1e12, 1e9)[0].rows
    assert rows == 8


def test_the_command_reads_a_configuration_alone(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((tokenizer_and_model / "config.json").read_text())
    assert run(monkeypatch, tmp_path, "--tokens", "10M", "--gpus", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sizes_of(tmp_path).num_parameters
    assert found["tokens"] == 10_000_000
    assert [row["layout"] for row in found["layouts"]] == [layout.name for layout in LAYOUTS]
    assert found["choose"] == LAYOUTS[0].name
    assert run(monkeypatch, tmp_path, "--tokens", "1e6", "--recipe", "drafter", "drafter_rank=4") == 0
    assert "take: whole on each device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "many"], r"--tokens 'many' is no number of tokens: write 50M"),
        (["--tokens", "1M", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--tokens", "1M", "--gpu-memory", "-3"], r"--gpu-memory -3\.0 must be positive"),
        (["--tokens", "1M", "--recipe", "efficent-dlm"], "efficient-dlm"),
        (["--tokens", "1M", "corpus.txt"], "a plan needs no data"),
    ],
)
def test_bad_input_is_one_line(
    tokenizer_and_model: Path,
    more: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tokenizer_and_model, *more) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.strip().splitlines()) == 1


def test_numbers_of_tokens_have_units() -> None:
    texts = ("50M", "1.5B", "2T", "7k", "7K", "1e6", "1_000")
    assert [number_of_tokens(text) for text in texts] == [5e7, 1.5e9, 2e12, 7e3, 7e3, 1e6, 1e3]
    assert load_recipe("tri-mode", max_tokens="1.5M", self_tokens="2k", self_prompts="x").max_tokens == 1_500_000
    for wrong in ("", "M", "-1M", "0", "nan", "inf", "1.0001k", "10X"):
        with pytest.raises(ValueError, match=r"setting max_tokens '.*' is no number of tokens"):
            load_recipe("tri-mode", max_tokens=wrong)


@pytest.mark.parametrize("command", ["adapt MODEL --data d --output o", "demo MODEL --data d", "study masking MODEL"])
def test_commands_name_a_wrong_number_of_tokens(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["unmask", *command.replace("MODEL", str(MODEL)).split(), "--max-tokens", "10X"])
    with pytest.raises(SystemExit):
        main()
    assert "--max-tokens '10X' is no number of tokens: write 50M, 10B or 1000000" in capsys.readouterr().err
