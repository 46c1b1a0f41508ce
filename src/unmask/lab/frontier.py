"""Quality against speed: what a checkpoint writes under one decoding setting, and what that cost.

Text without a gold answer is judged by the AR parent: its NLL of the new tokens, *beside* their entropy and
distinct n-grams, because text that repeats itself has a low NLL. Only curves over settings, measured next to
the AR parent in the same run, say anything; a single point does not. Tasks with answers add an accuracy.

Knows no files and no tasks. Notation: a *text* is the new tokens of one prompt.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask import hf
from unmask.core.devices import synchronize
from unmask.core.noise import seed_for
from unmask.data.plain_text import open_ids
from unmask.evaluation.likelihood import Document, nll, summarise
from unmask.sampling import Selector, Threshold

Score = Callable[[list[str]], list[bool]]
"""The new texts of the prompts, or of the first few of them, in order -> which are right."""


class TextModel(Protocol):
    """A model that writes text; `DiffusionLM` is one."""

    model: Any
    tokenizer: Any
    diffusion: Any
    network: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Setting:
    """One way of decoding. mode: those of `generate`, or "prompt_lookup", stock speculation of the AR model.

    select: the commit rule of diffusion mode. block_size: None is the checkpoint's own. batch_size: rows at a time.
    """

    mode: str = "diffusion"
    select: Selector | None = None
    block_size: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")
        if self.mode == "prompt_lookup" and self.batch_size != 1:
            raise ValueError(f"batch_size {self.batch_size}: prompt lookup decodes one text at a time, use 1")
        if self.mode != "diffusion" and self.select is not None:
            raise ValueError(f"select {self.select} needs mode 'diffusion': {self.mode} commits what AR decoding would")

    @property
    def rule(self) -> str | None:
        """Name of the commit rule, None outside diffusion mode."""
        return type(self._select).__name__ if self.mode == "diffusion" else None

    @property
    def value(self) -> float | None:
        """The rule's first setting, the one that a frontier is drawn over."""
        if self.mode != "diffusion" or not (named := fields(self._select)):  # type: ignore[arg-type]
            return None
        return float(getattr(self._select, named[0].name))

    @property
    def _select(self) -> Selector:
        return self.select if self.select is not None else Threshold()


@dataclass(frozen=True)
class Decoded:
    """prompts and texts: token ids a row, texts with the token that ended them. strings: the new text.

    num_forwards: of all rows. num_cycles: speculative mode, of all rows. seconds: see `seconds_now`.
    """

    prompts: list[list[int]]
    texts: list[list[int]]
    strings: list[str]
    num_forwards: int
    num_cycles: int | None
    seconds: float

    @property
    def num_new_tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Quality:
    """parent_nll: nats per token, exact. unigram_entropy: nats, of a text's own tokens, mean over texts.

    distinct_n: different n-grams over all texts / n-grams. With short texts both depend on how many tokens there
    are, so they compare only at equal numbers and lengths. A text of one token has no bigram.
    """

    parent_nll: float
    unigram_entropy: float
    distinct_1: float
    distinct_2: float
    distinct_3: float


@dataclass(frozen=True)
class FrontierRow:
    """One point. tokens_per_forward: all new tokens / all forwards after the prefill. mean_length: tokens a text.

    rule, value, block_size: None where the mode has none. tokens_per_cycle: speculation only. accuracy: with a task.
    speed_over_ar: tokens per second over those of the AR parent, where the two were timed in turn.
    The row of the data itself (mode "data") has no cost.
    """

    mode: str
    rule: str | None
    value: float | None
    block_size: int | None
    batch_size: int | None
    num_texts: int
    mean_length: float
    tokens_per_forward: float | None
    tokens_per_cycle: float | None
    tokens_per_second: float | None
    parent_nll: float
    unigram_entropy: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    accuracy: float | None = None
    speed_over_ar: float | None = None


def measure(
    lm: TextModel,
    parent: TextModel,
    prompts: Sequence[str] | Sequence[Tensor],
    setting: Setting,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    score: Score | None = None,
) -> FrontierRow:
    """Decode `prompts` (texts, or token ids of any lengths) with `lm` under one setting; `parent` judges.

    The parent must share the vocabulary. Times of one run of a setting are rough: for ratios, time settings in
    turn (`decode`) and take medians.
    """
    check_vocabulary(lm, parent)
    decoded = decode(lm, prompts, setting, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                     stop_strings=stop_strings)  # fmt: skip
    return frontier_row(lm, setting, decoded, judge(parent, decoded.prompts, decoded.texts), score=score)


def decode(
    lm: TextModel,
    prompts: Sequence[str] | Sequence[Tensor],
    setting: Setting,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
) -> Decoded:
    """All prompts, `setting.batch_size` at a time. At temperature 0 what is written does not depend on the batch."""
    rows = [_ids(lm, prompt) for prompt in prompts]
    if not rows:
        raise ValueError("prompts is empty: give at least one")
    options = {"temperature": temperature, "stop_strings": list(stop_strings) or None}
    began = seconds_now(lm)
    batches = [
        _decode_batch(lm, rows[start : start + setting.batch_size], setting, max_new_tokens,
                      options | {"seed": seed_for(("batch", seed, start))})
        for start in range(0, len(rows), setting.batch_size)
    ]  # fmt: skip
    seconds = seconds_now(lm) - began
    texts, strings, num_forwards, num_cycles = zip(*batches, strict=True)
    return Decoded(
        [row.tolist() for row in rows], list(itertools.chain(*texts)), list(itertools.chain(*strings)),
        sum(num_forwards), sum(num_cycles) or None, seconds,
    )  # fmt: skip


def _decode_batch(
    lm: TextModel, rows: Sequence[Tensor], setting: Setting, max_new_tokens: int, options: dict[str, Any]
) -> tuple[list[list[int]], list[str], int, int]:
    """The new tokens and text of each row, and the forwards and cycles of all rows."""
    if setting.mode == "prompt_lookup":
        new, calls = prompt_lookup(
            lm, rows[0], max_new_tokens, temperature=options["temperature"], seed=options["seed"]
        )
        return [new], [lm.tokenizer.decode(new, skip_special_tokens=True)], calls, 0
    ids, real = padded(rows)
    if setting.mode in ("diffusion", "speculative"):
        options = options | {"block_size": setting.block_size}
    if setting.mode == "diffusion":
        options = options | {"select": setting.select}
    if setting.mode == "speculative":  # the same cycles whatever the clock says
        options = options | {"cycle": "two"}
    out = lm.generate(ids, setting.mode, max_new_tokens, attention_mask=real, **options)
    texts = [
        whole[len(row) : len(row) + n]
        for row, whole, n in zip(rows, out.sequences.tolist(), out.num_new_tokens.tolist(), strict=True)
    ]
    num_cycles = 0 if out.cycle_gains is None else int(out.cycle_gains.sum())
    return texts, out.texts, int(out.num_forwards.sum()), num_cycles


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids as (rows, longest), padded on the right, and where they are real."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])


def judge(parent: TextModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Quality:
    """What the parent makes of texts (token ids), each given its prompt (at least one token)."""
    documents = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([*prompt, *text])
        documents.append(Document(ids, torch.zeros_like(ids), torch.arange(len(ids)) >= len(prompt)))
    found = summarise(nll(parent.network, documents, context_length=parent.network.context_length))
    entropies = [unigram_entropy(text) for text in texts]
    return Quality(found.nats_per_token, sum(entropies) / len(entropies), *(distinct(texts, n) for n in (1, 2, 3)))


def unigram_entropy(text: Sequence[int]) -> float:
    """Entropy in nats of the tokens of one text, at most the logarithm of its length."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams / n-grams over all texts (1510.03055), 0 where no text has n tokens."""
    grams = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def frontier_row(
    lm: TextModel, setting: Setting, decoded: Decoded, quality: Quality, *, score: Score | None = None
) -> FrontierRow:
    """The point that one run of one setting makes."""
    new = decoded.num_new_tokens
    right = None if score is None else score(decoded.strings)
    return FrontierRow(
        mode=setting.mode,
        rule=setting.rule,
        value=setting.value,
        block_size=block_size_of(lm, setting),
        batch_size=setting.batch_size,
        num_texts=len(decoded.texts),
        mean_length=new / len(decoded.texts),
        tokens_per_forward=new / decoded.num_forwards,
        tokens_per_cycle=None if decoded.num_cycles is None else new / decoded.num_cycles,
        tokens_per_second=new / max(decoded.seconds, 1e-9),
        accuracy=None if right is None else sum(right) / len(right),
        **vars(quality),
    )


def block_size_of(lm: TextModel, setting: Setting) -> int | None:
    """The block size that a setting decodes with, None where there are no blocks."""
    if setting.mode not in ("diffusion", "speculative"):
        return None
    size: int | None = setting.block_size or lm.diffusion.block_size
    return size


def data_row(parent: TextModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> FrontierRow:
    """The same figures of real text, the point that no frontier should pass unnoticed."""
    mean_length = sum(map(len, texts)) / len(texts)
    return FrontierRow("data", None, None, None, None, len(texts), mean_length, None, None, None,
                       **vars(judge(parent, prompts, texts)))  # fmt: skip


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]], *, best_accuracy: float | None = None, sharpness: float = 3.0
) -> float:
    """Area under a curve of (tokens per forward rho, accuracy y in [0, 1]) points; y counts in percent (AUP of d3LLM).

    AUP = rho_1 y_1 + sum_(i>1) (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2 over rising rho, with
    W(y) = min(exp(-sharpness (1 - y / y_max)), 1); points more than 5 percent below y_1 are left out. y_max: the
    best of the points, or `best_accuracy` of all the systems compared.
    """
    if not points:
        raise ValueError("points is empty: give at least one (tokens per forward, accuracy)")
    if wrong := [y for _, y in points if not 0 <= y <= 1]:
        raise ValueError(f"accuracy {wrong[0]} must lie in [0, 1]: give shares, not percents")
    curve = sorted((rho, 100 * y) for rho, y in points)
    curve = [(rho, y) for rho, y in curve if y >= curve[0][1] - 5]
    top = 100 * best_accuracy if best_accuracy is not None else max(y for _, y in curve)

    def weighted(y: float) -> float:
        return y * min(math.exp(-sharpness * (1 - y / top)), 1.0) if top > 0 else 0.0

    area = curve[0][0] * curve[0][1]
    for (rho, y), (next_rho, next_y) in itertools.pairwise(curve):
        area += (next_rho - rho) * (weighted(next_y) + weighted(y)) / 2
    return area


def prompt_lookup(
    lm: TextModel, prompt: Tensor, max_new_tokens: int, *, num_tokens: int = 8, temperature: float = 0.0, seed: int = 0
) -> tuple[list[int], int]:
    """New tokens and forwards of stock speculation whose drafts are copied from the text so far.

    `prompt_lookup_num_tokens` of `generate` in transformers. The prefill also verifies, so every forward counts.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    ids = prompt[None].to(lm.network.device)
    room = max_new_tokens
    if lm.network.context_length is not None:
        room = min(room, lm.network.context_length - ids.shape[1])
    ends = list(hf.end_token_ids(lm.model, lm.tokenizer))
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    hook = lm.model.register_forward_hook(count)
    try:
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed_for(("prompt lookup", seed)) >> 65)  # torch takes 63 bits
            out = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, prompt_lookup_num_tokens=num_tokens,
                eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **drawn,
            )  # fmt: skip
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), calls


def check_vocabulary(lm: TextModel, parent: TextModel) -> None:
    """Raise ValueError unless every token of the parent is the same token of `lm` (which may have more)."""
    ours = lm.tokenizer.get_vocab()
    unlike = [token for token, i in parent.tokenizer.get_vocab().items() if ours.get(token) != i]
    if unlike:
        raise ValueError(
            f"parent {getattr(parent.model.config, '_name_or_path', '')!r} has another vocabulary ({unlike[0]!r} is "
            "not the same token): give the AR model that this checkpoint was made from"
        )


def seconds_now(lm: TextModel) -> float:
    """A clock: CPU time of this process on one CPU thread, which other programs do not disturb; else wall clock."""
    device = lm.network.device
    synchronize(device)
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _ids(lm: TextModel, prompt: str | Tensor) -> Tensor:
    if isinstance(prompt, Tensor):
        ids = prompt.cpu().long()
    else:
        ids = torch.tensor(open_ids(lm.tokenizer, prompt), dtype=torch.long)
    if not len(ids):
        raise ValueError(f"prompt {prompt!r} has no tokens: a text is judged given at least one")
    return ids
