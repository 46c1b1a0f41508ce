"""The four ways to decode, each with its own options: logits to text for a `Request`.

    Blocks(window=4)(network, config, prompts, Request(max_new_tokens=64))

`network` is any `Network`, `config` what the checkpoint was converted to, None for an untouched AR model, and `prompts`
are (length,) int64 tensors of at least one token. Every decoder returns `SampledTokens`. An option is a field here, and
nowhere else: what a decoder has no field for, it does not read.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from unmask.core.decoding import spare_masks
from unmask.core.network import DiffusionConfig, Network
from unmask.limits import check_function, check_whole
from unmask.plain_numbers import plain_fields
from unmask.sampling.acceptance import Acceptance
from unmask.sampling.autoregressive import sample_autoregressive
from unmask.sampling.block import sample_blocks
from unmask.sampling.canvas import Canvas, sample_bidirectional
from unmask.sampling.canvases import sample_canvases
from unmask.sampling.commit import Ancestral, ConfidenceAmongAll, Selector, Threshold
from unmask.sampling.constraint import check_unconstrained
from unmask.sampling.cycles import Cycle, MeasuredPace, Pace, experience_of
from unmask.sampling.guidance import check_guidance
from unmask.sampling.remask import Remask
from unmask.sampling.request import REQUEST_OPTIONS, Request, SampledTokens
from unmask.sampling.speculative import sample_speculative


@dataclass(frozen=True)
class Autoregressive:
    """mode="ar", of every checkpoint: one token per forward, no options."""

    def check(self, config: DiffusionConfig | None) -> None:
        """Every checkpoint has this mode."""

    def __call__(
        self, network: Network, config: DiffusionConfig | None, prompts: Sequence[Tensor], request: Request
    ) -> SampledTokens:
        del config
        return sample_autoregressive(network, prompts, request)


@dataclass(frozen=True)
class Blocks:
    """mode="diffusion" of a block-wise checkpoint: block after block on a cache, see `sample_blocks`.

    block_size: another than the checkpoint's. max_denoising_steps: forwards of a block at most. select: the commit
    rule, by default `Threshold()`. guidance_scale: of classifier-free guidance towards the prompt, 1 is none. window:
    masked positions of a block that a forward sees; faster, and another model than the one trained: quality drops.
    """

    block_size: int | None = None
    max_denoising_steps: int | None = None
    select: Selector | None = None
    guidance_scale: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_positive(self, "block_size", "max_denoising_steps", "window")
        check_function("select", self.select, "Threshold(0.9)")
        check_guidance(self.guidance_scale)
        if isinstance(self.select, ConfidenceAmongAll):
            raise ValueError(f"select={self.select} ranks committed tokens too, which Blocks does not score again: "
                             "use Confidence(), or a bidirectional checkpoint")  # fmt: skip

    def check(self, config: DiffusionConfig | None) -> None:
        """Raise ValueError for a checkpoint that has no blocks."""
        if _converted(config, "diffusion").attention == "bidirectional":
            raise ValueError("Blocks needs a block-wise checkpoint, and this one is bidirectional: use WholeCanvas")

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        prompts: Sequence[Tensor],
        request: Request,
        canvases: Sequence[Canvas] | None = None,
    ) -> SampledTokens:
        check_unconstrained(request.constraint)
        config = _converted(config, "diffusion").with_block_size(self.block_size)
        return sample_blocks(
            network, config, prompts, request, canvases=canvases, select=self.select, window=self.window,
            max_denoising_steps=self.max_denoising_steps, guidance_scale=self.guidance_scale,
        )  # fmt: skip

    def fill(
        self, network: Network, config: DiffusionConfig | None, canvases: Sequence[Canvas], request: Request
    ) -> SampledTokens:
        """Fill the open positions of canvases, however many the request says."""
        return self(network, config, [canvas.prompt for canvas in canvases], request, canvases)


@dataclass(frozen=True)
class WholeCanvas:
    """mode="diffusion" of a bidirectional checkpoint: canvases that every forward sees whole, see `sample_canvases`.

    block_size: new tokens of a canvas, all by default. max_denoising_steps: forwards of a canvas at most, which
    `Ancestral` and `ConfidenceAmongAll` need. select: the commit rule, by default `Threshold()`; with remask, chance
    decides. guidance_scale: as for `Blocks`. remask: takes tokens back while sampling.
    """

    block_size: int | None = None
    max_denoising_steps: int | None = None
    select: Selector | None = None
    guidance_scale: float = 1.0
    remask: Remask | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_positive(self, "block_size", "max_denoising_steps")
        if self.remask is not None and not isinstance(self.remask, Remask):
            raise TypeError(f"remask {self.remask!r} must be a Remask(), or None")
        check_function("select", self.select, "Threshold(0.9)")
        check_guidance(self.guidance_scale)
        if isinstance(self.select, Ancestral | ConfidenceAmongAll) and self.max_denoising_steps is None:
            raise ValueError(
                f"select={self.select} needs max_denoising_steps, which is None: set the number of forwards"
            )

    def check(self, config: DiffusionConfig | None) -> None:
        """Raise ValueError for a checkpoint that is not bidirectional."""
        if _converted(config, "diffusion").attention != "bidirectional":
            raise ValueError("WholeCanvas needs a bidirectional checkpoint, and this one is block-wise: use Blocks")

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        prompts: Sequence[Tensor],
        request: Request,
    ) -> SampledTokens:
        check_unconstrained(request.constraint)
        config = _converted(config, "diffusion")
        return sample_canvases(
            network, config, prompts, request, canvas_size=self.block_size, select=self.select, remask=self.remask,
            max_denoising_steps=self.max_denoising_steps, guidance_scale=self.guidance_scale,
        )  # fmt: skip

    def fill(
        self, network: Network, config: DiffusionConfig | None, canvases: Sequence[Canvas], request: Request
    ) -> SampledTokens:
        """Fill the open positions of canvases, however many the request says."""
        if self.block_size is not None:
            raise ValueError(f"block_size {self.block_size} has no meaning here: a bidirectional span is filled as one")
        return sample_bidirectional(
            network, _converted(config, "diffusion"), canvases, request, select=self.select, remask=self.remask,
            max_denoising_steps=self.max_denoising_steps, guidance_scale=self.guidance_scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Speculative:
    """mode="speculative" of a causal clean half (tri-mode, drafter): AR's own output in fewer forwards.

    cycle: "two" forwards a cycle, a draft and its verification; "one", which verifies and drafts at once; or "auto":
    the cycle and its length, or none, by what forwards cost on this device and how often drafts are accepted. By
    default "auto", or "two" with a draft_length.
    draft_length: tokens drafted at a time, the AR row's own among them, the block size by default; or "auto": that of
    each row follows its last cycle. block_size: the longest draft of "auto". acceptance: `Coupled()` by default, or
    `Rejection()`.
    """

    draft_length: int | str | None = None
    cycle: str | None = None
    block_size: int | None = None
    acceptance: Acceptance | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        if isinstance(self.draft_length, str) and self.draft_length != "auto":
            raise ValueError(f"draft_length {self.draft_length!r} must be a number of tokens or 'auto'")
        if not isinstance(self.draft_length, str):
            check_whole("draft_length", self.draft_length)
        if self.cycle not in (None, "one", "two", "auto"):
            raise ValueError(f"cycle {self.cycle!r} is unknown: use 'one', 'two' or 'auto'")
        if self.cycle == "auto" and self.draft_length is not None:
            raise ValueError(
                f"draft_length {self.draft_length!r} has no meaning with cycle 'auto', which chooses it: leave it out, "
                "or set block_size, the longest"
            )
        _check_positive(self, "block_size")
        check_function("acceptance", self.acceptance, "Coupled()")

    def check(self, config: DiffusionConfig | None) -> None:
        """Raise ValueError for a checkpoint whose cache is not the AR model's."""
        if config is None:
            raise ValueError("mode 'speculative' is not available: this checkpoint has no drafter; use 'ar'")
        if not config.serves_ar:
            raise ValueError(
                f"mode 'speculative' is not available: clean attention {config.clean_attention!r} of this "
                "checkpoint is not 'causal', so its cache is not the AR model's; use 'diffusion', or adapt with "
                "recipe 'tri-mode' or 'drafter'"
            )
        if config.adapt_anchor and self.cycle == "one":
            raise ValueError(
                "cycle 'one' needs the AR model's row beside the drafts, and this drafter (adapt_anchor) has none: use "
                "'two' or 'auto'"
            )

    def __call__(
        self, network: Network, config: DiffusionConfig | None, prompts: Sequence[Tensor], request: Request
    ) -> SampledTokens:
        config = _converted(config, "speculative").with_block_size(self.block_size)
        return sample_speculative(
            network, config, prompts, request, pace=pace_of(self, network, config), acceptance=self.acceptance
        )


def pace_of(decoder: Speculative, network: Network, config: DiffusionConfig) -> Pace:
    """Which cycles a decoder makes; config: with the block size that is decoded in."""
    assert config.block_size is not None
    length = decoder.draft_length if isinstance(decoder.draft_length, int) else config.block_size
    if decoder.cycle == "auto" or (decoder.cycle is None and decoder.draft_length is None):
        return MeasuredPace(length, experience_of(network), spare_masks(config), apart=config.adapt_anchor)
    return Pace(Cycle(1 if decoder.cycle == "one" else 2, length), adaptive=decoder.draft_length == "auto")


Decoder = Autoregressive | Blocks | WholeCanvas | Speculative
DECODERS: tuple[type[Decoder], ...] = (Autoregressive, Blocks, WholeCanvas, Speculative)


def decoder_type(mode: str, config: DiffusionConfig | None) -> type[Decoder]:
    """The decoder behind a mode's name on this checkpoint; raises ValueError for a name that is none."""
    if mode == "ar":
        return Autoregressive
    if mode == "speculative":
        return Speculative
    if mode != "diffusion":
        raise ValueError(f"mode {mode!r} is unknown: use 'diffusion', 'ar' or 'speculative'")
    return WholeCanvas if config is not None and config.attention == "bidirectional" else Blocks


def choose_decoder(
    mode: str | Decoder, config: DiffusionConfig | None, options: dict[str, Any], context_length: int | None = None
) -> Decoder:
    """The decoder of a mode with these options, of which None are not set; or `mode`, which is one already.

    confidence_threshold=p is short for select=Threshold(p). Raises ValueError for a mode that the checkpoint does not
    have, for an option that the decoder does not read, and for one beyond the model's context.
    """
    options = {name: value for name, value in options.items() if value is not None}
    kind = decoder_type(mode, config) if isinstance(mode, str) else type(mode)
    if kind not in DECODERS:
        raise ValueError(f"mode {mode!r} is no decoder: use a mode's name, or one of {_names()}")
    (kind() if isinstance(mode, str) else mode).check(config)
    readable = _options_of(kind)
    for name, value in options.items():
        if name not in readable:
            raise ValueError(_unread(name, value, mode, kind))
        if not isinstance(mode, str):
            raise ValueError(f"{name}={value!r} stands beside a decoder: give it inside, {kind.__name__}({name}=...)")
    if not isinstance(mode, str):
        _check_sizes(mode, context_length)
        return mode
    if "confidence_threshold" in options:
        if "select" in options:
            raise ValueError(
                f"confidence_threshold={options['confidence_threshold']} is short for select=Threshold(...), and "
                f"select={options['select']!r} is set as well: leave one of them out"
            )
        options["select"] = Threshold(options.pop("confidence_threshold"))
    decoder = kind(**options)
    decoder.check(config)  # of these options
    _check_sizes(decoder, context_length)
    return decoder


def _check_sizes(decoder: Decoder, context_length: int | None) -> None:
    """Raise ValueError for a block or draft longer than the model's context, and for steps far beyond its tokens."""
    if context_length is None:
        return
    most = {"block_size": 1, "draft_length": 1, "window": 1, "max_denoising_steps": _STEPS_PER_TOKEN}
    for name, times in most.items():
        value = getattr(decoder, name, None)
        if value is not None and value != "auto" and value > times * context_length:
            bound = "" if times == 1 else f"{times} times "
            raise ValueError(f"{name} {value} exceeds {bound}the model's context of {context_length}: use less")


_STEPS_PER_TOKEN = 8
"""Denoising steps for each token of the context, at most: a chance rule and remasking take every step asked for."""


def _names() -> str:
    return ", ".join(kind.__name__ for kind in DECODERS)


def _options_of(kind: type[Decoder]) -> list[str]:
    """Names of the options that a decoder reads."""
    names = [entry.name for entry in fields(kind)]
    return [*names, "confidence_threshold"] if "select" in names else names


def _unread(name: str, value: Any, mode: str | Decoder, kind: type[Decoder]) -> str:
    """The message for an option that the decoder has no field for: where it is read, and what is read here."""
    decoder = f"mode {mode!r} ({kind.__name__})" if isinstance(mode, str) else kind.__name__
    places = list(dict.fromkeys(_name(other, kind) for other in DECODERS if name in _options_of(other)))
    if not places:
        known = sorted({option for other in DECODERS for option in _options_of(other)})
        near = difflib.get_close_matches(name, [*known, *REQUEST_OPTIONS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"options of decoders are {', '.join(known)}"
        return f"option {name}={value!r} is unknown: {hint}"
    reads = ", ".join(_options_of(kind)) or "no options"
    return f"{name}={value!r} is not read by {decoder}, which reads {reads}: leave it out, or use {' or '.join(places)}"


def _name(kind: type[Decoder], instead_of: type[Decoder]) -> str:
    """How a user asks for a decoder; from one kind of diffusion to the other it takes another checkpoint."""
    if kind is Autoregressive or kind is Speculative:
        return f"mode={'ar' if kind is Autoregressive else 'speculative'!r}"
    if instead_of not in (Blocks, WholeCanvas):
        return "mode='diffusion'"
    return f"mode='diffusion' of a {'bidirectional' if kind is WholeCanvas else 'block-wise'} checkpoint"


def _converted(config: DiffusionConfig | None, mode: str) -> DiffusionConfig:
    if config is None:
        raise ValueError(f"mode {mode!r} is not available: this is an untouched AR model; adapt it, or use 'ar'")
    return config


def _check_positive(decoder: Any, *names: str) -> None:
    for name in names:
        check_whole(name, getattr(decoder, name))
