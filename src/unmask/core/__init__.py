"""The mathematics of masked diffusion: torch only."""
