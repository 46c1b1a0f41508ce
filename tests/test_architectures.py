"""A handful of the classes of tests/architectures, whose command examines all of them."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

import unmask
from unmask import hf
from unmask.core.attention import Layout, causal
from unmask.hf import tiny as tiny_module
from unmask.hf.tiny import tiny_settings

FOLDER = Path(__file__).parent / "architectures"
sys.path.insert(0, str(FOLDER))
import checks  # noqa: E402
from checks import examine  # noqa: E402


@pytest.mark.parametrize(
    "name", ["gpt2", "mixtral", "gemma3n_text", "ministral3", "deepseek_v3", "deepseek_v32", "moshi"]
)
def test_accepted_classes_are_read_right(name: str) -> None:
    row = examine(name)
    assert (row.verdict, row.reason) == ("accepted", "")


# --- the tiny models


def tiny(config: tf.PreTrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(tiny_settings(config))
    return settings


@pytest.mark.parametrize(("heads", "key_heads", "tiny_key_heads"), [(32, 32, 4), (32, 8, 2), (32, 1, 1)])
def test_heads_keep_their_grouping(heads: int, key_heads: int, tiny_key_heads: int) -> None:
    settings = tiny(tf.LlamaConfig(num_attention_heads=heads, num_key_value_heads=key_heads))
    assert (settings["num_attention_heads"], settings["num_key_value_heads"]) == (4, tiny_key_heads)


def test_every_list_with_an_entry_for_each_layer_is_cut_to_a_layer_of_each_kind() -> None:
    types = ["sliding_attention"] * 4 + ["full_attention"]
    sparsity = [0.95] * 10 + [0.0] * 20
    config = tf.Gemma3nTextConfig(num_hidden_layers=30, layer_types=types * 6, activation_sparsity_pattern=sparsity,
                                  intermediate_size=[8192] * 30, num_kv_shared_layers=10)  # fmt: skip
    settings = tiny(config)
    kinds = list(zip(settings["layer_types"], settings["activation_sparsity_pattern"], strict=True))
    assert settings["num_hidden_layers"] == len(kinds) == len(settings["intermediate_size"]) == 6
    assert set(kinds) == {(kind, share) for kind in set(types) for share in (0.95, 0.0)}
    assert settings["num_kv_shared_layers"] == 2


def test_settings_of_single_layers_follow_the_layers_that_are_kept() -> None:
    settings = tiny(tf.Gemma4TextConfig())
    full = settings["layer_types"].index("full_attention")
    assert list(settings["per_layer_config"]) == [str(full)]


def test_nothing_that_is_unset_gets_the_default_of_its_class() -> None:
    assert tiny(tf.MistralConfig(sliding_window=None))["sliding_window"] is None
    assert tiny(tf.DeepseekV3Config(q_lora_rank=None))["q_lora_rank"] is None


def test_what_a_model_reads_beside_rotary_scaling_stays() -> None:
    rope = tiny(tf.Ministral3Config())["rope_parameters"]
    assert (rope["rope_type"], rope["llama_4_scaling_beta"]) == ("default", 0.1)


def test_a_tiny_model_that_does_not_run_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_module._SIZES, "hidden_size", 30)  # no multiple of the number of heads
    config = tf.GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    with pytest.raises(unmask.UnsupportedModelError, match="no tiny model of its class could be made"):
        hf.probe(AutoModelForCausalLM.from_config(config))


def test_a_model_in_a_wrapper_is_probed_by_its_configuration() -> None:
    peft = pytest.importorskip("peft")
    config = tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    hf.probe(peft.get_peft_model(AutoModelForCausalLM.from_config(config), peft.LoraConfig(task_type="CAUSAL_LM")))


# --- Llama 4: chunks, and queries scaled by their position


def llama4(**changes: Any) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8,
             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
             "attention_chunk_size": 12, "floor_scale": 6, "attn_scale": 3.0, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tf.Llama4TextConfig(**(sizes | changes))).eval()


def test_llama4_is_read_right_beyond_its_chunks_and_scales() -> None:
    model = llama4()
    hf.probe(model)
    for check in (checks._whole, checks._packed, checks._two_streams, checks._learns, checks._decodes):
        check(model, 2e-5)


@pytest.mark.parametrize("changes", [{"attention_chunk_size": 999}, {"attn_scale": 0.0}])
def test_chunks_and_scales_matter_to_these_texts(changes: dict[str, Any]) -> None:
    tokens = torch.arange(40)[None] + 3
    with torch.no_grad():
        one, other = llama4()(input_ids=tokens).logits, llama4(**changes)(input_ids=tokens).logits
    assert (one - other).abs().max() > 0.1


def test_a_long_pass_through_layers_that_run_again_is_refused() -> None:
    model = llama4().train()
    hf.checkpoint_layers(model, compiled=True)  # in the way of transformers, which ours is not refused for
    network, tokens = hf.as_network(model), torch.arange(40)[None] + 3
    network(tokens[:, :5], Layout.of(torch.arange(5)[None]), causal)
    with pytest.raises(ValueError, match=r"reaches position 6.*gradient_checkpointing off"):
        network(tokens, Layout.of(torch.arange(40)[None]), causal)
    assert all(layer.self_attn.attn_temperature_tuning for layer in model.model.layers)


def test_a_long_pass_whose_layers_run_again_has_the_gradients_of_kept_ones() -> None:
    model = llama4().double().train()
    network, tokens = hf.as_network(model), torch.arange(40)[None] + 3
    found = []
    for again in (False, True):
        hf.checkpoint_layers(model, on=again)
        network(tokens, Layout.of(torch.arange(40)[None]), causal).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for kept, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, kept, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "recurrent state"),
        ("qwen3_next", "'linear_attention'"),
        ("bert", "no causal model"),
        ("minimax_m3_vl_text", "'minimax_m3_sparse' is attention to blocks of keys"),
        ("doge, texts longer than its choice of keys", "tokens that come later"),
    ],
)
def test_refused_classes_are_refused_for_what_was_measured(name: str, reason: str) -> None:
    row = examine(name)
    assert row.verdict == "refused"
    assert reason in row.reason


def test_the_command_refuses_what_is_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(FOLDER / "__main__.py"))
    with pytest.raises(SystemExit):
        command["main"](["llamma"])
    assert "'llamma' is no model type" in capsys.readouterr().err


def test_a_class_that_takes_its_process_along_is_a_crash() -> None:
    command = runpy.run_path(str(FOLDER / "__main__.py"))
    command["in_a_process"].__globals__["examine"] = lambda _: os._exit(3)
    row = command["in_a_process"]("llama")
    assert (row.verdict, row.reason) == ("crash", "its process ended with 3")
    assert "| `llama` | crash |  |  | its process ended with 3 |" in command["page"]([row])
