"""What ends a long run early: SIGTERM, too little memory, a process that does not come on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from ranks import CASES, assert_same_run, break_down, full, logged, on_ranks, run_case
from torch.optim.optimizer import register_optimizer_step_pre_hook

import unmask
from unmask.recipe import load_recipe
from unmask.resolve import resolve
from unmask.training.guards import STOPPED, naming_memory
from unmask.training.ranks import check_launcher

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(scope="module")
def case(work: Path, tokenizer_and_model: Path, stories: Path) -> dict[str, Any]:
    """A run, which has been made."""
    found = full(CASES["efficient-dlm"] | {"max_tokens": 1500}, tokenizer_and_model, stories, work / "whole")
    run_case(found)
    return found


def test_a_run_that_gets_sigterm_saves_and_goes_on(case: dict[str, Any], work: Path) -> None:
    stopped = case | {"output_dir": str(work / "stopped"), "save_every": 100}
    break_down("sigterm", work / "stopped")
    with pytest.raises(SystemExit) as end:
        run_case(stopped)
    assert end.value.code == STOPPED == 143
    steps = [row["step"] for row in logged(work / "stopped")]
    assert 2 <= steps[-1] < logged(work / "whole")[-1]["step"]
    assert (work / "stopped" / f"checkpoint-{steps[-1]}" / "files.json").is_file()
    run_case(stopped | {"resume": True})
    assert_same_run(work / "stopped", work / "whole")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_processes_stop_if_one_gets_sigterm(kind: str, case: dict[str, Any], work: Path) -> None:
    stopped = case | {"output_dir": str(work / f"stopped {kind}"), "save_every": 100}
    faulty = stopped | {"fault": {"rank": 1, "kind": "sigterm"}, "kind": kind}
    told = on_ranks(2, {"stopped": faulty}, work / f"first {kind}")
    assert told["stopped"] == f"SystemExit: {STOPPED}"
    run_case(stopped | {"resume": True})
    assert_same_run(work / f"stopped {kind}", work / "whole", rel=1e-6)


def test_a_process_that_does_not_come_on_is_named(case: dict[str, Any], work: Path) -> None:
    slow = case | {"output_dir": str(work / "slow"), "rank_timeout": 3.0, "fault": {"rank": 1, "kind": "sleep"}}
    with pytest.raises(AssertionError, match=r"rank_timeout=3 seconds on process \d: process \d is at"):
        on_ranks(2, {"slow": slow}, work / "slow ranks")


def test_too_little_memory_names_what_to_change() -> None:
    settings = resolve(load_recipe("efficient-dlm", micro_batch_size=8, batch_size=8), 10**8, 4096)
    advice = (
        r"out of memory in step 3 .*: try micro_batch_size=4 .*, gradient_checkpointing=true, mixed_precision=bf16, "
        "optimizer=adamw-8bit, max_length below 512, more processes with FSDP2"
    )
    with pytest.raises(ValueError, match=advice), naming_memory(settings, 3, 1):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_memory(settings, 3, 1):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_too_little_memory_for_the_optimiser_is_named_too(case: dict[str, Any], work: Path) -> None:
    """Its moments are made in its first step, after the passes."""
    hook = register_optimizer_step_pre_hook(lambda *_: torch.empty(2**50))
    try:
        with pytest.raises(ValueError, match=r"out of memory in step 1 .*: try "):
            run_case(case | {"output_dir": str(work / "optimiser")})
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("FSDP_VERSION", "1", "only FSDP2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing=true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_launchers_that_are_not_supported_are_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, given in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ValueError, match=message):
        check_launcher()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_those_that_accelerate_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    for key, given in (config.fsdp_config or {}).items():
        monkeypatch.setenv(key.upper(), str(given).lower())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str("fsdp" in path.name).lower())
    check_launcher()


def test_attention_is_computed_as_asked(case: dict[str, Any], work: Path) -> None:
    """Another implementation, the same run up to rounding in float32."""
    short = {name: value for name, value in case.items() if name != "save_every"} | {"max_tokens": 400}
    losses = []
    for name in ("sdpa", "eager"):
        lm = unmask.adapt(
            **short | {"output_dir": str(work / name), "attn_implementation": name, "show_progress": False}
        )
        assert lm.model.config._attn_implementation == name
        losses.append([row["loss"] for row in logged(work / name) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa' is chosen when .* with 'eager'"):
        unmask.adapt(**short | {"model": lm, "output_dir": str(work / "other"), "attn_implementation": "sdpa"})
