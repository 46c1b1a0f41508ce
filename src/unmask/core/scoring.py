"""Whole sequences, for training and scoring: the streams of a pass, and the row that scores each position.

The token shift is resolved here, and for cached passes in `decoding`, and nowhere else: callers of `score` and
`denoise` get, for position i, the logits that predict token i.

Notation: x0 clean tokens, xt corrupted tokens, both (batch, length) int64; `wanted` (batch, length) bool marks the
positions whose logits are asked for, returned (wanted.sum(), vocab) in row-major order. Logits are float32 (float64
for a float64 network), the mask token's is -inf.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from unmask.core.attention import Layout, Pattern, causal
from unmask.core.network import DiffusionConfig, GrowingCache, LogitsOf, Network, Pass, run, run_lazily
from unmask.core.noise import integers
from unmask.core.transfer import to_device


def score(
    network: Network,
    config: DiffusionConfig,
    xt: Tensor,
    x0: Tensor,
    layout: Layout,
    wanted: Tensor,
    pattern: Pattern | None = None,
) -> Tensor:
    """Logits of the wanted positions of xt; with two streams each block of xt attends to the clean x0 before it."""
    return run(network, scoring_pass(config, xt, x0, layout, wanted, pattern))


def scoring_pass(
    config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, pattern: Pattern | None = None
) -> Pass:
    """The pass behind `score`.

    One pass over [xt | x0] with the positions repeated scores every block after its clean prefix at once
    (Efficient-DLM 2512.14067, section 2). `layout` is that of x0. `pattern` replaces the config's while a mask is
    annealed.
    """
    if config.attention == "two_stream":
        input_ids, passed = torch.cat([noisy_ids(config, xt, layout), x0], dim=1), _both_streams(layout)
    else:
        input_ids, passed = xt, layout
    rows = _scoring_rows(config, layout, input_ids)[wanted]
    return Pass(input_ids, passed, pattern or config.pattern, rows)


def _both_streams(layout: Layout) -> Layout:
    """[noisy | clean], the positions repeated."""
    return layout.cached("both streams", lambda: all_noisy(layout).concat(layout))


_ALL_NOISY: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Results of `all_noisy`, by the tensor that they replace."""


def all_noisy(layout: Layout) -> Layout:
    """The same positions and documents in the noisy stream; the same tensors again for the same layout."""
    if layout.noisy not in _ALL_NOISY:
        with torch.inference_mode(False):  # as in `Layout.cached`, which cannot share tensors
            _ALL_NOISY[layout.noisy] = torch.ones_like(layout.noisy)
    return layout._replace(noisy=_ALL_NOISY[layout.noisy])


def noisy_ids(config: DiffusionConfig, xt: Tensor, layout: Layout) -> Tensor:
    """xt as the network reads it: masks by their place in a block where these differ, or random tokens instead of them.

    The random token of a position is always the same, so that decoding is a function of its text.
    """
    if config.noise_tokens:
        noise = to_device(_fixed_noise(layout.position, config.noise_tokens), xt.device)
        return torch.where(xt == config.mask_token_id, noise, xt)
    if config.mask_rows == 1 or config.block_size is None:
        return xt
    place = to_device((layout.position % config.block_size).clamp_max(config.mask_rows - 1), xt.device)
    return torch.where(xt == config.mask_token_id, config.mask_token_id + place, xt)


def _fixed_noise(position: Tensor, vocabulary: int) -> Tensor:
    """A token below `vocabulary` for each position, int64 of the same shape."""
    longest = 1 << int(position.max()).bit_length() if position.numel() else 1
    return to_device(_noise_of_positions(vocabulary, longest), position.device)[position]


@functools.lru_cache(maxsize=8)
def _noise_of_positions(vocabulary: int, length: int) -> Tensor:
    with torch.inference_mode(False):  # used again by passes of other modes
        return integers([("noise token", vocabulary)], length, vocabulary)[0]


def _scoring_rows(config: DiffusionConfig, layout: Layout, input_ids: Tensor) -> Tensor:
    """Flat index of the row that scores each position, (batch, length), in a pass over xt or [xt | x0]."""
    batch, length = layout.position.shape
    row = torch.arange(length, device=input_ids.device).expand(batch, length)
    if config.shift:
        row = row - 1
        if config.attention == "two_stream":
            # A block's first position has no row before it in its own block: the clean row i - 1 scores it.
            assert config.block_size is not None
            row = torch.where(layout.position % config.block_size == 0, row + length, row)
    return row + torch.arange(batch, device=input_ids.device)[:, None] * input_ids.shape[1]


def score_joint(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, ar_wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` of the positions `wanted` and `score_ar` of `ar_wanted`, in one pass over [xt | x0]."""
    passed, count = joint_pass(config, xt, x0, layout, wanted, ar_wanted)
    logits = run(network, passed)
    return logits[:count], logits[count:]


def joint_pass(
    config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, ar_wanted: Tensor
) -> tuple[Pass, int]:
    """The pass behind `score_joint`, and how many of its rows score `wanted`; those of `ar_wanted` follow.

    Needs a strictly causal clean stream: only then is it the AR model (Nemotron-Labs 2607.05722, section 2.1).
    """
    check_serves_ar(config)
    (batch, length), passed = xt.shape, scoring_pass(config, xt, x0, layout, wanted)
    clean = torch.arange(length, 2 * length, device=xt.device) - 1
    ar_rows = (clean + torch.arange(batch, device=xt.device)[:, None] * 2 * length)[ar_wanted]
    return passed._replace(rows=torch.cat([passed.rows, ar_rows])), len(passed.rows)


def score_distilled(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` and `score_ar` of the positions `wanted`; the clean stream leaves no graph."""
    ar_logits, passed, past = distilled_pass(network, config, xt, x0, layout, wanted)
    return run(network, passed, past), ar_logits(slice(None))


def distilled_pass(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor
) -> tuple[LogitsOf, Pass, GrowingCache]:
    """`score_ar` of the positions `wanted`, without a graph, and the pass on top of it that scores them.

    The clean tokens run first and fill a cache, and the noisy ones run on top of it: the same as one pass
    over [xt | x0], but only the noisy half is kept for the backward pass, so that a step costs about an AR
    step. With the shift, a block's first position is scored by the clean stream and must not be wanted.
    """
    check_serves_ar(config)
    (batch, length), block = xt.shape, config.block_size
    row = torch.arange(batch * length, device=xt.device).view(batch, length)
    if config.shift and bool((wanted & (layout.position % (block or 1) == 0)).any()):
        raise ValueError("a block's first position has no noisy row with the shift: leave it out of wanted")
    past = GrowingCache(network.new_cache(), layout.subset(..., slice(0, 0)))
    ar_logits = run_lazily(network, Pass(x0, layout, causal, row[wanted] - 1), past)
    past.layout = layout
    return ar_logits, noisy_pass(config, xt, layout, wanted), past


def noisy_pass(config: DiffusionConfig, xt: Tensor, layout: Layout, wanted: Tensor) -> Pass:
    """The pass over xt on top of the cached clean stream that scores the positions `wanted`."""
    row = torch.arange(xt.numel(), device=xt.device).view(xt.shape) - int(config.shift)
    return Pass(noisy_ids(config, xt, layout), all_noisy(layout), config.pattern, row[wanted])


def check_serves_ar(config: DiffusionConfig) -> None:
    if not config.serves_ar:
        raise ValueError(
            f"clean attention {config.clean_attention!r} of {config.attention} attention is not the AR model: "
            "use attention='two_stream' with clean_attention='causal'"
        )


def score_ar(network: Network, x0: Tensor, layout: Layout, wanted: Tensor) -> Tensor:
    """Next-token logits: causal pattern, position i scored by row i - 1."""
    return run(network, ar_pass(x0, layout, wanted))


def ar_pass(x0: Tensor, layout: Layout, wanted: Tensor) -> Pass:
    """The pass behind `score_ar`."""
    row = torch.arange(x0.numel(), device=x0.device).view(x0.shape) - 1
    return Pass(x0, layout, causal, row[wanted])
