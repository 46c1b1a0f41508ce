"""The mathematics of masked diffusion: torch only."""

from unmask.requirements import check

check()
