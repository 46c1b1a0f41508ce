"""A drafter on a CPU, beside its base in stock transformers: is the text the same, and what is faster by how much?

    python benchmarks/smollm2_cpu.py drafters/smollm2-135m-instruct --prompts held-out.jsonl --output results/smollm2

Prompts: records with `domain`, `prompt` and `chat` (through the chat template, or as it is). Stages, each a few rows of
rows.jsonl: `text` compares 200 greedy texts with stock `generate()`; `rows` times forwards over some rows on a cache;
`speed` times whole answers at batch 1, all ways taking turns on each prompt; `yield` counts tokens per cycle and per
forward; `beside` is speed over AR at temperature 1, in batches, with 8-bit weights, and where drafts do not pay.
Ratios of seconds are medians over prompts, and mean something on an idle machine alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import unmask
from unmask.core.attention import Layout, causal
from unmask.core.decoding import begin
from unmask.hf import end_token_ids
from unmask.sampling import Request, Speculative, sample_autoregressive
from unmask.version import __version__


def prompts_of(lm: unmask.DiffusionLM, file: Path, per_domain: int, longest: int) -> dict[str, list[torch.Tensor]]:
    """Domain -> the first prompts of at most so many tokens."""
    found: dict[str, list[torch.Tensor]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = record["prompt"]
        if record.get("chat"):
            turns = [{"role": "user", "content": text}]
            text = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(lm.tokenizer(text)["input_ids"])
        rows = found.setdefault(record["domain"], [])
        if len(rows) < per_domain and 0 < len(ids) <= longest:
            rows.append(ids)
    return found


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.set_num_threads(options.threads)
        self.lm = unmask.load(options.checkpoint)
        self.model, self.network = self.lm.model.eval(), self.lm.network
        self.ends = tuple(end_token_ids(self.lm.model, self.lm.tokenizer))
        options.output.mkdir(parents=True, exist_ok=True)

    def keep(self, case: str, **figures: Any) -> None:
        row = {
            "case": case,
            **figures,
            "threads": self.options.threads,
            "torch": torch.__version__,
            "unmask": __version__,
        }
        with (self.options.output / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(case, json.dumps(figures), flush=True)

    def prompts(self, per_domain: int) -> dict[str, list[torch.Tensor]]:
        return prompts_of(self.lm, self.options.prompts, per_domain, 512 - self.options.new)

    # --- ways to write an answer

    def stock(self, prompt: torch.Tensor, **more: Any) -> tuple[list[int], int]:
        """transformers' own `generate()`, greedy, and its forwards."""
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        handle = self.model.register_forward_hook(count)
        try:
            with torch.inference_mode():
                out = self.model.generate(
                    prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=self.options.new,
                    do_sample=False, eos_token_id=list(self.ends), pad_token_id=self.ends[0], **more,
                )  # fmt: skip
        finally:
            handle.remove()
        return out[0, len(prompt) :].tolist(), forwards

    def request(self, temperature: float = 0.0) -> Request:
        return Request(self.options.new, temperature, end_token_ids=self.ends)

    def autoregressive(self, prompt: torch.Tensor) -> tuple[list[int], int]:
        out = sample_autoregressive(self.network, [prompt], self.request())
        return out.new_tokens[0], int(out.num_forwards[0])

    def speculative(self, prompt: torch.Tensor, decoder: Speculative) -> tuple[list[int], int]:
        out = decoder(self.network, self.lm.diffusion, [prompt], self.request())
        return out.new_tokens[0], int(out.num_forwards[0])


def text(bench: Bench) -> None:
    """Greedy texts against stock `generate()`, a row a domain; where they part, how near its two best tokens were."""
    if bench.options.pack:
        bench.lm.pack()
    ways: dict[str, Callable[[torch.Tensor], tuple[list[int], int]]] = {
        "ar": bench.autoregressive,
        "two": lambda p: bench.speculative(p, Speculative()),
        "one": lambda p: bench.speculative(p, Speculative(cycle="one", draft_length=3)),
    }
    for domain, prompts in bench.prompts(bench.options.texts // 4).items():
        equal = dict.fromkeys(ways, 0)
        gaps: dict[str, list[float]] = {name: [] for name in ways}
        for prompt in prompts:
            expected, _ = bench.stock(prompt)
            for name, way in ways.items():
                got, _ = way(prompt)
                if got == expected:
                    equal[name] += 1
                else:
                    gaps[name].append(tie(bench, prompt, expected, got))
        bench.keep("text", domain=domain, prompts=len(prompts), equal=equal, gaps_where_parted=gaps,
                   packed=bench.network.packed is not None)  # fmt: skip


def tie(bench: Bench, prompt: torch.Tensor, expected: list[int], got: list[int]) -> float:
    """Between the two best logits where two answers part."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), -1)
    with torch.inference_mode():
        logits = bench.model(torch.tensor([[*prompt.tolist(), *expected[:at]]])).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def rows(bench: Bench) -> None:
    """Seconds of a forward on 128 cached tokens, over 1, 5, 9, 17 rows, beside transformers' own of one row."""
    prefix = torch.randint(0, 1000, (128,), generator=torch.Generator().manual_seed(0))
    caches: dict[str, Any] = {}

    def stock() -> None:
        cache = caches.setdefault("stock", None)
        if cache is None or cache.get_seq_length() > 160:
            cache = caches["stock"] = DynamicCache()
            bench.model(prefix[None], past_key_values=cache, use_cache=True)
        bench.model(prefix[None, :1], past_key_values=cache, use_cache=True)

    state = begin(bench.network, causal, [prefix], columns=200)

    def ours(number: int, packed: bool) -> None:
        kept = bench.network.packed
        bench.network.packed = kept if packed else None
        layout = Layout.of(128 + torch.arange(number)[None])
        state.set_columns(128 + number)
        bench.network(prefix[None, :number], layout, causal, past=state)
        bench.network.packed = kept

    bench.lm.pack()
    cases: dict[str, Callable[[], None]] = {"transformers, 1": stock}
    for number in (1, 5, 9, 17):
        cases[f"plain, {number}"] = partial(ours, number, False)
        cases[f"packed, {number}"] = partial(ours, number, True)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for _ in range(bench.options.rounds):
            for name, case in cases.items():
                began = time.perf_counter()
                case()
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    one = medians["transformers, 1"]
    bench.keep("rows", milliseconds={name: round(1000 * value, 1) for name, value in medians.items()},
               over_transformers={name: round(value / one, 2) for name, value in medians.items()})  # fmt: skip


def speed(bench: Bench) -> None:
    """Whole answers at batch 1, greedy: seconds a token over those of stock `generate()`, by domain."""
    bench.lm.pack()
    packed = bench.network.packed

    def plain(way: Callable[..., Any]) -> Callable[..., Any]:
        def run(prompt: torch.Tensor) -> Any:
            bench.network.packed = None
            try:
                return way(prompt)
            finally:
                bench.network.packed = packed

        return run

    ways: dict[str, Callable[[torch.Tensor], tuple[list[int], int]]] = {
        "generate": plain(bench.stock),
        "prompt_lookup": plain(lambda p: bench.stock(p, prompt_lookup_num_tokens=4)),
        "early_exit": plain(lambda p: bench.stock(p, assistant_early_exit=20)),
        "ar, plain": plain(bench.autoregressive), "ar": bench.autoregressive,
        "auto, plain": plain(lambda p: bench.speculative(p, Speculative(cycle="auto"))),
        "auto": lambda p: bench.speculative(p, Speculative(cycle="auto")),
    }  # fmt: skip
    for name in bench.options.forms:
        cycle, length = name.split("-")
        ways[name] = partial(bench.speculative, decoder=Speculative(draft_length=int(length), cycle=cycle))
    if bench.options.ways is not None:
        ways = {name: way for name, way in ways.items() if name in ("generate", *bench.options.ways)}
    for domain, prompts in bench.prompts(bench.options.answers).items():
        taken: dict[str, list[float]] = {name: [] for name in ways}
        made, forwards, parted = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
        for prompt in prompts:
            expected: list[int] = []
            for name, way in ways.items():
                began = time.perf_counter()
                new, passes = way(prompt)
                taken[name].append((time.perf_counter() - began) / len(new))
                made[name] += len(new)
                forwards[name] += passes
                expected = expected or new
                parted[name] += new != expected
        for name in ways:
            ratios = [a / b for a, b in zip(taken["generate"], taken[name], strict=True)]
            bench.keep(
                "speed", domain=domain, way=name, prompts=len(prompts),
                over_generate=round(statistics.median(ratios), 3),
                milliseconds_a_token=round(1000 * statistics.median(taken[name]), 2),
                tokens_per_forward=round(made[name] / forwards[name], 3), texts_that_parted=parted[name],
            )  # fmt: skip


def yields(bench: Bench) -> None:
    """Tokens per cycle and per forward by domain, and inputs a forward."""
    bench.lm.pack()
    prompts = bench.prompts(bench.options.answers)
    for temperature in bench.options.temperatures:
        for name in bench.options.forms:
            cycle, length = name.split("-")
            decoder = Speculative(cycle=cycle, draft_length=int(length))
            figures: dict[str, Any] = {}
            for domain, those in prompts.items():
                out = decoder(bench.network, bench.lm.diffusion, those, bench.request(temperature))
                assert out.cycle_gains is not None
                assert out.num_inputs is not None
                tokens, forwards = sum(map(len, out.new_tokens)), int(out.num_forwards.sum())
                figures[domain] = {
                    "tokens_per_cycle": round(tokens / int(out.cycle_gains.sum()), 3),
                    "tokens_per_forward": round(tokens / forwards, 3),
                    "inputs_per_forward": round(int(out.num_inputs.sum()) / forwards, 2),
                }
            mean = {
                key: round(statistics.mean(f[key] for f in figures.values()), 3) for key in next(iter(figures.values()))
            }
            bench.keep("yield", cycle=cycle, draft_length=int(length), temperature=temperature,
                       prompts=sum(map(len, prompts.values())), mean=mean, domains=figures)  # fmt: skip


def beside(bench: Bench) -> None:
    """Speculation and `"auto"` over AR decoding on the same weights: at temperature 1, in batches of 8, with weights of
    8 bits, and with a drafter that learnt nothing."""
    bench.lm.pack()
    prompts = bench.prompts(8)
    one = [[prompt] for those in prompts.values() for prompt in those[: bench.options.answers]]
    compared(bench, "temperature 1", bench.lm, one, 1.0)
    compared(bench, "batch of 8", bench.lm, list(prompts.values()), 0.0)
    kept = {name: up.clone() for name, up in bench.lm.drafter.up.items()}
    with torch.no_grad():
        for up in bench.lm.drafter.up.values():
            up.zero_()
        compared(bench, "drafter that learnt nothing", bench.lm, one, 0.0)
        for name, up in bench.lm.drafter.up.items():
            up.copy_(kept[name])
    if bench.options.base is not None:
        eight_bit = unmask.load(bench.options.checkpoint, base=bench.options.base, quantization_config="int8")
        compared(bench, "8-bit weights", eight_bit, one, 0.0)


def compared(
    bench: Bench, case: str, lm: unmask.DiffusionLM, batches: list[list[torch.Tensor]], temperature: float
) -> None:
    """Seconds a token over those of AR decoding, the median over batches, each way once on every batch."""
    lm.model.eval()
    request = bench.request(temperature)
    ways: dict[str, Callable[[list[torch.Tensor]], Any]] = {
        "ar": lambda rows: sample_autoregressive(lm.network, rows, request)
    }
    for name, decoder in {"two-4": Speculative(cycle="two", draft_length=4), "auto": Speculative(cycle="auto")}.items():
        ways[name] = partial(decoder, lm.network, lm.diffusion, request=request)
    for way in ways.values():  # what happens once
        way(batches[0])
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made, forwards = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for rows in batches:
        for name, way in ways.items():
            began = time.perf_counter()
            out = way(rows)
            tokens = sum(map(len, out.new_tokens))
            taken[name].append((time.perf_counter() - began) / tokens)
            made[name], forwards[name] = made[name] + tokens, forwards[name] + int(out.num_forwards.sum())
    for name in ways:
        over = statistics.median(a / b for a, b in zip(taken["ar"], taken[name], strict=True))
        bench.keep("beside", what=case, way=name, batches=len(batches), over_ar=round(over, 3),
                   milliseconds_a_token=round(1000 * statistics.median(taken[name]), 2),
                   tokens_per_forward=round(made[name] / forwards[name], 3))  # fmt: skip


STAGES = {"beside": beside, "text": text, "rows": rows, "speed": speed, "yield": yields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--base", help="a folder of the base in float32, for `beside` with 8-bit weights")
    parser.add_argument("--output", type=Path, default=Path("results/smollm2"))
    parser.add_argument("--stages", default="rows,speed,beside,yield,text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--pack", action="store_true", help="of `text`: on packed weights")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--answers", type=int, default=6, help="prompts of a domain for speed and yield")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--forms", nargs="+", default=["two-3", "two-4", "two-8", "one-2", "one-3", "one-4"])
    parser.add_argument("--ways", nargs="+", help="of `speed`: some of them, beside generate()")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0])
    bench = Bench(parser.parse_args())
    for stage in bench.options.stages.split(","):
        STAGES[stage](bench)


if __name__ == "__main__":
    main()
