"""Random numbers as a function of a key, never of a global state.

Every random number of the library comes from here, keyed by its use (seed, step, row, position), so that it
does not depend on how a batch is split, on the other rows, or on interruptions.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): number i of a
key is a function of (key, i), with a key of 128 bits hashed from its use. On a CPU numpy computes it; on other
devices `philox` does, in integer arithmetic of torch, so the bits are the same everywhere and nothing is copied.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmask.core.transfer import to_device

Key = tuple[int | str, ...]

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_BUMPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = 0xFFFFFFFF
_IN_CACHE, _ON_DEVICE = 2**17, 2**24
"""Numbers made at a time: what fits a core's cache; on a device, what needs about 1 GB of intermediate results."""


def _words(key: Key) -> tuple[int, int]:
    """128 bits of `key`, as two numbers below 2^64; integers of any size and sign have keys of their own."""
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)  # numpy's 3 is 3
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def seed_for(key: Key) -> int:
    """A seed of 128 bits hashed from `key`, for other generators; sums such as seed + step would collide."""
    first, second = _words(key)
    return first | second << 64


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 64 bits of x * multiplier, both unsigned, in int64 arithmetic that wraps."""
    x0, x1, m0, m1 = x & _LOW, (x >> 32) & _LOW, multiplier & _LOW, multiplier >> 32
    middle = x1 * m0 + ((x0 * m0 >> 32) & _LOW)
    other = x0 * m1 + (middle & _LOW)
    return x1 * m1 + ((middle >> 32) & _LOW) + ((other >> 32) & _LOW), x * _signed(multiplier)


def philox(keys: Tensor, size: int) -> Tensor:
    """The first `size` numbers of each key, 64 random bits each, (keys, size) int64 on the device of `keys`.

    keys: (keys, 2) int64. The counter of block b (numbers 4b .. 4b + 3) is b + 1, as numpy counts.
    """
    counter = torch.arange(1, -(-size // 4) + 1, device=keys.device).expand(len(keys), -1)
    zero = torch.zeros_like(counter)
    lanes, (k0, k1) = (counter, zero, zero, zero), (keys[:, :1], keys[:, 1:])
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(lanes[0], _MULTIPLIERS[0]), _product(lanes[2], _MULTIPLIERS[1])
        lanes = high1 ^ lanes[1] ^ k0, low1, high0 ^ lanes[3] ^ k1, low0
        k0, k1 = k0 + _signed(_BUMPS[0]), k1 + _signed(_BUMPS[1])
    return torch.stack(lanes, dim=-1).flatten(1)[:, :size]


def bits(keys: Sequence[Key], size: int, device: torch.device | None = None) -> Tensor:
    """The first `size` numbers of each key, 64 random bits each, (keys, size) int64; by default on the CPU."""
    words = [_words(key) for key in keys]
    if device is not None and device.type != "cpu":
        signed = torch.tensor([[_signed(a), _signed(b)] for a, b in words], dtype=torch.int64).view(-1, 2)
        return philox(to_device(signed, device), size)
    drawn = [np.random.Philox(key=a | b << 64).random_raw(size) for a, b in words]
    whole = drawn[0][None] if len(drawn) == 1 else np.array(drawn, dtype=np.uint64).reshape(len(drawn), size)
    return torch.from_numpy(whole.view(np.int64))


def uniforms(keys: Sequence[Key], size: int, device: torch.device | None = None) -> Tensor:
    """(keys, size) float64 uniforms in (0, 1): (k + 1/2) / 2^52, so neither end occurs."""
    k = bits(keys, size, device).bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    return k.double().add_(0.5).mul_(2.0**-52)


def uniform(*shape: int, key: Key, device: torch.device | None = None) -> Tensor:
    """float64 uniforms in (0, 1)."""
    return uniforms([key], math.prod(shape), device).view(shape)


def bernoulli(*shape: int, probability: float, key: Key, device: torch.device | None = None) -> Tensor:
    """bool, True with `probability` up to 2^-33: two for each 64-bit number, without floats."""
    count = math.prod(shape)
    halves = bits([key], -(-count // 2), device).flatten().view(torch.int32)[:count]
    return (halves < min(round(probability * 2**32) - 2**31, 2**31 - 1)).view(shape)


def integer(bound: int, key: Key) -> int:
    """An integer drawn from 0 .. bound - 1; bound up to 2^31, where the bias is below 1 in 2^32."""
    return int(integers([key], 1, bound).item())


def integers(keys: Sequence[Key], size: int, bound: int, device: torch.device | None = None) -> Tensor:
    """(keys, size) int64 drawn from 0 .. bound - 1; bound up to 2^31, where the bias is below 1 in 2^32."""
    return (bits(keys, size, device) >> 1 & ((1 << 62) - 1)) % bound


def gumbels(keys: Sequence[Key], size: int, device: torch.device | None = None) -> Tensor:
    """(keys, size) float64 Gumbel noise, -log(-log u).

    AR and diffusion sampling read the same noise at the same position, so that they can be compared token for
    token. float64 because float32 uniforms cut the tail at 16.6, which lowers the temperature (2409.02908).
    """
    on_cpu = device is None or device.type == "cpu"
    at_once = max(1, (_IN_CACHE if on_cpu else _ON_DEVICE) // max(1, size))
    if len(keys) <= at_once:
        return uniforms(keys, size, device).log_().neg_().log_().neg_()
    noise = torch.empty(len(keys), size, dtype=torch.float64, device=device)
    for start in range(0, len(keys), at_once):
        noise[start : start + at_once] = gumbels(keys[start : start + at_once], size, device)
    return noise
