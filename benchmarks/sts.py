"""Semantic textual similarity: do the cosines of sentence vectors rank pairs as people do?"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Two sentences and how alike people found them (STS-B: 0 to 5)."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Lines `sentence,sentence,score` of a .csv file, as STS-B has them, without a header."""
    pairs = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            try:
                first, second, score = row
                pairs.append(Pair(first, second, float(score)))
            except ValueError:
                raise ValueError(
                    f"pairs file {str(path)!r}, line {number}: {row} is no sentence, sentence, score"
                ) from None
    return pairs


def sts_spearman(embed: Callable[[Sequence[str]], Tensor], pairs: Sequence[Pair]) -> float:
    """Spearman's rho between the cosine of a pair's vectors and its score; MTEB's `cosine_spearman` / 100."""
    vectors = embed([pair.first for pair in pairs] + [pair.second for pair in pairs]).double()
    cosines = torch.cosine_similarity(vectors[: len(pairs)], vectors[len(pairs) :], dim=-1)
    return spearman(cosines, torch.tensor([pair.score for pair in pairs], dtype=torch.float64))


def spearman(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the ranks of x and y (n,), ties at the mean of their ranks."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, index, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()  # the highest rank of each value
    return (last - (count - 1) / 2)[index]
