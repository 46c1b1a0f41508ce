"""Decoders, the commit rules they take, and what they are asked."""

from unmask.sampling.acceptance import Acceptance, Coupled, Rejection
from unmask.sampling.autoregressive import sample_autoregressive
from unmask.sampling.block import sample_blocks
from unmask.sampling.canvas import Canvas, sample_bidirectional
from unmask.sampling.canvases import sample_canvases
from unmask.sampling.commit import (
    Ancestral,
    Candidates,
    Confidence,
    ConfidenceAmongAll,
    Entropy,
    EntropyBound,
    Factor,
    Margin,
    Random,
    Selector,
    Threshold,
)
from unmask.sampling.decoders import (
    Autoregressive,
    Blocks,
    Decoder,
    Speculative,
    WholeCanvas,
    choose_decoder,
)
from unmask.sampling.remask import Remask
from unmask.sampling.request import Request, SampledTokens
from unmask.sampling.speculative import sample_speculative
from unmask.sampling.trace import Guess, Step, Trace

__all__ = [
    "Acceptance",
    "Ancestral",
    "Autoregressive",
    "Blocks",
    "Candidates",
    "Canvas",
    "Confidence",
    "ConfidenceAmongAll",
    "Coupled",
    "Decoder",
    "Entropy",
    "EntropyBound",
    "Factor",
    "Guess",
    "Margin",
    "Random",
    "Rejection",
    "Remask",
    "Request",
    "SampledTokens",
    "Selector",
    "Speculative",
    "Step",
    "Threshold",
    "Trace",
    "WholeCanvas",
    "choose_decoder",
    "sample_autoregressive",
    "sample_bidirectional",
    "sample_blocks",
    "sample_canvases",
    "sample_speculative",
]
