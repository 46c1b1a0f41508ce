"""Tiny real models and a tiny real tokenizer; nothing here is downloaded."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers as tf
from tokenizers import ByteLevelBPETokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from unmask import hf
from unmask.core.network import DiffusionConfig
from unmask.core.noise import gumbels

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
_GQA = _SIZES | {"num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.15}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]

SUPPORTED = {
    "gpt2": lambda: tf.GPT2Config(**_GPT),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SIZES),
    "opt": lambda: tf.OPTConfig(**(_SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15})),
    "llama": lambda: tf.LlamaConfig(**_GQA),
    "mistral": lambda: tf.MistralConfig(**_GQA, sliding_window=None),
    "mistral_window": lambda: tf.MistralConfig(**_GQA, sliding_window=7),
    "qwen2": lambda: tf.Qwen2Config(**_GQA),
    "qwen2_window": lambda: tf.Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**_GQA, head_dim=8),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_GQA, **_MOE, head_dim=8),
    "mixtral": lambda: tf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": lambda: tf.Gemma2Config(**_GQA, head_dim=8, sliding_window=7, layer_types=_MIXED),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=7, layer_types=_MIXED),
    "olmo2": lambda: tf.Olmo2Config(**_GQA),
    "phi3": lambda: tf.Phi3Config(**_GQA),
    "smollm3": lambda: tf.SmolLM3Config(**_GQA),
    "granite": lambda: tf.GraniteConfig(**_GQA),
    "bitnet": lambda: tf.BitNetConfig(**_GQA),
}
REFUSED = {
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "gpt_neo": lambda: tf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
                                       attention_types=[[["global", "local"], 1]], window_size=8),
    "lfm2": lambda: tf.Lfm2Config(**_GQA, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: tf.Qwen3NextConfig(**_GQA, **_MOE, head_dim=8, shared_expert_intermediate_size=16,
                                             layer_types=["linear_attention", "full_attention"]),
    "mamba": lambda: tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
}  # fmt: skip
MASK = VOCABULARY - 1


def tiny_model(config: object, dtype: torch.dtype = torch.float32):
    """A random instance in eval mode, seeded."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_llama(dtype: torch.dtype = torch.float64, **changes: object):
    return tiny_model(tf.LlamaConfig(**(_GQA | changes)), dtype)


def network(model=None, dtype: torch.dtype = torch.float64) -> hf.HFNetwork:
    """A tiny llama (unless given) whose last vocabulary row is the mask token."""
    return hf.as_network(tiny_llama(dtype) if model is None else model, MASK)


def block_config(
    block_size: int = 4, *, shift: bool = False, clean: str | None = "block_causal", attention: str = "two_stream"
) -> DiffusionConfig:
    return DiffusionConfig(MASK, attention, clean, block_size, shift, "test", "0")


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids that are neither special nor the mask."""
    return torch.randint(3, MASK, shape, generator=torch.Generator().manual_seed(seed))


def gumbel(size: int, seed: int, row: int, position: int, draw: int = 0) -> torch.Tensor:
    """The sampling noise (size,) of one place, by its key; draw: how often the place was remasked."""
    return gumbels([("token", seed, row, position, draw)], size)[0]


STORIES = [
    f"Once there was a {animal} who liked to {verb} in the {place}. The {animal} was very {mood} that day."
    for animal in ("cat", "dog", "little bird", "grey mouse")
    for verb in ("play", "sing", "run and jump")
    for place in ("garden", "old house", "sun")
    for mood in ("happy", "tired")
]


def write_parent(folder: Path) -> Path:
    """An ordinary HF folder: a byte-level BPE tokenizer with <s>, </s> and a tiny llama without a spare row."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(STORIES, 300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    config = tf.LlamaConfig(**(_GQA | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1,
                                       "pad_token_id": None, "tie_word_embeddings": True}))  # fmt: skip
    tiny_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_and_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `write_parent` writes."""
    return write_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("<|endoftext|>".join(STORIES))
    return path


@pytest.fixture(scope="session")
def converted(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent after a short conversion."""
    import unmask

    folder = tmp_path_factory.mktemp("runs") / "converted"
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", folder, show_progress=False, max_tokens=4000,
                 max_length=64, block_size=4, batch_size=4, save_every=5, eval_every=4,
                 eval_data=str(stories))  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and corpora beside the checkout, where there are any."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs the folder shared/ with real models beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Commands that time one thread leave it set, and other thread counts change the last bits of later runs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def in_a_terminal(command: list[str], typed: bytes = b"", stderr: int | None = None) -> str:
    """What a pseudo-terminal shows of a command that ends well; stderr goes there too unless it is said where."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave if stderr is None else stderr)
    os.close(slave)
    os.write(master, typed)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    from unmask import cli

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call


class Rows(TorchDispatchMode):
    """most: rows of the largest tensor that was made with a number for each token of the vocabulary.

    The head's matrix, transposed, does not count.
    """

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCABULARY,) and x.shape != (32, VOCABULARY):
                self.most = max(self.most, x.numel() // VOCABULARY)
        return made
