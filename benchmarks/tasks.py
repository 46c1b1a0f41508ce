"""A small AR base that solves synthetic tasks, and conversions that keep its answers in fewer forwards.

    python benchmarks/tasks.py --output runs/tasks [--parts base,short,curve,seeds,shuffle,long,study]

Problems of train, valid and test are disjoint. A LLaMA of 0.9M parameters learns them with the recipe `ar`, writes its
own greedy answers to training problems, and is converted on those. Thresholds and draft lengths are chosen on valid;
everything is then measured on test beside the base: answers and forwards (rows of measure "answers"), and the time of
an answer in turns with the base's, in CPU seconds of one thread (rows of measure "time"). Run again, it goes on where
it stopped. rows.jsonl has a row for each measurement, report.md the tables. `plan` is left out: this base does not
learn it in minutes.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import unmask
from unmask.lab.study import load_study, run_study
from unmask.lab.tasks import LONG_TASKS, LONG_WORDS, WORDS, Problem, problems, write_problems
from unmask.sampling import (
    Ancestral,
    Autoregressive,
    Blocks,
    Confidence,
    Decoder,
    EntropyBound,
    Random,
    Remask,
    Speculative,
    Threshold,
    WholeCanvas,
)

FOUR = ("copy", "reverse", "replace", "chain")
"""The tasks with one right answer to each problem."""
FIVE = (*FOUR, "shuffle")
PARTS = ("base", "short", "curve", "seeds", "shuffle", "long", "study")


@dataclass(frozen=True)
class Family:
    """Tasks that one base learns. stages: (tasks that take turns, tokens) of its training, one after the other.

    judged: the tasks whose mean accuracy decoders are chosen by. own: tasks that take turns in the base's own answers.
    length: of a row that holds any problem and its answer; new_tokens: the most that an answer may take.
    """

    name: str
    words: tuple[str, ...]
    tasks: tuple[str, ...]
    judged: tuple[str, ...]
    own: tuple[str, ...]
    stages: tuple[tuple[tuple[str, ...], int], ...]
    length: int
    new_tokens: int


SHORT = Family(
    "short", WORDS, FIVE, FOUR, (*FOUR, "chain", "chain", "chain", "shuffle", "shuffle"),
    # First the order of things, then above all sums, which take longest.
    (((*FIVE, "shuffle"), 1_600_000), (("copy", "reverse", "replace", "shuffle", *["chain"] * 4), 1_200_000)),
    length=26, new_tokens=16,
)  # fmt: skip
LONG = Family("long", LONG_WORDS, LONG_TASKS, LONG_TASKS, LONG_TASKS, ((LONG_TASKS, 4_000_000),), 80, 50)


def thresholds(*values: float) -> dict[str, Decoder]:
    return {f"threshold {p}": Blocks(select=Threshold(p)) for p in values}


def drafts(*lengths: int) -> dict[str, Decoder]:
    """Cycles of a draft and its verification, and cycles of one forward that does both."""
    return {f"drafts of {n}": Speculative(draft_length=n) for n in lengths} | {
        f"drafts of {n}, one forward a cycle": Speculative(draft_length=n, cycle="one") for n in lengths
    }


ALSO_TIMED = ("threshold 0.9", "drafts of 10", "drafts of 12")
"""Decoders timed beside what is chosen: the library's default, and cycles of two forwards, which pass fewer rows."""
CURVE = thresholds(1.0, 0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.0)


@dataclass(frozen=True)
class Arm:
    """A conversion. data: "own" (the base's greedy answers) or "text". decoders: the ways of decoding it is read in."""

    recipe: str
    settings: dict[str, Any]
    decoders: dict[str, Decoder] = field(default_factory=lambda: CURVE)
    data: str = "own"
    tokens: int = 3_000_000


ONE_BLOCK = {"attention": "block_causal", "clean_attention": None, "block_size": 26}
"""A problem and its answer in one block: no clean context is left, so one stream is the same at half the cost."""
HARD = {"masking": "bernoulli", "min_noise_level": 0.3}
"""Masks as decoding meets them, most of the answer: with fewer, what fills the row up is most of what is learnt."""

HEADLINE = {
    "one-block": Arm("efficient-dlm", ONE_BLOCK | HARD, tokens=5_000_000),
    "tri-mode": Arm(
        "tri-mode-published",
        {"block_size": 26, "noisy_attention": "causal", "teacher": "parent", "alpha": 1.0, "masking": "bernoulli",
         "min_noise_level": 0.5},
        drafts(4, 8, 10), tokens=3_000_000,
    ),
}  # fmt: skip
BUDGETS = {"one-block": (500_000, 1_000_000, 2_000_000), "tri-mode": (1_000_000, 6_000_000)}
"""Further budgets, each a run of its own that ends with its learning rate at the floor."""

ORDERS: dict[str, Decoder] = {
    "one at a time, surest": Blocks(select=Confidence(1)), "one at a time, at random": Blocks(select=Random(1)),
    "entropy bound 0.1": Blocks(select=EntropyBound(0.1)), "entropy bound 1": Blocks(select=EntropyBound(1.0)),
}  # fmt: skip
CANVAS = {
    "surest, 11 steps": WholeCanvas(11, 11, Confidence(1)), "threshold 0.9": WholeCanvas(11, None, Threshold(0.9)),
    "ancestral, 11 steps": WholeCanvas(11, 11, Ancestral()),
    **{f"remasking {variant}, 32 steps": WholeCanvas(11, 32, remask=Remask(variant, 0.1)) for variant in
       ("cap", "confidence", "loop")},
}  # fmt: skip
SHUFFLES = {
    "one-block, orders": Arm("efficient-dlm", ONE_BLOCK | HARD, ORDERS, tokens=5_000_000),
    "one-block on text": Arm("efficient-dlm", ONE_BLOCK | HARD, CURVE | ORDERS, "text", 1_000_000),
    "whole canvas on text": Arm("diffullama", HARD | {"anneal_steps": 1}, CANVAS, "text", 1_000_000),
}
"""Shuffle has many right answers: on the text it is any of them, on the base's own answers one."""

LONG_ARMS = {
    "one-block": Arm("efficient-dlm", ONE_BLOCK | HARD | {"block_size": 80}, tokens=5_000_000),
    "blocks of 16": Arm("efficient-dlm", {"block_size": 16}, tokens=3_000_000),
    "tri-mode": Arm("tri-mode-published", HEADLINE["tri-mode"].settings | {"block_size": 16}, drafts(4, 8, 12)),
}


# --- the base and its own text


def new_model(words: Sequence[str]) -> unmask.DiffusionLM:
    """A word-level tokenizer and an untrained LLaMA of 0.9M parameters."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<s>", "</s>", *words]))}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    return unmask.DiffusionLM(model, tokenizer)


def make_base(family: Family, output: Path) -> Path:
    """The folder of the base, trained on the answers, on one mix of tasks after the other."""
    folder, lm = output / f"base-{family.name}", new_model(family.words)
    files = [
        write_problems(output / f"text-{family.name}-{stage}.jsonl", problems(mix, "train", 60_000, seed=stage))
        for stage, (mix, _) in enumerate(family.stages)
    ]
    if (folder / "config.json").exists():
        return folder
    for stage, (file, (_, tokens)) in enumerate(zip(files, family.stages, strict=True)):
        last = stage == len(family.stages) - 1
        lm = unmask.adapt(
            lm, file, "ar", folder if last else folder.with_name(f"{folder.name}-{stage}"), resume=True,
            max_tokens=tokens, max_length=256, batch_size=4, learning_rate=2e-3, warmup_ratio=0.05,
            eval_every=10**9, save_every=500,
        )  # fmt: skip
    return folder


def write_own(family: Family, base: Path, file: Path, number: int) -> Path:
    """The base's greedy answers to training problems, in a file; one that is there already is kept."""
    if file.exists():
        return file
    lm, found = unmask.load(base), []
    asked = problems(family.own, "train", number, seed=len(family.stages))
    for some in batches(asked, 250):
        texts = lm.generate([p.prompt for p in some], mode="ar", max_new_tokens=family.new_tokens).texts
        found += [Problem(p.prompt, text.strip()) for p, text in zip(some, texts, strict=True) if text.strip()]
        gc.collect()
    return write_problems(file, found)


def batches(asked: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    return (asked[start : start + size] for start in range(0, len(asked), size))


# --- what is measured

Row = dict[str, Any]


def answers(lm: unmask.DiffusionLM, asked: Sequence[Problem], decoder: Decoder, family: Family) -> Row:
    """Of each task: problems, right answers, tokens and forwards; the shares and ratios of all of them."""
    tasks: dict[str, dict[str, int]] = {}
    for some in batches(asked, 100):
        out = lm.generate([p.prompt for p in some], mode=decoder, max_new_tokens=family.new_tokens, seed=0)
        for i, problem in enumerate(some):
            of = tasks.setdefault(problem.task, {"problems": 0, "right": 0, "tokens": 0, "forwards": 0})
            of["problems"] += 1
            of["right"] += problem.check(out.texts[i])
            of["tokens"] += int(out.num_new_tokens[i])
            of["forwards"] += int(out.num_forwards[i])
    return {**summary(tasks, family.judged), **{f"{k}_all": v for k, v in summary(tasks, family.tasks).items()},
            "tasks": tasks}  # fmt: skip


def summary(tasks: dict[str, dict[str, int]], named: Sequence[str]) -> dict[str, float]:
    """accuracy: mean over the named tasks. tokens_per_forward: all their tokens over all their forwards."""
    some = [tasks[name] for name in named]
    return {
        "accuracy": statistics.fmean(of["right"] / of["problems"] for of in some),
        "tokens_per_forward": sum(of["tokens"] for of in some) / sum(of["forwards"] for of in some),
    }


def times(
    lm: unmask.DiffusionLM, base: unmask.DiffusionLM, asked: Sequence[Problem], decoder: Decoder, family: Family,
    batch_size: int, rounds: int = 5,
) -> Row:  # fmt: skip
    """CPU time of one thread for all answers, in turns with the base's AR decoding batch by batch; median round."""

    def seconds(model: unmask.DiffusionLM, how: Decoder, some: Sequence[Problem]) -> float:
        start = time.process_time()
        model.generate([p.prompt for p in some], mode=how, max_new_tokens=family.new_tokens, seed=0)
        return time.process_time() - start

    ar = Autoregressive()
    totals: list[tuple[float, float]] = []
    for turn in range(rounds + 1):  # the first warms up
        both = [(seconds(base, ar, some), seconds(lm, decoder, some)) for some in batches(asked, batch_size)]
        if turn:
            totals.append((sum(a for a, _ in both), sum(b for _, b in both)))
    ratios = sorted(a / b for a, b in totals)
    return {
        "speedup": statistics.median(ratios), "speedup_low": ratios[0], "speedup_high": ratios[-1],
        "ar_ms": 1000 * statistics.median(a for a, _ in totals) / len(asked),
        "ms": 1000 * statistics.median(b for _, b in totals) / len(asked), "problems": len(asked),
    }  # fmt: skip


class Rows:
    """rows.jsonl: a row for each measurement, none of them taken twice."""

    KEY = ("measure", "family", "arm", "seed", "tokens", "decoder", "split", "batch_size", "asked")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> Row | None:
        return next((row for row in self.rows if all(row.get(k) == key.get(k) for k in self.KEY)), None)

    def add(self, key: Row, found: Row) -> Row:
        row = key | {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "tasks"}), flush=True)
        return row


# --- what is run


@dataclass(frozen=True)
class Bench:
    """A family, its base, its files, and the rows measured so far."""

    family: Family
    output: Path
    base: Path
    data: dict[str, Path]
    rows: Rows

    def convert(self, name: str, arm: Arm, seed: int, tokens: int) -> unmask.DiffusionLM:
        folder = self.output / "runs" / f"{self.family.name}-{name.split(',')[0].replace(' ', '-')}-{seed}-{tokens}"
        if (folder / "config.json").exists():
            return unmask.load(folder)
        shared = {"max_length": self.family.length, "batch_size": 32, "learning_rate": 2e-3, "predict_padding": True,
                  "shift": True, "eval_every": 10**9}  # fmt: skip
        settings = shared | arm.settings | {"max_tokens": tokens, "seed": seed}
        return unmask.adapt(self.base, self.data[arm.data], arm.recipe, folder, resume=True, **settings)

    def asked(self, split: str) -> list[Problem]:
        return problems(self.family.tasks, split, 200 * len(self.family.tasks))

    def measure(self, name: str, arm: Arm, seed: int = 0, tokens: int | None = None, *, timed: bool = False) -> None:
        """Train the arm, read it in all its decoders on both splits, and time that chosen on valid and `ALSO_TIMED`."""
        tokens = arm.tokens if tokens is None else tokens
        lm = self.convert(name, arm, seed, tokens)
        key = {"family": self.family.name, "arm": name, "seed": seed, "tokens": tokens}
        decoders = arm.decoders
        if any(isinstance(d, Speculative) for d in decoders.values()):
            decoders = {"ar": Autoregressive(), **decoders}
        for split in ("valid", "test"):
            for decoder in decoders:
                self.answered(key | {"decoder": decoder, "split": split}, lm, decoders[decoder])
        if not timed:
            return
        chosen = self.chosen(key, list(arm.decoders))
        for decoder in dict.fromkeys([chosen, *(name for name in arm.decoders if name in ALSO_TIMED)]):
            for batch_size, asked in ((1, "judged"), (8, "judged"), (1, "all")):
                self.timed(key | {"decoder": decoder, "batch_size": batch_size, "asked": asked}, lm, arm)

    def timed(self, key: Row, lm: unmask.DiffusionLM, arm: Arm) -> None:
        at = {"measure": "time", "split": "test", **key}
        if self.rows.find(**at) is None:
            tasks = self.family.judged if key["asked"] == "judged" else self.family.tasks
            some, base = problems(tasks, "test", 16 * len(tasks)), unmask.load(self.base)
            self.rows.add(at, times(lm, base, some, arm.decoders[key["decoder"]], self.family, key["batch_size"]))

    def answered(self, key: Row, lm: unmask.DiffusionLM, decoder: Decoder) -> None:
        at = {"measure": "answers", **key}
        if self.rows.find(**at) is None:
            self.rows.add(at, answers(lm, self.asked(key["split"]), decoder, self.family))

    def measure_base(self) -> None:
        lm = unmask.load(self.base)
        for split in ("valid", "test"):
            key = {"family": self.family.name, "arm": "base", "seed": 0, "tokens": 0, "decoder": "ar", "split": split}
            self.answered(key, lm, Autoregressive())

    def chosen(self, key: Row, decoders: Sequence[str]) -> str:
        """Of an arm's decoders, that of most tokens per forward on valid whose accuracy is within a point of the base.

        The most accurate one where none is; of equals the first.
        """
        key = {"measure": "answers", "split": "valid"} | key
        base = self.rows.find(**key | {"arm": "base", "seed": 0, "tokens": 0, "decoder": "ar"})
        found = [self.rows.find(**key | {"decoder": decoder}) for decoder in decoders]
        assert base is not None
        assert all(found)
        good = [row for row in found if row and row["accuracy"] >= base["accuracy"] - 0.01]
        if good:
            return str(max(good, key=lambda row: row["tokens_per_forward"])["decoder"])
        return str(max((row for row in found if row), key=lambda row: row["accuracy"])["decoder"])


def prepare(family: Family, output: Path, rows: Rows) -> Bench:
    base = make_base(family, output)
    own = write_own(family, base, output / f"own-{family.name}.jsonl", 60_000)
    text = output / f"text-{family.name}-0.jsonl"
    bench = Bench(family, output, base, {"own": own, "text": text}, rows)
    bench.measure_base()
    return bench


# --- the report


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def by_task(row: Row) -> str:
    return " ".join(f"{of['right'] / of['problems']:.2f}" for of in row["tasks"].values())


def report(rows: Sequence[Row]) -> str:
    """The chosen decoder of every conversion with its times; then every decoder of every conversion."""
    test = [row for row in rows if row["measure"] == "answers" and row["split"] == "test"]
    timed = {
        (*run_of(row), row["decoder"], row["batch_size"], row["asked"]): row for row in rows if row["measure"] == "time"
    }
    chosen, every = [], []
    for row in test:
        speed = [timed.get((*run_of(row), row["decoder"], *at)) for at in ((1, "judged"), (8, "judged"), (1, "all"))]
        figures = [f"{row[k]:.3f}" if "accuracy" in k else f"{row[k]:.2f}" for k in
                   ("accuracy", "tokens_per_forward", "accuracy_all", "tokens_per_forward_all")]  # fmt: skip
        what = [
            row["family"],
            row["arm"],
            str(row["seed"]),
            f"{row['tokens']:,}",
            row["decoder"],
            by_task(row),
            *figures,
        ]
        every.append(what)
        if any(speed):
            shown = [
                f"{s['speedup']:.2f} ({s['speedup_low']:.2f}-{s['speedup_high']:.2f})" if s else "-" for s in speed
            ]
            chosen.append([*what, *shown])
    head = ["family", "arm", "seed", "training tokens", "decoder", "accuracy by task", "mean of the judged",
            "tokens per forward", "mean of all", "tokens per forward"]  # fmt: skip
    return (
        "# Tasks\n\nAccuracy on test. Judged: copy, reverse, replace, chain; all: with shuffle; of the long family all "
        "three.\n\n## Decoders chosen on valid, and the default threshold\n\n"
        "Speed over the base's AR decoding: median (lowest-highest round).\n\n"
        + table([*head, "speed, batch 1", "speed, batch 8", "speed of all, batch 1"], chosen)
        + "\n## Every decoder\n\n" + table(head, every)
    )  # fmt: skip


def run_of(row: Row) -> tuple[Any, ...]:
    return row["family"], row["arm"], row["seed"], row["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: use any of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.output / "rows.jsonl")
    short = prepare(SHORT, options.output, rows)
    for name, arm in HEADLINE.items():
        if "short" in parts:
            short.measure(name, arm, timed=True)
    for name, arm in SHUFFLES.items():
        if "shuffle" in parts:
            short.measure(name, arm)
    for name, arm in HEADLINE.items() if "seeds" in parts else ():
        for seed in (1, 2):
            short.measure(name, arm, seed, timed=True)
    for name, budgets in BUDGETS.items() if "curve" in parts else ():
        for tokens in budgets:
            short.measure(name, HEADLINE[name], 0, tokens, timed=True)
    if "long" in parts:
        long = prepare(LONG, options.output, rows)
        for name, arm in LONG_ARMS.items():
            long.measure(name, arm, timed=True)
    (options.output / "report.md").write_text(report(rows.rows))
    if "study" in parts:
        held_out = write_problems(options.output / "test.jsonl", problems(FIVE, "test", 600))
        run_study(load_study("tasks"), short.base, [short.data["text"]], [held_out], options.output / "study")


if __name__ == "__main__":
    main()
