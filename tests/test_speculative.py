"""Self-speculation against plain AR decoding, whatever the drafter."""

from __future__ import annotations

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, network, random_tokens, tiny_model
from decode import sample_autoregressive, sample_speculative
from torch import Tensor

from unmask import hf
from unmask.core.attention import PADDING, Layout, causal, dense, drafting, two_stream
from unmask.core.decoding import begin, speculate
from unmask.sampling import Coupled, Rejection
from unmask.sampling.acceptance import Noise
from unmask.sampling.cycles import adapted_length

LENGTHS = (1, 4, 6, 11, 3, 9, 2, 17)


def causal_config(block_size: int = 4, *, shift: bool = False, noisy: str = "bidirectional"):
    from dataclasses import replace

    return replace(block_config(block_size, shift=shift, clean="causal"), noisy_attention=noisy)


def check_equals_ar(net, config, lengths=LENGTHS, *, ends: tuple[int, ...] = (), **options) -> Tensor:
    """Speculative == AR in one ragged batch, and its first row alone; the counts add up."""
    prompts = [random_tokens(n, seed=n) for n in lengths]
    common = {k: options[k] for k in ("temperature", "top_p", "seed", "context_length") if k in options}
    expected = sample_autoregressive(net, prompts, max_new_tokens=14, end_token_ids=ends, **common).new_tokens
    got = sample_speculative(net, config, prompts, max_new_tokens=14, end_token_ids=ends, **options)
    assert got.new_tokens == expected
    gains = torch.arange(got.cycle_gains.shape[1])
    assert (got.cycle_gains * gains).sum(-1).tolist() == [len(new) for new in expected]
    cycles = got.cycle_gains.sum(-1)
    queued = sample_speculative(net, config, prompts, max_new_tokens=14, end_token_ids=ends, batch_size=2, **options)
    assert queued.new_tokens == expected
    if options.get("cycle") == "auto":  # it follows the clock
        return got.cycle_gains
    if options.get("cycle") == "one":
        assert torch.equal(got.num_forwards, cycles)
    else:
        assert ((got.num_forwards <= 2 * cycles) & (got.num_forwards >= 2 * cycles - 1)).all()
    assert queued.num_forwards.tolist() == got.num_forwards.tolist()
    assert torch.equal(queued.cycle_gains, got.cycle_gains)
    alone = sample_speculative(net, config, prompts[:1], max_new_tokens=14, end_token_ids=ends, **options)
    assert alone.new_tokens[0] == expected[0]
    assert alone.num_forwards[0] == got.num_forwards[0]
    return got.cycle_gains


@pytest.mark.parametrize("cycle", ["one", "two", "auto"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("noisy", ["bidirectional", "causal"])
@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_greedy_equals_ar_greedy(draft_length: int, noisy: str, shift: bool, cycle: str) -> None:
    config = causal_config(shift=shift, noisy=noisy)
    options = {"block_size": draft_length} if cycle == "auto" else {"draft_length": draft_length}
    check_equals_ar(network(), config, cycle=cycle, **options)


def test_long_drafts_in_one_forward_pad_the_rows_that_want_fewer() -> None:
    """13 tokens of 14 rows each are so many queries of a slot that they go through chunked attention."""
    check_equals_ar(network(), causal_config(16), draft_length=13, cycle="one", context_length=26)


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n not in ("qwen3_moe", "mixtral", "gemma2")])
@pytest.mark.parametrize(("cycle", "temperature"), [("two", 0.0), ("two", 1.0), ("one", 1.0)])
def test_speculative_equals_ar_on_every_architecture(name: str, cycle: str, temperature: float) -> None:
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    check_equals_ar(net, causal_config(), LENGTHS[:4], cycle=cycle, temperature=temperature, seed=3)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cycle", ["one", "two", "auto"])
def test_coupled_equals_ar_sampling_with_the_same_noise(
    temperature: float, top_p: float, shift: bool, cycle: str
) -> None:
    config = causal_config(shift=shift)
    check_equals_ar(network(), config, cycle=cycle, temperature=temperature, top_p=top_p, seed=7)


def test_float32_parts_from_ar_only_where_the_two_best_tokens_tie() -> None:
    net = network(dtype=torch.float32)
    prompts = [random_tokens(3 + n % 7, seed=n) for n in range(64)]
    ar = sample_autoregressive(net, prompts, max_new_tokens=40).new_tokens
    fast = sample_speculative(net, causal_config(), prompts, max_new_tokens=40).new_tokens
    same = 0
    for prompt, a, b in zip(prompts, ar, fast, strict=True):
        parted = next((i for i in range(40) if a[i] != b[i]), None)
        if parted is None:
            same += 1
            continue
        text = torch.cat([prompt, torch.tensor(a[:parted], dtype=torch.long)])
        with torch.no_grad():
            logits = net(text[None], Layout.of(torch.arange(len(text))[None]), causal)[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] < 1e-4
    assert same >= 60


def test_end_tokens_adaptive_lengths_and_the_context_change_nothing() -> None:
    net, config = network(), causal_config()
    free = sample_autoregressive(net, [random_tokens(n, seed=n) for n in LENGTHS], max_new_tokens=14).new_tokens
    check_equals_ar(net, config, ends=(free[1][4], free[3][0], free[5][7]))
    check_equals_ar(net, config, draft_length="auto", block_size=8)
    check_equals_ar(net, config, context_length=19)
    check_equals_ar(net, config, ends=(free[1][4], free[3][0], free[5][7]), cycle="one")
    check_equals_ar(net, config, draft_length="auto", block_size=8, cycle="one")
    check_equals_ar(net, config, context_length=19, cycle="one")
    gpt2 = hf.as_network(tiny_model(SUPPORTED["gpt2"](), torch.float64), MASK)  # positions end at 128, no rotation
    check_equals_ar(gpt2, config, (120, 127, 100, 3), context_length=128, draft_length=8)
    check_equals_ar(gpt2, config, (120, 127, 100, 3), context_length=128, draft_length=8, cycle="one")


def test_stop_and_callback_see_what_ar_shows_them() -> None:
    net, prompt = network(), random_tokens(5)
    seen: list[tuple[list[int], list[int]]] = []
    free = sample_autoregressive(net, [prompt], max_new_tokens=12).new_tokens[0]
    got = sample_speculative(
        net, causal_config(), [prompt], max_new_tokens=12, stop=lambda _row, new: 7 if len(new) >= 7 else None,
        callback=lambda _row, positions, tokens: seen.append((positions, tokens)),
    )  # fmt: skip
    assert got.new_tokens[0] == free[:7]
    assert [p for positions, _ in seen for p in positions] == list(range(5, 12))
    assert [t for _, tokens in seen for t in tokens] == free[:7]


class Echo:
    """A network whose drafts are always right: noisy rows know what AR will say, since the text only counts up."""

    device = torch.device("cpu")

    def __init__(self, shift: bool = False) -> None:
        self.shift = shift

    def new_slots(self, slots, columns):  # noqa: ARG002
        return Kept()

    def __call__(self, input_ids, layout, pattern, *, rows=None, past=None):  # noqa: ARG002
        ahead = (~layout.noisy | self.shift).long()
        logits = torch.nn.functional.one_hot((layout.position + ahead) % 90, 97).double() * 9
        return logits if rows is None else logits.flatten(0, 1)[rows]


class Kept:
    def keep_slots(self, keep: Tensor) -> None: ...


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("draft_length", [1, 4, 7])
def test_a_perfect_drafter_gains_its_draft_a_forward(draft_length: int, shift: bool) -> None:
    new = 1 + 3 * draft_length  # the first forward has no drafts to verify
    got = sample_speculative(Echo(shift), causal_config(shift=shift), [random_tokens(5)], max_new_tokens=new,
                             draft_length=draft_length, cycle="one")  # fmt: skip
    assert got.new_tokens[0] == list(range(5, 5 + new))
    gained = [0] * (draft_length + 1)
    gained[1] += 1
    gained[draft_length] += 3
    assert got.num_forwards.tolist() == [4]
    assert got.cycle_gains[0].tolist() == gained


@pytest.mark.parametrize("draft_length", [1, 4, 7])
def test_a_perfect_drafter_gains_its_draft_and_one_token_a_cycle(draft_length: int) -> None:
    new = 3 * (draft_length + 1)
    got = sample_speculative(Echo(), causal_config(), [random_tokens(5)], max_new_tokens=new, draft_length=draft_length)
    assert got.new_tokens[0] == list(range(5, 5 + new))
    assert got.num_forwards.tolist() == [6]
    assert got.cycle_gains[0].tolist() == [0] * (draft_length + 1) + [3]


def test_adapted_length_follows_the_last_cycle() -> None:
    assert adapted_length(4, 5, 16) == 8
    assert adapted_length(8, 9, 12) == 12
    assert adapted_length(8, 3, 16) == 4
    assert adapted_length(8, 1, 16) == 2


# --- the passes


def test_patterns_of_a_causal_noisy_block_equal_double_loops() -> None:
    layout = Layout.of(torch.arange(9)[None], noisy=True).concat(Layout.of(torch.arange(9)[None]))
    got = dense(two_stream(4, "causal", "causal"), layout, layout)[0]
    start = dense(drafting("causal"), layout, layout)[0]
    for row in range(18):
        for column in range(18):
            q, kv = row % 9, column % 9
            if row >= 9:  # clean: the AR model, and never a noisy token
                expected = drafted = column >= 9 and kv <= q
            elif column >= 9:
                expected, drafted = kv // 4 < q // 4, kv <= q
            else:
                expected, drafted = kv // 4 == q // 4 and kv <= q, kv <= q
            assert bool(got[row, column]) == expected
            assert bool(start[row, column]) == drafted


@torch.no_grad()
def test_drafting_pattern_equals_two_stream_on_an_aligned_block() -> None:
    for noisy in ("bidirectional", "causal"):
        clean = Layout.of(torch.arange(8)[None])
        block = Layout.of(torch.arange(8, 12)[None], noisy=True)
        both = clean.concat(block)
        assert torch.equal(dense(drafting(noisy), both, both), dense(two_stream(4, "causal", noisy), both, both))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("noisy", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral_window"])
@torch.no_grad()
def test_drafts_behind_each_token_equal_those_of_a_pass_of_its_own(name: str, noisy: str, shift: bool) -> None:
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    config = causal_config(shift=shift, noisy=noisy)
    prompts, tokens = [random_tokens(n, seed=n) for n in (9, 4, 7)], random_tokens(3, 4, seed=1)
    start, counts, wanted = torch.tensor([9, 4, 7])[:, None], torch.tensor([4, 2, 3]), torch.tensor([3, 3, 2])
    real = torch.arange(4) < counts[:, None]
    position = torch.where(real, start + torch.arange(4), start)
    past = begin(net, causal, prompts, columns=40)
    past.set_columns(13)
    got = speculate(net, config, past, tokens, Layout.of(position, torch.where(real, 0, PADDING)), wanted)
    for j in range(4):
        drafts = got.drafts(torch.full((3,), j))
        for i in torch.arange(3)[counts > j].tolist():
            fresh = begin(net, causal, [torch.cat([prompts[i], tokens[i, :j]])], columns=40)
            fresh.set_columns(20)
            layout = Layout.of(start[i : i + 1] + j)
            alone = speculate(net, config, fresh, tokens[i : i + 1, j : j + 1], layout, wanted[i : i + 1])
            assert (got.ar_logits[i, j] - alone.ar_logits[0, 0])[:MASK].abs().max() < 1e-10
            expected = alone.drafts(torch.tensor([0]))[0]
            assert (drafts[i, : wanted[i]] - expected)[:, :MASK].abs().max() < 1e-10


@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_drafts_equal_the_training_pass_on_an_aligned_block(shift: bool) -> None:
    from unmask.core.scoring import score, score_ar

    net, config, x0 = network(), causal_config(shift=shift), random_tokens(1, 12)
    layout, wanted = Layout.of(torch.arange(12)[None]), torch.arange(12)[None] >= 8
    past = begin(net, causal, x0[:, :7])
    past.columns = 12
    got = speculate(net, config, past, x0[:, 7:8], layout.subset(..., slice(7, 8)), 3)
    masked = score(net, config, x0.masked_fill(wanted, MASK), x0, layout, wanted)
    assert (got.drafts(torch.tensor([0]))[0] - masked[1:])[:, :MASK].abs().max() < 1e-10
    assert (got.ar_logits[0] - score_ar(net, x0, layout, layout.position == 8))[:, :MASK].abs().max() < 1e-10


@torch.no_grad()
def test_logits_that_are_read_later_equal_those_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, prompts = network(), [random_tokens(5)]
    assert net.plain_head
    at_once = sample_speculative(net, causal_config(), prompts, max_new_tokens=20, cycle="one")
    monkeypatch.setattr(type(net), "plain_head", property(lambda _: False))
    later = sample_speculative(net, causal_config(), prompts, max_new_tokens=20, cycle="one")
    assert later.new_tokens == at_once.new_tokens
    assert later.num_forwards.tolist() == at_once.num_forwards.tolist()


# --- distributions


class Chain:
    """An enumerable distribution over 3 symbols: AR rows depend on the token, noisy rows on the position alone."""

    device = torch.device("cpu")
    ar = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 1.5], [1.0, -1.0, 0.3]], dtype=torch.float64)
    noisy = torch.tensor([[0.5, 1.0, 0.2], [-1.0, 0.7, 1.0], [0.0, 0.0, 2.0]], dtype=torch.float64)

    def new_slots(self, slots, columns):  # noqa: ARG002
        return Kept()

    def __call__(self, input_ids, layout, pattern, *, rows=None, past=None):  # noqa: ARG002
        logits = torch.where(layout.noisy[..., None], self.noisy[layout.position % 3], self.ar[input_ids.clamp_max(2)])
        return logits if rows is None else logits.flatten(0, 1)[rows]


def chain_distribution(temperature: float, top_p: float) -> Tensor:
    from unmask.sampling.tokens import truncate

    p = truncate(Chain.ar, temperature, top_p).softmax(-1)
    return torch.einsum("a,ab,bc,cd->abcd", p[1], p, p, p).flatten()


@pytest.mark.parametrize("cycle", ["one", "two"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.85)])
@pytest.mark.parametrize("rule", [Rejection(), Coupled()])
def test_sampled_distribution_is_that_of_ar(rule, temperature: float, top_p: float, cycle: str) -> None:
    from scipy import stats

    n, expected_share = 4000, chain_distribution(temperature, top_p)
    prompts = [torch.tensor([1])] * n
    got = sample_speculative(Chain(), causal_config(3), prompts, max_new_tokens=4, acceptance=rule, cycle=cycle,
                             temperature=temperature, top_p=top_p, seed=5)  # fmt: skip
    ids = torch.tensor(got.new_tokens) @ torch.tensor([27, 9, 3, 1])
    counts = torch.bincount(ids, minlength=81).double()
    assert counts[expected_share == 0].sum() == 0
    likely = expected_share * n >= 5
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([expected_share[likely], expected_share[~likely].sum()[None]]) * n
    keep = expected > 0
    assert stats.chisquare(seen[keep].numpy(), expected[keep].numpy()).pvalue > 1e-3
    assert got.cycle_gains.sum() < 4 * n  # drafts were accepted at all


def test_rejection_accepts_one_minus_total_variation() -> None:
    n = 6000
    q, p = Chain.noisy[0], Chain.ar[0]
    position = torch.arange(2).expand(n, 2)
    noise = Noise(0, torch.arange(n), position)
    drafts = (q + noise.tokens(3)[:, :1]).argmax(-1)
    accepted, _ = Rejection()(drafts, q.expand(n, 1, 3), p.expand(n, 2, 3), torch.ones(n, 1, dtype=torch.bool), noise)
    rate = 1 - 0.5 * float((q.softmax(-1) - p.softmax(-1)).abs().sum())
    assert abs(float(accepted.double().mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5


@pytest.mark.parametrize("rule", [Coupled(), Rejection()])
def test_a_cycle_draws_the_noise_of_a_token_once(rule, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.sampling import tokens

    drawn: list[str] = []
    original = tokens.gumbels

    def counted(keys, *rest):
        drawn.extend(key[0] for key in keys)
        return original(keys, *rest)

    monkeypatch.setattr(tokens, "gumbels", counted)
    got = sample_speculative(network(), causal_config(), [random_tokens(5)], max_new_tokens=40, draft_length=6,
                             acceptance=rule, temperature=1.0)  # fmt: skip
    cycles = int(got.cycle_gains.sum())
    forwards = int(got.num_forwards[0])
    if isinstance(rule, Coupled):  # a draft's noise verifies it too, and the last token of a forward needs its own
        assert 6 * cycles < drawn.count("token") <= 5 * cycles + forwards
    else:
        assert drawn.count("token") == 5 * cycles
        assert drawn.count("residual") == forwards


# --- bad input


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (block_config(), {}, "clean attention 'block_causal' of two_stream attention is not the AR model"),
        (causal_config(), {"top_p": 2}, "top_p 2"),
    ],
)
def test_bad_values_are_named(config, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_speculative(network(), config, [random_tokens(3)], max_new_tokens=2, **options)
