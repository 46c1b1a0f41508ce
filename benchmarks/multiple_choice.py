"""Multiple choice: accuracy of a checkpoint that ranks the choices by likelihood.

    python benchmarks/multiple_choice.py MODEL FILE.jsonl ... --output results/NAME [--max-questions 200]

Lines are `query, choices, gold` or `context_options, continuation, gold` (Winogrande: the same continuation after
each context), or HellaSwag's own. Scores: in AR mode the exact NLL of the choice, in diffusion mode the bound
(--num-samples masks a block, or --exact for blocks of up to 4); with --paper also DiffuLLaMA's estimator (32
levels, one draw each, mean over the masked tokens, 0 if none is). The lowest score wins; accuracies are given for
the total, per token and per byte, beside what guessing gives. Prints a JSON line a file.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any


def read_question(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """(context, choice) of every option, and the number of the right one."""
    if "context_options" in row:
        return [(context, " " + row["continuation"]) for context in row["context_options"]], row["gold"]
    if "endings" in row:
        start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
        return [(start, " " + ending) for ending in row["endings"]], row["label"]
    query = row["query"].rstrip()
    if query.startswith("Question:") and not query.endswith("Answer:"):
        query += "\nAnswer:"
    return [(query, " " + choice) for choice in row["choices"]], row["gold"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-questions", type=int)
    parser.add_argument("--mode", choices=["ar", "diffusion"], help="by default what the checkpoint is")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--paper", action="store_true")
    options = parser.parse_args()

    import torch
    from choices import choice_document, mean_over_levels

    import unmask
    from unmask.evaluation.likelihood import nelbo, nll

    torch.set_num_threads(1)
    lm = unmask.load(options.model)
    context = lm.network.context_length
    diffusion = lm.diffusion if options.mode != "ar" else None
    if options.mode == "diffusion" and diffusion is None:
        raise SystemExit(f"{options.model} is an untouched AR model: it has no bound, use --mode ar")
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "rows.jsonl").open("a") as rows:
        for file in options.files:
            lines = file.read_text().splitlines()[: options.max_questions]
            questions = [read_question(json.loads(line)) for line in lines]
            documents = [choice_document(lm.tokenizer, *pair, context) for pairs, _ in questions for pair in pairs]
            if diffusion is None:
                outputs = nll(lm.network, documents, context_length=context)
            else:
                outputs = nelbo(lm.network, diffusion, documents, num_samples=options.num_samples,
                                exact=options.exact, context_length=context)  # fmt: skip
            scores = {
                "total": [o.nats for o in outputs],
                "per_token": [o.nats / o.num_tokens for o in outputs],
                "per_byte": [o.nats / o.num_bytes for o in outputs],
            }
            if options.paper and diffusion is not None:
                scores["paper"] = mean_over_levels(lm.network, diffusion, documents, context_length=context)
            row: dict[str, Any] = {"file": file.name, "questions": len(questions),
                                   "guessing": sum(1 / len(p) for p, _ in questions) / len(questions)}  # fmt: skip
            for name, values in scores.items():
                right, start = 0, 0
                for pairs, gold in questions:
                    of_question = values[start : start + len(pairs)]
                    right, start = right + (of_question.index(min(of_question)) == gold), start + len(pairs)
                row[f"accuracy_{name}"] = right / len(questions)
            mode = "ar" if diffusion is None else "exact" if options.exact else options.num_samples
            rows.write(json.dumps(row | {"score": mode, "command": shlex.join(["python", *sys.argv])}) + "\n")
            rows.flush()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
