"""Decoding beside `generate()` of the same Hugging Face model, in the same process: tokens per second as ratios.

Fixed commits separate the engine from the quality of a model: exactly n tokens become final in each forward, and
speculation keeps a fixed number of drafts. The tokens counted are new tokens of the rows, the forwards those
that the samplers count: every pass after the prefill, cache writes included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask import hf
from unmask.core.attention import Layout
from unmask.core.decoding import begin, denoise
from unmask.core.network import DiffusionConfig
from unmask.lab.bench_train import Case, clocks, make_model, medians
from unmask.sampling import Confidence, Request, SampledTokens, Speculative, sample_autoregressive, sample_blocks
from unmask.sampling.acceptance import Noise
from unmask.version import __version__

PROMPT, NEW = 32, 128


@dataclass(frozen=True)
class DecodeCase(Case):
    """value, baseline: tokens per second of CPU time (of wall clock on GPU). wall_ratio: the ratio by wall clock.

    forwards_per_row: ours, after the prefill. peak_growth, baseline_peak_growth: MiB above the memory in use before
    a run, None where that is not measured.
    """

    wall_ratio: float
    forwards_per_row: float
    peak_growth: float | None
    baseline_peak_growth: float | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Accept:
    """Keep the first n drafts of a cycle, whatever the verifier says: n + 2 tokens a cycle of two forwards."""

    n: int

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        del q, noise
        accepted = drafted.sum(-1).clamp_max(self.n)
        index = torch.arange(len(drafts), device=drafts.device)
        return accepted, p[index, accepted].argmax(-1)


Decoder = Callable[[], SampledTokens]


def random_prompts(model: Any, batch: int, length: int = PROMPT) -> Tensor:
    """(batch, length) random tokens, never the mask."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size - 1, (batch, length), generator=generator).to(model.device)


def bench_config(model: Any, block_size: int, clean: str = "block_causal") -> DiffusionConfig:
    """A converted model that was never trained: the last row of the vocabulary is its mask."""
    return DiffusionConfig(model.config.vocab_size - 1, "two_stream", clean, block_size, False, "bench", __version__)


@functools.lru_cache(maxsize=2)
def network_of(model: Any, compiled: bool = False) -> hf.HFNetwork:
    """The model as a network, its mask the last row of the vocabulary; one for all cases: compiling takes long."""
    network = hf.as_network(model.eval(), model.config.vocab_size - 1)
    if compiled:
        network.compile()
    return network


def block_decoder(
    model: Any, *, batch: int, block_size: int, n: int, new: int = NEW, window: int | None = None, prompt: int = PROMPT,
    compiled: bool = False,
) -> Decoder:  # fmt: skip
    """Greedy block decoding of exactly `new` tokens a row, n a forward."""
    config, network = bench_config(model, block_size), network_of(model, compiled)
    prompts = list(random_prompts(model, batch, prompt))
    return lambda: sample_blocks(
        network, config, prompts, Request(max_new_tokens=new), select=Confidence(n), window=window
    )


def speculative_decoder(
    model: Any, *, batch: int, draft_length: int, gain: int, new: int = NEW, compiled: bool = False
) -> Decoder:
    """Greedy self-speculation that gains exactly `gain` tokens a cycle of a draft and a verification."""
    config, network = bench_config(model, draft_length, "causal"), network_of(model, compiled)
    prompts = list(random_prompts(model, batch))
    decoder = Speculative(draft_length=draft_length, acceptance=Accept(gain - 2))
    return lambda: decoder(network, config, prompts, Request(max_new_tokens=new))


def ar_decoder(model: Any, *, batch: int, new: int = NEW, compiled: bool = False) -> Decoder:
    """Greedy AR decoding on our own cache code."""
    network, prompts = network_of(model, compiled), list(random_prompts(model, batch))
    return lambda: sample_autoregressive(network, prompts, Request(max_new_tokens=new))


def generate_decoder(model: Any, *, batch: int, new: int = NEW, prompt: int = PROMPT, lookup: int = 0) -> Decoder:
    """transformers' own `generate()`, greedy; lookup: draft so many tokens from the text (batch 1 only)."""
    ids = random_prompts(model.eval(), batch, prompt)
    extra = {"prompt_lookup_num_tokens": lookup} if lookup else {"min_new_tokens": new}

    def decode() -> SampledTokens:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                                 pad_token_id=0, eos_token_id=None, **extra)  # fmt: skip
        tokens = out[:, prompt:].tolist()
        return SampledTokens(tokens, torch.full((batch,), len(tokens[0])), torch.ones(batch, dtype=torch.long))

    return decode


def tokens_of(out: SampledTokens) -> int:
    """New tokens of all rows."""
    return sum(len(tokens) for tokens in out.new_tokens)


# --- measuring


def compare(case: str, ours: Decoder, baseline: Decoder, rounds: int, settings: dict[str, Any]) -> DecodeCase:
    """Both in turn, medians of the rounds; the first run of each warms up, counts tokens and measures memory."""
    (out, peak), (baseline_out, baseline_peak) = _memory_growth(ours), _memory_growth(baseline)
    times = [(clocks(ours), clocks(baseline)) for _ in range(rounds)]
    # Speed is tokens over time, so the medians are of the baseline's time over ours.
    baseline_seconds, seconds, ratio, wall_ratio = medians([(second, first) for first, second in times])
    tokens, baseline_tokens = tokens_of(out), tokens_of(baseline_out)
    more = tokens / baseline_tokens
    return DecodeCase(
        case, tokens / seconds, baseline_tokens / baseline_seconds, more * ratio, "tokens per second",
        more * wall_ratio, float(out.num_forwards.double().mean()), peak, baseline_peak, settings,
    )  # fmt: skip


def _memory_growth(work: Decoder) -> tuple[SampledTokens, float | None]:
    """What it returns, and by how many MiB the memory in use grew while it ran; None where that cannot be read."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return work(), (torch.cuda.max_memory_allocated() - allocated) / 2**20
    work()  # what is allocated once and kept does not count
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        resident = _status("VmRSS")
        return work(), _status("VmHWM") - resident
    except (OSError, StopIteration):
        return work(), None


def _status(field: str) -> float:
    """A field of /proc/self/status, MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 2**10


# --- the cases

_CASES: tuple[tuple[str, Callable[..., Decoder], dict[str, Any]], ...] = (
    ("b8_block32_n4", block_decoder, {"batch": 8, "block_size": 32, "n": 4, "window": None}),
    ("b8_block32_n4_window", block_decoder, {"batch": 8, "block_size": 32, "n": 4, "window": 8}),
    ("b8_block32_n8", block_decoder, {"batch": 8, "block_size": 32, "n": 8, "window": None}),
    ("b8_block32_n8_window", block_decoder, {"batch": 8, "block_size": 32, "n": 8, "window": 16}),
    ("b8_block8_n4", block_decoder, {"batch": 8, "block_size": 8, "n": 4, "window": None}),
    ("b1_block16_n4", block_decoder, {"batch": 1, "block_size": 16, "n": 4, "window": None}),
    ("b1_draft8_gain5", speculative_decoder, {"batch": 1, "draft_length": 8, "gain": 5}),
    ("b8_draft8_gain5", speculative_decoder, {"batch": 8, "draft_length": 8, "gain": 5}),
    ("b8_ar", ar_decoder, {"batch": 8}),
)
"""(case, what makes its decoder, with which options)."""


def bench_decode(shape: str, rounds: int = 3, *, compiled: bool = False, **options: Any) -> Iterator[DecodeCase]:
    """Decoding, as it is done: `ratio` is our tokens per second over those of AR `generate()` (higher is better).

    compiled: our passes, those of our own AR too. options: of `make_model`.
    """
    model = make_model(shape, **options)
    baseline = {batch: generate_decoder(model, batch=batch) for batch in (1, 8)}
    for case, make_decoder, settings in _CASES:
        ours = make_decoder(model, **settings, compiled=compiled)
        recorded = settings | {"new": NEW, "compiled": compiled}
        yield compare(case, ours, baseline[settings["batch"]], rounds, recorded)
    lookup = generate_decoder(model, batch=1, lookup=8)
    yield compare("b1_prompt_lookup", lookup, baseline[1], rounds, {"batch": 1, "lookup": 8, "new": NEW})
    yield _lengths(model, max(1, rounds - 1), compiled)
    if model.device.type == "cuda":
        yield weight_bound(model, compiled)
        yield from throughput(model, rounds, compiled=compiled)


def throughput(
    model: Any, rounds: int, batches: tuple[int, ...] = (1, 8, 64), *, compiled: bool = False
) -> list[DecodeCase]:
    """Blocks of 16 at 3 tokens a forward beside AR: transformers' `generate()`, and our own engine (`_own_ar`)."""
    cases = []
    for batch in batches:
        settings: dict[str, Any] = {"batch": batch, "block_size": 16, "n": 3, "compiled": compiled}
        ours, our_ar = block_decoder(model, **settings), ar_decoder(model, batch=batch, compiled=compiled)
        for name, baseline in (("", generate_decoder(model, batch=batch)), ("_own_ar", our_ar)):
            cases.append(compare(f"b{batch}_block16_n3{name}", ours, baseline, rounds, settings | {"new": NEW}))
    return cases


def weight_bound(model: Any, compiled: bool = False, *, prefix: int = 512, block_size: int = 16) -> DecodeCase:
    """Milliseconds of one denoising forward of one row beside those that reading all weights once takes.

    The rate is that of a large copy, which reads and writes. `ratio` is the first over the second: at least 1.
    """
    config, network = bench_config(model, block_size), network_of(model, compiled)
    ids = random_prompts(model, 1, prefix)
    with torch.inference_mode():
        past = begin(network, config.pattern, [ids[0]], columns=prefix + block_size)
        past.set_columns(prefix + block_size)
        xt = torch.full((1, block_size), config.mask_token_id, device=ids.device)
        layout = Layout.of(prefix + torch.arange(block_size)[None])
        wanted = torch.ones(1, block_size, dtype=torch.bool)
        big = torch.empty(2**28 if ids.device.type == "cuda" else 2**24, dtype=torch.uint8, device=ids.device)
        copy = min(clocks(lambda: big.clone())[1] for _ in range(8))
        ours = min(clocks(lambda: denoise(network, config, past, xt, layout, wanted))[1] for _ in range(8))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = weights / (2 * big.numel() / copy)
    settings: dict[str, Any] = {"batch": 1, "block_size": block_size, "prefix": prefix, "compiled": compiled}
    return DecodeCase("b1_denoising_forward", 1e3 * ours, 1e3 * bound, ours / bound, "ms per forward", ours / bound,
                      1.0, None, None, settings)  # fmt: skip


def _lengths(model: Any, rounds: int, compiled: bool) -> DecodeCase:
    """Tokens per second at 512 new tokens over those at 128, ours over AR's."""
    settings: dict[str, Any] = {"batch": 8, "block_size": 32, "n": 4, "compiled": compiled}
    runs = []
    for new in (512, NEW):
        ours, baseline = block_decoder(model, **settings, new=new), generate_decoder(model, batch=8, new=new)
        runs.append(compare("", ours, baseline, rounds, settings))
    long, short = runs
    value, expected = long.value / short.value, long.baseline / short.baseline
    return DecodeCase("length_512_vs_128", value, expected, value / expected,
                      "tokens per second at 512 new tokens over those at 128", long.wall_ratio / short.wall_ratio,
                      long.forwards_per_row, long.peak_growth, long.baseline_peak_growth, settings)  # fmt: skip
