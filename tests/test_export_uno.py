"""Format `uno`: an adapter that PEFT loads, and that gives our logits where an engine switches it by rows."""

from __future__ import annotations

import ast
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from conftest import SUPPORTED, block_config, random_tokens, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import unmask
from unmask import hf
from unmask.cli import app
from unmask.core.attention import Layout
from unmask.core.decoding import begin, speculate
from unmask.core.drafter import DrafterConfig
from unmask.core.scoring import noisy_ids
from unmask.export import export_model
from unmask.model import DiffusionLM

KINDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def drafter_on(folder: Path, targets: str = "all", **changes: Any) -> DiffusionLM:
    """A drafter on the model in a folder, with adapters that do something; changes: of its DiffusionConfig."""
    parent = unmask.load(folder)
    rows = parent.model.get_input_embeddings().weight.shape[0]
    uniform = changes.get("noise_tokens") != 0
    drafter = hf.add_drafter(parent.model, parent.tokenizer, DrafterConfig(4, 6.0, targets, mask_rows=int(not uniform)))
    torch.manual_seed(1)
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=0.3)
    config = replace(block_config(4, shift=True, clean="causal"), noisy_attention="causal", noise_tokens=rows,
                     mask_token_id=drafter.mask_token_id)  # fmt: skip
    base = hf.Base.of(str(folder), parent.model)
    return DiffusionLM(parent.model, parent.tokenizer, replace(config, **changes), drafter=drafter, base=base)


def routed(model: Any, num_clean: int) -> None:
    """Switch PEFT's adapters off for the first rows of a pass, as the engines do."""

    def hook(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return torch.cat([module.base_layer(args[0][:, :num_clean]), out[:, num_clean:]], dim=1)

    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_hook(hook)


@pytest.mark.parametrize(("targets", "kinds"), [
    ("all", KINDS),
    ("v_proj", ["k_proj", "q_proj", "v_proj"]),
    ("o_proj,up_proj", ["gate_proj", "o_proj", "up_proj"]),
    ("1.self_attn.q_proj", ["k_proj", "q_proj", "v_proj"]),
])  # fmt: skip
@torch.no_grad()
def test_peft_with_the_engines_rows_gives_our_logits(
    tokenizer_and_model: Path, tmp_path: Path, targets: str, kinds: list[str]
) -> None:
    """A causal pass over [text, last token, random tokens], adapters on for the random tokens alone."""
    lm = drafter_on(tokenizer_and_model, targets).to(torch.float64)
    export_model(lm, "uno", tmp_path / "uno")
    described = json.loads((tmp_path / "uno" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["target_modules"]) == (4, 6, kinds)
    assert described["base_model_name_or_path"] == str(tokenizer_and_model)
    names = set(load_file(tmp_path / "uno" / "adapter_model.safetensors"))
    assert {name.split(".")[-3] for name in names} == set(kinds)
    assert len(names) == 2 * 2 * len(kinds)  # two layers, A and B: the engines fuse q, k, v, and gate, up

    size, x0 = lm.model.config.vocab_size, random_tokens(2, 9)
    layout = Layout.of(torch.arange(12).expand(2, 12))
    past = begin(lm.network, lm.diffusion.pattern, x0[:, :8])
    past.columns = 12
    passed = speculate(lm.network, lm.diffusion, past, x0[:, 8:], layout.subset(..., slice(8, 9)), 3)
    masks = torch.full((2, 3), lm.diffusion.mask_token_id)
    noise = noisy_ids(lm.diffusion, masks, layout.subset(..., slice(9, 12)))
    assert int(noise.max()) < size

    base = AutoModelForCausalLM.from_pretrained(tokenizer_and_model, dtype=torch.float64)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "uno").eval()
    routed(tuned, 9)
    logits = tuned(torch.cat([x0, noise], dim=1)).logits
    assert (logits[:, 8] - passed.ar_logits[:, 0]).abs().max() < 1e-10
    assert (logits[:, 9:] - passed.drafts(torch.zeros(2, dtype=torch.long))).abs().max() < 1e-10
    ungated = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tokenizer_and_model, dtype=torch.float64), tmp_path / "uno"
    )
    assert (ungated(torch.cat([x0, noise], dim=1)).logits[:, 8] - logits[:, 8]).abs().max() > 1e-2


@pytest.mark.parametrize(("changes", "reason"), [
    ({"noise_tokens": 0}, r"read a mask embedding \(noise='mask'\)"),
    ({"shift": False}, "shift=false"),
    ({"noisy_attention": "bidirectional"}, "noisy_attention='bidirectional'"),
    ({"adapt_anchor": True}, "adapt_anchor=true"),
])  # fmt: skip
def test_a_drafter_of_another_layout_is_refused_with_what_to_train(
    tokenizer_and_model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    lm = drafter_on(tokenizer_and_model, **changes)
    line = rf"{reason}.*unmask adapt {tokenizer_and_model} --recipe drafter .* noise=uniform shift=true"
    with pytest.raises(ValueError, match=line):
        export_model(lm, "uno", tmp_path / "uno")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "odd", "instead"), [
    ("gpt2", "transformer.h.0.attn.c_attn", "no drafter of this base can be served"),
    ("phi3", "model.layers.0.self_attn.qkv_proj", "drafter_targets=self_attn.o_proj,mlp.down_proj"),
])  # fmt: skip
def test_adapters_that_the_engines_have_no_place_for_are_refused(
    tokenizer_and_model: Path, tmp_path: Path, name: str, odd: str, instead: str
) -> None:
    shutil.copytree(tokenizer_and_model, tmp_path / "base")
    config = SUPPORTED[name]()
    config.vocab_size = tf.AutoConfig.from_pretrained(tokenizer_and_model).vocab_size
    tiny_model(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"adapter on '{odd}'.*{instead}"):
        export_model(drafter_on(tmp_path / "base"), "uno", tmp_path / "uno")
    if "=" in instead:
        export_model(drafter_on(tmp_path / "base", instead.partition("=")[2]), "uno", tmp_path / "uno")


def test_whole_models_are_refused(tokenizer_and_model: Path, converted: Path, tmp_path: Path) -> None:
    for folder, kind in ((tokenizer_and_model, "an untouched AR model"), (converted, "of recipe 'efficient-dlm'")):
        with pytest.raises(ValueError, match=f"for drafters, and this is .*{kind}.*--recipe drafter"):
            export_model(folder, "uno", tmp_path / "uno")


@torch.no_grad()
def test_a_base_that_no_engine_finds_is_written_beside(tokenizer_and_model: Path, tmp_path: Path) -> None:
    """Of a drafter that stands on another adapter, the base is that adapter merged into its own base."""
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tokenizer_and_model),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "tuned")
    lm = drafter_on(tmp_path / "tuned")
    lines = export_model(lm, "uno", tmp_path / "uno")
    assert f"--model-path {tmp_path}/uno/base " in lines["sglang"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "uno" / "base")
    ids = random_tokens(1, 6)
    assert (base(ids).logits - tuned(ids).logits).abs().max() < 1e-4
    assert not (tmp_path / "uno" / "base" / "tokenizer.json").read_text().count("<|mask|>")


def test_the_command_writes_a_trained_drafter_and_says_how_it_is_served(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    run = {"max_tokens": 500, "max_length": 32, "block_size": 4, "batch_size": 2, "show_progress": False}
    unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path / "drafter", noise="uniform", shift=True,
                 noisy_attention="causal", **run)  # fmt: skip
    output = tmp_path / "served" / "uno"
    words = ["export", str(tmp_path / "drafter"), "--format", "uno", "--output", str(output), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    said = json.loads(result.stdout)
    rows = tf.AutoConfig.from_pretrained(tokenizer_and_model).vocab_size
    assert said["sglang"] == (
        f"python -m sglang.launch_server --model-path {tokenizer_and_model} --speculative-algorithm UNO "
        f"--uno-lora-path {output} --speculative-num-draft-tokens 4 --attention-backend fa3"
    )
    assert f'"uno_mask_token_id": {rows}, "num_speculative_tokens": 4' in said["vllm"]
    card = (output / "README.md").read_text()
    assert said["sglang"] in card
    assert said["vllm"] in card
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="was exported for SGLang and vLLM"):
        unmask.load(output)
    with pytest.raises(ValueError, match="is a folder with something in it"):
        export_model(tmp_path / "drafter", "uno", output)


def test_what_an_export_does_not_read_is_refused(tokenizer_and_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format 'onnx' is unknown: use .*uno"):
        export_model(tokenizer_and_model, "onnx", tmp_path / "x")
    with pytest.raises(ValueError, match="quantize 'q8_0' is not read by format 'uno'"):
        export_model(tokenizer_and_model, "uno", tmp_path / "x", quantize="q8_0")
    with pytest.raises(ValueError, match="base='y' is for a model that is loaded here"):
        export_model(unmask.load(tokenizer_and_model), "uno", tmp_path / "x", base="y")


@pytest.mark.parametrize("targets", ["all", "v_proj", "up_proj,o_proj"])
def test_sglangs_own_code_reads_the_folder(tokenizer_and_model: Path, tmp_path: Path, targets: str) -> None:
    """UNMASK_WHEELS=DIR, with what `pip download --no-deps sglang` leaves there: its reader and its fusing."""
    folder = os.environ.get("UNMASK_WHEELS")
    wheel = next(Path(folder).glob("sglang-*.whl"), None) if folder else None
    if wheel is None:
        pytest.skip("needs UNMASK_WHEELS, a folder with the wheel of sglang")
    export_model(drafter_on(tokenizer_and_model, targets), "uno", tmp_path / "uno")
    with zipfile.ZipFile(wheel) as files:
        reader, fusing = (files.read(f"sglang/srt/lora/{name}.py").decode() for name in ("lora_config", "lora"))
    module: dict[str, Any] = {}
    exec(reader, module)
    config = module["LoRAConfig"](str(tmp_path / "uno"))
    assert (config.r, config.lora_alpha, config.lora_added_tokens_size) == (4, 6, 0)

    adapter = next(node for node in ast.parse(fusing).body if getattr(node, "name", "") == "LoRAAdapter")
    names = ("normalize_qkv_proj", "normalize_gate_up_proj")
    adapter.body = [node for node in adapter.body if getattr(node, "name", "") in names]
    adapter.bases, space = [], {"torch": torch, "nn": torch.nn}
    exec("from __future__ import annotations\nfrom typing import *\n" + ast.unparse(adapter), space)
    weights = load_file(tmp_path / "uno" / "adapter_model.safetensors")
    for layer in range(2):
        own = {name: tensor for name, tensor in weights.items() if f"layers.{layer}." in name}
        for name in names:
            getattr(space["LoRAAdapter"], name)(SimpleNamespace(config=config), list(own), own)
        kinds = {name.split(".")[-3] for name in own}
        fused = {"all": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, "v_proj": {"qkv_proj"}}
        assert kinds == fused.get(targets, {"gate_up_proj", "o_proj"})
        ranks = {name.split(".")[-3]: len(tensor) for name, tensor in own.items() if "lora_A" in name}
        assert all(rank == {"qkv_proj": 12, "gate_up_proj": 8}.get(kind, 4) for kind, rank in ranks.items())
