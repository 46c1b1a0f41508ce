"""A small AR base that solves the synthetic tasks, and what every recipe makes of it.

    python benchmarks/tasks.py --output runs/tasks [--base-tokens 1600000] [--max-tokens N] [--seeds 0,1] [--only-base]

Writes problems (train, valid, test are disjoint), trains a LLaMA of 0.8M parameters on them with the recipe `ar`,
prints its greedy accuracy by task on valid, and runs the study `tasks` on it, measured on test. Run again, it goes on
where it stopped. `plan` is left out: this base does not learn it in minutes.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import unmask
from unmask.lab.study import choose, load_study, run_study
from unmask.lab.tasks import WORDS, Problem, problems, write_problems

MIX = ("copy", "reverse", "replace", "chain", "shuffle", "shuffle")
MORE_SUMS = ("copy", "reverse", "replace", "shuffle", "chain", "chain", "chain", "chain")
"""First the order of things, then above all sums, which take longest."""

TAUGHT = tuple(dict.fromkeys(MIX))


def make_base(folder: Path, data: list[Path], tokens: list[int]) -> None:
    """A word-level tokenizer and a tiny LLaMA, trained on the answers, on one file after the other."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<s>", "</s>", *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    lm = unmask.DiffusionLM(model, tokenizer)
    for stage, (file, number) in enumerate(zip(data, tokens, strict=True), 1):
        last = stage == len(data)
        lm = unmask.adapt(
            lm, file, "ar", folder if last else folder.with_name(f"{folder.name}-{stage}"), resume=True,
            max_tokens=number, max_length=256, batch_size=4, learning_rate=2e-3, warmup_ratio=0.05,
            eval_every=10**9, save_every=500,
        )  # fmt: skip


def accuracy_by_task(lm: unmask.DiffusionLM, asked: list[Problem]) -> dict[str, float]:
    right: Counter[str] = Counter()
    for start in range(0, len(asked), 100):
        some = asked[start : start + 100]
        out = lm.generate([p.prompt for p in some], max_new_tokens=16)
        right.update(p.task for p, text in zip(some, out.texts, strict=True) if p.check(text))
    of = Counter(p.task for p in asked)
    return {task: right[task] / of[task] for task in of} | {"all": right.total() / len(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-tokens", type=int, default=1_600_000)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--arms", default=None)
    parser.add_argument("--only-base", action="store_true")
    options = parser.parse_args()
    asked = {
        "train": problems(MIX, "train", 60_000),
        "sums": problems(MORE_SUMS, "train", 60_000, seed=1),
        "valid": problems(TAUGHT, "valid", 600),
        "test": problems(TAUGHT, "test", 600),
    }
    data = {name: write_problems(options.output / f"{name}.jsonl", found) for name, found in asked.items()}
    base = options.output / "base"
    make_base(base, [data["train"], data["sums"]], [options.base_tokens, options.base_tokens * 3 // 4])
    found = accuracy_by_task(unmask.load(base), asked["valid"])
    (options.output / "base.json").write_text(json.dumps(found) + "\n")
    print(json.dumps(found), flush=True)
    if options.only_base:
        return
    study = choose(
        load_study("tasks"),
        max_tokens=options.max_tokens,
        seeds=[int(seed) for seed in options.seeds.split(",")],
        arms=None if options.arms is None else options.arms.split(","),
    )
    run_study(study, base, [data["train"]], [data["test"]], options.output / "study")
    print((options.output / "study" / "report.md").read_text())


if __name__ == "__main__":
    main()
