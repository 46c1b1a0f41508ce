"""Format `sglang`: an SDAR folder that gives our logits, and our tokens where an engine's own steps decode it."""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import _GQA, _MOE, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import unmask
from unmask import hf
from unmask.core.network import DiffusionConfig
from unmask.export import export_model
from unmask.export.sglang import MASK_ID, _write_weights
from unmask.model import DiffusionLM
from unmask.sampling import Threshold

KINDS = {"qwen3": tf.Qwen3Config, "qwen3_moe": tf.Qwen3MoeConfig}
ROWS = 151936
"""Of Qwen3's embedding, where the mask token has a row of no other token."""


def model_like(parent: Any, kind: str = "qwen3", *, rows: int | None = None, **changes: Any) -> DiffusionLM:
    """A random block-wise model of Qwen3's class with a tokenizer, or that of a folder; rows: of its embedding.

    In float64, but for experts, whose products transformers has in float32 alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(parent) if isinstance(parent, Path) else parent
    sizes = _GQA | (_MOE if kind == "qwen3_moe" else {}) | {
        "vocab_size": rows or len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": kind == "qwen3",
    }  # fmt: skip
    config = {name: value for name, value in changes.items() if name in DiffusionConfig.__dataclass_fields__}
    model = tiny_model(KINDS[kind](**(sizes | {k: v for k, v in changes.items() if k not in config})),
                       torch.float64 if kind == "qwen3" else torch.float32)  # fmt: skip
    mask = hf.add_mask_token(model, tokenizer)
    diffusion = DiffusionConfig(mask, "two_stream", "block_causal", 4, False, "efficient-dlm", "0")
    return DiffusionLM(model, tokenizer, replace(diffusion, **config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, ROWS])
@torch.no_grad()
def test_the_folder_gives_our_logits_and_text(
    tokenizer_and_model: Path, tmp_path: Path, kind: str, rows: int | None
) -> None:
    """A tied head and one of its own, a vocabulary that has the row of the mask token and one that must grow."""
    lm = model_like(tokenizer_and_model, kind, rows=rows)
    before = lm.model.get_input_embeddings().weight.clone()
    export_model(lm, "sglang", tmp_path / "out")
    assert torch.equal(lm.model.get_input_embeddings().weight, before)  # our own model stays as it is
    back = unmask.load(tmp_path / "out", trust_remote_code=True)
    old, count = lm.diffusion.mask_token_id, len(before)
    assert (back.diffusion.mask_token_id, back.tokenizer.mask_token_id) == (MASK_ID, MASK_ID)
    assert replace(back.diffusion, mask_token_id=old) == lm.diffusion
    ids = torch.tensor([[0, 5, 9, old, old, 7, 3, old, 11, old]])
    want, got = lm.model(ids).logits, back.model(ids.where(ids != old, MASK_ID)).logits
    kept = torch.tensor([token not in (old, MASK_ID) for token in range(count)])
    torch.testing.assert_close(
        got[..., :count][..., kept], want[..., kept], rtol=0, atol=1e-10 if kind == "qwen3" else 1e-5
    )
    assert bool((got[..., MASK_ID] < got[..., :count][..., kept].max(-1).values).all())
    assert bool((got[..., count:] <= got[..., MASK_ID : MASK_ID + 1] + 1e-4).all())
    texts = ["Once there was", "The little bird", ""]
    a, b = (model.generate(texts, max_new_tokens=9, select=Threshold(1.0)) for model in (lm, back))
    assert torch.equal(a.num_forwards, b.num_forwards)
    if rows:  # rows that a small vocabulary grows by take probability, and so change which token is surest
        assert torch.equal(a.sequences, b.sequences)


@torch.no_grad()
def as_sglang_decodes(model: Any, prompt: list[int], size: int, blocks: int, threshold: float) -> list[int]:
    """`LowConfidence.step` of sglang 0.5.23 without a cache: whole blocks, and no token is kept from being chosen."""
    x = torch.tensor([*prompt, *[MASK_ID] * (-len(prompt) % size)])
    for block in range((len(prompt) - 1) // size, (len(prompt) - 1) // size + blocks):
        stop = (block + 1) * size
        x = torch.cat([x, torch.full((max(0, stop - len(x)),), MASK_ID)])
        number = torch.arange(stop) // size
        seen = (number[:, None] >= number)[None, None]
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, -torch.inf)
        for _ in range(size):
            masked = x[stop - size : stop] == MASK_ID
            if not bool(masked.any()):
                break
            logits: Tensor = model(x[None, :stop], attention_mask=mask).logits[0, stop - size :]
            confidence, tokens = logits.softmax(-1).max(-1)
            confidence = confidence.where(masked, -torch.inf)
            commit = confidence > threshold
            commit[confidence.argmax()] = True
            x[stop - size : stop] = torch.where(commit, tokens, x[stop - size : stop])
    return x.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["two_stream", "block_causal"])
def test_an_engines_steps_give_our_tokens(tokenizer_and_model: Path, tmp_path: Path, kind: str, attention: str) -> None:
    clean = "block_causal" if attention == "two_stream" else None
    lm = model_like(tokenizer_and_model, kind, rows=ROWS, attention=attention, clean_attention=clean)
    export_model(lm, "sglang", tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for prompt in ("Once there was a cat", "The", "The little bird likes to sing in"):
        ids = lm.prompt_ids(prompt)[0].tolist()
        got = as_sglang_decodes(stock, ids, 4, 4, 1e-4)
        want = lm.generate(prompt, max_new_tokens=len(got) - len(ids), select=Threshold(1e-4))
        assert int(want.num_forwards[0]) < int(want.num_new_tokens[0])
        new = int(want.num_new_tokens[0])  # ours ends at an end token
        assert want.sequences[0, : len(ids) + new].tolist() == got[: len(ids) + new]


def test_the_config_has_what_the_engines_read(tokenizer_and_model: Path, tmp_path: Path) -> None:
    lm = model_like(tokenizer_and_model, "qwen3_moe", block_size=8)
    said = export_model(lm, "sglang", tmp_path / "my out")
    raw = json.loads((tmp_path / "my out" / "config.json").read_text())
    assert raw["architectures"] == ["SDARMoeForCausalLM"]
    assert (raw["model_type"], raw["mask_token_id"], raw["block_size"]) == ("sdar_moe", MASK_ID, 8)
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e5
    assert "rope_scaling" not in raw  # transformers 5 would take it for rope_parameters
    assert raw["tie_word_embeddings"] is False
    config = AutoConfig.from_pretrained(tmp_path / "my out", trust_remote_code=True)
    assert (config.rope_theta, config.num_experts, config.head_dim) == (5e5, 4, 8)
    assert config.sliding_window is None
    assert config.pad_token_id is None
    assert (tmp_path / "my out" / "sglang.yaml").read_text() == "block_size: 8\nthreshold: 0.9\n"
    place = f"'{tmp_path}/my out'"
    assert said["sglang"].startswith(f"python -m sglang.launch_server --model-path {place} --trust-remote-code ")
    assert said["lmdeploy"].endswith("--dllm-confidence-threshold 0.9 --dllm-denoising-steps 8")
    card = (tmp_path / "my out" / "README.md").read_text()
    assert said["sglang"] in card
    assert said["lmdeploy"] in card


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_several_files_become_the_same(tokenizer_and_model: Path, tmp_path: Path, tied: bool) -> None:
    lm = model_like(tokenizer_and_model, rows=400, tie_word_embeddings=tied)
    lm.model.save_pretrained(tmp_path / "one")
    lm.model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        assert _write_weights(tmp_path / name, 300, list(range(300))) == 151680
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert whole["lm_head.weight"].shape == whole["model.embed_tokens.weight"].shape == (151680, 32)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(whole)
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name]), name


@pytest.mark.usefixtures("engines")  # takes ten seconds
def test_with_qwens_tokenizer_no_token_moves(shared: Path, tmp_path: Path) -> None:
    """Qwen3's tokens end at 151668, so that the mask token gets SDAR's id in the conversion."""
    folder = shared / "tokenizers"
    added = json.loads((folder / "qwen2-sdar" / "added_tokens.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2")
    tokenizer.add_tokens([t for t, _ in sorted(added.items(), key=lambda item: item[1]) if "MASK" not in t])
    lm = model_like(tokenizer, rows=ROWS)
    assert (lm.tokenizer.mask_token, lm.diffusion.mask_token_id) == ("<|MASK|>", MASK_ID)
    export_model(lm, "sglang", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The cat said: <|im_start|> 12 été\n\n<think>"
    assert theirs(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    assert theirs.mask_token_id == MASK_ID


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": True}, r"whose row i - 1 predicts position i \(shift=true\): train one with unmask adapt"),
        ({"clean_attention": "causal"}, "whose clean tokens are causal"),
        ({"attention": "bidirectional", "clean_attention": None, "block_size": None}, "which fills whole canvases"),
        ({"use_sliding_window": True, "sliding_window": 8}, "with sliding windows"),
        ({"hidden_act": "gelu"}, "with sliding windows, or another activation than silu"),
        ({"noisy_attention": "causal"}, "whose noisy rows are none of one mask token"),
    ],
)
def test_what_the_engines_do_not_serve_is_refused(
    tokenizer_and_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"format 'sglang' cannot serve this model, {message}"):
        export_model(model_like(tokenizer_and_model, **changes), "sglang", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tokenizer_and_model: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an untouched AR model: use format 'hf' or 'gguf', or convert a Qwen3 model"):
        export_model(tokenizer_and_model, "sglang", tmp_path / "out")
    with pytest.raises(ValueError, match="of type 'llama': SDAR's classes are Qwen3's, qwen3 and qwen3_moe"):
        export_model(converted, "sglang", tmp_path / "out")


def test_another_token_at_that_id_is_named(tokenizer_and_model: Path, tmp_path: Path) -> None:
    lm = model_like(tokenizer_and_model, rows=ROWS)
    vocabulary = lm.tokenizer.get_vocab
    lm.tokenizer.get_vocab = lambda: vocabulary() | {"<odd>": MASK_ID}
    with pytest.raises(ValueError, match="needs the id 151669 for the mask token, and here it is the token '<odd>'"):
        export_model(lm, "sglang", tmp_path / "out")


# --- the engines' own code: UNMASK_WHEELS=DIR, with what `pip download --no-deps sglang lmdeploy` leaves there


@pytest.fixture(scope="module")
def engines() -> dict[str, str]:
    """File -> text, of the wheels of both engines."""
    folder = os.environ.get("UNMASK_WHEELS")
    if not folder:
        pytest.skip("needs UNMASK_WHEELS, a folder with the wheels of sglang and lmdeploy")
    texts = {}
    for wheel in Path(folder).glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            for name in packed.namelist():
                if re.search(r"sdar|dllm|lmdeploy/cli/utils|server_args|arg_groups/.*\.py", name):
                    texts[name] = packed.read(name).decode()
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_know_every_weight_and_field(
    engines: dict[str, str], tokenizer_and_model: Path, tmp_path: Path, kind: str
) -> None:
    said = export_model(model_like(tokenizer_and_model, kind), "sglang", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    (architecture,) = config.architectures
    params = engines["sglang/srt/dllm/config.py"]
    assert re.search(rf'"{architecture}": {{"block_size": 4, "mask_id": {MASK_ID}}}', params)
    builder = engines["lmdeploy/pytorch/configurations/sdar.py"]
    assert f"dllm_mask_token = {MASK_ID}" in builder
    assert f"'{config.model_type}'" in builder
    for engine in ("sglang/srt/models", "lmdeploy/pytorch/models"):
        text = engines[f"{engine}/{config.model_type}.py"]
        assert f"class {architecture}(" in text
        named = set(re.findall(r"self\.(\w+) = ", text)) | {"model", "layers", "weight", "experts", "embed_tokens"}
        stacked = dict(re.findall(r"\([\"']\.?(\w+)[\"'], [\"']\.?(\w+)[\"'], [\"'\w]+\)", text))
        stacked |= {"gate_up_proj": "gate_proj", "qkv_proj": "q_proj"}
        named |= set(re.findall(r'ckpt_\w+="(\w+)"', text))
        named |= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", *stacked.values()}
        for weight in load_file(tmp_path / "out" / "model.safetensors"):
            assert {part for part in weight.split(".") if not part.isdigit()} <= named, (engine, weight)
        given = {"dllm_block_length"}  # set by LMDeploy
        for field in set(re.findall(r"\bconfig\.(\w+)", text)) - given - {"block_length", "get"}:
            assert hasattr(config, field), (engine, field)
    flags = "\n".join(text for name, text in engines.items() if "arg" in name or "cli" in name or "dllm" in name)
    for line in said.values():
        for flag in re.findall(r"--(dllm[\w-]+)", line):
            assert flag.replace("-", "_") in flags, flag
