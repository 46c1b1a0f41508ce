"""The speed-of-light oracle on toys whose answer is known by hand, and on models against the sampler."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import block_config, network, random_tokens
from decode import sample_bidirectional, sample_blocks
from torch import Tensor

from unmask.lab.oracle import compact, speed_of_light
from unmask.sampling import Canvas, Confidence

MASK = 9
OPEN = torch.full((4,), MASK), torch.ones(4, dtype=torch.bool)


def whole(xt: Tensor, masked: Tensor) -> list[int] | None:
    return None if bool(masked.any()) else xt.tolist()


def confident(tokens: list[int], confidence: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(tokens), torch.tensor(confidence, dtype=torch.float64)


def test_independent_positions_take_one_forward() -> None:
    found = compact(lambda *_: confident([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6]), *OPEN, whole)
    assert (found.tokens, found.num_serial_forwards, found.num_forwards) == ([1, 2, 3, 4], 4, 1)
    assert found.tokens_per_forward == 4


def test_a_chain_takes_a_forward_each() -> None:
    """A place knows its token once the place before it is committed, and is wrong until then."""

    def chain(_: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        known = [i == 0 or not bool(masked[i - 1]) for i in range(4)]
        return confident([i if k else 8 for i, k in enumerate(known)], [0.9 if k else 0.1 for k in known])

    found = compact(chain, *OPEN, whole)
    assert (found.tokens, found.num_forwards, found.tokens_per_forward) == ([0, 1, 2, 3], 4, 1)


def test_pairs_that_must_agree_are_taken_apart() -> None:
    """Places 0 and 1 are independent; 2 and 3 are right once both stand."""

    def pairs(_: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        ready = not bool(masked[:2].any())
        return confident([1, 2, *([3, 4] if ready else [8, 8])], [0.6, 0.5, *([0.9, 0.9] if ready else [0.1, 0.1])])

    found = compact(pairs, *OPEN, whole)
    assert (found.tokens, found.num_forwards) == ([1, 2, 3, 4], 2)


def test_a_match_that_derails_the_rest_is_not_taken() -> None:
    """Place 3 proposes its right token at once, but if it stands when 1 is still open, 1 goes wrong."""

    def trap(_: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        if bool(masked[0]):
            return confident([0, 8, 8, 3], [0.9, 0.3, 0.2, 0.5])
        astray = bool(masked[1]) and not bool(masked[3])
        return confident([0, 7 if astray else 1, 2, 3], [0.9, 0.8, 0.7, 0.5])

    found = compact(trap, *OPEN, whole)
    assert found.tokens == [0, 1, 2, 3]
    assert found.num_forwards == 2


def fewest(propose, xt: Tensor, masked: Tensor) -> int:
    """By trying every subset of matching positions: the fewest forwards to the serial text."""

    def serial(xt: Tensor, masked: Tensor) -> list[int]:
        while bool(masked.any()):
            tokens, confidence = propose(xt, masked)
            best = int(torch.where(masked, confidence, -torch.inf).argmax())
            xt, masked = xt.clone(), masked.clone()
            xt[best], masked[best] = tokens[best], False
        return xt.tolist()

    wanted = serial(xt, masked)
    frontier, steps = [(xt, masked)], 0
    while all(bool(m.any()) for _, m in frontier):
        steps, reached = steps + 1, []
        for xt, masked in frontier:
            tokens, _ = propose(xt, masked)
            matching = [i for i in masked.nonzero()[:, 0].tolist() if tokens[i] == wanted[i]]
            for n in range(1, len(matching) + 1):
                for some in itertools.combinations(matching, n):
                    x, m = xt.clone(), masked.clone()
                    x[list(some)], m[list(some)] = tokens[list(some)], False
                    if serial(x, m) == wanted:
                        reached.append((x, m))
        frontier = list({(tuple(x.tolist()), tuple(m.tolist())): (x, m) for x, m in reached}.values())
    return steps


def test_never_beats_the_exhaustive_search_and_often_meets_it() -> None:
    met = 0
    for seed in range(20):

        def random_law(xt: Tensor, _: Tensor, seed: int = seed) -> tuple[Tensor, Tensor]:
            key = hash((seed, *xt.tolist())) % 2**31
            draw = torch.Generator().manual_seed(key)
            return torch.randint(0, 2, (4,), generator=draw), torch.rand(4, generator=draw, dtype=torch.float64)

        found, least = compact(random_law, *OPEN, whole), fewest(random_law, *OPEN)
        assert least <= found.num_forwards <= found.num_serial_forwards == 4
        met += found.num_forwards == least
    assert met >= 12


def test_without_checks_it_is_serial() -> None:
    found = compact(lambda *_: confident([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6]), *OPEN, whole, max_checks=1)
    assert found.num_forwards == found.num_serial_forwards == 4


@pytest.mark.parametrize(("shift", "context"), [(False, None), (True, None), (False, 18)])
def test_serial_text_equals_the_block_sampler(shift: bool, context: int | None) -> None:
    net, config = network(), block_config(4, shift=shift)
    for n in (1, 6, 8):
        prompt = random_tokens(n, seed=n)
        sampled = sample_blocks(net, config, [prompt], max_new_tokens=13, context_length=context, select=Confidence(1))
        for ends in ([], sampled.new_tokens[0][5:6]):
            out = sample_blocks(net, config, [prompt], max_new_tokens=13, context_length=context, select=Confidence(1),
                                end_token_ids=ends)  # fmt: skip
            found = speed_of_light(net, config, prompt, max_new_tokens=13, context_length=context, end_token_ids=ends)
            assert found.tokens == out.new_tokens[0]
            assert found.num_serial_forwards == int(out.num_forwards[0])
            assert found.num_forwards <= found.num_serial_forwards


def test_serial_text_equals_the_canvas_sampler() -> None:
    net, config = network(), block_config(None, attention="bidirectional", clean=None)
    prompt = random_tokens(3)
    sampled = sample_bidirectional(net, config, [Canvas.around(prompt, 7)], select=Confidence(1))
    found = speed_of_light(net, config, prompt, max_new_tokens=7)
    assert found.tokens == sampled.new_tokens[0]
    assert found.num_forwards <= found.num_serial_forwards == 7


def test_no_checks_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="max_checks 0 must be at least 1"):
        speed_of_light(network(), block_config(4), random_tokens(3), max_new_tokens=4, max_checks=0)
