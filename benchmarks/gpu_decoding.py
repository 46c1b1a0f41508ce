"""Decoding and embedding as `generate` and `embed` do them, on random prompts and weights."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from gpu_cases import SIZES, Case
from gpu_measure import (
    Clock,
    document_lengths,
    forget_peak,
    make_model,
    needed_flops,
    peak_gib,
    precision,
    random_ids,
    seconds,
    shares,
    waits,
)

from unmask import hf
from unmask.core.network import DiffusionConfig
from unmask.evaluation.embed import embed, named_pattern
from unmask.lab.bench_decode import Accept, network_of, tokens_of, weight_bound
from unmask.sampling import (
    Autoregressive,
    Blocks,
    Confidence,
    Decoder,
    Request,
    SampledTokens,
    Speculative,
    Threshold,
    WholeCanvas,
)
from unmask.version import __version__

BLOCK, DRAFT, PROMPT, MOST = 16, 8, 128, 3
"""Tokens of a block, of a draft and of the longest prompt; rounds that are measured."""

_WAYS: dict[str, Decoder] = {
    "ar": Autoregressive(),
    "blocks-3": Blocks(select=Confidence(3)),
    "blocks-threshold-0.9": Blocks(select=Threshold(0.9)),
    "blocks-threshold-0": Blocks(select=Threshold(0.0)),
    "canvas-3": WholeCanvas(select=Confidence(3)),
    "speculative-one": Speculative(draft_length=DRAFT, cycle="one"),
    "speculative-two": Speculative(draft_length=DRAFT, cycle="two"),
    "speculative-two-gain-5": Speculative(draft_length=DRAFT, cycle="two", acceptance=Accept(3)),
}
_SAME_TEXT = {"ar": "generate", "speculative-one": "ar", "speculative-two": "ar"}
"""Whose text a way has to write; any way compiled, its own uncompiled one's. `generate` draws other random numbers."""


def decode(case: Case, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, the median of the rounds after one that warms up, and whether the text is the right one."""
    with precision(case.precision):
        run = _decoder(case, options)
        began = time.perf_counter()
        out = run()  # its tokens come back to the host
        first = time.perf_counter() - began
        waited = waits(run, options.device) if case.what != "generate" else None
        passes = int(out.num_forwards.max())
        reference = _reference(case, options)
        forget_peak()
        rounds = [seconds(run) for _ in clock.rounds(MOST)]
    taken, tokens = statistics.median(rounds), tokens_of(out)
    equal = None if reference is None else [a == b for a, b in zip(out.new_tokens, reference, strict=True)]
    return {
        "tokens_per_second": tokens / taken, "milliseconds_per_forward": 1e3 * taken / passes,
        "tokens_per_forward": tokens / int(out.num_forwards.sum()), "forwards": passes,
        "equal": None if equal is None else f"{sum(equal)} of {len(equal)}",
        "waits_per_forward": None if waited is None else waited / passes, "peak_gib": peak_gib(),
        "first_seconds": first, "rounds": len(rounds), "new_tokens": tokens,
    }  # fmt: skip


def _decoder(case: Case, options: argparse.Namespace) -> Callable[[], SampledTokens]:
    """What decodes a batch once."""
    model, network = _network(case.size, options.device, case.precision, case.compiled)
    lengths = [PROMPT - 8 * (row % 4) for row in range(case.batch)] if case.size != "tiny" else [16] * case.batch
    prompts = random_ids(lengths, model.config.vocab_size)
    if case.what == "generate":
        return lambda: _generate(model, prompts, options.new)
    mask, two = model.config.vocab_size - 1, not case.what.startswith("canvas")
    clean = "causal" if case.what.startswith("speculative") else "block_causal"
    config = DiffusionConfig(mask, "two_stream" if two else "bidirectional", clean if two else None,
                             BLOCK if two else None, False, "random", __version__)  # fmt: skip
    request = Request(max_new_tokens=options.new, temperature=case.temperature)
    return lambda: _WAYS[case.what](network, config, prompts, request)


def _network(size: str, device: str, kind: str, compiled: bool) -> tuple[Any, hf.HFNetwork]:
    """One for all cases, compiled and not on the same weights: compiling takes long."""
    model = _model(size, device, kind == "bf16" and device == "cuda")
    return model, network_of(model, compiled)


@functools.lru_cache(maxsize=1)
def _model(size: str, device: str, low: bool) -> Any:
    network_of.cache_clear()
    torch._dynamo.reset()  # else what is compiled for one model counts as a variant for the next
    return make_model(size, device, torch.bfloat16 if low else torch.float32).eval()


def forget() -> None:
    """Give up the model that is kept."""
    _model.cache_clear()
    _text.cache_clear()
    network_of.cache_clear()
    torch._dynamo.reset()  # else what is compiled for one model counts as a variant for the next


def _reference(case: Case, options: argparse.Namespace) -> list[list[int]] | None:
    """The text that a case has to write, None where there is none."""
    if case.compiled:
        way = case.what
    elif case.what in _SAME_TEXT:
        way = _SAME_TEXT[case.what]
    else:
        return None
    if way == "generate" and case.temperature:
        return None
    return _text(way, case.size, case.precision, case.batch, case.temperature, options.device, options.new)


@functools.lru_cache(maxsize=32)
def _text(way: str, size: str, kind: str, batch: int, temperature: float, device: str, new: int) -> list[list[int]]:
    plain = Case("decode", size, way, precision=kind, batch=batch, temperature=temperature)
    return _decoder(plain, argparse.Namespace(device=device, new=new))().new_tokens


@torch.inference_mode()
def _generate(model: Any, prompts: list[torch.Tensor], new: int) -> SampledTokens:
    """transformers' own `generate()`, greedy, prompts padded on the left."""
    width, mask = max(map(len, prompts)), model.config.vocab_size - 1
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], seen[row, width - len(prompt) :] = prompt, 1
    out = model.generate(ids.to(model.device), attention_mask=seen.to(model.device), max_new_tokens=new,
                         min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None,
                         suppress_tokens=[mask])  # fmt: skip
    tokens = out[:, width:].tolist()
    count = torch.full((len(prompts),), new)
    return SampledTokens(tokens, count, torch.ones_like(count))


def forward(case: Case, _clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one denoising forward of a block of one row, beside those that reading all weights takes."""
    model, _ = _network(case.size, options.device, case.precision, False)
    prefix = 16 if case.size == "tiny" else 512
    found = weight_bound(model, case.compiled, prefix=prefix, block_size=BLOCK)
    return {"milliseconds": found.value, "milliseconds_of_weights": found.baseline, "ratio": found.ratio}


def vectors(case: Case, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of `embed` on texts of many lengths."""
    model, network = _network(case.size, options.device, case.precision, False)
    longest = 128 if case.size == "tiny" else 1024
    lengths = document_lengths(64 * longest, longest)
    texts = random_ids(lengths, SIZES[case.size]["vocab_size"])
    pattern = named_pattern(case.what, None)
    embed(network, texts, pattern)
    waited = waits(lambda: embed(network, texts, pattern), options.device)
    forget_peak()
    rounds = [seconds(lambda: embed(network, texts, pattern)) for _ in clock.rounds(MOST)]
    taken, tokens = statistics.median(rounds), sum(lengths)
    mean = sum(n * (n if case.what == "bidirectional" else (n + 1) / 2) for n in lengths) / tokens
    return {
        "tokens_per_second": tokens / taken, "texts_per_second": len(lengths) / taken,
        **shares(needed_flops(model.config, [(mean, 0.0, 2.0)], tokens) / taken, options.device, case.precision),
        "peak_gib": peak_gib(), "waits": waited, "texts": len(lengths), "tokens": tokens, "rounds": len(rounds),
    }  # fmt: skip
