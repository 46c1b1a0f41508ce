"""Several corpora as one, whose tokens are mixed by weights."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from unmask.data.corpus import Corpus, Document, order, shuffled


@dataclass(frozen=True)
class Mixture:
    """Corpora that are read together; an epoch holds each of their documents at least once.

    shares: parts of an epoch's tokens that come from each corpus, about. counts: documents of each that an epoch reads.
    num_tokens: those of the first epoch. fingerprint: a digest of the contents and shares.
    """

    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]
    counts: tuple[int, ...]
    num_tokens: int
    fingerprint: str

    def __len__(self) -> int:
        """Documents, each counted once."""
        return sum(map(len, self.corpora))

    @property
    def passes(self) -> tuple[float, ...]:
        """How often an epoch reads each corpus."""
        return tuple(count / len(corpus) for count, corpus in zip(self.counts, self.corpora, strict=True))

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[list[Document]]:
        """The documents of an epoch, each alone, in a random order of its own, from number `start` in that order."""
        ends = list(accumulate(self.counts, initial=0))
        places = [_chosen(number, corpus, epoch) for number, corpus in enumerate(self.corpora)]
        for number in order(ends[-1], seed, epoch, start):
            which = bisect_right(ends, number) - 1
            corpus = self.corpora[which]
            place = places[which](np.asarray([(number - ends[which]) % len(corpus)]))
            yield [corpus.document(int(place[0]))]

    def split(self, held_out: int) -> tuple[Mixture, Corpus]:
        """All but about `held_out` documents, and these: the last of each corpus, in its share, a tenth at most."""
        pairs = zip(self.corpora, self.shares, strict=True)
        halves = [corpus.split(min(round(held_out * share), len(corpus) // 10)) for corpus, share in pairs]
        last = [corpus.document(index) for _, corpus in halves for index in range(len(corpus))]
        return mixed([first for first, _ in halves], self.shares), Corpus.of(last, self.fingerprint)

    def forget(self) -> None:
        """Give back pages of mapped files."""
        for corpus in self.corpora:
            corpus.forget()

    def tokens_per_row(self, max_length: int) -> float:
        """Mean number of tokens in a packed row, as of a corpus."""
        rows = sum(share / c.tokens_per_row(max_length) for share, c in zip(self.shares, self.corpora, strict=True))
        return 1 / rows

    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(corpus.longest() for corpus in self.corpora)

    def filled_up(self, max_length: int, token: int) -> Mixture:
        """Every document lengthened to `max_length` with `token`; the shares are of documents then."""
        return mixed([corpus.filled_up(max_length, token) for corpus in self.corpora], self.shares)


def mixed(corpora: Sequence[Corpus], weights: Sequence[float] | None = None) -> Mixture:
    """A mixture to which each corpus gives tokens in proportion to its weight; without weights each is read once.

    The corpus that would end last is read once in an epoch. The others are read again from the start, and in part.
    """
    sizes = [corpus.num_tokens for corpus in corpora]
    given = sizes if weights is None else weights
    shares = [weight / sum(given) for weight in given]
    whole = max(size / share for size, share in zip(sizes, shares, strict=True))
    counts = [
        max(len(corpus), round(len(corpus) * share * whole / size))
        for corpus, share, size in zip(corpora, shares, sizes, strict=True)
    ]
    num_tokens = sum(
        size * (count // len(corpus)) + _tokens_of_first(number, corpus, count % len(corpus))
        for number, (corpus, count, size) in enumerate(zip(corpora, counts, sizes, strict=True))
    )
    content = repr(([corpus.fingerprint for corpus in corpora], [round(share, 9) for share in shares]))
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Mixture(tuple(corpora), tuple(shares), tuple(counts), num_tokens, fingerprint)


def _chosen(number: int, corpus: Corpus, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
    """The order in which the documents of a corpus are drawn, which decides those that an epoch has once more."""
    return shuffled(len(corpus), ("mixture", number, epoch))


def _tokens_of_first(number: int, corpus: Corpus, count: int) -> int:
    """Tokens of the first `count` documents that the first epoch draws from a corpus."""
    if corpus.filled is not None:
        return count * corpus.filled[0]
    place, total = _chosen(number, corpus, 0), 0
    for first in range(0, count, 1 << 16):
        drawn = place(np.arange(first, min(first + (1 << 16), count)))
        total += int((corpus.offsets[drawn + 1] - corpus.offsets[drawn]).sum())
    corpus.forget()
    return total
