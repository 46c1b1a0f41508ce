"""Samplers and the commit rules they take."""

from unmask.sampling.autoregressive import sample_autoregressive
from unmask.sampling.block import sample_blocks
from unmask.sampling.canvas import Canvas, sample_bidirectional, sample_canvases
from unmask.sampling.commit import (
    Ancestral,
    Candidates,
    Confidence,
    Entropy,
    EntropyBound,
    Factor,
    Margin,
    Random,
    Selector,
    Threshold,
)
from unmask.sampling.output import SampledTokens
from unmask.sampling.remask import Remask
from unmask.sampling.speculative import Acceptance, Coupled, Rejection, sample_speculative
from unmask.sampling.trace import Guess, Step, Trace

__all__ = [
    "Acceptance",
    "Ancestral",
    "Candidates",
    "Canvas",
    "Confidence",
    "Coupled",
    "Entropy",
    "EntropyBound",
    "Factor",
    "Guess",
    "Margin",
    "Random",
    "Rejection",
    "Remask",
    "SampledTokens",
    "Selector",
    "Step",
    "Threshold",
    "Trace",
    "sample_autoregressive",
    "sample_bidirectional",
    "sample_blocks",
    "sample_canvases",
    "sample_speculative",
]
