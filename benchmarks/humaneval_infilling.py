"""HumanEval single-line infilling: one line of a function is hidden, its number of tokens given, and tests decide.

    python benchmarks/humaneval_infilling.py MODEL HumanEval-SingleLineInfilling.jsonl.gz --output results/NAME

Protocol of DiffuLLaMA (2410.17891, section 4.2 and B.3): oracle length, at most 32 denoising steps, greedy, pass@1.
An AR model (--mode ar) gets the prefix only and is cut at the same length. Samples longer than the context are left out
and counted. Every program runs in a process of its own with limits on time, memory and files; that stops accidents,
not attackers, so run this in a container if the model is not yours.
"""

import argparse
import contextlib
import gzip
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MEGABYTES = 1024


def read_samples(path: Path) -> list[dict[str, str]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode().splitlines()]


def run_program(program: str, seconds: float = 5.0) -> str:
    """'passed' if the program runs to its last line, else 'failed' or 'timed out'.

    The last line prints a word that the program cannot know, so that leaving early is no pass.
    """
    word = secrets.token_hex(8)

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(f"{program}\nprint({word!r})\n")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(file)], cwd=folder, env={}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=limit, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.wait()
    return "passed" if out.decode(errors="replace").rstrip().endswith(word) else "failed"


def check(sample: dict[str, str], completion: str, seconds: float = 5.0) -> str:
    """Run the sample's tests on prefix + completion + suffix."""
    program = sample["prompt"] + completion + sample["suffix"]
    return run_program(f"{program}\n{sample['test']}\ncheck({sample['entry_point']})", seconds)


def complete(lm: Any, sample: dict[str, str], mode: str, steps: int) -> str | None:
    """The hidden line as the model writes it; None for a sample that does not fit the context."""
    length = len(lm.tokenizer(sample["canonical_solution"], add_special_tokens=False)["input_ids"])
    around = len(lm.tokenizer(sample["prompt"])["input_ids"])
    if mode == "ar":
        if around + length > (lm.network.context_length or 10**9):
            return None
        return str(lm.generate(sample["prompt"], mode="ar", max_new_tokens=length).texts[0])
    around += len(lm.tokenizer(sample["suffix"], add_special_tokens=False)["input_ids"])
    if around + length > (lm.network.context_length or 10**9):
        return None
    out = lm.infill(sample["prompt"], sample["suffix"], length, max_denoising_steps=min(steps, length))
    return str(out.texts[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--mode", choices=["ar", "infill"])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each program")
    options = parser.parse_args()

    import torch

    import unmask

    torch.set_num_threads(1)
    lm = unmask.load(options.model)
    mode = options.mode or ("ar" if lm.diffusion is None else "infill")
    samples = read_samples(options.file)[: options.max_samples]
    completions = [(sample, complete(lm, sample, mode, options.steps)) for sample in samples]
    fitting = [(sample, text) for sample, text in completions if text is not None]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda pair: check(*pair, options.seconds), fitting))
    rows = [{"task_id": s["task_id"], "completion": text, "canonical": s["canonical_solution"], "outcome": outcome}
            for (s, text), outcome in zip(fitting, outcomes, strict=True)]  # fmt: skip
    passed = sum(row["outcome"] == "passed" for row in rows)
    result = {"pass_at_1": passed / max(1, len(rows)), "samples": len(rows), "too_long": len(samples) - len(rows),
              "timed_out": sum(row["outcome"] == "timed out" for row in rows), "mode": mode, "steps": options.steps,
              "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
