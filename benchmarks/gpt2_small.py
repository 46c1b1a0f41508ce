"""DiffuLLaMA's recipe on a GPT-2 of 1M parameters that is first trained as an AR model.

    python benchmarks/gpt2_small.py TOKENIZER TRAIN VALID --output results/gpt2-small [--folder runs/gpt2-small]

TOKENIZER: any folder with a small vocabulary (stories260k). Learned positions, a tied head and dropout in the
configuration: nothing of the recipe knows about them. Rows: NLL of the AR model, NELBO of the conversion.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import unmask
from unmask.data.readers import read_documents
from unmask.evaluation.likelihood import summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt2-small"))
    parser.add_argument("--ar-tokens", type=int, default=1_500_000)
    parser.add_argument("--tokens", type=int, default=700_000)
    parser.add_argument("--documents", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=5, n_head=4,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    parent = unmask.DiffusionLM(GPT2LMHeadModel(config).eval(), tokenizer)
    parameters = sum(p.numel() for p in parent.model.parameters())
    common = {"max_length": 256, "batch_size": 8, "learning_rate": 2e-3, "eval_documents": 8, "resume": True}
    parent = unmask.adapt(parent, options.train, "ar", options.folder / "base", max_tokens=options.ar_tokens, **common)
    # Long texts: their first 2,000 characters, so that no book outweighs the others.
    texts = [text[:2000] for text in read_documents(Path(options.valid))][: options.documents]
    nll = summarise(parent.nll(texts))
    lm = unmask.adapt(
        options.folder / "base", options.train, "diffullama", options.folder / "diffullama",
        max_tokens=options.tokens, anneal_steps=100, **common,
    )  # fmt: skip
    bound = summarise(lm.nelbo(texts, num_samples=8, seed=0))
    row = {
        "parameters": parameters,
        "ar_tokens": options.ar_tokens,
        "tokens": options.tokens,
        "nll": nll.nats_per_token,
        "nelbo": bound.nats_per_token,
        "nelbo_standard_error": bound.standard_error,
        "unigram_entropy": unigram_entropy(tokenizer, texts),
        "text": lm.generate("The king", max_new_tokens=32, seed=0).texts[0],
        "settings": common | {"versions": {"unmask": unmask.__version__, "torch": torch.__version__}},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def unigram_entropy(tokenizer: object, texts: list[str]) -> float:
    """What a model pays, nats per token, that knows nothing but how frequent tokens are."""
    counts = torch.bincount(torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


if __name__ == "__main__":
    main()
