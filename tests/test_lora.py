"""LoRA: what is trained, that merging changes no logit, that runs resume and folders load."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import STORIES, SUPPORTED, random_tokens, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import unmask
from unmask.hf import lora
from unmask.recipe import load_recipe

ALL = ("embeddings", "norms", "head")
RUN = {"max_tokens": 3000, "max_length": 64, "block_size": 4, "batch_size": 4, "save_every": 4, "log_every": 1,
       "keep_checkpoints": 99, "learning_rate": 1e-2, "show_progress": False, "lora_rank": 4}  # fmt: skip


def shake(model) -> None:
    """Give B values, as training would."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "phi3", "opt"])
def test_merged_logits_equal_unmerged_ones(name: str) -> None:
    model, ids = tiny_model(SUPPORTED[name](), torch.float64), random_tokens(2, 9)
    kind, names = type(model), list(model.state_dict())
    stock = model(input_ids=ids).logits
    tuner = lora.add_lora(model, 4, 8.0, ALL, seed=0)
    assert torch.equal(model(input_ids=ids).logits, stock)  # B is 0
    shake(model)
    adapted = model(input_ids=ids).logits
    assert (adapted - stock).abs().max() > 1e-3
    lora.merge(tuner)
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-10, rtol=0)
    assert type(model) is kind
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_targets_are_the_linear_layers_and_the_rest_is_chosen() -> None:
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for chosen in ((), ("norms",), ("embeddings", "head"), ALL):
        model = tiny_llama()
        lora.add_lora(model, 2, 4.0, chosen, seed=0)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        adapters = {n for n in trained if "lora_" in n}
        assert len(adapters) == 2 * 2 * len(linear)
        assert all(any(f".{layer}." in n for layer in linear) for n in adapters)
        rest = trained - adapters
        assert ("model.embed_tokens.weight" in rest) == ("embeddings" in chosen)
        assert ("lm_head.weight" in rest) == ("head" in chosen)
        assert len([n for n in rest if "norm" in n]) == (5 if "norms" in chosen else 0)


def test_size_of_the_papers_adapter() -> None:
    """LLaMA-7B, rank 8: 19.99M, and 151.06M with the embeddings (DiffuLLaMA: 151M)."""
    for chosen, millions in (((), 19.99), (("embeddings",), 151.06)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig())
            lora.add_lora(model, 8, 16.0, chosen, seed=0)
        assert model.config.hidden_size == 4096
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert round(trained / 1e6, 2) == millions


def test_adapters_start_from_the_seed_alone() -> None:
    first, second, third = (tiny_llama() for _ in "abc")
    for model, seed in ((first, 0), (second, 0), (third, 1)):
        torch.manual_seed(torch.randint(1000, (1,)).item())
        lora.add_lora(model, 2, 4.0, (), seed=seed)
    a, b, c = (m.state_dict() for m in (first, second, third))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if "lora_A" in k)


@pytest.fixture(scope="module")
def straight(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("lora") / "straight"
    return unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", folder, **RUN), folder


def test_a_run_resumes_bit_for_bit_and_loads(
    straight, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm, folder = straight
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(folder / "checkpoint-8", cut / "checkpoint-8")
    run = json.loads((folder / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(run | {"finished": False}))
    resumed = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", cut, resume=True, **RUN)
    expected = lm.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items())
    loaded = unmask.load(folder)
    assert loaded.diffusion == lm.diffusion
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())
    stock = AutoModelForCausalLM.from_pretrained(folder)  # a merged folder needs no PEFT
    assert all(torch.equal(v, expected[k]) for k, v in stock.state_dict().items())
    assert run["trained_parameters"] < sum(p.numel() for p in lm.model.parameters())
    losses = [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert losses[-1] < losses[0] - 1


def test_an_unmerged_folder_loads_on_its_base(
    straight, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", folder, lora_merge=False, **RUN)
    assert not (folder / "model.safetensors").exists()
    loaded, ids = unmask.load(folder), random_tokens(2, 9)
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, straight[0].model(input_ids=ids).logits)
    assert loaded.diffusion == lm.diffusion
    assert loaded.generate(STORIES[0][:20], max_new_tokens=4, seed=0).texts == lm.generate(
        STORIES[0][:20], max_new_tokens=4, seed=0).texts  # fmt: skip
    again = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", folder, resume=True, lora_merge=False, **RUN)
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    # an adapter on an adapter
    second = tmp_path / "second"
    lm = unmask.adapt(folder, stories, "efficient-dlm", second, lora_merge=False, **(RUN | {"max_tokens": 500}))
    torch.testing.assert_close(unmask.load(second).model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(straight[1])  # one row more than the adapter's true base
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"adapter '.*' does not fit the model it names"):
        unmask.load(folder)


@torch.no_grad()
def test_peft_itself_reads_an_adapter_folder(tmp_path: Path) -> None:
    import peft

    model, ids = tiny_llama(torch.float32, tie_word_embeddings=False), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "base")
    tuner = lora.add_lora(model, 4, 8.0, ALL, seed=0)
    shake(model)
    model.model.norm.weight.mul_(1.5)
    model.lm_head.weight.mul_(0.5)
    lora.save_adapter(tmp_path / "adapter", tuner, str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


def test_bad_requests_are_named(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"lora_trainable='norms,haed': 'haed' is unknown: use any of embeddings"):
        load_recipe("efficient-dlm", lora_rank=4, lora_trainable="norms,haed")
    with pytest.raises(ValueError, match="lora_rank=0 must be above 0"):
        load_recipe("efficient-dlm", lora_rank=0)
    with pytest.raises(ValueError, match=r"lora_rank=4: '.*experts.*' holds several layers in one tensor"):
        lora.add_lora(tiny_model(SUPPORTED["mixtral"]()), 4, 8.0, (), seed=0)
    lm = unmask.load(tokenizer_and_model)
    lm.model.config._name_or_path = ""
    with pytest.raises(ValueError, match="lora_merge=false: an adapter needs the name of its base"):
        unmask.adapt(lm, stories, "ar", tmp_path / "x", lora_merge=False, **RUN)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"LoRA needs PEFT.*pip install 'unmask\[lora\]'"):
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "x", **RUN)
    assert not (tmp_path / "x").exists()
