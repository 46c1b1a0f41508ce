"""GSM8K: fine-tune on the training questions, answer the test questions, compare the numbers.

    python benchmarks/gsm8k.py MODEL GSM8K_FOLDER --output results/gsm8k-small [--tokens 400000] [SETTING=VALUE ...]

Protocol of DiffuLLaMA (2410.17891, B.3): the prompt is the question and a newline, the
completion the worked answer and the end token; the prediction is the text after the last '####', stripped,
without commas, and counts where it equals the gold answer's exactly. The last 64 training questions are held
out; the bound of their completions, in nats per learnt token, is measured before, during and after. Questions
whose tokens do not fit the length are left out of training and counted. Writes run.json's settings, the rows
of metrics.jsonl and every answer.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HELD_OUT = 64


def extract_answer(text: str) -> str:
    """The text after the last '####', stripped, without commas; '' where there is none."""
    _, marker, after = text.rpartition("####")
    return after.strip().replace(",", "") if marker else ""


def read(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]


def write(path: Path, examples: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def answer(lm: Any, examples: list[dict[str, str]], batch_size: int = 16) -> list[dict[str, Any]]:
    """Greedy answers of up to 256 tokens with their extracted and gold numbers, one dict a question.

    A question that leaves no room in the context has no answer.
    """
    room = (lm.network.context_length or 10**9) - 1
    fits = [e for e in examples if len(lm.tokenizer(e["prompt"])["input_ids"]) <= room]
    found = [{"text": "", "predicted": "", "gold": extract_answer(e["completion"]), "correct": False,
              "num_new_tokens": 0, "num_forwards": 0} for e in examples if e not in fits]  # fmt: skip
    for start in range(0, len(fits), batch_size):
        batch = fits[start : start + batch_size]
        out = lm.generate([e["prompt"] for e in batch], max_new_tokens=256, seed=0)
        for example, text, forwards, tokens in zip(
            batch, out.texts, out.num_forwards.tolist(), out.num_new_tokens.tolist(), strict=True
        ):
            gold, predicted = extract_answer(example["completion"]), extract_answer(text)
            found.append({"text": text, "predicted": predicted, "gold": gold, "correct": predicted == gold,
                          "num_new_tokens": tokens, "num_forwards": forwards})  # fmt: skip
    return found


def encode(lm: Any, example: dict[str, str]) -> tuple[list[int], list[bool]]:
    from unmask.data.supervised import Completion, encode_example

    ((ids, loss_mask),) = encode_example(lm.tokenizer, Completion(**example), lm.tokenizer.eos_token_id)
    return ids, loss_mask


def completion_bound(lm: Any, examples: list[dict[str, str]], num_samples: int = 4) -> dict[str, float]:
    """NELBO (NLL of an AR model) of the completions, nats per learnt token, always with the same masks."""
    import torch

    from unmask.evaluation import likelihood

    context, documents = lm.network.context_length, []
    for example in examples:
        ids, loss_mask = encode(lm, example)
        if context is None or len(ids) <= context:
            tokens = torch.tensor(ids)
            documents.append(likelihood.Document(tokens, torch.zeros_like(tokens), torch.tensor(loss_mask)))
    if lm.diffusion is None:
        summary = likelihood.summarise(likelihood.nll(lm.network, documents, context_length=context))
    else:
        summary = likelihood.summarise(
            likelihood.nelbo(lm.network, lm.diffusion, documents, num_samples=num_samples, context_length=context)
        )
    return {"nats_per_token": summary.nats_per_token, "standard_error": summary.standard_error or 0.0,
            "num_documents": summary.num_documents, "num_tokens": summary.num_tokens}  # fmt: skip


def fine_tune(
    parent: Any, recipe: str, train: list[dict[str, str]], held_out: list[dict[str, str]], settings: dict[str, Any]
) -> tuple[Any, dict[str, Any], str]:
    """The model, run.json and metrics.jsonl of a run in a folder that does not stay."""
    import unmask

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "train.jsonl", train)
        write(Path(folder) / "valid.jsonl", held_out)
        run = Path(folder) / "run"
        lm = unmask.adapt(parent, Path(folder) / "train.jsonl", recipe, run, skip_invalid=True,
                          eval_data=str(Path(folder) / "valid.jsonl"), eval_documents=HELD_OUT, **settings)  # fmt: skip
        return lm, json.loads((run / "run.json").read_text()), (run / "metrics.jsonl").read_text()


def num_that_fit(parent: Any, examples: list[dict[str, str]], recipe: str, settings: dict[str, Any]) -> int:
    """How many examples are no longer than the rows of the run."""
    from unmask.recipe import load_recipe
    from unmask.resolve import resolve

    parameters = sum(p.numel() for p in parent.model.parameters())
    resolved = resolve(load_recipe(recipe, **settings), parameters, parent.network.context_length)
    return sum(len(encode(parent, example)[0]) <= resolved.max_length for example in examples)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--recipe", default="efficient-dlm")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000, help="training tokens, prompts included")
    parser.add_argument("--questions", type=int, default=128, help="test questions to answer")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()

    import torch

    import unmask
    from unmask.cli.adapt import split_settings

    torch.set_num_threads(1)
    _, settings = split_settings(options.settings)
    train, test = read(options.data / "train.jsonl"), read(options.data / "test.jsonl")[: options.questions]
    train, held_out = train[:-HELD_OUT], train[-HELD_OUT:]
    parent = unmask.load(options.model, dtype=torch.float32)
    num_fit = num_that_fit(parent, train, options.recipe, settings)
    parent_bound = completion_bound(parent, held_out)
    began = time.perf_counter()
    settings = {"eval_every": 50, "max_tokens": options.tokens} | settings
    lm, record, metrics = fine_tune(parent, options.recipe, train, held_out, settings)
    seconds = time.perf_counter() - began
    answers = answer(lm, test)
    figures = [row for line in metrics.splitlines() if {"nelbo", "nll"} & set(row := json.loads(line))]
    summary = {
        "parent_held_out": parent_bound,
        "bound_first": figures[0],
        "bound_last": figures[-1],
        "held_out": completion_bound(lm, held_out),
        "with_answer": sum(bool(a["predicted"]) for a in answers),
        "accuracy": sum(a["correct"] for a in answers) / max(1, len(answers)),
    }
    result = summary | {
        "command": shlex.join(["python", *sys.argv]),
        "settings": record["settings"] | {"eval_data": "the last 64 of train.jsonl"},
        "versions": record["versions"],
        "data": record["data"] | {"sources": ["train.jsonl of GSM8K without its last 64"]},
        "train_seconds": round(seconds, 1),
        "training_questions": num_fit,
        "left_out_as_too_long": len(train) - num_fit,
        "questions": len(answers),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "metrics.jsonl").write_text(metrics)
    (options.output / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
