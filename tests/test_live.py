"""Rows that come, go and are cancelled while others decode get what each gets alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import MASK, block_config, network, random_tokens, tiny_llama

from unmask.core.network import DiffusionConfig
from unmask.sampling import (
    Autoregressive,
    Blocks,
    Canvas,
    ConfidenceAmongAll,
    Factor,
    Random,
    Rejection,
    Remask,
    Request,
    Speculative,
    WholeCanvas,
)
from unmask.sampling.live import LiveRows

CANVAS = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")
CASES = [
    pytest.param(Autoregressive(), None, id="ar"),
    pytest.param(Blocks(), block_config(4), id="blocks"),
    pytest.param(Blocks(select=Random(1), max_denoising_steps=3), block_config(4, shift=True), id="blocks-steps"),
    pytest.param(Blocks(window=2, select=Factor(0.5)), block_config(4), id="window"),
    pytest.param(Blocks(guidance_scale=1.5), block_config(4), id="guidance"),
    pytest.param(Blocks(), block_config(4, clean=None, attention="block_causal"), id="one-stream"),
    pytest.param(Speculative(3, "two"), block_config(4, clean="causal"), id="two"),
    pytest.param(Speculative(3, "one"), block_config(4, clean="causal"), id="one"),
    pytest.param(Speculative("auto"), block_config(4, clean="causal"), id="auto-length"),
    pytest.param(Speculative(3, acceptance=Rejection()), block_config(4, clean="causal"), id="rejection"),
    pytest.param(WholeCanvas(), CANVAS, id="canvas"),
    pytest.param(WholeCanvas(block_size=5, max_denoising_steps=4), CANVAS, id="canvases"),
    pytest.param(WholeCanvas(max_denoising_steps=4, select=ConfidenceAmongAll()), CANVAS, id="among-all"),
    pytest.param(WholeCanvas(max_denoising_steps=9, remask=Remask(eta=0.3)), CANVAS, id="remask"),
]


def request_of(i: int, stop: bool) -> Request:
    """Requests of every kind of sampling; some rows end early."""
    how: list[dict[str, Any]] = [{}, {"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.8},
                                 {"temperature": 1.0, "top_k": 5}]  # fmt: skip
    return Request(
        max_new_tokens=5 + i * 7 % 13, seed=[(i, i % 3)], end_token_ids=range(3, 3 + i % 4), context_length=128,
        stop=(lambda _, new: 4 if len(new) >= 4 else None) if stop and i % 5 == 0 else None, **how[i % len(how)],
    )  # fmt: skip


@pytest.mark.parametrize(("decoder", "config"), CASES)
@pytest.mark.parametrize("most", [1, 5])
def test_rows_that_come_and_go_are_those_alone(decoder: Any, config: Any, most: int) -> None:
    net, chance = network(tiny_llama()), random.Random(most)
    texts = [random_tokens(1 + i * 5 % 17, seed=i) for i in range(10)]
    requests = [request_of(i, True) for i in range(len(texts))]
    live = LiveRows(decoder, net, config, most)
    waiting, running, done, dropped = list(range(len(texts))), {}, {}, set()
    heard: dict[int, dict[int, int]] = {i: {} for i in waiting}
    while waiting or running:
        while waiting and live.room and (not running or chance.random() < 0.6):
            i = waiting.pop(0)

            def callback(_: int, positions: list[int], tokens: list[int], i: int = i) -> None:
                heard[i].update(zip(positions, tokens, strict=True))

            running[live.put(texts[i], Request(**{**vars(requests[i]), "callback": callback}))] = i
        for row, sampled in live.step().items():
            done[running.pop(row)] = sampled
        if running and chance.random() < 0.06:
            row = chance.choice(sorted(running))
            dropped.add(running.pop(row))
            live.drop(row)
    assert set(done) | dropped == set(range(len(texts)))
    assert len(done) > 2
    for i, sampled in done.items():
        alone = decoder(net, config, [texts[i]], requests[i])
        assert sampled.new_tokens == alone.new_tokens, i
        first, new = len(texts[i]), sampled.new_tokens[0]
        assert [heard[i][first + place] for place in range(len(new))] == new
        for name in ("num_forwards", "num_prefill_forwards", "num_inputs"):
            if getattr(alone, name) is not None and decoder != Speculative("auto"):
                assert torch.equal(getattr(sampled, name), getattr(alone, name)), (i, name)


@pytest.mark.parametrize(("decoder", "config"), [(Blocks(), block_config(4)), (WholeCanvas(), CANVAS)])
def test_gaps_are_filled_beside_other_rows(decoder: Any, config: Any) -> None:
    net = network(tiny_llama())
    live, rows = LiveRows(decoder, net, config, 4), {}
    canvases = [Canvas.of_pieces([random_tokens(3 + i, seed=i), random_tokens(2, seed=9), random_tokens(i, seed=7)],
                                 [3, 2 + i]) for i in range(3)]  # fmt: skip
    request = Request(9, temperature=0.8, seed=[(5, 0)], context_length=128)
    other = live.put(random_tokens(4), request)
    for i, canvas in enumerate(canvases):
        rows[live.put(canvas.prompt, request, canvas)] = i
    done: dict[int, Any] = {}
    while len(done) < 4:
        done |= live.step()
    assert done[other].new_tokens == decoder(net, config, [random_tokens(4)], request).new_tokens
    for row, i in rows.items():
        assert done[row].new_tokens == decoder.fill(net, config, [canvases[i]], request).new_tokens


def test_rows_share_forwards_and_an_observer_sees_the_logits_of_each_token() -> None:
    net, calls = network(tiny_llama()), []
    run = type(net).__call__

    class Counted(type(net)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return run(self, *args, **options)

    net.__class__ = Counted
    seen: list[torch.Tensor] = []
    live = LiveRows(Autoregressive(), net, None, 8)
    for i in range(8):
        live.put(
            random_tokens(5, seed=i), Request(10, temperature=i / 4, observer=lambda _, logits: seen.append(logits))
        )
    done: dict[int, Any] = {}
    while len(done) < 8:
        done |= live.step()
    assert len(calls) == 1 + 10  # a prefill, and a forward a token
    assert len(seen) == 80
    for decoder, config in ((Blocks(), block_config(4)), (WholeCanvas(), CANVAS),
                            (Speculative(3, "two"), block_config(4, clean="causal"))):  # fmt: skip
        logits, tokens = [], []
        request = Request(9, observer=lambda _, of: logits.append(of), callback=lambda _, __, new: tokens.append(new))  # noqa: B023
        decoder(net, config, [random_tokens(5)], request)
        for of, new in zip(logits, tokens, strict=True):
            assert of.argmax(-1)[: len(new)].tolist() == new
