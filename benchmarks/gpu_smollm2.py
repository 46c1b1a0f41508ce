"""SmolLM2-135M-Instruct on one GPU: its own text, a drafter, two conversions, their quality and their speed.

    python benchmarks/gpu_smollm2.py --model FOLDER --prompts FOLDER --output results/gpu-smollm2 --minutes 8
    python benchmarks/gpu_smollm2.py --model FILE.gguf --output FOLDER --stages convert    (a GGUF file made a folder)

FOLDER of prompts: train.jsonl and held-out.jsonl with `domain`, `prompt`, `chat` (through the chat template or as it
is), and optionally `reference`, the text that goes on from the prompt. Stages, each ending inside its share of the
minutes: roll (the base writes its own training text), drafter, tri-mode, efficient-dlm (each trained on that text for
as many tokens as its share allows, then measured on held-out prompts), speed. What a later stage needs lies in --work.
Rows go to rows.jsonl one by one, the drafter to output/drafter.
A rehearsal: --device cpu --minutes 2 --rows 8 --batch 8 --length 64 --new 16 --held-out 2 --model A_TINY_MODEL
"""

import argparse
import gzip
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from smollm2_bench import Bench, quality
from torch.optim.optimizer import register_optimizer_step_post_hook

import unmask
from unmask.sampling import Request, SampledTokens, Threshold, sample_autoregressive, sample_blocks, sample_speculative

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHARES = {"roll": 0.24, "drafter": 0.36, "tri-mode": 0.13, "efficient-dlm": 0.13, "speed": 0.14}
WEIGHTS = {"questions": 1.0, "code": 1.0, "stories": 1.0, "everyday": 1.0, "prose": 0.5}
KEEPS_PARENT = {"teacher": "parent", "alpha": 0.05, "shift": True, "noisy_attention": "causal"}
MOST_EPOCHS = 6
FILL = 0.7
"""The share of what is left of a stage that steps may take; tokenising, saving and measuring have the rest."""


# --- the base's own text


def roll(bench: Bench) -> None:
    """Batches of one mix of domains: each prompt's first text at temperature 0, those of later rounds at 0.7."""
    lm, options = bench.load(bench.low), bench.options
    pools = bench.prompts(lm, "train")
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    for pool in pools.values():
        draw.shuffle(pool)
    used = dict.fromkeys(pools, 0)
    names = list(pools)
    speeds: dict[str, float] = {}
    ends = unmask.hf.end_token_ids(lm.model, lm.tokenizer)
    made = texts = number = 0
    longest = 0.0
    with bench.text.open("w") as file:
        while bench.left() > 1.1 * longest + 2 and made < options.roll_tokens:
            began = time.perf_counter()
            chosen: dict[bool, list[list[int]]] = {False: [], True: []}
            # The number of sampled rows is what was used up, so that most of the text is greedy while prompts last.
            for domain in draw.choices(names, [WEIGHTS.get(name, 1.0) for name in names], k=options.batch):
                turn, place = divmod(used[domain], len(pools[domain]))
                used[domain] += 1
                chosen[turn > 0].append(pools[domain][place][1])
            way = ("library", "generate")[number] if number < 2 else max(speeds, key=lambda key: speeds[key])
            count = 0
            for sampled, prompts in chosen.items():
                if not prompts:
                    continue
                written = _written(lm, prompts, options.new, ends, sampled, "generate" if sampled else way)
                for prompt, new in zip(prompts, written, strict=True):
                    count += len(prompt) + len(new)
                    new = new[:-1] if new and new[-1] in ends else new  # training puts an end behind each text
                    file.write(json.dumps({"text": lm.tokenizer.decode([*prompt, *new])}) + "\n")
                    texts += 1
            longest = max(longest, time.perf_counter() - began)
            made += count
            speeds[way] = count / (time.perf_counter() - began)
            number += 1
            bench.keep("roll", way=way, rows=options.batch, sampled=len(chosen[True]), tokens=made, texts=texts,
                       tokens_per_second=round(speeds[way]))  # fmt: skip
            file.flush()
    with bench.text.open("rb") as plain, gzip.open(bench.output / "own-text.jsonl.gz", "wb", 5) as packed:
        shutil.copyfileobj(plain, packed)


def _written(
    lm: unmask.DiffusionLM, prompts: list[list[int]], new: int, ends: Sequence[int], sampled: bool, way: str
) -> list[list[int]]:
    """New tokens of each prompt, an end token included."""
    if way == "library":
        rows = [torch.tensor(prompt) for prompt in prompts]
        return sample_autoregressive(lm.network, rows, Request(max_new_tokens=new, end_token_ids=ends)).new_tokens
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    pad = ends[0] if ends else 0
    with torch.inference_mode():
        out = lm.model.generate(
            ids.to(lm.model.device), attention_mask=mask.to(lm.model.device), max_new_tokens=new, pad_token_id=pad,
            eos_token_id=list(ends) or None, **options,
        )[:, width:].tolist()  # fmt: skip
    rows = []
    for row in out:
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


# --- training


def converted(bench: Bench, recipe: str, folder: Path, **settings: Any) -> tuple[unmask.DiffusionLM, int, float]:
    """The base trained for most of what is left of the stage; with its tokens and seconds.

    A short run before says how fast steps are.
    """
    options = bench.options
    settings = {
        "max_length": options.length, "batch_size": options.rows, "micro_batch_size": options.micro or options.rows,
        "mixed_precision": "bf16" if bench.cuda else "no", "eval_documents": 16, "eval_every": 10**6,
        "save_every": 10**6, "seed": options.seed, **settings,
    }  # fmt: skip
    per_step, steps = options.rows * options.length, 8
    few = bench.work / "few.jsonl"
    with bench.text.open() as file, few.open("w") as short:
        short.writelines(line for line, _ in zip(file, range(1000), strict=False))
    shutil.rmtree(bench.work / "probe", ignore_errors=True)
    times: list[float] = []
    lm = bench.load(torch.float32)

    def clock(*_: Any) -> None:
        if bench.cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    handle = register_optimizer_step_post_hook(clock)
    probe = dict(settings, max_tokens=steps * per_step, log_every=1, eval_documents=1, eval_samples=1)
    adapted = unmask.adapt(lm, few, recipe, bench.work / "probe", show_progress=False, **probe)
    handle.remove()
    del lm, adapted
    warm = min(3, len(times) - 2)  # the first steps choose kernels
    speed = per_step * (len(times) - 1 - warm) / (times[-1] - times[warm])
    own = sum(1 for _ in bench.text.open()) * options.length  # no more than so many tokens
    tokens = int(min(speed * FILL * bench.left(), MOST_EPOCHS * own))
    bench.keep("probe", recipe=recipe, tokens_per_second=round(speed), planned_tokens=tokens)
    lm = bench.load(torch.float32)
    shutil.rmtree(folder, ignore_errors=True)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    adapted = unmask.adapt(
        lm, bench.text, recipe, folder, show_progress=False, max_tokens=max(per_step, tokens), **settings
    )
    run = json.loads((folder / "run.json").read_text())
    seconds = time.perf_counter() - began
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 1) if bench.cuda else None
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = metrics[:: max(1, len(metrics) // 50)] + metrics[-1:]
    bench.keep("trained", recipe=recipe, tokens=run["tokens"], seconds=round(seconds, 1), peak_gib=peak,
               tokens_per_second=round(run["tokens"] / seconds), own_evaluation=run["evaluation"],
               settings={k: v for k, v in run["settings"].items() if v is not None},
               parent=run["parent"], metrics=metrics)  # fmt: skip
    return adapted, run["tokens"], seconds


def drafter(bench: Bench) -> None:
    options = bench.options
    lm, tokens, _ = converted(
        bench, "drafter", bench.work / "drafter", drafter_rank=options.rank, drafter_scale=options.scale * options.rank,
        block_size=options.block, random_offset=True, learning_rate=options.drafter_rate,
    )  # fmt: skip
    assert lm.drafter is not None
    trained = lm.drafter.to(torch.bfloat16)  # 9.8 MB of rank 16 on all maps
    lm.save_pretrained(bench.work / "drafter")
    trained.float()
    shutil.copytree(bench.work / "drafter", bench.output / "drafter", dirs_exist_ok=True)
    for file in (bench.output / "drafter").iterdir():  # the base's own files lie with the base
        if file.name not in ("drafter.safetensors", "config.json", "run.json", "README.md"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    size = (bench.output / "drafter" / "drafter.safetensors").stat().st_size
    bench.keep("drafter_saved", bytes=size, rank=options.rank, tokens=tokens)
    del lm, trained
    quality(bench, "drafter", bench.load(torch.float32, bench.work / "drafter"), tokens)


def tri_mode(bench: Bench) -> None:
    lm, tokens, _ = converted(
        bench, "tri-mode", bench.work / "tri-mode", block_size=bench.options.block, learning_rate=bench.options.rate,
        **KEEPS_PARENT,
    )  # fmt: skip
    quality(bench, "tri-mode", lm, tokens)


def efficient_dlm(bench: Bench) -> None:
    lm, tokens, _ = converted(
        bench, "efficient-dlm", bench.work / "efficient-dlm", block_size=bench.options.block,
        learning_rate=bench.options.rate,
    )  # fmt: skip
    quality(bench, "efficient-dlm", lm, tokens)


# --- speed


def speed(bench: Bench) -> None:
    """Tokens per second of AR, speculation and diffusion at batch 1, 8 and 64, then batch 1 compiled."""
    ways: dict[str, tuple[Callable[[], unmask.DiffusionLM], str]] = {}
    if (bench.work / "drafter" / "drafter.safetensors").is_file():
        ways["drafter, speculative"] = (lambda: bench.load(bench.low, bench.work / "drafter"), "speculative")
    for recipe, modes in (("tri-mode", ("speculative", "diffusion")), ("efficient-dlm", ("diffusion",))):
        if (bench.work / recipe / "model.safetensors").is_file():
            for mode in modes:
                ways[f"{recipe}, {mode}"] = (lambda recipe=recipe: bench.load(bench.low, bench.work / recipe), mode)
    options, new = bench.options, bench.options.new_speed
    base = bench.load(bench.low)
    _, prompts, _ = bench.held_out(base)
    random.Random(0).shuffle(prompts)
    cases = [(batch, False) for batch in options.batches] + ([(1, True)] if options.compiled else [])
    for batch, compiled in cases:
        rows = [prompts[i % len(prompts)] for i in range(batch)]
        ar = None
        for way, (make, mode) in ways.items():
            if bench.left() < (60 if compiled else 3):  # compiling takes most of a minute
                bench.keep("left_out", stage="speed", way=way, batch=batch, compiled=compiled, why="no time")
                continue
            if ar is None:
                if compiled:
                    base.compile()
                ar = _median(bench, lambda rows=rows: _decode(base, rows, new, "ar"))
            lm = make()
            if compiled:
                lm.compile()
            ours = _median(bench, lambda lm=lm, rows=rows, mode=mode: _decode(lm, rows, new, mode))
            bench.keep("speed", way=way, batch=batch, compiled=compiled, dtype=str(bench.low),
                       tokens_per_second=round(ours[0], 1), ar_tokens_per_second=round(ar[0], 1),
                       ratio=round(ours[0] / ar[0], 3), tokens_per_forward=round(ours[1], 3),
                       new_tokens=new, threshold=THRESHOLD if mode == "diffusion" else None)  # fmt: skip
            del lm


def _decode(lm: unmask.DiffusionLM, prompts: list[torch.Tensor], new: int, mode: str) -> SampledTokens:
    if mode == "ar":
        return sample_autoregressive(lm.network, prompts, Request(max_new_tokens=new))
    assert lm.diffusion is not None
    if mode == "speculative":
        return sample_speculative(lm.network, lm.diffusion, prompts, Request(max_new_tokens=new))
    return sample_blocks(lm.network, lm.diffusion, prompts, Request(max_new_tokens=new), select=Threshold(THRESHOLD))


THRESHOLD = 0.8


def _median(bench: Bench, decode: Callable[[], SampledTokens]) -> tuple[float, float]:
    """Tokens per second (the median of three after a warm-up) and per forward."""
    decode()
    seen = []
    for _ in range(3):
        if bench.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = decode()
        if bench.cuda:
            torch.cuda.synchronize()
        made = sum(map(len, out.new_tokens))
        seen.append((made / (time.perf_counter() - began), made / int(out.num_forwards.sum())))
        if bench.left() < 0:
            break
    return sorted(seen)[len(seen) // 2]


def convert(model: str, output: Path, base_name: str) -> None:
    """A GGUF file as an ordinary folder in float32, made anew so that nothing of a quantised model is left."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(model)
    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **more)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(lm.config, name):
            delattr(lm.config, name)
    weights, lm = lm.state_dict(), AutoModelForCausalLM.from_config(lm.config, dtype=torch.float32)
    lm.load_state_dict(weights)
    lm.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(base_name, unmask.hf.fingerprint(lm), sum(p.numel() for p in lm.parameters()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base, or a .gguf file for the stage convert")
    parser.add_argument("--base-name", default=HUB_ID, help="what the drafter calls its base")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_smollm2"), help="what later stages and calls use")
    parser.add_argument("--stages", default=",".join(SHARES))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=1024, help="rows that the base writes at once")
    parser.add_argument("--new", type=int, default=256, help="the longest text of the base's own")
    parser.add_argument("--roll-tokens", type=float, default=2e7)
    parser.add_argument("--length", type=int, default=512, help="of training rows")
    parser.add_argument("--rows", type=int, default=32, help="in a training step")
    parser.add_argument("--micro", type=int, help="rows at once, all by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scale", type=float, default=4.0, help="alpha / rank")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--drafter-rate", type=float, default=1e-3)
    parser.add_argument("--rate", type=float, default=3e-4, help="of the conversions, which train all weights")
    parser.add_argument("--held-out", type=int, default=50, help="prompts of each domain")
    parser.add_argument("--new-held-out", type=int, default=64)
    parser.add_argument("--new-speed", type=int, default=64)
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=(1, 8, 64))
    parser.add_argument("--compiled", action="store_true", help="measure batch 1 compiled as well")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.stages == "convert":
        convert(options.model, options.output, options.base_name)
        return
    stages = {"roll": roll, "drafter": drafter, "tri-mode": tri_mode, "efficient-dlm": efficient_dlm, "speed": speed}
    chosen = options.stages.split(",")
    unknown = [name for name in chosen if name not in stages]
    if unknown or options.prompts is None:
        raise SystemExit(f"--stages: {unknown} unknown, use some of {', '.join(stages)}; --prompts is needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: rehearse with --device cpu and a tiny model")
    bench = Bench(options)
    total, done = sum(SHARES[name] for name in chosen), 0.0
    for name in chosen:
        done += SHARES[name]
        bench.until = bench.began + 60 * options.minutes * done / total
        try:
            stages[name](bench)
        except Exception as error:  # the other stages are worth having
            import traceback

            traceback.print_exc()
            bench.keep("failed", stage=name, error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
