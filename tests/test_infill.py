"""Whole canvases and infilling as a user meets them: `generate`, `infill`, and the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import MASK, STORIES, network, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.core.attention import Layout, bidirectional
from unmask.core.network import DiffusionConfig
from unmask.evaluation.likelihood import Document, continuation_nelbo, nelbo
from unmask.sampling import Ancestral, Confidence, Random, Remask, Threshold


@pytest.fixture(scope="session")
def whole(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent after a short conversion with `diffullama`."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    unmask.adapt(tokenizer_and_model, stories, "diffullama", folder, show_progress=False, max_tokens=8000,
                 max_length=64, batch_size=4, anneal_steps=5, learning_rate=1e-2, save_every=10**9)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def lm(whole: Path) -> unmask.DiffusionLM:
    return unmask.load(whole)


@pytest.fixture(scope="module")
def blocks(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted)


# --- generate


def test_generate_fills_one_canvas_in_t_forwards(lm: unmask.DiffusionLM) -> None:
    prompts = ["Once there was", "The"]
    out = lm.generate(prompts, max_new_tokens=12, max_denoising_steps=4, select=Confidence())
    assert (out.num_forwards <= 4).all()
    free = lm.generate(prompts, max_new_tokens=12, select=Threshold(0.0))
    assert free.num_forwards.tolist() == [1, 1]
    assert out.num_prefill_forwards.tolist() == [0, 0]
    for row, prompt in enumerate(prompts):
        ids = lm.tokenizer(prompt)["input_ids"]
        assert out.sequences[row, : len(ids)].tolist() == ids
    assert lm.generate("Once there was", mode="ar", max_new_tokens=5).tokens_per_forward.tolist() == [1.0]
    pieces = lm.generate("Once there was", max_new_tokens=12, block_size=4, select=Threshold(0.0))
    assert pieces.num_forwards[0] <= 3


def test_unconditional_text_starts_from_the_begin_token(lm: unmask.DiffusionLM) -> None:
    out = lm.generate("", max_new_tokens=10, max_denoising_steps=10, select=Ancestral(), temperature=1.0, seed=0)
    assert out.sequences[0, 0] == lm.tokenizer.bos_token_id
    same = lm.generate(["", "The cat"], max_new_tokens=10, max_denoising_steps=10, select=Ancestral(), temperature=1.0,
                       seed=0)  # fmt: skip
    assert same.texts[0] == out.texts[0]


def test_options_reach_the_sampler(lm: unmask.DiffusionLM, blocks: unmask.DiffusionLM) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 2, "select": Confidence(2)}
    greedy = lm.generate("Once", **(options | {"temperature": 0.0}))
    assert lm.generate("Once", top_k=1, **options).texts == greedy.texts
    assert blocks.generate("Once", top_k=1, **options).texts == blocks.generate(
        "Once", **(options | {"temperature": 0.0})
    ).texts  # fmt: skip
    select = options.pop("select")
    assert lm.generate("Once", top_k=1, mode="ar", **options).texts == lm.generate(
        "Once", mode="ar", max_new_tokens=8
    ).texts  # fmt: skip
    options["select"] = select
    once = lm.generate("Once", **options)
    twice = lm.generate("Once", guidance_scale=2.0, **options)
    assert twice.num_forwards[0] % 2 == 0
    assert once.num_forwards[0] <= 4
    taken_back = lm.generate("Once", max_new_tokens=8, max_denoising_steps=16, temperature=1.0, seed=2,
                             remask=Remask("rescale", 0.5))  # fmt: skip
    assert taken_back.num_forwards[0] <= 16


# --- infill

WORDS = sorted({word for story in STORIES for word in story.split()})
TEXT = st.lists(st.sampled_from([*WORDS, "  ", "\n", "é"]), max_size=8).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(prefix=TEXT, suffix=TEXT, n=st.integers(1, 12), temperature=st.sampled_from([0.0, 1.0]), kind=st.integers(0, 3))
def test_prefix_and_suffix_come_back_unchanged(lm, blocks, prefix, suffix, n, temperature, kind) -> None:
    model = lm if kind < 2 else blocks
    attention = "bidirectional" if kind == 3 else None
    out = model.infill(prefix, suffix, n, temperature=temperature, attention=attention, seed=0)
    before = model.tokenizer(prefix)["input_ids"] or [model.tokenizer.bos_token_id]
    after = model.tokenizer(suffix, add_special_tokens=False)["input_ids"]
    ids = out.sequences[0].tolist()
    assert ids[: len(before)] == before
    assert ids[len(before) + n :] == after
    assert model.diffusion.mask_token_id not in ids
    assert out.num_new_tokens.tolist() == [n]
    assert 1 <= out.num_forwards[0] <= n
    assert out.texts[0] == model.new_text(torch.tensor(before), ids[len(before) : len(before) + n])


def test_a_batch_of_gaps_equals_each_alone(lm: unmask.DiffusionLM) -> None:
    prefixes, suffixes = ["Once there was a cat", "The"], [" in the garden.", " was very happy that day."]
    out = lm.infill(prefixes, suffixes, 6, select=Confidence(1))
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        alone = lm.infill(prefix, suffix, 6, select=Confidence(1))
        assert alone.texts == [out.texts[row]]
        assert alone.num_forwards[0] == out.num_forwards[row]
    steps = lm.infill(prefixes, suffixes, 6, max_denoising_steps=2, select=Random())
    assert steps.num_forwards.tolist() == [2, 2]


def test_the_length_is_the_one_of_lowest_bound_and_every_forward_counts(lm: unmask.DiffusionLM) -> None:
    gap = ("Once there was a grey mouse who", " in the garden.", [2, 5, 9])
    out = lm.infill(*gap, num_samples=4, seed=1)
    scores, forwards, texts = [], 0, []
    for n in gap[2]:
        one = lm.infill(*gap[:2], n, seed=1)
        start = len(lm.tokenizer(gap[0])["input_ids"])
        (bound,) = continuation_nelbo(lm.network, lm.diffusion, [one.sequences[0]], [start], num_samples=4, seed=1)
        assert bound.num_tokens == one.sequences.shape[1] - start
        scores.append(bound.nats / bound.num_tokens)
        forwards += int(one.num_forwards[0]) + 4
        texts.append(one.texts[0])
    assert out.texts[0] == texts[scores.index(min(scores))]
    assert out.num_forwards.tolist() == [forwards]
    steps = lm.infill(*gap, max_denoising_steps=5, select=Confidence(), num_samples=1)
    assert steps.num_forwards.tolist() == [2 + 5 + 5 + 3]


def test_a_stop_ends_the_span_and_the_suffix_follows(lm: unmask.DiffusionLM) -> None:
    gap = ("Once there was a", " The end.", 12)
    free = lm.infill(*gap)
    before = len(lm.tokenizer(gap[0])["input_ids"])
    span = free.sequences[0, before : before + 12].tolist()
    suffix = lm.tokenizer(gap[1], add_special_tokens=False)["input_ids"]
    out = lm.infill(*gap, stop_tokens=[span[5]])
    kept = span[: span.index(span[5]) + 1]
    assert out.sequences[0].tolist() == free.sequences[0, :before].tolist() + kept + suffix
    assert out.num_new_tokens.tolist() == [len(kept)]
    stop = free.texts[0][2:4]
    cut = lm.infill(*gap, stop_strings=[stop])
    assert cut.texts[0] == free.texts[0][: free.texts[0].index(stop)]


@torch.no_grad()
def test_bound_of_a_continuation_equals_enumeration_and_the_whole_document() -> None:
    net, config = network(), DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")
    x = random_tokens(7)
    (got,) = continuation_nelbo(net, config, [x], [4], num_samples=2000, seed=0)
    exact, layout = 0.0, Layout.of(torch.arange(7)[None])
    for k in (1, 2, 3):
        for chosen in itertools.combinations((4, 5, 6), k):
            xt = x.clone()
            xt[list(chosen)] = MASK
            log_p = net(xt[None], layout, bidirectional)[0].log_softmax(-1)
            exact += sum(-float(log_p[i - 1, x[i]]) for i in chosen) / (k * math.comb(3, k))
    assert got.num_tokens == 3
    assert got.nats == pytest.approx(exact, abs=4 * got.standard_error)
    texts = [random_tokens(n, seed=n) for n in (5, 9)]
    whole = nelbo(net, config, [Document(t, torch.zeros_like(t)) for t in texts], num_samples=3, seed=2)
    assert continuation_nelbo(net, config, texts, [1, 1], num_samples=3, seed=2) == whole


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("a", "b", 0), {}, "num_tokens 0 must be at least 1"),
        (("a", "b", []), {}, r"num_tokens \[\] must"),
        (("a", "b", [4, 0]), {}, r"num_tokens \[4, 0\] must"),
        (("a " * 200, "b", 4), {}, "more than the model's context of 128: shorten them"),
        ((["a", "b"], "c", 4), {}, "2 prefixes do not go with 1 suffixes"),
        (("a", "b", 4), {"max_denoising_steps": 5}, "max_denoising_steps 5 exceeds the 4 tokens"),
        (("a", "b", 4), {"attention": "causal"}, "attention 'causal' is unknown"),
        (("a", "b", 4), {"mode": "ar"}, "mode 'ar' cannot see a suffix"),
        (("a", "b", 4), {"block_size": 4}, "block_size 4 has no meaning here"),
        (("a", "b", 4), {"stop_strings": [""]}, "stop string '' is empty"),
    ],
)
def test_bad_gaps_are_named(lm: unmask.DiffusionLM, arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.infill(*arguments, **options)


def test_more_bad_requests(lm, blocks, tokenizer_and_model: Path) -> None:
    with pytest.raises(ValueError, match="infill needs a converted checkpoint"):
        unmask.load(tokenizer_and_model).infill("a", "b", 4)
    with pytest.raises(ValueError, match="max_denoising_steps 9 exceeds the 8 tokens"):
        lm.generate("Once", max_new_tokens=8, max_denoising_steps=9)
    with pytest.raises(ValueError, match=r"window=3 is not read by mode 'diffusion' .* of a block-wise checkpoint"):
        lm.generate("Once", window=3)
    with pytest.raises(ValueError, match=r"guidance_scale=2 is not read by mode 'ar' .* or use mode='diffusion'"):
        lm.generate("Once", mode="ar", guidance_scale=2)
    with pytest.raises(ValueError, match=r"remask=Remask\(.* is not read by .* of a bidirectional checkpoint"):
        blocks.generate("Once", remask=Remask())
    with pytest.raises(ValueError, match="leaves no room in the model's context of 128"):
        lm.generate("Once there was a cat " * 60)


# --- the command


@pytest.mark.parametrize("folder", ["whole", "converted"])
def test_the_command_fills_a_gap(run, folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    gap = ["infill", path, "--prefix", "Once there was a", "--suffix", " in the garden."]
    code, out, err = run(*gap, "--num-tokens", 6, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["num_new_tokens"] == 6
    assert answer["num_forwards"] >= 1
    code, plain, err = run(*gap, "--num-tokens", 6)
    assert code == 0
    assert plain == f"Once there was a{answer['text']} in the garden.\n"
    assert "6 tokens in" in err
    code, out, err = run(*gap, "--num-tokens", 3, "--num-tokens", 6, "--json")
    assert code == 0, err
    assert json.loads(out)["num_new_tokens"] in (3, 6)


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["--num-tokens", 0], "num_tokens 0"),
        (["--num-tokens", 500], "context of 128"),
        (["--num-tokens", 4, "--max-denoising-steps", 5], "max_denoising_steps 5"),
        (["--num-tokens", 4, "--attention", "none"], "'none'"),
        ([], "--num-tokens"),
    ],
)
def test_bad_gaps_are_one_clear_line(run, whole: Path, arguments: list, bad: str) -> None:
    code, out, err = run("infill", whole, "--prefix", "a", "--suffix", "b", *arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error: ")
    assert bad in last
