"""Quantised bases: packed weights stay as they are, drafters and adapters beside them learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, VOCABULARY, random_tokens, tiny_llama
from safetensors.torch import load_file

import unmask
from unmask import hf
from unmask.core.attention import Layout, two_stream
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.finite import bad_weight, plain_parts
from unmask.hf.quantised import named_quantisation

RUN: dict[str, Any] = {"show_progress": False, "max_tokens": 2000, "max_length": 64, "block_size": 4, "batch_size": 4,
                       "save_every": 4}  # fmt: skip
KINDS = ("nf4", "int8", "torchao")


def quantisation(kind: str) -> Any:
    """A value of quantization_config; skips where its package is not installed."""
    if kind != "torchao":
        pytest.importorskip("bitsandbytes")
        return kind
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(ao.Int8WeightOnlyConfig())


def weights(model: Any) -> list[torch.Tensor]:
    return [part.clone() for p in model.parameters() for part in plain_parts(p.detach())]


@pytest.fixture(params=KINDS)
def quantised(request: pytest.FixtureRequest, tokenizer_and_model: Path) -> unmask.DiffusionLM:
    return unmask.load(tokenizer_and_model, dtype=torch.float32, quantization_config=quantisation(request.param))


@torch.no_grad()
def test_clean_rows_of_a_quantised_base_are_bit_identical_with_the_drafter_on_and_off(
    quantised: unmask.DiffusionLM,
) -> None:
    model = quantised.model
    assert hf.quantisation_of(model) is not None
    size = model.get_input_embeddings().weight.shape[0]
    clean = Layout.of(torch.arange(12).expand(2, 12))
    both = clean._replace(noisy=torch.ones_like(clean.noisy)).concat(clean)
    ids = torch.cat([torch.full((2, 12), size), random_tokens(2, 12)], dim=1)
    drafter = Drafter(model, size, DrafterConfig(4, 4.0))
    pattern = two_stream(4, "causal")
    net = hf.as_network(model, size, gate=drafter.rows)
    off = net(ids, both, pattern)
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=0.3)
    on = net(ids, both, pattern)
    assert torch.equal(on[:, 12:], off[:, 12:])
    assert (on[:, :12] - off[:, :12]).abs().max() > 1e-2
    # A pass of other rows, with gradients wanted, rounds otherwise and no more than that.
    with torch.enable_grad():
        one = net(ids[:, 12:20], clean.subset(..., slice(0, 8)), two_stream(4, "causal"))
    assert (one - off[:, 12:20]).abs().max() < 1e-4 * off.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_learns_on_a_quantised_base_and_loads_on_it_and_on_the_whole_one(
    kind: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    packed, folder, prompts = quantisation(kind), tmp_path / "drafter", [STORIES[0][:20], STORIES[9][:9]]
    lm = unmask.load(tokenizer_and_model, dtype=torch.float32, quantization_config=packed)
    before = weights(lm.model)
    lm = unmask.adapt(lm, stories, "drafter", folder, **RUN)
    assert all(torch.equal(*pair) for pair in zip(before, weights(lm.model), strict=True))
    assert max(float(up.detach().abs().max()) for up in lm.drafter.up.values()) > 0
    text = lm.generate(prompts, mode="ar", max_new_tokens=24).texts
    assert lm.generate(prompts, max_new_tokens=24).texts == text
    base = json.loads((folder / "config.json").read_text())["diffusion"]["base"]
    assert base["name"] == str(tokenizer_and_model)
    assert base["quantised"] == kind
    again = unmask.load(folder, dtype=torch.float32, quantization_config=packed)
    assert again.generate(prompts, max_new_tokens=24).texts == text
    whole = unmask.load(folder)
    assert hf.quantisation_of(whole.model) is None
    parent = unmask.load(tokenizer_and_model).generate(prompts, max_new_tokens=24).texts
    assert whole.generate(prompts, max_new_tokens=24).texts == parent


def test_a_drafter_of_a_whole_base_loads_on_the_quantised_one_and_on_no_other(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    packed = quantisation("nf4")
    unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path / "drafter", **RUN)
    lm = unmask.load(tmp_path / "drafter", dtype=torch.float32, quantization_config=packed)
    assert hf.quantisation_of(lm.model) == "nf4"
    other = tmp_path / "other"
    shutil.copytree(tokenizer_and_model, other)
    model = unmask.load(other).model
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on another model"):
        unmask.load(tmp_path / "drafter", base=other, dtype=torch.float32, quantization_config=packed)


@pytest.mark.parametrize("recipe", ["drafter", "tri-mode"])
def test_a_run_on_a_packed_parent_resumes_and_its_checkpoints_hold_what_learns(
    recipe: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    quantisation("nf4")
    run = RUN | {"quantize": "nf4"}
    if recipe == "tri-mode":
        pytest.importorskip("peft")
        run |= {"lora_rank": 4, "lora_merge": False}
    lm = unmask.adapt(tokenizer_and_model, stories, recipe, tmp_path / "run", **run)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-4", cut / "checkpoint-4")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(record | {"finished": False}))
    resumed = unmask.adapt(tokenizer_and_model, stories, recipe, cut, resume=True, **run)
    for name in ("drafter.safetensors", "adapter_model.safetensors"):
        if (cut / name).exists():
            once, twice = load_file(tmp_path / "run" / name), load_file(cut / name)
            assert once.keys() == twice.keys()
            assert all(torch.equal(once[key], twice[key]) for key in once)
    assert resumed.generate(STORIES[0][:20], seed=0).texts == lm.generate(STORIES[0][:20], seed=0).texts


def test_an_adapter_of_a_packed_parent_loads_beside_it_and_merges_into_the_whole_one(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    packed, ids = quantisation("int8"), random_tokens(2, 9)
    run = RUN | {"quantize": "int8", "lora_rank": 4, "lora_merge": False}
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "adapter", **run)
    assert "quantization_config" not in json.loads((tmp_path / "adapter" / "config.json").read_text())
    again = unmask.load(tmp_path / "adapter", dtype=torch.float32, quantization_config=packed)
    torch.testing.assert_close(again.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    whole = unmask.load(tmp_path / "adapter")
    assert hf.quantisation_of(whole.model) is None
    gap = (whole.model(input_ids=ids).logits - lm.model(input_ids=ids).logits).abs().max()
    assert gap < 0.1 * lm.model(input_ids=ids).logits.abs().max()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="lies beside packed weights"):
        again.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="has an adapter already"):
        unmask.adapt(again, stories, None, tmp_path / "more", **(RUN | {"lora_rank": 4, "lora_merge": False}))


def test_what_packed_weights_cannot_do_is_refused_with_the_reason(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.load(tokenizer_and_model, quantization_config=quantisation("nf4"))
    with pytest.raises(ValueError, match=r"is quantised \(nf4\), and packed weights cannot learn: add lora_rank=N"):
        unmask.adapt(lm, stories, "efficient-dlm", tmp_path / "x", **RUN)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="lora_merge=true: adapters merged into packed weights"):
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "x", quantize="nf4", lora_rank=4, **RUN)
    with pytest.raises(ValueError, match="quantize='nf4' packs weights while they are read"):
        unmask.adapt(lm, stories, "drafter", tmp_path / "x", quantize="nf4", **RUN)
    with pytest.raises(ValueError, match=r"quantize='nf4' needs objective='distill', or lora_rank"):
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "x", quantize="nf4", **RUN)
    with pytest.raises(ValueError, match="quantization_config='int3' is unknown: use one of nf4, int8"):
        unmask.load(tokenizer_and_model, quantization_config="int3")
    assert not (tmp_path / "x").exists()


def test_a_threshold_that_lets_rows_change_each_other_is_warned_of(tokenizer_and_model: Path) -> None:
    quantisation("int8")
    from transformers import BitsAndBytesConfig

    with pytest.warns(UserWarning, match=r"llm_int8_threshold=6.0 makes a row depend on all others"):
        unmask.load(tokenizer_and_model, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"'nf4' needs bitsandbytes, .*pip install 'unmask\[quant\]'"):
        named_quantisation("nf4")


def test_packed_weights_that_are_not_finite_are_found(tokenizer_and_model: Path) -> None:
    lm = unmask.load(tokenizer_and_model, dtype=torch.float32, quantization_config=quantisation("torchao"))
    weight: Any = lm.model.model.layers[0].self_attn.q_proj.weight
    assert bad_weight(lm.model) is None
    with torch.no_grad():
        weight.scale[0] = torch.nan
    assert bad_weight(lm.model) == "model.layers.0.self_attn.q_proj.weight"


def test_a_model_without_linear_maps_is_refused() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, _ in list(part.named_children()):
                setattr(part, name, torch.nn.Identity())
    with pytest.raises(ValueError, match="drafter_targets 'all': LlamaForCausalLM has no linear maps"):
        Drafter(model, VOCABULARY, DrafterConfig())
