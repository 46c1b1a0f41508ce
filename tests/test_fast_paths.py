"""Fast paths through a stock model change nothing: losses and gradients are those of the plain pass."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model

from unmask import hf
from unmask.core.attention import PADDING, Layout, annealed, block_causal, causal
from unmask.core.corruption import Corruption, mask_complementary, mask_exact, segments
from unmask.core.drafter import DrafterConfig
from unmask.core.network import DiffusionConfig
from unmask.core.objectives import (
    LossOutput,
    ar_loss,
    diffusion_loss,
    distill_loss,
    joint_loss,
    predictable,
    shared_loss,
)
from unmask.hf.layers import layers_of

LENGTH = 144
ROOT = Path(__file__).resolve().parents[1]
ALL = hf.FastPaths(chunked=True, last_rows=True, head_sum=True)


def packed() -> tuple[torch.Tensor, Layout]:
    """Three rows: documents of 70 + 50 tokens with padding, one of 144, and 9 + 80 + 55."""
    cuts = ([70, 50, 24], [144], [9, 80, 55])
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    document = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in cuts])
    document[0, 120:] = PADDING
    return random_tokens(3, LENGTH), Layout.of(position, document)


def objectives(shift: bool) -> dict:
    x0, layout = packed()
    noise, t = torch.rand(2, 3, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = mask_exact(t, noise, segments(layout, 8), predictable(layout))
    whole = DiffusionConfig(MASK, "bidirectional", None, None, shift, "test", "0")
    causal = block_config(8, shift=shift, clean="causal")
    return {
        "two_stream": lambda net: diffusion_loss(net, block_config(8, shift=shift), x0, layout, drawn),
        "bidirectional": lambda net: diffusion_loss(net, whole, x0, layout, drawn),
        "joint": lambda net: joint_loss(net, causal, x0, layout, drawn, 0.3),
        "ar": lambda net: ar_loss(net, x0, layout),
    }


def measured(network: hf.HFNetwork, loss_of) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss: LossOutput = loss_of(network)
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    return loss.sum.detach(), list(torch.autograd.grad(loss.sum / 100, parameters, allow_unused=True))


def assert_same(network: hf.HFNetwork, loss_of, relative: float, fast_paths: hf.FastPaths = ALL) -> None:
    network.fast_paths = hf.FastPaths()
    loss, grads = measured(network, loss_of)
    network.fast_paths = fast_paths
    fast_loss, fast_grads = measured(network, loss_of)
    assert abs(fast_loss - loss) <= relative * abs(loss)
    scale = max(g.abs().max() for g in grads if g is not None)
    for fast, slow in zip(fast_grads, grads, strict=True):
        assert (fast is None) == (slow is None)
        assert slow is None or (fast - slow).abs().max() <= relative * scale


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("objective", ["two_stream", "bidirectional", "joint", "ar"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral_window", "qwen3_moe"])
def test_loss_and_gradients_match_the_plain_pass(name: str, objective: str, shift: bool) -> None:
    config = SUPPORTED[name]()
    config.max_position_embeddings = config.n_positions = 160
    dtype = torch.float32 if name == "qwen3_moe" else torch.float64
    network = hf.as_network(tiny_model(config, dtype).train(), MASK)
    hf.without_dropout(network.model)
    # Only GPT-2 is float64 throughout: the other models' norms round to float32 whatever their precision.
    assert_same(network, objectives(shift)[objective], 1e-10 if name == "gpt2" else 1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_fast_paths_are_found_on_a_tiny_instance(name: str) -> None:
    model = tiny_model(SUPPORTED[name]())
    fast_paths = hf.probe_fast_paths(model)
    if name == "gemma2":  # it caps logits; and scores, which no kernel does: up to 5.20 transformers left that out
        eager = model.config._attn_implementation == "eager"
        assert fast_paths == (hf.FastPaths() if eager else replace(ALL, head_sum=False))
    else:
        assert fast_paths == ALL


def test_a_head_whose_logits_are_changed_after_it_is_not_summed() -> None:
    granite = tiny_model(tf.GraniteConfig(**SUPPORTED["granite"]().to_dict() | {"logits_scaling": 4.0}))
    assert hf.probe_fast_paths(granite) == replace(ALL, head_sum=False)
    network = hf.as_network(granite, MASK)
    loss_of = objectives(False)["two_stream"]
    network.model.config.max_position_embeddings = 160
    assert_same(network, loss_of, 1e-5, replace(ALL, head_sum=False))


def test_gated_rows_of_the_last_layer_are_adapted_alone(tokenizer_and_model) -> None:
    model, tokenizer = hf.load_pretrained(tokenizer_and_model, dtype=torch.float64)
    model.config.max_position_embeddings = 160
    drafter = hf.add_drafter(model, tokenizer, DrafterConfig(rank=4))
    model.requires_grad_(False)
    for name, up in drafter.up.items():
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(len(name)))
    network = hf.as_network(model, drafter.mask_token_id, gate=drafter.rows)
    x0, layout = packed()
    drawn = mask_exact(
        *torch.rand(2, 3, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        segments(layout, 8),
        predictable(layout),
    )
    config = DiffusionConfig(drafter.mask_token_id, "two_stream", "causal", 8, False, "test", "0")
    for loss_of in (
        lambda net: diffusion_loss(net, config, x0, layout, drawn),
        lambda net: distill_loss(net, config, x0, layout, drawn, "tv"),
    ):
        network.fast_paths, results = hf.FastPaths(), []
        for fast_paths in (hf.FastPaths(), ALL):
            network.fast_paths = fast_paths
            loss = loss_of(network).sum
            results.append((loss.detach(), torch.autograd.grad(loss, list(drafter.parameters()))))
        (slow, slow_grads), (fast, fast_grads) = results
        assert abs(fast - slow) <= 1e-6 * abs(slow)
        for a, b in zip(fast_grads, slow_grads, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_checkpointed_layers_give_the_same_gradients() -> None:
    config = SUPPORTED["llama"]()
    config.max_position_embeddings = 160
    network = hf.as_network(tiny_model(config, torch.float64).train(), MASK)
    loss_of = objectives(False)["two_stream"]
    loss, grads = measured(network, loss_of)
    hf.checkpoint_layers(network.model)
    again, recomputed = measured(network, loss_of)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for a, b in zip(recomputed, grads, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window"])
def test_masks_on_one_clean_pass_are_the_mean_of_passes_apart(name: str, alpha: float | None) -> None:
    config = SUPPORTED[name]()
    config.max_position_embeddings = config.n_positions = 160
    network = hf.as_network(tiny_model(config, torch.float64), MASK)
    x0, layout = packed()
    t, noise = torch.rand(2, 3, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = list(mask_complementary(t, noise, segments(layout, 8), predictable(layout)))
    blocks = block_config(8, clean="block_causal" if alpha is None else "causal")

    def apart(net: hf.HFNetwork) -> LossOutput:
        losses = [
            diffusion_loss(net, blocks, x0, layout, mask)
            if alpha is None
            else joint_loss(net, blocks, x0, layout, mask, alpha)
            for mask in drawn
        ]
        return LossOutput(losses[0].sum / 2 + losses[1].sum / 2, losses[0].count)

    loss, grads = measured(network, apart)
    shared, shared_grads = measured(network, lambda net: shared_loss(net, blocks, x0, layout, drawn, alpha))
    relative = 1e-10 if name == "gpt2" else 1e-5
    assert abs(shared - loss) <= relative * abs(loss)
    for a, b in zip(shared_grads, grads, strict=True):
        assert (a - b).abs().max() <= relative * max(g.abs().max() for g in grads)


def test_a_shifted_stream_shares_no_clean_pass() -> None:
    network = hf.as_network(tiny_model(SUPPORTED["llama"]()), MASK)
    x0, layout = packed()
    with pytest.raises(ValueError, match="has no clean stream to share"):
        shared_loss(network, block_config(8, shift=True), x0, layout, [])


def test_a_layout_that_comes_again_gets_the_same_mask() -> None:
    network = hf.as_network(tiny_model(SUPPORTED["llama"]()), MASK)
    _, layout = packed()
    first = network.masks(block_causal(8), layout, layout)
    assert network.masks(block_causal(8), layout, layout) is first
    for other in (block_causal(4), annealed(torch.zeros(LENGTH, LENGTH, dtype=torch.bool))):
        assert not torch.equal(network.masks(other, layout, layout), first)
    moved = layout._replace(document=layout.document.clone())
    assert network.masks(block_causal(8), moved, moved) is not first


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layout_remembered_in_inference_mode_serves_training(device: str) -> None:
    """Learned positions are saved for the backward pass, which tensors made in inference mode refuse."""
    network = hf.as_network(tiny_model(SUPPORTED["gpt2"]()).to(device), MASK)
    x0, layout = random_tokens(1, 16), Layout.of(torch.arange(16)[None])
    everything = Corruption(predictable(layout), predictable(layout).float())
    for again in (
        lambda: diffusion_loss(network, block_config(8), x0, layout, everything),
        lambda: shared_loss(network, block_config(8), x0, layout, [everything]),
    ):
        with torch.inference_mode():
            again()
        again().sum.backward()


@pytest.mark.parametrize("objective", ["two_stream", "joint"])
def test_fast_paths_run_under_autocast(objective: str) -> None:
    config = SUPPORTED["llama"]()
    config.max_position_embeddings = 160
    network = hf.as_network(tiny_model(config).train(), MASK)
    loss_of = objectives(False)[objective]
    network.fast_paths = hf.FastPaths()
    loss, grads = measured(network, loss_of)
    network.fast_paths = ALL
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_grads = measured(network, loss_of)
    assert abs(rounded - loss) < 0.01 * loss
    for a, b in zip(rounded_grads, grads, strict=True):
        assert (a - b).abs().max() < 0.05 * max(g.abs().max() for g in grads)


def test_every_file_of_fast_paths_names_its_slow_twin_and_the_test_of_both() -> None:
    for file in (ROOT / "src" / "unmask" / "hf" / "fast").glob("*.py"):
        if file.stem != "__init__":
            docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
            assert "Slow twin" in docstring, file
            page, test = re.findall(r"(tests/\w+\.py)\s+\(`(\w+)`\)", docstring)[0]
            assert f"def {test}(" in (ROOT / page).read_text(), (file, test)


@torch.no_grad()
def test_the_layers_are_those_of_the_text_model() -> None:
    """A tower for images may have as many layers, and comes first."""
    text = SUPPORTED["gemma3"]().to_dict()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    model = tiny_model(tf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4))
    assert layers_of(model) == list(model.model.language_model.layers)
    network = hf.as_network(model, MASK)
    assert network.fast_paths.last_rows
    tokens, layout = packed()
    rows = torch.arange(3, 3 * LENGTH, 5)
    fast = network(tokens, layout, causal, rows=rows)
    network.fast_paths = hf.FastPaths()
    slow = network(tokens, layout, causal, rows=rows)
    assert (fast - slow)[:, :MASK].abs().max() <= 1e-5 * slow[:, :MASK].abs().max()
