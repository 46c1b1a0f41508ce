"""Steps, runs and decoding on an emulated accelerator: the results of the CPU, and how often the device is waited for.

test_emulated_device.py runs the short cases in a process of their own; all of them, for the night:

    python -m pytest tests/on_emulated_device.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model
from decode import sample_autoregressive, sample_bidirectional, sample_blocks, sample_canvases, sample_speculative
from emulated_device import Emulated
from ranks import CASES, assert_same_run, full, interrupted, logged, run_case
from test_waits import STEPS, Step
from torch import Tensor

import unmask
from unmask import hf
from unmask.core.devices import peak_memory, runs_ahead
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.finite import StepWatch, bad_weight
from unmask.core.network import DiffusionConfig
from unmask.core.noise import Key, uniforms
from unmask.core.transfer import to_host
from unmask.sampling import (
    Ancestral,
    Canvas,
    Confidence,
    ConfidenceAmongAll,
    EntropyBound,
    Factor,
    Random,
    Rejection,
    Remask,
)
from unmask.training import loop


def of_ci(names: Iterable[str], *in_ci: str) -> list[Any]:
    """The names as parameters; those that are not `in_ci` are left for the night."""
    return [pytest.param(name, marks=() if name in in_ci else pytest.mark.nightly) for name in names]


# --- the device itself


@pytest.mark.parametrize("read", [
    lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[x > 0],
    lambda x: x.index_put((x > 0,), x.new_ones(())), lambda x: x[torch.zeros(3, dtype=torch.long)],
    lambda x: torch.ones(5).to(x.device), lambda x: torch.ones(5).to(x.device, non_blocking=True),
    lambda x: x.tolist(), lambda x: x.masked_select(x > 0), lambda x: torch.equal(x, x), lambda x: x.unique(),
    lambda x: x.repeat_interleave(x.long()), lambda x: torch.where(x > 0), lambda x: torch.ones(5).copy_(x),
    lambda x: x.copy_(torch.ones(5)), lambda x: torch.tensor([1.0], device=x.device), lambda x: list(range(x.int()[0])),
    lambda x: x.long().bincount(), lambda x: x.__setitem__(x > 0, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_waits_is_counted(read: Callable[[Tensor], Any], mode: Callable[[], Any]) -> None:
    with Emulated() as device:
        x = torch.ones(5, device="emu")
        assert not device.waits
        with mode():
            read(x)
        assert device.waits


@pytest.mark.parametrize("work", [
    lambda x: torch.ones(5).pin_memory().to(x.device, non_blocking=True), lambda x: x + torch.tensor(2.0),
    lambda x: x.to("cpu", non_blocking=True), lambda x: x.to("emu:1"), lambda x: x[x.long()], lambda x: x[1:3],
    lambda x: x.masked_fill(x > 0, 1.0), lambda x: torch.where(x > 0, x, 0.0),
    lambda x: torch.full((2,), 1.0, device=x.device), lambda x: x.repeat_interleave(2),
    lambda x: x.masked_scatter(x > 0, x), lambda x: x.sort(),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_queued_is_not_counted(work: Callable[[Tensor], Any], mode: Callable[[], Any]) -> None:
    with Emulated() as device, mode():
        work(torch.ones(5, device="emu"))
        assert not device.waits


@pytest.mark.parametrize("mix", [
    lambda x, y: x + y, lambda x, y: x @ y, lambda x, y: torch.where(x > 0, x, y), lambda x, y: torch.cat([x, y]),
    lambda x, y: x.index_copy(0, y.long(), x), lambda x, y: x.add_(y), lambda x, y: x.gather(0, y.long()),
    lambda x, y: torch.equal(x, y),
])  # fmt: skip
@pytest.mark.parametrize("other", ["cpu", "emu:1"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_of_two_devices_do_not_mix(mix: Callable[..., Any], other: str, mode: Callable[[], Any]) -> None:
    with Emulated(), mode():
        x, y = torch.ones(5, device="emu"), torch.ones(5, device=other)
        for pair in ((x, y), (y, x)):
            with pytest.raises(RuntimeError, match="tensors on"):
                mix(*pair)


def test_a_copy_to_the_host_is_there_after_its_event() -> None:
    with Emulated() as device:
        host, event = to_host(torch.arange(3, device="emu"))
        with pytest.raises(RuntimeError, match="before it is there"):
            host.tolist()
        event.synchronize()
        assert host.tolist() == [0, 1, 2]
        assert not device.waits


def test_questions_about_a_device() -> None:
    with Emulated():
        assert runs_ahead(torch.device("emu"))
        assert not runs_ahead(torch.device("cpu"))
        assert peak_memory(torch.device("emu")) is None  # of a backend that does not count it
        assert peak_memory(torch.device("cpu")) > 2**20


def test_the_device_draws_the_same_bits_and_floats() -> None:
    keys: list[Key] = [("token", 0, 0, 0, 0), ("token", -5, 3, 7, 1), ("level", 2**70, 1, 2)]
    with Emulated():
        found = uniforms(keys, 37, torch.device("emu")).cpu()
    assert torch.equal(found, uniforms(keys, 37))


# --- training steps


def compare(name: str, architecture: str = "llama") -> None:
    dtype = torch.float32 if "moe" in architecture or "mixtral" in architecture else torch.float64
    on_cpu = Step(name, "cpu", architecture, dtype)
    expected = on_cpu.run()
    with Emulated() as device:
        step = Step(name, "emu", architecture, dtype)
        device.waits.clear()
        found = step.run()
        assert not device.waits
        assert found.sum.device == torch.device("emu", 0)
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(found.sum.cpu(), expected.sum, **near)
        for got, wanted in zip(step.trained, on_cpu.trained, strict=True):
            assert (got.grad is None) == (wanted.grad is None)
            if got.grad is not None:
                torch.testing.assert_close(got.grad.cpu(), wanted.grad, **near)


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_never_waits_and_has_the_loss_and_gradient_of_the_cpu(name: str) -> None:
    compare(name)


@pytest.mark.parametrize("architecture", of_ci(SUPPORTED, "gpt2", "gemma3", "qwen3_moe"))
def test_no_architecture_waits_in_a_pass_over_two_streams(architecture: str) -> None:
    compare("two streams", architecture)


def test_judging_a_step_waits_for_nothing_and_reads_what_is_there() -> None:
    watch = StepWatch(allowed=1)
    with Emulated() as device:
        for step, value in enumerate((1.0, math.nan, 2.0)):
            loss = torch.full((), value, dtype=torch.float64, device="emu")
            assert watch.look(step, 0.1, loss, loss).device == loss.device
            watch.settle(but_last=True)
        assert watch.skipped == 1
        watch.settle()
        assert not device.waits


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_all_weights_are_checked_with_one_wait(value: float) -> None:
    with Emulated() as device:
        model = tiny_model(SUPPORTED["llama"]()).to("emu")
        names = [name for name, _ in model.named_parameters()]
        device.waits.clear()
        assert bad_weight(model) is None
        assert device.waits.total() == 1
        for name in (names[-1], names[3]):  # the first of them is named
            model.get_parameter(name).data[0] = value
            assert bad_weight(model) == name


# --- whole runs


def count_waits(device: Emulated, patch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How often each step, log row and check of the weights of the runs to come waits."""
    counted: dict[str, list[int]] = {"step": [], "log": [], "check_weights": []}

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted_method(*given: Any, **named: Any) -> Any:
            before = device.waits.total()
            result = method(*given, **named)
            counted[name].append(device.waits.total() - before)
            return result

        return counted_method

    for name in counted:
        patch.setattr(loop._Run, name, counting(name, getattr(loop._Run, name)))
    return counted


@pytest.mark.parametrize("name", of_ci(CASES, "efficient-dlm", "drafter, checkpointing"))
def test_a_whole_run_is_that_of_the_cpu_and_no_step_waits(
    name: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, training, evaluation, checkpoints, going on from one, and the model that is saved in the end."""
    short = {"max_tokens": 600} if "data" not in CASES[name] else {}
    exact = CASES[name] | short | {"save_every": 2, "keep_checkpoints": 9, "mixed_precision": "no"}
    run_case(full(exact, tokenizer_and_model, stories, tmp_path / "cpu"))
    with Emulated() as device, monkeypatch.context() as patch:
        counted = count_waits(device, patch)
        case = full(exact | {"device": "emu"}, tokenizer_and_model, stories, tmp_path / "emu")
        lm = run_case(case)
        assert lm.model.device == torch.device("emu", 0)
        # An optimiser that does not read on the device whether a loss is finite waits for it, and once more to begin.
        assert max(counted["step"]) <= (3 if "optimizer" in CASES[name] else 0), device.waits
        assert max(counted["log"]) <= 3  # loss, its tokens, whether the run goes on
        assert max(counted["check_weights"]) <= 1
        gone_on = interrupted(tmp_path / "emu", tmp_path / "gone on", 2)
        run_case(case | {"output_dir": str(gone_on), "resume": True})
    for folder in (tmp_path / "emu", gone_on):
        assert_same_run(folder, tmp_path / "cpu")
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "cpu").iterdir())


@pytest.mark.nightly
def test_a_run_loads_its_model_to_the_device_and_learns_in_bfloat16(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    case = full({"recipe": "efficient-dlm", "dtype": "bfloat16", "max_tokens": 400}, tokenizer_and_model, stories,
                tmp_path / "cpu")  # fmt: skip
    unmask.adapt(show_progress=False, **case)
    with Emulated():
        unmask.adapt(show_progress=False, **case | {"output_dir": str(tmp_path / "emu"), "device": "emu"})
        loaded = [unmask.load(tmp_path / "emu", device=device, dtype=torch.float64) for device in ("cpu", "emu")]
        on_cpu, there = (lm.generate("Once", max_new_tokens=8).texts for lm in loaded)
    assert there == on_cpu
    losses = [[row["loss"] for row in logged(tmp_path / name) if "loss" in row] for name in ("cpu", "emu")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.02, atol=0.02)  # bfloat16 rounds on each in its way


# --- decoding

PROMPTS = [random_tokens(n, seed=n) for n in (5, 6, 9)]
CANVASES = [Canvas.around(random_tokens(n, seed=n), k, random_tokens(2)) for n, k in ((3, 6), (5, 4), (2, 5))]
SHIFT = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")


class Evens:
    """A constraint: tokens with even numbers, and behind a multiple of three one more than it."""

    def __init__(self, tokens: tuple[int, ...] = ()) -> None:
        self.tokens, self.ended = list(tokens), False

    def begin(self) -> Evens:
        return Evens()

    def allowed(self) -> Tensor:
        last = self.tokens[-1] if self.tokens else 1
        number = torch.arange(MASK + 1)
        return number == last + 1 if last % 3 == 0 else number % 2 == 0

    def accept(self, token: int) -> None:
        self.tokens.append(token)

    def undo(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]


def autoregressive(net: Any, **options: Any) -> Any:
    return sample_autoregressive(net, PROMPTS, **options)


def blocks(net: Any, shift: bool = False, **options: Any) -> Any:
    return sample_blocks(net, block_config(shift=shift), PROMPTS, **options)


def canvas(net: Any, **options: Any) -> Any:
    del options["max_new_tokens"], options["batch_size"]
    return sample_bidirectional(net, SHIFT, CANVASES, **options)


def texts(net: Any, **options: Any) -> Any:
    return sample_canvases(net, SHIFT, PROMPTS, block_size=4, **options)


def speculative(net: Any, **options: Any) -> Any:
    return sample_speculative(net, block_config(clean="causal"), PROMPTS, **options)


HOT = {"temperature": 1.0}
DECODED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ar": (autoregressive, {}),
    "ar, sampled": (autoregressive, {**HOT, "top_p": 0.9, "top_k": 20}),
    "ar, constraint": (autoregressive, {**HOT, "constraint": Evens()}),
    "ar, observed": (autoregressive, {"observer": lambda *_: None}),
    "blocks": (blocks, {}),
    "blocks, shift": (blocks, {"shift": True}),
    "blocks, window": (blocks, {"window": 2}),
    "blocks, sampled": (blocks, {**HOT, "top_p": 0.9}),
    "blocks, guided": (blocks, {"guidance_scale": 2.0}),
    "blocks, steps": (blocks, {"max_denoising_steps": 2}),
    "blocks, confidence": (blocks, {"select": Confidence(2)}),
    "blocks, factor": (blocks, {"select": Factor(1.0)}),
    "blocks, entropy": (blocks, {"select": EntropyBound(3.0)}),
    "blocks, random": (blocks, {"select": Random(2)}),
    "blocks, infilled": (blocks, {"suffixes": [random_tokens(n, seed=n) for n in (3, 2, 4)]}),
    "blocks, observed": (blocks, {"observer": lambda *_: None, "callback": lambda *_: None}),
    "canvas": (canvas, {}),
    "canvas, sampled": (canvas, HOT),
    "canvas, confidence": (canvas, {"select": Confidence(1)}),
    "canvas, ancestral": (canvas, {"select": Ancestral(), "max_denoising_steps": 5}),
    "canvas, guided": (canvas, {"guidance_scale": 2.0}),
    "canvas, among all": (canvas, {"select": ConfidenceAmongAll(), "max_denoising_steps": 4, "temperature": 0.7}),
    "canvas, remasked": (canvas, {**HOT, "remask": Remask("cap", 0.3), "max_denoising_steps": 9}),
    "canvas, remasked by confidence": (canvas, {"remask": Remask("confidence"), "max_denoising_steps": 9}),
    "canvas, observed": (canvas, {"observer": lambda *_: None, "callback": lambda *_: None}),
    "canvas after canvas": (texts, {}),
    "speculative": (speculative, {}),
    "speculative, fused": (speculative, {"cycle": "one"}),
    "speculative, coupled": (speculative, HOT),
    "speculative, rejection": (speculative, {**HOT, "acceptance": Rejection()}),
    "speculative, rejection, fused": (speculative, {**HOT, "acceptance": Rejection(), "cycle": "one"}),
    "speculative, constraint": (speculative, {**HOT, "constraint": Evens()}),
    "speculative, observed": (speculative, {"observer": lambda *_: None}),
}  # fmt: skip


def decoder_of(name: str, device: str, compiled: bool) -> Any:
    """A network that decodes: with a drafter for speculation."""
    model = tiny_model(SUPPORTED["gemma3" if name == "blocks" else "llama"](), torch.float64).to(device)
    drafter = None
    if name.startswith("speculative"):
        drafter = Drafter(model, MASK, DrafterConfig(4)).to(device)
        generator = torch.Generator().manual_seed(0)
        for matrix in drafter.up.values():
            matrix.data.copy_(torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype) * 0.1)
    net = hf.as_network(model, MASK, gate=None if drafter is None else drafter.rows)
    if compiled:
        net.compile()
    return net


IN_CI = ("ar, constraint", "blocks", "blocks, window", "blocks, observed", "canvas, sampled", "canvas, observed",
         "canvas, remasked", "speculative, coupled", "speculative, rejection, fused")  # fmt: skip


def decode_on_both(name: str, compiled: bool = False) -> None:
    """A pass is waited for once, for its decision; with guidance two passes have one.

    With a constraint each draft of a block of four is waited for too: what is allowed behind it depends on it.
    """
    decode, options = DECODED[name]
    options = {"max_new_tokens": 8, "batch_size": 2, "seed": 3} | options
    expected = decode(decoder_of(name, "cpu", False), **options)
    with Emulated() as device:
        net = decoder_of(name, "emu", compiled)
        passes, made, make_masks = [], [], net.make_masks
        net.model.register_forward_pre_hook(lambda *_: passes.append(1))
        net.make_masks = lambda *given: made.append(1) or make_masks(*given)
        device.waits.clear()
        found = decode(net, **options)
    assert found.new_tokens == expected.new_tokens
    assert torch.equal(found.num_forwards, expected.num_forwards)
    decisions = len(passes) // (2 if "guidance_scale" in options else 1)
    drafts = 3 if decode is speculative and "constraint" in options else 0
    assert device.waits.total() <= decisions * (1 + drafts), device.waits
    if decode is canvas:
        assert len(made) <= 3  # a row that ends makes the layout anew


@pytest.mark.parametrize("name", of_ci(DECODED, *IN_CI))
def test_decoding_waits_once_a_pass_and_writes_what_the_cpu_writes(name: str) -> None:
    decode_on_both(name)


CACHED = [name for name, (decode, _) in DECODED.items() if decode not in (canvas, texts)]


@pytest.mark.parametrize("name", of_ci(CACHED, "blocks, shift", "speculative"))
def test_compiled_passes_wait_no_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled runs as it is: a compiler would trace it without values."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    decode_on_both(name, compiled=True)
