"""Seeds of every size and sign are streams of their own, wherever numbers are drawn from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from unmask.core import noise
from unmask.core.noise import gumbels, uniform
from unmask.data.documents import Corpus, Encoder
from unmask.data.readers import Faults
from unmask.data.streams import RecordStream
from unmask.lab import frontier

SEEDS = (0, 1, -1, 2**32, 2**32 + 1, -(2**32), 2**64, 2**64 + 1, 2**200)


def order(seed: int, epoch: int) -> tuple[int, ...]:
    corpus = Corpus(np.arange(50, dtype=np.int32), np.arange(51), "test")
    return tuple(int(ids[0]) for ((ids, _),) in corpus.stream(seed, epoch, 0))


def test_documents_come_in_an_order_of_their_seed_and_epoch() -> None:
    assert len({order(seed, epoch) for seed in SEEDS for epoch in range(3)}) == 3 * len(SEEDS)
    assert order(-1, 2) == order(-1, 2)
    assert sorted(order(-1, 0)) == list(range(50))


def test_a_streams_second_epoch_is_not_another_seeds_first() -> None:
    seen: list[int] = []
    data = SimpleNamespace(column_names=None, shuffle=lambda **options: seen.append(options["seed"]) or [])
    stream = RecordStream(data, "", Encoder(None, None, Faults()), text_column="text", fingerprint="")
    for seed in SEEDS:
        for epoch in range(3):
            assert list(stream.stream(seed, epoch, 0)) == []
    assert len(set(seen)) == len(seen) == 3 * len(SEEDS)
    assert min(seen) >= 0


def test_batches_of_a_seed_are_not_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def generate(ids: torch.Tensor, *_: Any, seed: int, **__: Any) -> Any:
        seen.append(seed)
        return SimpleNamespace(sequences=ids, num_new_tokens=torch.zeros(len(ids), dtype=torch.long), texts=[""] * 2,
                               num_forwards=torch.zeros(2), cycle_gains=None)  # fmt: skip

    monkeypatch.setattr(frontier, "seconds_now", lambda _lm: 0.0)
    model = SimpleNamespace(generate=generate)
    for seed in (0, 2, 4):
        setting = frontier.Setting("ar", batch_size=2)
        frontier.decode(model, [torch.ones(3, dtype=torch.long)] * 6, setting, seed=seed)  # type: ignore[arg-type]
    assert len(set(seen)) == len(seen) == 9


def test_numpys_integers_are_integers() -> None:
    assert torch.equal(uniform(3, key=("a", 7)), uniform(3, key=("a", int(np.int64(7)))))
    assert torch.equal(uniform(3, key=("a", 7)), uniform(3, key=("a", np.int64(7))))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        uniform(3, key=("a", 0.5))  # type: ignore[arg-type]


def test_noise_does_not_depend_on_how_much_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[noise.Key] = [("token", 0, row, 5, 0) for row in range(7)]
    whole = gumbels(keys, 11)
    for few in (1, 25, 76, 77):
        monkeypatch.setattr(noise, "_IN_CACHE", few)
        assert torch.equal(gumbels(keys, 11), whole)
    assert gumbels([], 11).shape == (0, 11)
