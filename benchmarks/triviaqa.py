"""TriviaQA without context: the answer's number of tokens is given, and ten more.

    python benchmarks/triviaqa.py MODEL triviaqa_sm_sub.jsonl --output results/NAME [--max-questions 2000] [--released]

Protocol of DiffuLLaMA (2410.17891, section 4.2 and B.3): the first 2,000 questions, each continued by as many tokens as
its answer has plus 10, in as many denoising steps (`--mode ar`: the same number of tokens). "contained" is the paper's
figure: a normalised answer or alias stands in the normalised text. "exact" asks for equality, "f1" is the largest F1
of words over answer and aliases (its second figure). Normalised: lower case, without punctuation and articles.
--released commits as the authors' sampler does, ranking committed tokens too; by default the surest token a forward.
The temperature of the paper's run is not known: 1 here, as for LAMBADA. Lines: `context, answer, aliases`. The authors'
script loads SQuAD with its passages instead; questions that do not fit the context are left out and counted.
"""

import argparse
import json
import re
import shlex
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MORE_TOKENS = 10
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalised(text: str) -> str:
    """Lower case, punctuation as spaces, without articles, single spaces (TriviaQA's official evaluation)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def f1(text: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of two normalised texts."""
    words, wanted = text.split(), gold.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def scores(text: str, golds: Sequence[str]) -> dict[str, float]:
    """The figures of one answer; golds that are empty once normalised (such as "The") count for nothing."""
    said = normalised(text)
    wanted = [gold for gold in map(normalised, golds) if gold]
    return {
        "contained": float(any(gold in said for gold in wanted)),
        "exact": float(said in wanted),
        "f1": max((f1(said, gold) for gold in wanted), default=0.0),
    }


def answer_tokens(tokenizer: Any, question: str, answer: str) -> int:
    """How many tokens the answer has after the question."""
    from unmask.data.supervised import continue_ids

    return len(continue_ids(tokenizer, tokenizer(question)["input_ids"], question, " " + answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-questions", type=int, default=2000)
    parser.add_argument("--mode", choices=["ar", "diffusion"])
    parser.add_argument("--released", action="store_true", help="the authors' sampler, on a whole canvas")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    import torch

    import unmask
    from unmask.sampling import Confidence, ConfidenceAmongAll

    torch.set_num_threads(1)
    lm = unmask.load(options.model)
    mode = options.mode or ("ar" if lm.diffusion is None else "diffusion")
    if mode == "ar" and options.released:
        parser.error("--released is a sampler of mode diffusion: leave it out with --mode ar")
    rule = ConfidenceAmongAll() if options.released else Confidence(1)
    context = lm.network.context_length or 10**9
    groups: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    left_out = 0
    for number, line in enumerate(options.file.read_text().splitlines()[: options.max_questions]):
        row = json.loads(line)
        length = answer_tokens(lm.tokenizer, row["context"], row["answer"]) + MORE_TOKENS
        if len(lm.tokenizer(row["context"])["input_ids"]) + length > context:
            left_out += 1
        else:
            groups[length].append((number, row))

    found = []
    for length, group in sorted(groups.items()):
        # The authors' sampler shares the tokens out over T = length forwards; the other takes as many by itself.
        steps = length if options.released else None
        decoder = lm.decoder(mode) if mode == "ar" else lm.decoder(mode, select=rule, max_denoising_steps=steps)
        for start in range(0, len(group), options.batch_size):
            batch = group[start : start + options.batch_size]
            out = lm.generate([row["context"] for _, row in batch], mode=decoder, max_new_tokens=length,
                              temperature=options.temperature, seed=options.seed)  # fmt: skip
            found += [{"question": number, "answer": row["answer"], "tokens": length, "text": text,
                       **scores(text, [row["answer"], *row["aliases"]])}
                      for (number, row), text in zip(batch, out.texts, strict=True)]  # fmt: skip
    found.sort(key=lambda row: row["question"])
    figures = {name: sum(row[name] for row in found) / max(1, len(found)) for name in ("contained", "exact", "f1")}
    result = {**figures, "questions": len(found), "left_out": left_out, "mode": mode, "released": options.released,
              "temperature": options.temperature, "seed": options.seed,
              "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
