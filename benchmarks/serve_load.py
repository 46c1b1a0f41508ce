"""Many clients on `unmask serve`: is anything lost or mixed up, does memory stay flat, how long do answers take?

    python benchmarks/serve_load.py runs/q --clients 200 --seconds 60 --output results/serve

Starts `unmask serve` on the model (in float64, where ties are as good as none) and lets clients ask mixed questions:
every mode, lengths, temperatures, stops, several choices, streamed or not; one in ten goes away in the middle. Every
whole answer is compared with what `lm.generate` writes for that question alone. Rows: counts of answers, refusals,
clients that left, differing and lost answers; percentiles of seconds; memory of the server before and after.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

import unmask

BEGINNINGS = [
    "Once upon a time",
    "Lily had a",
    "The dog was very",
    "One day, Tom",
    "There was a big tree. It",
    "Mom said",
]


def question(i: int, modes: list[str]) -> dict[str, Any]:
    """The body of a completion; the same for the same number."""
    chance = random.Random(i)
    return {
        "prompt": chance.choice(BEGINNINGS), "max_tokens": chance.randint(4, 48), "seed": i,
        "n": chance.choice([1, 1, 1, 2]),
        "mode": chance.choice(modes), "stop": chance.choice([None, None, ".", ["Lily", "dog"]]),
        **chance.choice([{}, {"temperature": 0.8}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1, "top_k": 20}]),
    }  # fmt: skip


def alone(lm: unmask.DiffusionLM, asked: dict[str, Any]) -> list[str]:
    """What the library writes for a question."""
    names = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
    given = {names.get(name, name): value for name, value in asked.items() if name not in ("prompt", "n")}
    return list(lm.generate([asked["prompt"]] * asked["n"], **given).texts)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], leave: bool) -> list[str] | int | None:
    """The texts; the status of a refusal; None where the client left."""
    if not body["stream"]:
        answer = await client.post("/v1/completions", json=body)
        done = answer.status_code == 200
        return [choice["text"] for choice in answer.json()["choices"]] if done else answer.status_code
    texts, ended = [""] * body["n"], False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code
        async for line in answer.aiter_lines():
            if leave and line:
                return None
            ended = ended or line == "data: [DONE]"
            for choice in json.loads(line[6:]).get("choices", []) if line.startswith("data: {") else []:
                texts[choice["index"]] += choice["text"]
    return texts if ended else 0


async def load(address: str, clients: int, seconds: float, pool: int, modes: list[str]) -> list[dict[str, Any]]:
    """What came of every question: its number, the answer, and the seconds it took."""
    ends, came = time.monotonic() + seconds, list[dict[str, Any]]()

    async def one(number: int, client: httpx.AsyncClient) -> None:
        chance = random.Random(number)
        while time.monotonic() < ends:
            i, leave = chance.randrange(pool), chance.random() < 0.1
            body = {"model": "load", "stream": leave or chance.random() < 0.5, **question(i, modes)}
            began = time.monotonic()
            came.append({"question": i, "answer": await ask(client, body, leave), "seconds": time.monotonic() - began})

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(number, client) for number in range(clients)))
    return came


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while process.poll() is None:
        try:
            httpx.get(f"{address}/health")
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lm = unmask.load(args.model, dtype="float64")
    modes = ["ar"] + (["diffusion"] if lm.diffusion else []) + (["speculative"] * (lm.default_mode == "speculative"))
    expected = {i: alone(lm, question(i, modes)) for i in range(args.questions)}
    address = f"http://127.0.0.1:{args.port}"
    command = [sys.executable, "-m", "unmask.cli", "serve", args.model, "--port", str(args.port), "--name", "load",
               "--dtype", "float64", "--max-rows", str(args.max_rows)]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            wait_for(address, process)
            memory = psutil.Process(process.pid).memory_info
            asyncio.run(load(address, min(20, args.clients), min(10, args.seconds), args.questions, modes))  # warm
            before = memory().rss
            came = asyncio.run(load(address, args.clients, args.seconds, args.questions, modes))
            after = memory().rss
            time.sleep(1)
            state = httpx.get(f"{address}/health").json()
        finally:
            process.terminate()
    whole = [entry for entry in came if isinstance(entry["answer"], list)]
    took = statistics.quantiles([entry["seconds"] for entry in whole], n=100)
    refused = [entry["answer"] for entry in came if isinstance(entry["answer"], int)]
    row = {
        "what": "load", "version": unmask.__version__, "model": Path(args.model).name, "clients": args.clients,
        "seconds": args.seconds, "max_rows": args.max_rows, "modes": modes, "answers": len(whole),
        "left": sum(entry["answer"] is None for entry in came),
        "refused_429": refused.count(429), "lost": len(refused) - refused.count(429),
        "different": sum(entry["answer"] != expected[entry["question"]] for entry in whole),
        "still_running": state["running"] + state["waiting"], "p50": round(took[49], 3), "p95": round(took[94], 3),
        "p99": round(took[98], 3), "memory_before_mb": before // 2**20, "memory_after_mb": after // 2**20,
    }  # fmt: skip
    print(json.dumps(row))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        with (args.output / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
