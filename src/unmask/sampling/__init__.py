"""Samplers and the commit rules they take."""

from unmask.sampling.autoregressive import sample_autoregressive
from unmask.sampling.block import sample_blocks
from unmask.sampling.output import SampledTokens
from unmask.sampling.select import Candidates, Confidence, EntropyBound, Factor, Random, Selector, Threshold

__all__ = [
    "Candidates",
    "Confidence",
    "EntropyBound",
    "Factor",
    "Random",
    "SampledTokens",
    "Selector",
    "Threshold",
    "sample_autoregressive",
    "sample_blocks",
]
