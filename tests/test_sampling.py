"""Samplers against slow references: no cache, no batch, no parallel commits."""

from __future__ import annotations

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, gumbel, network, random_tokens, tiny_model
from decode import sample_autoregressive, sample_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import hf
from unmask.core.attention import Layout, causal
from unmask.sampling import Candidates, Confidence, Entropy, EntropyBound, Factor, Margin, Random, Threshold
from unmask.sampling.tokens import choose_tokens


def uncached(net, config, prompt, *, max_new_tokens, threshold=None, n=None, temperature=0.0, seed=0, context=None,
             window=None, row=0):  # fmt: skip
    """Block sampling of one row by its definition: the whole text in one pass for every step."""
    size, end = config.block_size, len(prompt) + max_new_tokens
    end = end if context is None else min(end, context)
    width = -(-end // size) * size
    width = width if context is None else min(width, context)
    x = torch.cat([prompt, torch.full((width - len(prompt),), config.mask_token_id)])[None]
    forwards = 0
    for start in range(len(prompt) // size * size, width, size):
        stop = min(start + size, width)
        while True:
            masked = [i for i in range(start, stop) if i < end and x[0, i] == config.mask_token_id and i >= len(prompt)]
            if not masked:
                break
            visible = stop
            if window is not None and len(masked) >= window:
                visible = masked[window - 1] + 1
                masked = masked[:window]
            part = x[:, :visible]
            layout = Layout.of(torch.arange(visible)[None])
            noisy = layout.position >= start
            forwards += 1
            pattern = config.pattern
            if config.attention == "two_stream":
                logits = net(part, layout._replace(noisy=noisy), pattern)[0]
            else:
                logits = net(part, layout, pattern)[0]
            options = []
            for i in masked:
                own = logits[i - config.shift]
                scores = own if temperature == 0 else own / temperature + gumbel(len(own), seed, row, i)
                token = int(scores.argmax())
                options.append((float(own.softmax(-1)[token]), i, token))
            ranked = sorted(options, key=lambda option: (-option[0], option[1]))
            take = n if n is not None else max(1, sum(p > threshold for p, _, _ in ranked))
            for _, i, token in ranked[:take]:
                x[0, i] = token
    return x[0, len(prompt) : end].tolist(), forwards


@torch.no_grad()
def check(net, config, lengths, **options) -> None:
    prompts = [random_tokens(n, seed=n) for n in lengths]
    reference = dict(options)
    rule = reference.pop("select")
    reference |= {"threshold": rule.confidence_threshold} if isinstance(rule, Threshold) else {"n": rule.n}
    together = sample_blocks(net, config, prompts, **options)
    for i, prompt in enumerate(prompts):
        if not options.get("temperature"):
            expected, forwards = uncached(net, config, prompt, **reference)
            assert together.new_tokens[i] == expected
            assert together.num_forwards[i] == forwards
        alone = sample_blocks(net, config, [prompt], **options)
        if not options.get("temperature"):  # noise is a function of the row's number in the batch
            assert alone.new_tokens[0] == together.new_tokens[i]
            assert alone.num_forwards[0] == together.num_forwards[i]
        elif i == 0:
            assert alone.new_tokens[0] == together.new_tokens[0] == uncached(net, config, prompt, **reference)[0]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("attention", "clean"), [("two_stream", "block_causal"), ("two_stream", "causal"), ("block_causal", None)]
)
@pytest.mark.parametrize("select", [Threshold(0.02), Threshold(0.9), Confidence(2)])
def test_cached_ragged_batch_equals_uncached_rows(select, attention, clean, shift) -> None:
    config = block_config(4, shift=shift, attention=attention, clean=clean)
    check(network(), config, (1, 4, 6, 11), max_new_tokens=13, select=select)


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n not in ("qwen3_moe", "mixtral", "gemma2")])
@pytest.mark.parametrize("shift", [False, True])
def test_cached_equals_uncached_on_every_architecture(name: str, shift: bool) -> None:
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    check(net, block_config(4, shift=shift), (3, 9), max_new_tokens=10, select=Threshold(0.03))


def test_a_row_that_ends_in_its_first_block_leaves_the_others_as_they_are() -> None:
    """The cache is empty then, and must forget the row all the same."""
    check(network(), block_config(8), (2, 6), max_new_tokens=5, select=Confidence(1))


def test_sampled_tokens_equal_uncached_with_the_same_noise() -> None:
    check(network(), block_config(4), (5, 9), max_new_tokens=9, select=Confidence(2), temperature=1.0, seed=5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_block_cut_by_the_context_equals_uncached(name: str) -> None:
    """The context of 128 ends inside a block of 24, where learned positions have no rows left."""
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    prompt, config = random_tokens(121), block_config(24)
    with torch.no_grad():
        got = sample_blocks(net, config, [prompt], max_new_tokens=99, context_length=128, select=Confidence(1))
        assert len(got.new_tokens[0]) == 7
        assert got.new_tokens[0] == uncached(net, config, prompt, max_new_tokens=99, n=1, context=128)[0]


def test_limits_of_the_threshold() -> None:
    net, config, prompts = network(), block_config(4), [random_tokens(4), random_tokens(8)]
    slow = sample_blocks(net, config, prompts, max_new_tokens=12, select=Threshold(1.0))
    assert slow.num_forwards.tolist() == [12, 12]  # one token a forward; cache writes ride along
    fast = sample_blocks(net, config, prompts, max_new_tokens=12, select=Threshold(0.0))
    assert fast.num_forwards.tolist() == [3, 3]  # one forward a block


def test_block_size_one_with_shift_equals_ar() -> None:
    net, config = network(), block_config(1, shift=True, clean="causal")
    prompts = [random_tokens(n, seed=n) for n in (2, 7)]
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 9, "temperature": temperature, "seed": 3}
        ar = sample_autoregressive(net, prompts, **options)
        assert sample_blocks(net, config, prompts, **options).new_tokens == ar.new_tokens


@torch.no_grad()
def test_ar_greedy_equals_stock_generate_and_counts_one_forward_a_token() -> None:
    net = network()
    prompts = [random_tokens(n, seed=n) for n in (1, 5, 9)]
    got = sample_autoregressive(net, prompts, max_new_tokens=10)
    for prompt, new in zip(prompts, got.new_tokens, strict=True):
        stock = net.model.generate(prompt[None], max_new_tokens=10, do_sample=False, eos_token_id=None,
                                   suppress_tokens=[MASK])  # fmt: skip
        assert new == stock[0, len(prompt) :].tolist()
    assert got.num_forwards.tolist() == [10, 10, 10]
    assert got.num_prefill_forwards.tolist() == [0, 1, 1]


@torch.no_grad()
def test_ar_sampling_is_exact_argmax_of_logits_plus_noise() -> None:
    net, prompt = network(), random_tokens(4)
    got = sample_autoregressive(net, [prompt], max_new_tokens=6, temperature=0.7, seed=11).new_tokens[0]
    x = prompt
    for _ in range(6):
        logits = net(x[None], Layout.of(torch.arange(len(x))[None]), causal)[0, -1]
        token = (logits / 0.7 + gumbel(len(logits), 11, 0, len(x))).argmax()
        x = torch.cat([x, token[None]])
    assert got == x[4:].tolist()


def test_gumbel_argmax_has_the_law_of_softmax_cut_by_top_p() -> None:
    from scipy import stats

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0], dtype=torch.float64)
    n = 20_000
    noise = torch.stack([gumbel(5, 0, 0, i) for i in range(n)])
    for temperature, top_p, kept in ((1.0, 1.0, 5), (1.0, 0.7, 2), (2.0, 0.9, 4)):
        tokens = choose_tokens(logits.expand(n, 5), temperature, top_p, noise)
        p = (logits / temperature).softmax(-1)[:kept]
        counts = torch.bincount(tokens, minlength=5)
        assert counts[kept:].sum() == 0
        assert stats.chisquare(counts[:kept].numpy(), (n * p / p.sum()).numpy()).pvalue > 1e-3


# --- a window inside the block, and rows that wait


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize(
    ("attention", "clean"), [("two_stream", "block_causal"), ("two_stream", "causal"), ("block_causal", None)]
)
def test_window_equals_a_block_that_ends_there(attention, clean, window: int, shift: bool) -> None:
    config = block_config(8, shift=shift, attention=attention, clean=clean)
    check(network(), config, (1, 4, 6, 11), max_new_tokens=21, select=Confidence(2), window=window)
    check(network(), config, (3, 16), max_new_tokens=21, select=Threshold(0.02), window=window)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mistral_window", "qwen3"])
def test_window_equals_its_definition_on_other_architectures(name: str) -> None:
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    check(net, block_config(8), (3, 9), max_new_tokens=18, select=Threshold(0.03), window=3)


def test_window_as_wide_as_the_block_changes_nothing() -> None:
    net, prompts = network(), [random_tokens(n, seed=n) for n in (2, 9)]
    for config in (block_config(8), block_config(8, shift=True)):
        plain = sample_blocks(net, config, prompts, max_new_tokens=17, select=Confidence(3))
        wide = sample_blocks(net, config, prompts, max_new_tokens=17, select=Confidence(3), window=8)
        assert wide.new_tokens == plain.new_tokens
        assert wide.num_forwards.tolist() == plain.num_forwards.tolist()
        narrow = sample_blocks(net, config, prompts, max_new_tokens=17, select=Confidence(3), window=3)
        assert narrow.new_tokens != plain.new_tokens


def test_window_opens_where_the_step_budget_asks_for_more() -> None:
    got = sample_blocks(network(), block_config(8), [random_tokens(8)], max_new_tokens=16, window=1,
                        max_denoising_steps=3)  # fmt: skip
    assert got.num_forwards.tolist() == [6]
    assert MASK not in got.new_tokens[0]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"shift": True}, {"temperature": 1.0}, {"guidance_scale": 1.5}])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_rows_that_wait_equal_rows_alone(batch_size: int, options: dict) -> None:
    """Seven prompts in fewer slots: tokens, forwards and callbacks are those of one batch and of each row alone."""
    net, options = network(), dict(options)
    config = block_config(4, shift=options.pop("shift", False))
    prompts = [random_tokens(n, seed=n) for n in (5, 2, 11, 4, 8, 1, 13)]
    free = sample_blocks(net, config, prompts, max_new_tokens=15, select=Threshold(0.02), seed=3, **options)
    end = free.new_tokens[1][4]
    seen: dict[int, dict[int, int]] = {}

    def record(row: int, positions: list[int], tokens: list[int]) -> None:
        seen.setdefault(row, {}).update(zip(positions, tokens, strict=True))

    common = options | {"max_new_tokens": 15, "select": Threshold(0.02), "seed": 3, "end_token_ids": [end]}
    together = sample_blocks(net, config, prompts, **common)
    queued = sample_blocks(net, config, prompts, batch_size=batch_size, callback=record, **common)
    assert queued.new_tokens == together.new_tokens
    assert queued.num_forwards.tolist() == together.num_forwards.tolist()
    assert queued.num_prefill_forwards.tolist() == together.num_prefill_forwards.tolist()
    for i, prompt in enumerate(prompts):
        assert [seen[i][len(prompt) + j] for j in range(len(queued.new_tokens[i]))] == queued.new_tokens[i]
        if not options.get("temperature"):
            alone = sample_blocks(net, config, [prompt], **common)
            assert alone.new_tokens[0] == queued.new_tokens[i]
            assert alone.num_forwards[0] == queued.num_forwards[i]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ar_rows_that_wait_equal_one_batch(temperature: float) -> None:
    prompts = [random_tokens(n, seed=n) for n in (5, 2, 11, 1, 8)]
    free = sample_autoregressive(NET, prompts, max_new_tokens=9)
    common = {"max_new_tokens": 9, "temperature": temperature, "end_token_ids": [free.new_tokens[1][3]], "seed": 1}
    net = network()
    together = sample_autoregressive(net, prompts, **common)
    for batch_size in (1, 2, 4):
        assert sample_autoregressive(net, prompts, batch_size=batch_size, **common).new_tokens == together.new_tokens


class Counting:
    """A network that counts its passes and the tokens in them."""

    def __init__(self, net: hf.HFNetwork) -> None:
        self.net, self.passes, self.tokens, self.device = net, 0, 0, net.device
        self.new_slots = net.new_slots

    def __call__(self, input_ids, layout, pattern, **options):
        self.passes += 1
        self.tokens += input_ids.numel()
        return self.net(input_ids, layout, pattern, **options)


def test_rows_of_different_progress_share_forwards_and_compute_no_more_than_alone() -> None:
    net, config = network(), block_config(4)
    prompts = [random_tokens(4 * n, seed=n) for n in (1, 2, 3)]
    common = {"max_new_tokens": 24, "select": Threshold(0.08)}
    alone = [Counting(net) for _ in prompts]
    for prompt, counting in zip(prompts, alone, strict=True):
        sample_blocks(counting, config, [prompt], **common)
    together = Counting(net)
    got = sample_blocks(together, config, prompts, **common)
    assert len(set(got.num_forwards.tolist())) > 1  # else nothing is shown
    assert together.passes == int(got.num_forwards.max()) + 1  # and one prefill: nobody waits for a block-mate
    assert together.tokens == sum(c.tokens for c in alone) + 3 * 12 - 24  # the ragged prefill's padding


# --- where a row ends


def test_end_token_ends_a_row_alone_and_only_once_everything_before_it_stands() -> None:
    net, config = network(), block_config(4)
    prompts = [random_tokens(n, seed=n) for n in (5, 6, 11)]
    free = sample_blocks(net, config, prompts, max_new_tokens=16, select=Threshold(0.0))
    end = free.new_tokens[1][4]
    cut = sample_blocks(net, config, prompts, max_new_tokens=16, select=Threshold(0.0), end_token_ids=[end])
    for full, got in zip(free.new_tokens, cut.new_tokens, strict=True):
        expected = full[: full.index(end) + 1] if end in full else full
        assert got == expected
    assert cut.num_forwards[1] < free.num_forwards[1]


def test_finished_rows_leave_the_batch_and_change_no_other() -> None:
    net = network()
    prompts = [random_tokens(n, seed=n) for n in (3, 5, 8)]
    free = sample_autoregressive(net, prompts, max_new_tokens=12)
    end = free.new_tokens[0][2]
    got = sample_autoregressive(net, prompts, max_new_tokens=12, end_token_ids=[end])
    for full, new in zip(free.new_tokens, got.new_tokens, strict=True):
        assert new == (full[: full.index(end) + 1] if end in full else full)
    assert got.num_forwards.tolist() == [len(new) for new in got.new_tokens]


def test_stop_sees_only_what_is_final_and_from_the_left() -> None:
    net, config, prompt = network(), block_config(4), random_tokens(4)
    free = sample_blocks(net, config, [prompt], max_new_tokens=12).new_tokens[0]
    seen: list[list[int]] = []

    def stop(_row: int, new: list[int]) -> int | None:
        seen.append(new)
        return 6 if len(new) >= 6 else None

    got = sample_blocks(net, config, [prompt], max_new_tokens=12, stop=stop)
    assert got.new_tokens[0] == free[:6]
    assert all(new == free[: len(new)] for new in seen)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    new=st.integers(1, 14),
    size=st.sampled_from([1, 2, 3, 4, 8]),
    rule=st.sampled_from([Confidence(3), Threshold(0.02), Factor(1.5), EntropyBound(3.0), Random(2)]),
    shift=st.booleans(),
    steps=st.sampled_from([None, 1, 2, 5]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_no_sampler_leaves_a_mask_or_commits_twice(lengths, new, size, rule, shift, steps, temperature) -> None:
    commits: dict[tuple[int, int], int] = {}

    def record(row: int, positions: list[int], tokens: list[int]) -> None:
        for position, token in zip(positions, tokens, strict=True):
            assert (row, position) not in commits
            commits[row, position] = token

    prompts = [random_tokens(n, seed=n) for n in lengths]
    got = sample_blocks(
        NET, block_config(size, shift=shift), prompts, max_new_tokens=new, select=rule, max_denoising_steps=steps,
        temperature=temperature, seed=1, callback=record,
    )  # fmt: skip
    for row, (prompt, tokens) in enumerate(zip(prompts, got.new_tokens, strict=True)):
        assert len(tokens) == new
        assert MASK not in tokens
        assert [commits[row, len(prompt) + i] for i in range(new)] == tokens
        if steps is not None:
            blocks = (len(prompt) + new - 1) // size - len(prompt) // size + 1
            assert got.num_forwards[row] <= steps * blocks
    assert len(commits) == new * len(prompts)


NET = network(dtype=torch.float32)


# --- commit rules on hand-made candidates


def candidates(confidence: list[float], masked: list[bool] | None = None) -> Candidates:
    flags = torch.tensor([masked or [True] * len(confidence)])
    logits = torch.stack([torch.tensor([p, 1 - p]).double().log() for p in confidence])[flags[0]]
    return Candidates(flags, torch.tensor([confidence], dtype=torch.float64) * flags, logits,
                      torch.tensor([[0.3, 0.9, 0.1, 0.5]], dtype=torch.float64)[:, : len(confidence)])  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Confidence(1), [1]),
        (Confidence(2), [1, 3]),
        (Confidence(9), [0, 1, 2, 3]),
        (Threshold(0.9), [1]),  # strictly greater: 0.9 itself stays masked
        (Threshold(0.89), [1, 3]),
        (Threshold(1.0), [1]),
        (Threshold(0.0), [0, 1, 2, 3]),
        (Factor(0.31), [1, 3]),  # 2 * 0.05 = 0.10, 3 * 0.10 = 0.30, 4 * 0.40 = 1.6
        (Factor(0.05), [1]),
        (EntropyBound(0.0), [1]),
        (EntropyBound(0.2), [1, 3]),  # H = .198, .325, .673, .693: sum less the largest .198 | .523
        (Random(2), [1, 3]),
        (Entropy(2), [1, 3]),
        (Margin(3), [1, 2, 3]),
    ],
)
def test_rules_commit_what_they_say(rule, expected: list[int]) -> None:
    commit = rule(candidates([0.5, 0.95, 0.6, 0.9]), torch.zeros(1, dtype=torch.long))
    assert commit[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("rule", [Confidence(1), Threshold(1.0), Factor(1e-9), EntropyBound(0.0), Random(1), Entropy(1),
                                  Margin(1)])  # fmt: skip
def test_every_rule_honours_at_least_and_the_mask(rule) -> None:
    masked = [True, False, True, True]
    commit = rule(candidates([0.5, 0.95, 0.6, 0.9], masked), torch.tensor([2]))
    assert commit.sum() == 2
    assert not commit[0, 1]


def test_ties_go_to_the_lower_position() -> None:
    commit = Confidence(2)(candidates([0.5, 0.5, 0.5, 0.5]), torch.zeros(1, dtype=torch.long))
    assert commit[0].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Confidence(0), "n 0 must"),
        (lambda: Random(0), "n 0 must"),
        (lambda: Threshold(1.5), r"confidence_threshold 1.5 must lie in \[0, 1\]"),
        (lambda: Factor(0), "factor 0 must"),
        (lambda: EntropyBound(-1), "entropy_bound -1 must"),
        (lambda: sample_blocks(NET, block_config(), [random_tokens(3)], max_new_tokens=1, temperature=-1), "-1"),
        (lambda: sample_blocks(NET, block_config(), [random_tokens(3)], max_new_tokens=1, top_p=0), "top_p 0"),
        (
            lambda: sample_blocks(NET, block_config(), [random_tokens(3)], max_new_tokens=1, max_denoising_steps=0),
            "max_denoising_steps 0",
        ),
        (lambda: sample_blocks(NET, block_config(), [random_tokens(3)], max_new_tokens=1, window=0), "window 0 must"),
        (
            lambda: sample_blocks(
                NET, block_config(), [random_tokens(3)], max_new_tokens=1, window=2, suffixes=[random_tokens(2)]
            ),
            "window 2 would hide the suffix",
        ),
        (
            lambda: sample_blocks(NET, block_config(), [random_tokens(3)], max_new_tokens=1, batch_size=0),
            "batch_size 0",
        ),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
