"""The benchmark's own arithmetic: real tokens, all forwards, both sides doing the same work."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from unmask.lab import bench_decode as decode
from unmask.lab import bench_train as bench
from unmask.sampling import SampledTokens


@pytest.fixture(scope="module")
def model(tokenizer_and_model: Path):
    return bench.make_model(str(tokenizer_and_model))


def test_decoders_make_the_same_number_of_new_tokens_and_count_their_forwards(model) -> None:
    out = decode.block_decoder(model, batch=3, block_size=8, n=4, new=24, prompt=8)()
    assert [len(tokens) for tokens in out.new_tokens] == [24] * 3
    assert all(model.config.vocab_size - 1 not in tokens for tokens in out.new_tokens)
    assert out.num_forwards.tolist() == [6, 6, 6]  # 24 tokens, 4 a forward, cache writes riding along
    narrow = decode.block_decoder(model, batch=3, block_size=8, n=4, new=24, prompt=8, window=4)()
    assert narrow.num_forwards.tolist() == [6, 6, 6]
    odd = decode.block_decoder(model, batch=2, block_size=8, n=3, new=16, prompt=8)()
    assert odd.num_forwards.tolist() == [6, 6]  # 3 + 3 + 2 a block
    for other in (decode.generate_decoder(model, batch=3, new=24, prompt=8), decode.ar_decoder(model, batch=3, new=24)):
        assert decode.tokens_of(other()) == decode.tokens_of(out) == 3 * 24
    lookup = decode.generate_decoder(model, batch=1, new=24, prompt=8, lookup=4)()
    assert lookup.new_tokens == decode.generate_decoder(model, batch=1, new=24, prompt=8)().new_tokens


def test_fixed_acceptance_gains_what_it_says(model) -> None:
    out = decode.speculative_decoder(model, batch=2, draft_length=6, gain=4, new=20)()
    assert [len(tokens) for tokens in out.new_tokens] == [20, 20]
    assert out.cycle_gains.tolist() == [[0, 0, 0, 0, 5]] * 2  # five cycles of four
    assert out.num_forwards.tolist() == [10, 10]


def test_comparison_counts_real_tokens_over_medians(model) -> None:
    case = decode.compare("x", decode.block_decoder(model, batch=2, block_size=4, n=2, new=8, prompt=8),
                          decode.generate_decoder(model, batch=2, new=4, prompt=8), 3, {"batch": 2})  # fmt: skip
    assert case.forwards_per_row == 4
    assert case.ratio == pytest.approx(case.value / case.baseline, rel=0.7)
    assert case.peak_growth >= 0
    times = iter([(1.0, 2.0), (0.5, 1.0)] * 3)
    fake = SampledTokens([[1] * 6, [1] * 4], torch.tensor([3, 2]), torch.tensor([1, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "clocks", lambda _work: next(times))
        case = decode.compare("y", lambda: fake, lambda: fake, 3, {})
    assert (case.value, case.baseline, case.ratio, case.wall_ratio, case.forwards_per_row) == (10, 20, 0.5, 0.5, 2.5)


def test_gpu_cases_run_on_a_cpu(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "NEW", 12)
    bound = decode.weight_bound(model, prefix=16, block_size=4)
    assert bound.ratio == bound.value / bound.baseline > 0
    cases = decode.throughput(model, 1, (1, 2))
    assert [case.case for case in cases] == [f"b{b}_block16_n3{own}" for b in (1, 2) for own in ("", "_own_ar")]


def test_cases_are_named_as_promised(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "make_model", lambda _shape, **_: model)
    monkeypatch.setattr(decode, "compare", lambda case, _a, _b, _rounds, settings: decode.DecodeCase(
        case, 1, 1, 1, "", 1, 1, 1, 1, settings))  # fmt: skip
    names = {case.case for case in decode.bench_decode("tiny", 1)}
    assert names >= {"b8_block32_n4", "b8_block32_n8", "b8_block8_n4", "b1_block16_n4", "length_512_vs_128",
                     "b8_block32_n4_window", "b8_block32_n8_window"}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "num_masks"), [("two_stream", 1), ("two_stream", 2), ("bidirectional", 1), ("drafter", 1)]
)
def test_steps_leave_no_gradient(kind: str, num_masks: int, tokenizer_and_model: Path) -> None:
    model = bench.make_model(str(tokenizer_and_model))
    steps = bench.train_steps(model, kind, 4, 2, 16, num_masks=num_masks)
    for step in steps.values():
        step()
        assert all(p.grad is None for p in model.parameters())


def test_measure_is_the_median_ratio() -> None:
    seconds, baseline, ratio, wall_ratio = bench.measure(
        lambda: sum(range(2_000_000)), lambda: sum(range(1_000_000)), 5
    )
    assert seconds > baseline > 0
    assert 1.2 < ratio < 3.5
    assert 0.3 < wall_ratio < 10


def test_memory_grows_by_at_least_the_gradients() -> None:
    assert bench._peak_growth("tiny", "block_step", "ar") > 6_800_000 * 4 / 2**20


def test_training_cases_are_measured_as_they_say(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "make_model", lambda _shape, **_: model)
    monkeypatch.setattr(bench, "measure", lambda _ours, _ar, _rounds: bench.Measured(3.0, 2.0, 1.5, 1.4))
    growth = {("block_step", "ar"): 4.0, ("block_step", "diffusion"): 2.0, ("block_step_whole", "diffusion"): 5.0}
    monkeypatch.setattr(bench, "_peak_growth", lambda _shape, case, which, *_: growth[case, which])
    cases = {case.case: case for case in bench.bench_train("tiny", 1)}
    speeds = {name: case.tokens_per_second for name, case in cases.items() if isinstance(case, bench.TrainCase)}
    assert speeds["block_step"] == 4 * 512 / 3  # clean tokens, each counted once
    assert speeds["block_step_draws2"] == 2 * 4 * 512 / 3
    assert {name: (case.value, case.ratio) for name, case in cases.items()} == {
        "block_step": (3, 1.5), "block_step_whole": (3, 1.5), "block_step_draws2": (1.5, 0.75),
        "bidirectional_step": (3, 1.5), "drafter_step": (3, 1.5), "two_stream_1024": (3, 1.5),
        "block_peak_memory": (2, 0.5), "block_peak_memory_whole": (5, 1.25)}  # fmt: skip


@pytest.mark.parametrize(("shape", "parameters"), [
    ("tiny", 6_819_840), ("0.6b", 596_049_920), ("4b", 4_022_468_096), ("8b", 8_190_735_360),
])  # fmt: skip
def test_shapes_are_those_of_the_models(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**bench._SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="shape '70b' is unknown"):
        bench.make_model("70b")
