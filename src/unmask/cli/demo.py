"""The main job on a default that every Python installation has the text for: its own standard library.

Makes a tokenizer and a tiny LLaMA of 1M parameters, trains it as an AR model, converts it, and shows both.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.plain_json import to_json

if TYPE_CHECKING:
    from unmask.model import DiffusionLM

BASE_TOKENS = 1_500_000
VOCABULARY = 1024


def run_demo(model: str | None, data: list[str] | None, output: Path, max_tokens: int, base: str | None = None,
             trust: bool = False) -> None:  # fmt: skip
    """Convert a base, a tiny one made of `data` unless `model` names one, and show text and likelihood of both.

    data: without it, the standard library. base, trust: of `load`: run code that the model's folder brings.
    """
    import unmask
    from unmask.data.readers import find_files, read_documents

    if data is None:
        data = [str(_write_sources(output / "sources.jsonl"))]
    if model is None:
        model = str(make_base(output / "base", data[0]))
    converted = output / "converted"
    _note(f"convert {model}")
    lm = unmask.adapt(
        model,
        data,
        output_dir=converted,
        resume=True,
        base=base,
        trust_remote_code=trust,
        max_tokens=max_tokens,
        eval_every=50,
    )
    files = find_files(data)
    held_out = [text for file in files[-1:] for text in read_documents(file)][-8:] if files else []
    _show(unmask.load(model, base=base, trust_remote_code=trust), lm, held_out)
    print(f'model          {converted}: try `unmask generate {converted} "import "`', flush=True)


def _show(base: DiffusionLM, lm: DiffusionLM, held_out: list[str]) -> None:
    """What both write after the first words of a document, a gap that only `lm` can fill, and bits per byte of all."""
    from unmask.evaluation.likelihood import summarise

    prompt = held_out[0][:60] if held_out else ""
    ar, fast = (model.generate(prompt, max_new_tokens=48) for model in (base, lm))
    cycles = float(fast.tokens_per_cycle[0]) if fast.tokens_per_cycle is not None else 0.0
    same = "the same text" if ar.texts == fast.texts else "another text"
    filled = lm.infill(prompt[:30], prompt[45:], 6)
    lines = [
        "",
        f"prompt         {prompt!r}",
        f"AR parent      {ar.texts[0]!r}",
        f"converted      {fast.texts[0]!r}",
        f"               {same}, {cycles:.2f} tokens per cycle, "
        f"{int(ar.num_forwards[0])} and {int(fast.num_forwards[0])} forwards for {int(fast.num_new_tokens[0])} tokens",
        f"infilling      {prompt[:30]!r} [{filled.texts[0]}] {prompt[45:]!r}",
    ]
    if held_out:
        nll, bound = summarise(base.nll(held_out)), summarise(lm.nelbo(held_out, seed=0))
        lines.append(f"bits per byte  {nll.bits_per_byte:.3f} (AR parent, exact) and {bound.bits_per_byte:.3f} (bound)")
    print("\n".join(lines), flush=True)


def _write_sources(path: Path) -> Path:
    """The standard library's modules as documents, in a fixed random order."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for module in modules if len(text := module.read_text(encoding="utf-8", errors="ignore")) > 500]
    random.Random(0).shuffle(texts)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(to_json({"text": text}) + "\n" for text in texts), encoding="utf-8")
    partial.replace(path)
    return path


def make_base(folder: Path, data: str) -> Path:
    """A tiny AR base trained on `data`, saved as an ordinary HF folder."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import unmask
    from unmask.data.readers import local_files, read_documents

    _note(f"make a tiny AR base from {data}")
    bpe = ByteLevelBPETokenizer()
    texts = [text for file in local_files([data], "data") for text in read_documents(file)]
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    unmask.adapt(
        unmask.DiffusionLM(model, tokenizer), data, "ar", folder, resume=True, max_tokens=BASE_TOKENS,
        max_length=256, batch_size=16, learning_rate=4e-3, eval_every=100,
    )  # fmt: skip
    return folder


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
