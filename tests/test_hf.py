"""Every supported architecture does exactly what the patterns say; every other one is refused."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import MASK, REFUSED, SUPPORTED, block_config, random_tokens, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import unmask
from unmask import hf
from unmask.core.attention import PADDING, Layout, block_causal, causal
from unmask.core.decoding import begin, denoise
from unmask.core.scoring import score


def exact(name: str):
    """The architecture in float64, or float32 where its kernels know nothing else; and the tolerance."""
    dtype = torch.float32 if name in ("qwen3_moe", "mixtral") else torch.float64
    model = tiny_model(SUPPORTED[name](), dtype)
    relative = 1e-10 if dtype == torch.float64 and model.config._attn_implementation == "sdpa" else 1e-5
    return model, relative


def close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    finite = expected.isfinite()
    assert torch.equal(finite, got.isfinite())
    assert (got - expected)[finite].abs().max() <= relative * expected[finite].abs().max()


@pytest.mark.parametrize("name", SUPPORTED)
def test_causal_pattern_equals_stock_logits(name: str) -> None:
    model, relative = exact(name)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        stock = model(input_ids=tokens, use_cache=False).logits
        got = hf.as_network(model)(tokens, Layout.of(torch.arange(24).expand(2, 24)), causal)
    close(got, stock, relative)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("clean", ["block_causal", "causal"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_two_stream_pass_equals_each_block_after_its_clean_prefix(name: str, clean: str, shift: bool) -> None:
    model, relative = exact(name)
    network, config = hf.as_network(model, MASK), block_config(4, shift=shift, clean=clean)
    x0 = random_tokens(1, 18)
    xt = x0.masked_fill(torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.6, MASK)
    layout = Layout.of(torch.arange(18)[None])
    wanted = layout.position > 0
    with torch.no_grad():
        got = score(network, config, xt, x0, layout, wanted)
        rows = []
        for start in range(0, 18, 4):
            end = min(start + 4, 18)
            at = layout.subset(slice(None), slice(start, end))
            past = begin(network, config.pattern, x0[:, :start], keep_logits=shift)
            past.columns = end
            rows.append(denoise(network, config, past, xt[:, start:end], at, wanted[:, start:end]))
    close(got, torch.cat(rows), relative)


@pytest.mark.parametrize("name", SUPPORTED)
def test_strictly_causal_clean_half_equals_ar_logits(name: str) -> None:
    model, relative = exact(name)
    config = block_config(4, clean="causal")
    x0 = random_tokens(2, 18)
    layout = Layout.of(torch.arange(18).expand(2, 18))
    both = layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)
    with torch.no_grad():
        stock = model(input_ids=x0, use_cache=False).logits
        passed = hf.as_network(model)(torch.cat([torch.full_like(x0, MASK), x0], 1), both, config.pattern)
    close(passed[:, 18:], stock, relative)


@pytest.mark.parametrize("name", SUPPORTED)
def test_packed_documents_equal_each_alone(name: str) -> None:
    model, relative = exact(name)
    network = hf.as_network(model, MASK)
    tokens = random_tokens(1, 27)
    lengths = (11, 9, 7)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), d if d < 2 else PADDING) for d, n in enumerate(lengths)])[None]
    with torch.no_grad():
        whole = network(tokens, Layout.of(position, document), block_causal(4))
        for start, n in ((0, 11), (11, 9)):
            alone = network(tokens[:, start : start + n], Layout.of(torch.arange(n)[None]), block_causal(4))
            close(whole[:, start : start + n], alone, relative)


@pytest.mark.parametrize("name", SUPPORTED)
def test_probe_accepts(name: str) -> None:
    hf.probe(tiny_model(SUPPORTED[name]()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "alibi"),
        ("mpt", "position"),
        ("gpt_neo", "'local'"),
        ("lfm2", "'conv'"),
        ("qwen3_next", "'linear_attention'"),
        ("mamba", "'mamba'"),
    ],
)
def test_probe_refuses_and_names_the_layer(name: str, reason: str) -> None:
    assert set(REFUSED) == {"bloom", "mpt", "gpt_neo", "lfm2", "qwen3_next", "mamba"}
    with pytest.raises(unmask.UnsupportedModelError, match=reason) as caught:
        hf.probe(AutoModelForCausalLM.from_config(REFUSED[name]()))
    assert "cannot be converted" in str(caught.value)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "gpt_neo"])
def test_probe_measures_and_never_reads_names(name: str) -> None:
    """The verdict comes from numbers: the network is refused without a look at its layer types."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(REFUSED[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        assert hf.probe_network(hf.HFNetwork(model)) is not None


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_window"])
def test_probe_refuses_sliding_windows_without_a_mask_per_layer_type(name: str) -> None:
    model = tiny_model(SUPPORTED[name]())
    with torch.no_grad():
        assert hf.probe_network(hf.HFNetwork(model)) is None
        assert "causal mask changes its logits" in str(hf.probe_network(hf.HFNetwork(model, per_layer_type=False)))


def test_flash_attention_is_refused_with_the_fix() -> None:
    model = tiny_llama(torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(unmask.UnsupportedModelError, match=r"'flash_attention_2'.*attn_implementation='sdpa'"):
        hf.probe(model)
    with pytest.raises(unmask.UnsupportedModelError, match=r"'flash_attention_2'.*no 4-D mask"):
        hf.as_network(model)(random_tokens(1, 4), Layout.of(torch.arange(4)[None]), causal)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "granite"])
def test_head_rows_equal_all_rows(name: str) -> None:
    model, relative = exact(name)
    network = hf.as_network(model)
    tokens, layout = random_tokens(2, 10), Layout.of(torch.arange(10).expand(2, 10))
    rows = torch.tensor([0, 7, 13, 19])
    with torch.no_grad():
        close(network(tokens, layout, causal, rows=rows), network(tokens, layout, causal).flatten(0, 1)[rows], relative)


# --- the mask token and folders


def test_mask_token_gets_a_new_row_at_the_mean(tokenizer_and_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_and_model)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    before = model.get_input_embeddings().weight.detach().clone()
    mask = hf.add_mask_token(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert mask == len(before) == len(after) - 1 == model.config.vocab_size - 1
    assert torch.equal(after[:-1], before)
    torch.testing.assert_close(after[-1], before.mean(0))
    assert model.get_output_embeddings().weight is after  # still tied
    assert tokenizer.mask_token_id == mask
    assert tokenizer("a <|mask|>")["input_ids"][-1] == mask


def test_mask_token_takes_a_free_row_and_can_start_as_another_token(tokenizer_and_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    model = tiny_llama(torch.float32, vocab_size=len(tokenizer) + 20, tie_word_embeddings=False)
    mask = hf.add_mask_token(model, tokenizer, like="</s>")
    assert mask == len(tokenizer) - 1
    assert len(model.get_input_embeddings().weight) == len(tokenizer) + 19
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.equal(embedding.weight[mask], embedding.weight[tokenizer.eos_token_id])


def test_mask_token_can_reuse_a_token_with_its_embedding(tokenizer_and_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_and_model)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    before = model.get_input_embeddings().weight.detach().clone()
    mask = hf.add_mask_token(model, tokenizer, token="!")
    assert tokenizer.convert_ids_to_tokens(mask) == "!"
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_qwen3_gets_the_token_that_engines_know(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")
    config = tf.Qwen3Config(vocab_size=151936, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, num_key_value_heads=1, head_dim=8)  # fmt: skip
    model = tiny_model(config)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(151669 - len(tokenizer))])
    assert hf.add_mask_token(model, tokenizer) == 151669
    assert tokenizer.mask_token == "<|MASK|>"
    assert len(model.get_input_embeddings().weight) == 151936


@pytest.mark.parametrize("like", [None, "</s>"])
@pytest.mark.parametrize("tied", [True, False])
def test_mask_token_can_start_with_noise(tied: bool, like: str | None, tokenizer_and_model: Path) -> None:
    """N(0, 1 / width) on top of the mean or the token, in both embeddings, the same for the same key alone."""

    def row_less_start(seed: int, of_head: bool = False) -> torch.Tensor:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
        model = tiny_llama(torch.float64, vocab_size=len(tokenizer), hidden_size=512, tie_word_embeddings=tied)
        embedding = model.get_output_embeddings() if of_head else model.get_input_embeddings()
        before = embedding.weight.detach().clone()
        mask = hf.add_mask_token(model, tokenizer, like=like, noise=("mask init", seed))
        embedding = model.get_output_embeddings() if of_head else model.get_input_embeddings()
        assert torch.equal(embedding.weight[:-1], before)
        return embedding.weight[mask].detach() - (before[tokenizer.eos_token_id] if like else before.float().mean(0))

    noise = row_less_start(3)
    assert torch.equal(noise, row_less_start(3))
    assert not torch.allclose(noise, row_less_start(4))
    assert torch.equal(noise, row_less_start(3, of_head=True)) == tied
    for one in (noise, row_less_start(3, of_head=True)):
        assert float(one.std() * 512**0.5) == pytest.approx(1.0, abs=0.1)
        assert float(one.mean() * 512**0.5) == pytest.approx(0.0, abs=0.15)


def test_a_reused_mask_token_keeps_its_embedding_without_noise(tokenizer_and_model: Path) -> None:
    model, tokenizer = tiny_llama(torch.float32), AutoTokenizer.from_pretrained(tokenizer_and_model)
    token = tokenizer.convert_ids_to_tokens(9)
    with pytest.raises(ValueError, match=f"mask_init_noise=true: mask token {re.escape(repr(token))} is in"):
        hf.add_mask_token(model, tokenizer, token=token, noise=("mask init", 0))
    assert tokenizer.mask_token is None


def test_unknown_token_to_start_from_is_named(tokenizer_and_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_and_model)
    with pytest.raises(ValueError, match="mask_init 'nowhere' is no token"):
        hf.add_mask_token(model, AutoTokenizer.from_pretrained(tokenizer_and_model), like="nowhere")


def test_mask_token_has_probability_zero_everywhere(converted: Path) -> None:
    lm = unmask.load(converted)
    mask = lm.diffusion.mask_token_id
    tokens = torch.full((1, 8), mask)
    for pattern in (causal, lm.diffusion.with_block_size(4).pattern):
        logits = lm.network(tokens, Layout.of(torch.arange(8)[None]), pattern)
        assert (logits[..., mask] == -torch.inf).all()
        assert logits[..., :mask].isfinite().all()


def test_saved_folder_loads_with_the_same_logits_here_and_in_stock_transformers(
    converted: Path, tmp_path: Path
) -> None:
    lm = unmask.load(converted)
    lm.save_pretrained(tmp_path)
    again, stock = unmask.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.diffusion == lm.diffusion
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        expected = lm.model(input_ids=tokens).logits
        assert torch.equal(again.model(input_ids=tokens).logits, expected)
        assert torch.equal(stock(input_ids=tokens).logits, expected)
    assert type(stock) is type(lm.model)
    assert again.tokenizer("Once there was")["input_ids"] == lm.tokenizer("Once there was")["input_ids"]
    assert stock.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 24)


def test_config_json_says_what_was_converted(converted: Path) -> None:
    import json

    diffusion = json.loads((converted / "config.json").read_text())["diffusion"]
    assert diffusion["recipe"] == "efficient-dlm"
    assert (diffusion["attention"], diffusion["clean_attention"]) == ("two_stream", "block_causal")
    assert (diffusion["block_size"], diffusion["shift"]) == (4, False)
    assert diffusion["version"] == unmask.__version__
    card = (converted / "README.md").read_text()
    assert "diffusion-language-model" in card
    assert re.findall(r"!\[[^]]+\]\((.+)\)", card) == ["training.png"]
    assert "AR parent: " in (converted / "training.svg").read_text()
    assert "block size | 4" in card
