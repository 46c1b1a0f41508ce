"""The benchmark's own arithmetic: real tokens, all forwards, both sides doing the same work."""

from pathlib import Path

import pytest
from conftest import random_tokens
from transformers import Qwen3Config

from unmask import bench, hf
from unmask.sampling import Confidence, sample_blocks


@pytest.fixture(scope="module")
def model(tokenizer_and_model: Path):
    return bench.make_model(str(tokenizer_and_model))


def test_decoders_make_the_same_number_of_new_tokens(model) -> None:
    run = bench.decoders(model, batch=3, block_size=8, n=4, new=24, prompt=8)
    assert run["diffusion"]() == run["ar"]() == 3 * 24


def test_fixed_commits_cost_what_they_say(model) -> None:
    from unmask.denoiser import DiffusionConfig

    config = DiffusionConfig(model.config.vocab_size - 1, "two_stream", "block_causal", 8, False, "bench", "0")
    network = hf.HFNetwork(model, config.mask_token_id)
    prompts = [random_tokens(8, seed=i) for i in range(3)]
    out = sample_blocks(network, config, prompts, max_new_tokens=24, select=Confidence(4))
    assert out.num_forwards.tolist() == [6, 6, 6]  # 24 tokens, 4 a forward, cache writes riding along


@pytest.mark.parametrize("kind", ["two_stream", "bidirectional", "drafter"])
def test_steps_leave_no_gradient(kind: str, tokenizer_and_model: Path) -> None:
    model = bench.make_model(str(tokenizer_and_model))
    steps = bench.train_steps(model, kind, 4, 2, 16)
    for step in steps.values():
        step()
        assert all(p.grad is None for p in model.parameters())


def test_measure_is_the_median_ratio() -> None:
    seconds, baseline, ratio = bench.measure(lambda: sum(range(2_000_000)), lambda: sum(range(1_000_000)), 5)
    assert seconds > baseline > 0
    assert 1.2 < ratio < 3.5


def test_memory_grows_by_at_least_the_gradients() -> None:
    assert bench._peak_growth("tiny", "ar") > 6_800_000 * 4 / 2**20


def test_needed_arithmetic_is_counted_as_by_hand() -> None:
    config = Qwen3Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                         intermediate_size=16, vocab_size=32)  # fmt: skip
    keys, rest, head = 8 * 8, 8 * 8 * 2 + 3 * 8 * 16, 8 * 32
    ar = 2 * (keys + rest + 2 * 8 * 6.5) + head  # 12 tokens see 1..12 keys, 6.5 on average
    assert bench.needed_flops(config, "ar", 4, 3, 12) == 6 * 3 * 12 * ar
    both = 2 * (keys + rest + 2 * 8 * 8) + 2 * keys + 0.5 * (rest + 2 * 8 * 8 + head)  # blocks of 4 see 4, 8, 12
    assert bench.needed_flops(config, "two_stream", 4, 3, 12) == 6 * 3 * 12 * both


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="shape '70b' is unknown"):
        bench.make_model("70b")
