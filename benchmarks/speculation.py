"""What self-speculation yields on a checkpoint: tokens per cycle and per forward, wall clock, mismatches.

    python benchmarks/speculation.py CHECKPOINT PROMPTS.txt --output results/speculation [--name NAME]

Prompts are the first 16 tokens of the first 200 documents, continued by 64 tokens. One row a case is appended to
rows.jsonl: {temperature 0, 1} x {coupled, rejection} x cycles of {one, two} forwards, the wall clock of batch 1 against
AR decoding on the same cache code and against transformers' prompt lookup, all alternating in one process, and how
often greedy speculation leaves greedy AR in float32 and bfloat16 (in float64 the test suite says never).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.data.readers import read_documents
from unmask.sampling import Coupled, Rejection, Request, Speculative, sample_autoregressive


def prompts_of(
    lm: unmask.DiffusionLM, file: Path, number: int, length: int, unseen_in: Path | None
) -> list[torch.Tensor]:
    def begin(text: str) -> tuple[int, ...]:
        return tuple(lm.tokenizer(text)["input_ids"][:length])

    seen = {begin(text) for text in read_documents(unseen_in)} if unseen_in is not None else set()
    rows = []
    for text in read_documents(file):
        ids = begin(text)
        if len(ids) == length and ids not in seen:
            rows.append(torch.tensor(ids))
        if len(rows) == number:
            break
    return rows


def yields(lm: unmask.DiffusionLM, prompts: list[torch.Tensor], new: int, draft_length: int | None) -> list[dict]:
    rows: list[dict[str, Any]] = []
    cases = [(0.0, Coupled()), (1.0, Coupled()), (1.0, Rejection())]
    for cycle in ("one", "two"):
        for temperature, rule in cases:
            gains: list[torch.Tensor] = []
            forwards = tokens = 0
            for start in range(0, len(prompts), 50):
                request = Request(new, temperature, seed=start, context_length=lm.network.context_length)
                decoder = Speculative(draft_length=draft_length, cycle=cycle, acceptance=rule)
                out = decoder(lm.network, lm.diffusion, prompts[start : start + 50], request)
                forwards += int(out.num_forwards.sum())
                tokens += sum(map(len, out.new_tokens))
                total = out.cycle_gains.sum(0)
                gains.append(torch.nn.functional.pad(total, (0, 64 - len(total))))
            histogram = torch.stack(gains).sum(0)
            rows.append({
                "case": "yield", "temperature": temperature, "acceptance": type(rule).__name__.lower(),
                "cycle": cycle, "tokens_per_cycle": tokens / int(histogram.sum()),
                "tokens_per_forward": tokens / forwards,
                "cycle_gains": histogram[: int(histogram.nonzero().max()) + 1].tolist(), "tokens": tokens,
            })  # fmt: skip
    return rows


def wall_clock(lm: unmask.DiffusionLM, prompts: list[torch.Tensor], new: int, draft_length: int | None) -> dict:
    """Seconds a token at batch 1, greedy, the ways taking turns on each prompt."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def ar(p: torch.Tensor) -> int:
        return len(sample_autoregressive(lm.network, [p], Request(new)).new_tokens[0])

    def speculative(p: torch.Tensor) -> int:
        out = Speculative(draft_length=draft_length)(lm.network, lm.diffusion, [p], Request(new))
        return len(out.new_tokens[0])

    def stock(p: torch.Tensor, **more: Any) -> int:
        out = lm.model.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=new, do_sample=False,
                                eos_token_id=None, pad_token_id=0, **more)  # fmt: skip
        return out.shape[1] - len(p)

    ways = {"ar": ar, "speculative": speculative, "transformers": stock,
            "prompt_lookup": lambda p: stock(p, prompt_lookup_num_tokens=4)}  # fmt: skip
    seconds, tokens, forwards = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    handle = lm.model.register_forward_hook(count)
    for i, prompt in enumerate(prompts):
        for name, way in ways.items():
            calls, began = 0, time.process_time()
            made = way(prompt)
            if i:  # the first prompt warms up
                seconds[name] += time.process_time() - began
                tokens[name] += made
                forwards[name] += calls
    handle.remove()
    each = {name: seconds[name] / tokens[name] for name in ways}
    return {
        "case": "wall_clock",
        "clock": "processor time of one thread, batch 1, greedy",
        "milliseconds_per_token": {name: round(1e3 * value, 3) for name, value in each.items()},
        "speed_against_ar": {name: round(each["ar"] / value, 3) for name, value in each.items()},
        "forwards_per_token_with_prefill": {name: round(forwards[name] / tokens[name], 3) for name in ways},
    }


def mismatches(lm: unmask.DiffusionLM, prompts: list[torch.Tensor], new: int, dtype: torch.dtype) -> dict:
    """Rows whose greedy speculation leaves greedy AR, and the top-2 gap of AR's logits where they part."""
    lm.model.to(dtype)
    if lm.drafter is not None:
        lm.drafter.to(dtype)
    parted, gaps = 0, []
    for start in range(0, len(prompts), 50):
        rows = prompts[start : start + 50]
        a = sample_autoregressive(lm.network, rows, Request(new)).new_tokens
        b = Speculative()(lm.network, lm.diffusion, rows, Request(new)).new_tokens
        for prompt, x, y in zip(rows, a, b, strict=True):
            where = next((i for i, pair in enumerate(zip(x, y, strict=True)) if pair[0] != pair[1]), None)
            if where is not None:
                parted += 1
                with torch.inference_mode():
                    ids = torch.cat([prompt, torch.tensor(x[:where], dtype=torch.long)])[None]
                    top = lm.model(ids).logits[0, -1].float().topk(2).values
                gaps.append(float(top[0] - top[1]))
    lm.model.float()
    if lm.drafter is not None:
        lm.drafter.float()
    return {"case": "mismatch", "dtype": str(dtype).removeprefix("torch."), "rows": len(prompts), "parted": parted,
            "rate_per_token": parted / (len(prompts) * new), "largest_gap": max(gaps, default=None)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default=None)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=None)
    parser.add_argument("--only-yield", action="store_true")
    parser.add_argument("--unseen-in", type=Path, default=None, help="Leave out prompts that begin a document here.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = unmask.load(options.checkpoint, dtype=torch.float32)
    prompts = prompts_of(lm, options.prompts, options.number, options.prompt_tokens, options.unseen_in)
    found = yields(lm, prompts, options.new_tokens, options.draft_length)
    if not options.only_yield:
        found.append(wall_clock(lm, prompts[:17], options.new_tokens, options.draft_length))
        found += [mismatches(lm, prompts, options.new_tokens, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert lm.diffusion is not None
    run = Path(options.checkpoint) / "run.json"
    trained = json.loads(run.read_text()) if run.is_file() else {}
    about = {
        "name": options.name or Path(options.checkpoint).name,
        "prompts": options.prompts.name,
        "prompt_tokens": options.prompt_tokens,
        "unseen_prompts_only": options.unseen_in is not None,
        "number": len(prompts),
        "draft_length": options.draft_length or lm.diffusion.block_size,
        "trained_tokens": trained.get("tokens"),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "rows.jsonl").open("a") as file:
        for row in found:
            file.write(json.dumps(about | row) + "\n")
            print(json.dumps(about | row), flush=True)
    if trained:  # files by their names alone: the rest of a path says nothing elsewhere
        settings = trained["settings"]
        trained["settings"] = {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in settings.items()}
        (options.output / f"run-{about['name']}.json").write_text(
            json.dumps({k: trained[k] for k in ("settings", "tokens", "versions", "evaluation")}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
