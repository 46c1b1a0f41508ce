"""Random numbers as a function of a key, never of a global state.

Every random draw of the library comes from here, keyed by what it is for (seed, step, row, position), so
that neither the split of a batch nor the company of other rows nor an interruption can change it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a 64-bit hash of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def uniform(*shape: int, key: tuple[int | str, ...]) -> Tensor:
    """float64 uniforms in [0, 1)."""
    return torch.rand(shape, generator=generator(*key), dtype=torch.float64)


def gumbel(size: int, seed: int, row: int, position: int, draw: int = 0, purpose: str = "token") -> Tensor:
    """float64 Gumbel noise (size,) of one token position of one row.

    AR and diffusion sampling read the same noise at the same place, so that they can be compared token for
    token. float64 because float32 uniforms cut the tail at 16.6, which lowers the temperature (2409.02908).
    `draw` counts how often the position was remasked: the same noise again would choose the same token again.
    """
    draws = torch.empty(size, dtype=torch.float64)
    key = (seed, row, position) if draw == 0 else (seed, row, position, draw)
    return draws.exponential_(generator=generator(purpose, *key)).log_().neg_()
