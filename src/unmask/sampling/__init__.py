"""Samplers and the commit rules they take."""

from unmask.sampling.autoregressive import sample_autoregressive
from unmask.sampling.block import sample_blocks
from unmask.sampling.output import SampledTokens
from unmask.sampling.select import Candidates, Confidence, EntropyBound, Factor, Random, Selector, Threshold
from unmask.sampling.speculative import Acceptance, Coupled, Rejection, sample_speculative

__all__ = [
    "Acceptance",
    "Candidates",
    "Confidence",
    "Coupled",
    "EntropyBound",
    "Factor",
    "Random",
    "Rejection",
    "SampledTokens",
    "Selector",
    "Threshold",
    "sample_autoregressive",
    "sample_blocks",
    "sample_speculative",
]
