"""Whole-canvas sampling against a slow reference: one row, one position at a time, by the rules' definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, gumbel, network, random_tokens, tiny_model
from decode import sample_bidirectional, sample_blocks, sample_canvases
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import hf
from unmask.core.attention import Layout, bidirectional
from unmask.core.network import DiffusionConfig
from unmask.core.noise import uniform
from unmask.sampling import (
    Ancestral,
    Blocks,
    Candidates,
    Canvas,
    Confidence,
    ConfidenceAmongAll,
    Entropy,
    EntropyBound,
    Margin,
    Random,
    Remask,
    Threshold,
    WholeCanvas,
)


def config(shift: bool = True) -> DiffusionConfig:
    return DiffusionConfig(MASK, "bidirectional", None, None, shift, "test", "0")


def canvas(prefix: int, span: int, suffix: int = 0) -> Canvas:
    return Canvas.around(random_tokens(prefix, seed=prefix), span, random_tokens(suffix, seed=50 + suffix))


def slow(
    net, chosen, canvas, rule, *, steps=None, temperature=0.0, top_k=None, seed=0, row=0, scale=1.0
) -> tuple[list[int], int]:
    """The span of one canvas, and the forwards it took."""
    x = torch.where(canvas.fixed, canvas.tokens, MASK)
    open_ = [i for i in range(len(x)) if not canvas.fixed[i]]
    masked, order, forwards = list(open_), uniform(len(x), key=("order", seed, row, 0)).tolist(), 0
    layout = Layout.of(torch.arange(len(x))[None])
    for step in range(10**6):
        if not masked:
            break
        logits = net(x[None], layout, bidirectional)[0]
        forwards += 1
        if scale != 1:
            bare = x.clone()
            bare[1:][canvas.fixed[1:]] = MASK
            without = net(bare[None], layout, bidirectional)[0]
            logits = without + scale * (logits - without)
            logits[:, MASK] = -torch.inf
            forwards += 1
        options = []
        for i in open_ if isinstance(rule, ConfidenceAmongAll) else masked:
            scores = logits[i - chosen.shift].clone()
            p = scores.softmax(-1)
            if temperature and isinstance(rule, ConfidenceAmongAll):
                p = (scores / temperature).softmax(-1)
            if temperature:
                if top_k:
                    scores[scores < scores.sort(descending=True).values[top_k - 1]] = -torch.inf
                scores = scores / temperature + gumbel(len(scores), seed, row, i)
            token = int(scores.argmax())
            first, second = p.sort(descending=True).values[:2].tolist()
            entropy = -float((p[p > 0] * p[p > 0].log()).sum())
            options.append((i, token, float(p[token]), first - second, entropy))
        least = 0 if steps is None else math.ceil(len(masked) / (steps - step))
        if isinstance(rule, Ancestral):
            chosen_now = [o for o in options if order[o[0]] < (step + 1) / steps]
        elif isinstance(rule, ConfidenceAmongAll):
            stay = len(open_) * (steps - step - 1) // steps
            least_sure = sorted(options, key=lambda o: (o[2], -o[0]))[:stay]
            chosen_now = [o for o in options if o[0] in masked and o not in least_sure]
        elif isinstance(rule, Threshold):
            n = max(least, 1, sum(o[2] > rule.confidence_threshold for o in options))
            chosen_now = sorted(options, key=lambda o: (-o[2], o[0]))[:n]
        else:
            keys = {Confidence: lambda o: -o[2], Margin: lambda o: -o[3], Entropy: lambda o: o[4],
                    Random: lambda o: -order[o[0]]}  # fmt: skip
            chosen_now = sorted(options, key=lambda o: (keys[type(rule)](o), o[0]))[: max(least, rule.n)]
        for i, token, *_ in chosen_now:
            x[i] = token
            masked.remove(i)
    return x[open_].tolist(), forwards


RULES = [Threshold(0.9), Threshold(0.02), Confidence(1), Confidence(3), Entropy(2), Margin(2), Random(2)]
CANVASES = [canvas(1, 9), canvas(4, 7, 5), canvas(6, 12, 2), canvas(2, 5, 9)]


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_ragged_batch_equals_each_row_by_definition(rule, shift: bool) -> None:
    net = network()
    for steps in (None, 3):
        got = sample_bidirectional(net, config(shift), CANVASES, select=rule, max_denoising_steps=steps)
        for row, one in enumerate(CANVASES):
            tokens, forwards = slow(net, config(shift), one, rule, steps=steps, row=row)
            assert got.new_tokens[row] == tokens
            assert got.num_forwards[row] == forwards
            if not isinstance(rule, Random):  # whose order is a function of the row's number
                alone = sample_bidirectional(net, config(shift), [one], select=rule, max_denoising_steps=steps)
                assert alone.new_tokens == [tokens]
                assert alone.num_forwards.tolist() == [forwards]
    assert got.num_prefill_forwards.tolist() == [0, 0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("rule", [Ancestral(), Confidence(2), ConfidenceAmongAll()])
def test_sampled_batch_equals_each_row_with_its_number(rule) -> None:
    net, options = network(), {"temperature": 0.8, "top_k": 20, "seed": 7}
    got = sample_bidirectional(net, config(), CANVASES, select=rule, max_denoising_steps=5, **options)
    for row, one in enumerate(CANVASES):
        alone = sample_bidirectional(
            net, config(), [one], select=rule, max_denoising_steps=5, row_numbers=[row], **options
        )
        assert alone.new_tokens[0] == got.new_tokens[row]
        assert got.new_tokens[row] == slow(net, config(), one, rule, steps=5, row=row, **options)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3", "mistral_window"])
def test_every_kind_of_architecture_equals_the_definition(name: str) -> None:
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    got = sample_bidirectional(net, config(), CANVASES[:2], select=Confidence(2))
    assert got.new_tokens == [slow(net, config(), one, Confidence(2))[0] for one in CANVASES[:2]]


# --- committed tokens in the ranking


def released_ranking(scores: torch.Tensor, masked: torch.Tensor, open_: torch.Tensor, t: int, steps: int):
    """Which positions are committed at loop index t: the released code's `topk_masking`, by its definition."""
    scores = torch.where(open_, scores, 1000.0)
    cutoff = scores.sort().values[int(open_.sum()) * t // steps]
    return masked & ~(scores < cutoff)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 20), steps=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_ranking_of_all_is_the_released_codes(n: int, steps: int, seed: int) -> None:
    """Scores that change at random from forward to forward; prompt positions at both ends."""
    generator, rule = torch.Generator().manual_seed(seed), ConfidenceAmongAll()
    open_ = torch.tensor([False, *[True] * n, False])
    masked, none = open_.clone(), torch.zeros(1, dtype=torch.long)
    logits = torch.zeros(1, 5)
    for t in range(steps - 1, -1, -1):
        p = torch.rand(n + 2, generator=generator, dtype=torch.float64)
        progress = (steps - t) / steps
        candidates = Candidates(masked[None], (p * open_)[None], logits, p[None], progress, open_[None])
        commit = rule(candidates, none)[0]
        assert torch.equal(commit, released_ranking(p.log(), masked, open_, t, steps))
        per_row = replace(candidates, progress=torch.tensor([[progress]], dtype=torch.float64))
        assert torch.equal(commit, rule(per_row, none)[0])
        masked = masked & ~commit
        assert int(masked.sum()) <= n * t // steps
    assert not masked.any()


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_ranking_of_all_on_ragged_canvases_equals_each_row_by_definition(shift: bool, steps: int) -> None:
    net, rule, ahead = network(), ConfidenceAmongAll(), 0
    got = sample_bidirectional(net, config(shift), CANVASES, select=rule, max_denoising_steps=steps)
    for row, one in enumerate(CANVASES):
        tokens, forwards = slow(net, config(shift), one, rule, steps=steps, row=row)
        assert got.new_tokens[row] == tokens
        assert got.num_forwards[row] == forwards
        ahead += tokens != slow(net, config(shift), one, Confidence(1), steps=steps, row=row)[0]
    assert ahead > 0 or steps == 1  # another rule than `Confidence`, which is the same where T is 1


@torch.no_grad()
def test_ranking_of_all_scores_at_the_sampling_temperature() -> None:
    rule, different = ConfidenceAmongAll(), 0
    for seed in range(4):
        options = {"steps": 6, "temperature": 0.2, "seed": seed}
        got = sample_bidirectional(
            NET, config(), CANVASES, select=rule, max_denoising_steps=6, temperature=0.2, seed=seed
        )
        expected = [slow(NET, config(), one, rule, row=row, **options)[0] for row, one in enumerate(CANVASES)]
        assert got.new_tokens == expected
        ones = [slow(NET, config(), one, Confidence(1), row=row, **options)[0] for row, one in enumerate(CANVASES)]
        different += expected != ones
    assert different


@torch.no_grad()
def test_ranking_of_all_with_guidance_equals_the_definition() -> None:
    got = sample_bidirectional(NET, config(), CANVASES, select=ConfidenceAmongAll(), max_denoising_steps=4,
                               guidance_scale=2.0)  # fmt: skip
    for row, one in enumerate(CANVASES):
        assert got.new_tokens[row] == slow(NET, config(), one, ConfidenceAmongAll(), steps=4, row=row, scale=2.0)[0]


def test_ranking_of_all_needs_a_canvas_and_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"ConfidenceAmongAll\(\) ranks committed tokens too, which Blocks does not"):
        Blocks(select=ConfidenceAmongAll())
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="which a whole canvas alone scores again"):
        ConfidenceAmongAll()(Candidates(one > 0, one.double(), one, one.double(), 1.0), torch.zeros(1))
    for rule in (Ancestral(), ConfidenceAmongAll()):
        with pytest.raises(ValueError, match=r"select=\w+\(\) needs max_denoising_steps, which is None"):
            WholeCanvas(select=rule)
    with pytest.raises(ValueError, match="shares its commits out over max_denoising_steps, which is None"):
        sample_bidirectional(NET, config(), [canvas(2, 8)], select=ConfidenceAmongAll())
    with pytest.raises(ValueError, match="does not go with remask"):
        sample_bidirectional(NET, config(), [canvas(2, 8)], select=ConfidenceAmongAll(), remask=Remask(),
                             max_denoising_steps=9)  # fmt: skip


# --- pace


@pytest.mark.parametrize("rule", [Confidence(1), Random(1), Entropy(1), Margin(1), Threshold(1.0)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7, 12])
def test_t_steps_are_t_forwards_and_keep_the_papers_pace(rule, steps: int) -> None:
    left = [12]
    sample = sample_bidirectional(network(), config(), [canvas(2, 12)], select=rule, max_denoising_steps=steps,
                                  callback=lambda _r, where, _t: left.append(left[-1] - len(where)))  # fmt: skip
    assert sample.num_forwards.tolist() == [steps]
    for t, n in zip(range(steps, -1, -1), left, strict=True):
        assert n <= 12 * t // steps  # floor(N t / T)
    if steps == 12:
        assert left == list(range(12, -1, -1))


def test_ancestral_reveals_each_token_at_a_uniform_step() -> None:
    """So N t / T tokens are masked, on average, when t of T steps are left; and nothing committed changes."""
    steps, n, runs = 6, 30, 60
    masked = torch.zeros(steps)
    for seed in range(runs):
        counts: list[int] = []

        class Counting:
            device = torch.device("cpu")

            def __call__(self, ids, _layout, _pattern, *, rows=None, past=None, counts=counts):  # noqa: ARG002
                counts.append(int((ids == MASK).sum()))
                return torch.randn(len(rows), 97, generator=torch.Generator().manual_seed(0)).index_fill(
                    1, torch.tensor([MASK]), -torch.inf
                )

        got = sample_bidirectional(Counting(), config(), [canvas(1, n)], select=Ancestral(), max_denoising_steps=steps,
                                   seed=seed)  # fmt: skip
        assert got.num_forwards[0] == len(counts) <= steps
        masked[: len(counts)] += torch.tensor(counts) / runs
        assert counts == sorted(counts, reverse=True)
    for step in range(steps):
        share = (steps - step) / steps
        assert float(masked[step]) == pytest.approx(n * share, abs=4 * math.sqrt(n * share * (1 - share) / runs) + 1e-4)


def test_ancestral_sampling_has_the_law_of_its_process() -> None:
    """Two open positions, three tokens, two steps: the joint distribution, enumerated over which is revealed when."""
    from scipy import stats

    table = torch.randn(5, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class Toy:
        """Logits of a position from the tokens on both sides of it (0..2, 3 is the mask, 4 the begin token)."""

        device = torch.device("cpu")

        def __call__(self, ids, _layout, _pattern, *, rows=None, past=None):  # noqa: ARG002
            right = torch.nn.functional.pad(ids[:, 2:], (0, 2), value=4)
            logits = torch.nn.functional.pad(table[ids, right], (0, 1), value=-torch.inf)
            return logits.flatten(0, 1)[rows]

    chosen = DiffusionConfig(3, "bidirectional", None, None, True, "test", "0")
    p = table.softmax(-1)
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            apart = p[4, 3, a] * p[3, 4, b]
            joint[a, b] = 0.5 * apart + 0.25 * p[4, 3, a] * p[a, 4, b] + 0.25 * p[3, 4, b] * p[4, b, a]
    assert float(joint.sum()) == pytest.approx(1.0)
    n = 6000
    one = Canvas.around(torch.tensor([4]), 2)
    got = sample_bidirectional(Toy(), chosen, [one] * n, select=Ancestral(), max_denoising_steps=2, temperature=1.0)
    counts = torch.zeros(3, 3)
    for a, b in got.new_tokens:
        counts[a, b] += 1
    assert stats.chisquare(counts.flatten().numpy(), (n * joint).flatten().numpy()).pvalue > 1e-3
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert stats.chisquare(counts.flatten().numpy(), (n * independent).flatten().numpy()).pvalue < 1e-3


# --- properties

NET = network(dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=3),
    rule=st.sampled_from([*RULES, EntropyBound(3.0), Ancestral(), ConfidenceAmongAll()]),
    steps=st.sampled_from([None, 1, 2]),
    temperature=st.sampled_from([0.0, 1.0]),
    remask=st.sampled_from(
        [None, None, Remask("cap", 0.3), Remask("rescale", 0.5), Remask("confidence"), Remask("loop")]
    ),
    scale=st.sampled_from([1.0, 2.5]),
    shift=st.booleans(),
)
def test_given_tokens_never_change_and_no_mask_is_left(shapes, rule, steps, temperature, remask, scale, shift) -> None:
    canvases = [canvas(*shape) for shape in shapes]
    if remask is not None:
        rule, steps = None, 14
    elif isinstance(rule, Ancestral | ConfidenceAmongAll) or steps == 2:
        steps = 1 if max(n for _, n, _ in shapes) == 1 else 2
    last: dict[tuple[int, int], int] = {}

    def record(row: int, positions: list[int], tokens: list[int]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            assert not canvases[row].fixed[position]
            assert remask is not None or (row, position) not in last
            last[row, position] = token

    got = sample_bidirectional(
        NET, config(shift), canvases, select=rule, max_denoising_steps=steps, temperature=temperature, remask=remask,
        guidance_scale=scale, callback=record, seed=1,
    )  # fmt: skip
    for row, (one, tokens) in enumerate(zip(canvases, got.new_tokens, strict=True)):
        positions = (~one.fixed).nonzero()[:, 0].tolist()
        assert len(tokens) == len(positions)
        assert MASK not in tokens
        assert [last[row, position] for position in positions] == tokens
        if steps is not None:
            assert got.num_forwards[row] <= steps * (1 if scale == 1 else 2)


# --- remasking


@pytest.mark.parametrize(
    ("remask", "progress", "after", "reveal", "again"),
    [
        (Remask("cap", 0.1), 0.5, 0.6, (0.6 - 0.9 * 0.5) / 0.5, 0.1),
        (Remask("cap", 0.9), 0.5, 0.6, (0.6 - 0.2 * 0.5) / 0.5, 0.8),  # the limit: min(1, (1 - .6) / .5)
        (Remask("rescale", 0.5), 0.5, 0.6, (0.6 - 0.6 * 0.5) / 0.5, 0.4),
        (Remask("cap", 0.0), 0.5, 0.6, 0.2, 0.0),  # plain: (t - s) / t
        (Remask("cap", 0.5), 0.75, 1.0, 1.0, 0.0),  # the last step fills everything
        (Remask("loop", 0.02), 0.0, 0.225, 0.45, 0.0),
        (Remask("loop", 0.02), 0.5, 0.6, 0.02 * 0.9 / 0.1, 0.02),
        (Remask("loop", 0.02), 0.975, 1.0, 1.0, 0.0),
    ],
)
def test_remasking_rates_are_the_papers(remask, progress, after, reveal, again) -> None:
    confidence = torch.full((1, 4), 0.5, dtype=torch.float64)
    got = remask.rates(progress, after, torch.ones(1, 4, dtype=torch.bool), confidence)
    torch.testing.assert_close(got[0], torch.full_like(confidence, reveal))
    torch.testing.assert_close(got[1], torch.full_like(confidence, again))


def test_remasking_by_confidence_takes_back_the_least_sure_more_often() -> None:
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.0]], dtype=torch.float64)
    revealed = torch.tensor([[True, True, True, False]])
    reveal, again = Remask("confidence").rates(0.5, 0.6, revealed, confidence)
    weights = torch.exp(-confidence[0, :3])
    torch.testing.assert_close(again[0, :3], 0.8 * weights / weights.sum())
    assert again[0, 3] == 0
    assert reveal[0, 3] == pytest.approx(0.2)
    assert not Remask("confidence").rates(0.0, 0.1, revealed & False, confidence)[1].any()


@pytest.mark.parametrize("remask", [Remask("cap", 0.2), Remask("rescale", 0.5), Remask("loop", 0.05)])
def test_remasking_keeps_the_share_of_clean_tokens(remask: Remask) -> None:
    steps, n, rows = 20, 40, 24
    shares: list[float] = []

    class Counting:
        device = torch.device("cpu")

        def __call__(self, ids, layout, _pattern, *, rows=None, past=None):  # noqa: ARG002
            shares.append(float((ids != MASK)[:, 1:].double().mean()))
            logits = torch.zeros(len(rows), 97, dtype=torch.float64)
            logits[:, MASK] = -torch.inf
            return logits

    got = sample_bidirectional(Counting(), config(), [canvas(1, n)] * rows, remask=remask, max_denoising_steps=steps,
                               temperature=1.0)  # fmt: skip
    for step, share in enumerate(shares):
        expected = remask.alpha(step / steps)
        spread = math.sqrt(expected * (1 - expected) / (n * rows))
        assert share == pytest.approx(expected, abs=4.5 * spread + 1e-9)
    assert all(MASK not in tokens for tokens in got.new_tokens)


@pytest.mark.parametrize("variant", ["cap", "rescale", "confidence", "loop"])
def test_a_remasked_ragged_batch_equals_each_row_with_its_number(variant: str) -> None:
    net, options = network(), {"remask": Remask(variant, 0.3), "max_denoising_steps": 15, "temperature": 1.0, "seed": 3}
    got = sample_bidirectional(net, config(), CANVASES, **options)
    for row, one in enumerate(CANVASES):
        alone = sample_bidirectional(net, config(), [one], row_numbers=[row], **options)
        assert alone.new_tokens[0] == got.new_tokens[row]
        assert alone.num_forwards[0] == got.num_forwards[row]


def test_a_remasked_position_is_drawn_with_fresh_noise() -> None:
    assert torch.equal(gumbel(9, 1, 2, 3), gumbel(9, 1, 2, 3, draw=0))
    assert not torch.equal(gumbel(9, 1, 2, 3), gumbel(9, 1, 2, 3, draw=1))
    seen: dict[int, list[int]] = {}

    class Flat:
        device = torch.device("cpu")

        def __call__(self, _ids, _layout, _pattern, *, rows=None, past=None):  # noqa: ARG002
            return torch.zeros(len(rows), 97, dtype=torch.float64).index_fill(1, torch.tensor([MASK]), -torch.inf)

    def record(_row: int, positions: list[int], tokens: list[int]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            seen.setdefault(position, []).append(token)

    sample_bidirectional(Flat(), config(), [canvas(1, 20)], remask=Remask("rescale", 0.9), max_denoising_steps=20,
                         temperature=1.0, callback=record)  # fmt: skip
    for position, tokens in seen.items():
        noise = [gumbel(97, 0, 0, position, draw) for draw in range(len(tokens))]
        assert tokens == [int(g.index_fill(0, torch.tensor([MASK]), -torch.inf).argmax()) for g in noise]
    assert max(map(len, seen.values())) > 2


# --- guidance


@torch.no_grad()
def test_guided_canvas_equals_its_definition_and_counts_two() -> None:
    net = network()
    plain = sample_bidirectional(net, config(), CANVASES, select=Confidence(2))
    got = sample_bidirectional(net, config(), CANVASES, select=Confidence(2), guidance_scale=2.0)
    for row, one in enumerate(CANVASES):
        assert (got.new_tokens[row], int(got.num_forwards[row])) == slow(net, config(), one, Confidence(2), scale=2.0)
    assert got.num_forwards.tolist() == [2 * n for n in plain.num_forwards.tolist()]
    assert got.new_tokens != plain.new_tokens
    ignored = sample_bidirectional(net, config(), [CANVASES[1]], select=Confidence(2), guidance_scale=0.0)
    hidden = Canvas(torch.where(torch.arange(16) > 0, MASK, CANVASES[1].tokens), CANVASES[1].fixed)
    assert ignored.new_tokens == sample_bidirectional(net, config(), [hidden], select=Confidence(2)).new_tokens


@torch.no_grad()
def slow_blocks(net, chosen, prompt, span, suffix=(), *, scale=1.0, n=1) -> list[int]:
    """Block sampling of one row without a cache: the whole text in one pass, the active block noisy."""
    size, start = chosen.block_size, len(prompt)
    known = torch.cat([prompt, torch.full((span,), MASK), torch.tensor(suffix, dtype=torch.long)])
    x = torch.cat([known, torch.full((-len(known) % size,), MASK)])[None]
    for first in range(start // size * size, start + span, size):
        stop = first + size
        layout = Layout.of(torch.arange(stop)[None])
        layout = layout._replace(noisy=layout.position >= first)
        while masked := [i for i in range(max(first, start), min(stop, start + span)) if x[0, i] == MASK]:
            logits = net(x[:, :stop], layout, chosen.pattern)[0]
            if scale != 1:
                bare = x[:, :stop].clone()
                bare[0, 1:start] = MASK
                without = net(bare, layout, chosen.pattern)[0]
                logits = without + scale * (logits - without)
                logits[:, MASK] = -torch.inf
            ranked = sorted((-float(logits[i - chosen.shift].softmax(-1).max()), i) for i in masked)[:n]
            for _, i in ranked:
                x[0, i] = logits[i - chosen.shift].argmax()
    return x[0, start : start + span].tolist()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("clean", ["block_causal", "causal"])
def test_guided_blocks_equal_the_uncached_definition_and_count_two(shift: bool, clean: str) -> None:
    net, chosen = network(), block_config(4, shift=shift, clean=clean)
    prompts = [random_tokens(n, seed=n) for n in (1, 5, 11)]
    plain = sample_blocks(net, chosen, prompts, max_new_tokens=9, select=Confidence(1))
    got = sample_blocks(net, chosen, prompts, max_new_tokens=9, select=Confidence(1), guidance_scale=1.7)
    assert got.new_tokens == [slow_blocks(net, chosen, prompt, 9, scale=1.7) for prompt in prompts]
    assert got.num_forwards.tolist() == [2 * n for n in plain.num_forwards.tolist()]
    assert got.num_prefill_forwards.tolist() == [0, 2, 2]
    assert got.new_tokens[1:] != plain.new_tokens[1:]


# --- infilling block by block


def test_block_infilling_sees_the_suffix_inside_the_active_block_only() -> None:
    net, chosen = network(), block_config(8)
    prefix, suffix = random_tokens(5), random_tokens(12, seed=3)
    got = sample_blocks(net, chosen, [prefix, prefix[:2]], max_new_tokens=5, suffixes=[suffix, suffix[:3]],
                        select=Confidence(1))  # fmt: skip
    assert got.new_tokens[0] == slow_blocks(net, chosen, prefix, 5, suffix.tolist())
    assert got.new_tokens[1] == slow_blocks(net, chosen, prefix[:2], 5, suffix[:3].tolist())
    assert got.new_tokens[0] != slow_blocks(net, chosen, prefix, 5)
    later = suffix.clone()
    later[6:] = 5  # span and suffix: positions 5..9 and 10.., the block of the span's end closes at 16
    assert (
        sample_blocks(net, chosen, [prefix], max_new_tokens=5, suffixes=[later], select=Confidence(1)).new_tokens[0]
        == (got.new_tokens[0])
    )


# --- one canvas after the other, and where a row ends


def test_canvases_follow_each_other_and_a_row_is_its_own() -> None:
    net, options = network(), {"select": Confidence(2), "temperature": 0.9, "seed": 3}
    prompts = [random_tokens(n, seed=n) for n in (2, 5)]
    got = sample_canvases(net, config(), prompts, max_new_tokens=11, block_size=4, max_denoising_steps=2, **options)
    for row, prompt in enumerate(prompts):
        text, forwards = prompt, 0
        for n, steps in ((4, 2), (4, 2), (3, 2)):
            part = sample_bidirectional(net, config(), [Canvas.around(text, n)], row_numbers=[row],
                                        max_denoising_steps=steps, **options)  # fmt: skip
            text, forwards = torch.cat([text, torch.tensor(part.new_tokens[0])]), forwards + int(part.num_forwards[0])
        assert got.new_tokens[row] == text[len(prompt) :].tolist()
        assert got.num_forwards[row] == forwards
    whole = sample_canvases(net, config(), prompts, max_new_tokens=11, **options)
    assert (
        whole.new_tokens
        == sample_bidirectional(net, config(), [Canvas.around(p, 11) for p in prompts], **options).new_tokens
    )
    queued = sample_canvases(net, config(), prompts, max_new_tokens=11, batch_size=1, **options)
    assert queued.new_tokens == whole.new_tokens
    cut = sample_canvases(net, config(), prompts, max_new_tokens=11, context_length=9, **options)
    assert [len(new) for new in cut.new_tokens] == [7, 4]


@pytest.mark.parametrize("size", [None, 4])
def test_an_end_token_ends_a_row_once_everything_before_it_stands(size: int | None) -> None:
    net, prompts = network(), [random_tokens(n, seed=n) for n in (3, 6, 9)]
    options = {"max_new_tokens": 14, "block_size": size, "select": Confidence(1)}
    free = sample_canvases(net, config(), prompts, **options)
    end = free.new_tokens[1][5]
    got = sample_canvases(net, config(), prompts, end_token_ids=[end], **options)
    for full, new in zip(free.new_tokens, got.new_tokens, strict=True):
        assert new == (full[: full.index(end) + 1] if end in full else full)
    assert got.num_forwards.sum() < free.num_forwards.sum()
    stopped = sample_canvases(net, config(), prompts, stop=lambda row, new: 6 if row == 1 and len(new) >= 6 else None,
                              **options)  # fmt: skip
    assert stopped.new_tokens == [free.new_tokens[0], free.new_tokens[1][:6], free.new_tokens[2]]


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_denoising_steps": 9}, "max_denoising_steps 9 exceeds the 8 tokens to fill in"),
        ({"max_denoising_steps": 0}, "max_denoising_steps 0 must be at least 1"),
        ({"select": Ancestral()}, "Ancestral draws each position's step out of max_denoising_steps, which is None"),
        ({"remask": Remask()}, "remask needs max_denoising_steps"),
        ({"remask": Remask(), "max_denoising_steps": 20, "select": Confidence(1)}, "does not go with remask"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_bad_requests_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_bidirectional(NET, config(), [canvas(2, 8), canvas(3, 4, 2)], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample_bidirectional(NET, config(), [Canvas.around(random_tokens(0), 4)]), "with an open position"),
        (lambda: sample_bidirectional(NET, config(), [canvas(4, 0, 3)]), "num_tokens 0 leaves nothing"),
        (
            lambda: sample_canvases(NET, config(), [random_tokens(3)], max_new_tokens=8, block_size=4,
                                    max_denoising_steps=5),
            "max_denoising_steps 5 exceeds the 4 tokens",
        ),
        (lambda: sample_canvases(NET, config(), [random_tokens(3)], max_new_tokens=8, block_size=0), "block_size 0"),
        (lambda: Entropy(0), "n 0 must"),
        (lambda: Margin(0), "n 0 must"),
        (lambda: Remask("often"), "variant 'often' is unknown"),
        (lambda: Remask(eta=1.5), r"eta 1.5 must lie in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
