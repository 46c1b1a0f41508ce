"""What a window inside the block costs in quality: the parent's NLL of the text, its variety, and the CPU time.

    python benchmarks/window.py CHECKPOINT PARENT DATA.txt --windows 4,8,16 --output results/window

Prompts are the first 32 tokens of the first documents with 96 or more, continued greedily by 64 tokens. One row a
rule and window is appended to rows.jsonl; window null is the whole block.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import unmask
from unmask.data.readers import read_documents
from unmask.sampling import Confidence, Request, Selector, Threshold, sample_blocks

PROMPT, NEW = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("parent")
    parser.add_argument("data", type=Path)
    parser.add_argument("--windows", default="2,4")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("results/window"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, parent = unmask.load(options.checkpoint), unmask.load(options.parent)
    assert lm.diffusion is not None
    prompts: list[torch.Tensor] = []
    for text in read_documents(options.data):
        ids = lm.tokenizer(text)["input_ids"]
        if len(ids) >= PROMPT + NEW:
            prompts.append(torch.tensor(ids[:PROMPT]))
        if len(prompts) == options.num_prompts:
            break
    rules: list[Selector] = [Threshold(0.9), Threshold(0.5), Confidence(4), Confidence(8)]
    for rule in rules:
        for window in (*map(int, options.windows.split(",")), None):
            began = time.process_time()
            out = sample_blocks(
                lm.network, lm.diffusion, prompts, Request(max_new_tokens=NEW), select=rule, window=window
            )
            seconds = time.process_time() - began
            text = torch.stack([torch.cat([p, torch.tensor(t)]) for p, t in zip(prompts, out.new_tokens, strict=True)])
            with torch.inference_mode():
                log_p = parent.model(text).logits.double().log_softmax(-1)[:, PROMPT - 1 : -1]
            nll = -log_p.gather(-1, text[:, PROMPT:, None])[..., 0].mean(1)
            shares = torch.stack([torch.bincount(row, minlength=log_p.shape[-1]) for row in text[:, PROMPT:]]) / NEW
            row = {
                "block": lm.diffusion.block_size, "rule": str(rule), "window": window, "prompts": len(prompts),
                "parent_nll": round(float(nll.mean()), 4),
                "standard_error": round(float(nll.std() / len(nll) ** 0.5), 4),
                "unigram_entropy": round(float(torch.special.entr(shares).sum(-1).mean()), 4),
                "tokens_per_forward": round(NEW * len(prompts) / float(out.num_forwards.sum()), 3),
                "cpu_seconds": round(seconds, 2),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            options.output.mkdir(parents=True, exist_ok=True)
            with (options.output / "rows.jsonl").open("a") as rows:
                rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
