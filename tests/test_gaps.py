"""Texts with any number of gaps: what a slow and obvious path gives, and `infill` as a user meets it."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MASK, block_config, network, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.core.attention import Layout, bidirectional
from unmask.core.network import DiffusionConfig
from unmask.evaluation.likelihood import continuation_nelbo
from unmask.infilling import span_config
from unmask.sampling import Blocks, Canvas, Confidence, Request, Threshold, WholeCanvas

NET = network()
WHOLE = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")


def canvas_of(seed: int, num_gaps: int, longest: int) -> Canvas:
    """A text of random pieces, of which those behind a gap may be empty, and random gaps."""
    draw = random.Random(seed)
    sizes = [
        draw.randint(1, longest),
        *(draw.choice([0, 1, longest, draw.randint(0, longest)]) for _ in range(num_gaps)),
    ]
    pieces = [random_tokens(n, seed=10 * seed + i) for i, n in enumerate(sizes)]
    return Canvas.of_pieces(pieces, [draw.randint(1, 6) for _ in range(num_gaps)])


@torch.no_grad()
def slow_gaps(config: DiffusionConfig, canvas: Canvas, n: int = 1, scale: float = 1.0) -> tuple[list[int], list[int]]:
    """The tokens of the open positions, in order, and the positions in the order of their commits; without a cache.

    Block after block, the whole text up to its end in one pass, which commits the n surest; a whole canvas is one
    block. Guidance masks the text before the first gap, on a whole canvas all that is given.
    """
    size, shift = config.block_size or len(canvas.tokens), int(config.shift)
    opened = (~canvas.fixed).nonzero()[:, 0].tolist()
    x = torch.where(canvas.fixed, canvas.tokens, MASK)
    x = torch.cat([x, torch.full((-len(x) % size,), MASK)])
    order: list[int] = []
    for first in sorted({i // size * size for i in opened}):
        stop = first + size
        layout = Layout.of(torch.arange(stop)[None])
        if config.block_size is not None:
            layout = layout._replace(noisy=layout.position >= first)
        while masked := [i for i in opened if first <= i < stop and x[i] == MASK]:
            logits = NET(x[None, :stop], layout, config.pattern)[0]
            if scale != 1:
                hidden = canvas.fixed & (torch.arange(len(canvas.fixed)) > 0)
                if config.block_size is not None:
                    hidden[opened[0] :] = False
                bare = torch.where(torch.cat([hidden, hidden.new_zeros(len(x) - len(hidden))]), MASK, x)
                without = NET(bare[None, :stop], layout, config.pattern)[0]
                logits = without + scale * (logits - without)
                logits[:, MASK] = -torch.inf
            ranked = sorted((-float(logits[i - shift].softmax(-1).max()), i) for i in masked)[:n]
            for _, i in ranked:
                x[i] = logits[i - shift].argmax()
            order += sorted(i for _, i in ranked)
    return x[opened].tolist(), order


CONFIGS = [
    *(block_config(4, shift=s, clean=c) for s in (True, False) for c in ("causal", "block_causal")),
    block_config(4, attention="block_causal", clean=None),
    block_config(16, shift=True),
    WHOLE,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.attention}-{c.clean_attention}-{c.block_size}-{c.shift}")
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_gaps_are_filled_as_without_a_cache_in_that_order(config: DiffusionConfig, scale: float) -> None:
    """Rows of different numbers of gaps, in one batch and queued: pieces within blocks, across them and of many."""
    decoder = (WholeCanvas if config is WHOLE else Blocks)(select=Confidence(1), guidance_scale=scale)
    canvases = [canvas_of(seed, num_gaps, 14) for seed, num_gaps in ((1, 1), (2, 3), (3, 2), (4, 5), (5, 2))]
    wanted = [slow_gaps(config, canvas, scale=scale) for canvas in canvases]
    for batch_size in (None, 2):
        order: list[list[int]] = [[] for _ in canvases]
        request = Request(1, batch_size=batch_size, callback=lambda row, at, _, order=order: order[row].extend(at))
        got = decoder.fill(NET, config, canvases, request)
        assert got.new_tokens == [tokens for tokens, _ in wanted]
        assert order == [positions for _, positions in wanted]
        passes = 1 if scale == 1 else 2
        assert got.num_forwards.tolist() == [passes * len(tokens) for tokens, _ in wanted]
        size = config.block_size or 10**9
        reads = []
        for canvas in canvases:
            blocks = sorted({i // size for i in (~canvas.fixed).nonzero()[:, 0].tolist()})
            jumps = sum(after > before + 1 for before, after in itertools.pairwise(blocks))
            reads.append(passes * (int(blocks[0] > 0) + jumps))
        assert got.num_prefill_forwards.tolist() == reads


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), num_gaps=st.integers(1, 5), config=st.sampled_from(CONFIGS), n=st.integers(1, 3))
def test_any_gaps_are_filled_as_without_a_cache(seed: int, num_gaps: int, config: DiffusionConfig, n: int) -> None:
    canvas = canvas_of(seed, num_gaps, 12)
    decoder = (WholeCanvas if config is WHOLE else Blocks)(select=Confidence(n))
    assert decoder.fill(NET, config, [canvas], Request(1)).new_tokens == [slow_gaps(config, canvas, n)[0]]


def test_the_gap_of_a_whole_canvas_sees_what_is_behind_it_and_a_block_does_not() -> None:
    canvas = canvas_of(2, 3, 14)
    other = Canvas(
        torch.where(torch.arange(len(canvas.tokens)) == len(canvas.tokens) - 1, 7, canvas.tokens), canvas.fixed
    )
    layout = Layout.of(torch.arange(len(canvas.tokens))[None])
    first = int((~canvas.fixed).nonzero()[0])
    with torch.no_grad():
        seen = [NET(c.tokens[None], layout, bidirectional)[0, first - 1] for c in (canvas, other)]
    assert not torch.equal(*seen)
    assert canvas.tokens[-1] != 7
    config = block_config(4)
    filled = [Blocks(select=Confidence(1)).fill(NET, config, [c], Request(1)).new_tokens for c in (canvas, other)]
    assert filled[0] == filled[1]


# --- infill


@pytest.fixture(scope="module")
def whole(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    unmask.adapt(tokenizer_and_model, stories, "diffullama", folder, show_progress=False, max_tokens=4000,
                 max_length=64, batch_size=4, anneal_steps=2, learning_rate=1e-2, save_every=10**9)  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=["whole", "blocks"])
def lm(request: pytest.FixtureRequest, whole: Path, converted: Path) -> unmask.DiffusionLM:
    return unmask.load(whole if request.param == "whole" else converted, dtype=torch.float64)


def ids(lm: unmask.DiffusionLM, text: str, *, first: bool = False) -> list[int]:
    """Tokens of a piece; of an empty first one the begin token."""
    if first:
        return lm.tokenizer(text, split_special_tokens=True)["input_ids"] or [lm.tokenizer.bos_token_id]
    return lm.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}, {"max_denoising_steps": 3},
                                     {"attention": "bidirectional"}, {"stop_strings": "e"}])  # fmt: skip
def test_one_gap_is_that_between_a_prefix_and_a_suffix(lm: unmask.DiffusionLM, options: dict[str, Any]) -> None:
    prefix, suffix = "Once there was a", " in the garden."
    want = lm.infill(prefix, suffix, 7, **options)
    for text in (f"{prefix}<gap:7>{suffix}", [prefix, 7, suffix], ["Once there", " was a", np.int64(7), suffix]):
        got = lm.infill(text, **options)
        assert torch.equal(got.sequences, want.sequences)
        assert got.texts == want.texts
        assert got.num_forwards.tolist() == want.num_forwards.tolist()
        assert got.num_prefill_forwards.tolist() == want.num_prefill_forwards.tolist()
        assert got.fills == want.fills == [want.texts]
        assert got.filled == want.filled == [prefix + want.texts[0] + suffix]
    assert lm.infill([f"{prefix}<gap:7>{suffix}"], **options).texts == want.texts


PIECE = st.sampled_from(["Once there was", " cat", "", " in the garden.  ", "\n", " é", "<gap:2>", "</s>", "<gap>"])


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(PIECE, min_size=2, max_size=6), data=st.data())
def test_what_is_given_comes_back_unchanged(lm: unmask.DiffusionLM, pieces: list[str], data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 6)) for _ in pieces[1:]]
    row = [part for pair in itertools.zip_longest(pieces, lengths) for part in pair if part is not None]
    out = lm.infill(row, temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=1)
    assert out.fills is not None
    assert out.filled is not None
    (fills,) = out.fills
    assert len(fills) == len(lengths)
    assert out.filled == ["".join(part for pair in itertools.zip_longest(pieces, fills, fillvalue="") for part in pair)]
    assert out.texts == ["".join(fills)]
    assert out.num_new_tokens.tolist() == [sum(lengths)]
    left = out.sequences[0].tolist()
    for i, piece in enumerate(pieces):
        given_ids = ids(lm, piece, first=i == 0)
        assert left[: len(given_ids)] == given_ids
        left = left[len(given_ids) + (lengths[i] if i < len(lengths) else 0) :]
    assert left == []
    assert lm.diffusion.mask_token_id not in out.sequences


def test_a_batch_of_texts_with_gaps_equals_each_alone(lm: unmask.DiffusionLM) -> None:
    texts = ["The<gap:3> cat <gap:2>.", "Once there was a<gap:9>", ["A", 2, "<gap:4>", 5, "", 1], "<gap:2><gap:3>"]
    out = lm.infill(texts, select=Confidence(1))
    for row, text in enumerate(texts):
        alone = lm.infill(text, select=Confidence(1))
        assert alone.fills == [out.fills[row]]
        assert alone.filled == [out.filled[row]]
        assert alone.num_forwards[0] == out.num_forwards[row]
    assert [len(row) for row in out.fills] == [2, 1, 3, 2]
    assert out.num_new_tokens.tolist() == [5, 9, 8, 5]
    drawn = [lm.infill(texts, temperature=1.0, seed=seed).filled for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_ends_its_gap_alone(lm: unmask.DiffusionLM) -> None:
    text = "Once there was a<gap:8> in the<gap:8> sun.<gap:3>"
    free = lm.infill(text)
    row, first = free.sequences[0].tolist(), len(ids(lm, "Once there was a", first=True))
    start = first + 8 + len(ids(lm, " in the"))
    gaps = [row[first : first + 8], row[start : start + 8], row[-3:]]
    stop = gaps[1][2]
    kept = [gap[: gap.index(stop) + 1] if stop in gap else gap for gap in gaps]
    got = lm.infill(text, stop_tokens=[stop])
    pieces = [ids(lm, "Once there was a", first=True), ids(lm, " in the"), ids(lm, " sun.")]
    assert got.sequences[0].tolist() == [
        token for pair in zip(pieces, kept, strict=True) for part in pair for token in part
    ]
    assert got.num_new_tokens.tolist() == [sum(map(len, kept))]
    string = next(fill for fill in free.fills[0] if fill.strip())[1:3]
    cut = lm.infill(text, stop_strings=[string])
    assert cut.fills == [[fill.split(string)[0] for fill in free.fills[0]]]


def test_greedy_candidates_are_the_same_each_time_without_a_seed(lm: unmask.DiffusionLM) -> None:
    found = {lm.infill("Once <gap:1,2,3,4,5,6,7,8> upon <gap:1,2,3>", num_samples=1).filled[0] for _ in range(6)}
    assert found == {lm.infill("Once <gap:1,2,3,4,5,6,7,8> upon <gap:1,2,3>", num_samples=1, seed=0).filled[0]}


def test_of_the_candidate_lengths_of_all_gaps_the_best_combination_is_kept(lm: unmask.DiffusionLM) -> None:
    text, pieces = "Once there was a<gap:2,5> in the <gap:3,1>.", ["Once there was a", " in the ", "."]
    got = lm.infill(text, num_samples=3, seed=1)
    given_tokens = len(ids(lm, pieces[0], first=True))
    scores, forwards, filled = [], 0, []
    for first, second in itertools.product((2, 5), (3, 1)):
        one = lm.infill([pieces[0], first, pieces[1], second, pieces[2]], seed=1)
        (bound,) = continuation_nelbo(
            lm.network, lm.diffusion, [one.sequences[0]], [given_tokens], num_samples=3, seed=1
        )
        scores.append(bound.nats / bound.num_tokens)
        forwards += int(one.num_forwards[0]) + 3
        filled += one.filled
    assert got.filled == [filled[scores.index(min(scores))]]
    assert got.num_forwards.tolist() == [forwards]
    mixed = lm.infill([text, "A <gap:4> b"], num_samples=3, seed=1)
    assert mixed.filled[0] == got.filled[0]
    assert mixed.num_forwards[0] == forwards
    assert mixed.num_forwards[1] == lm.infill("A <gap:4> b").num_forwards[0]


def test_texts_behind_a_gap_that_a_block_does_not_see_are_counted(lm: unmask.DiffusionLM) -> None:
    text = ["Once there was", 3, " a cat in the garden", 2, " of the old house."]
    if lm.diffusion.attention == "bidirectional":
        lm.infill(text, select=Threshold(0.0))
        return
    first, middle, last = (len(ids(lm, text[i], first=i == 0)) for i in (0, 2, 4))
    end = -(-(first + 3) // 4) * 4
    unseen = first + 3 + middle - end + last
    with pytest.warns(
        UserWarning, match=f"{unseen} of the {middle + last} tokens of the text after gap 1 are not seen"
    ):
        lm.infill(text, select=Threshold(0.0))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("no gap",), {}, "the text 'no gap' has no gap: write <gap:8>"),
        ((["a", "b"],), {}, "the text 'a' has no gap"),
        (([["a", "b"]],), {}, "the text 'ab' has no gap"),
        (([],), {}, "the list of texts is empty"),
        (("a <gap> b",), {}, "the mark '<gap>' gives no number of tokens: write <gap:8>"),
        (("a <gap:x> b",), {}, "the mark '<gap:x>' gives no number"),
        (("a <gap:-3> b",), {}, "the mark '<gap:-3>' gives no number"),
        (("a <gap:4,> b",), {}, "the mark '<gap:4,>' gives no number"),
        (("a <gap:0> b",), {}, r"gap \[0\] must be at least 1"),
        ((["a", 0, "b"],), {}, "gap 0 must be at least 1"),
        ((["a", [], "b"],), {}, r"gap \[\] must be at least 1"),
        (("a <gap:999999999999> b",), {}, "gap 999999999999 must be at most"),
        (("a <gap:100> b <gap:40>",), {}, "texts and 140 tokens make .* context of 128"),
        (("a <gap:4>", None, 4), {}, "num_tokens 4 needs a suffix"),
        (("a <gap:4> b <gap:4>",), {"num_samples": 3}, "num_samples=3 compares candidate lengths"),
        (("a <gap:1,2,3,4,5> b <gap:1,2,3,4,5> c <gap:1,2,3>",), {}, "75 combinations of candidate lengths exceed 64"),
        (("a <gap:4> b <gap:4>",), {"stop_strings": [""]}, "stop string '' is empty"),
        (("a <gap:4> b",), {"mode": "ar"}, "mode 'ar' cannot see a suffix"),
    ],
)  # fmt: skip
def test_bad_gaps_are_named(lm: unmask.DiffusionLM, arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.infill(*arguments, **options)


@pytest.mark.parametrize("text", [5, None, {"a": 4}, ["a", 2.5, "b"], ["a", True, "b"], ["a", None, "b"], b"a <gap:4>"])
def test_what_is_no_text_with_gaps_is_a_type_error(lm: unmask.DiffusionLM, text: Any) -> None:
    with pytest.raises(TypeError, match="gap"):
        lm.infill(text)


@pytest.mark.parametrize("noisy", ["bidirectional", "causal"])
def test_every_block_checkpoint_can_show_the_whole_text(noisy: str) -> None:
    config = replace(block_config(4, clean="causal"), noisy_attention=noisy)
    shown = span_config(config, None, "bidirectional", is_drafter=False)
    assert shown.pattern is bidirectional


def test_an_untouched_model_says_what_it_lacks(tokenizer_and_model: Path) -> None:
    with pytest.raises(ValueError, match="infill needs a converted checkpoint"):
        unmask.load(tokenizer_and_model).infill("a <gap:4> b")


def test_the_command_fills_a_text(run: Any, whole: Path) -> None:
    text = ["--text", "Once there was a<gap:4> in the<gap:2> sun."]
    code, out, err = run("infill", whole, *text, "--json")
    assert code == 0, err
    answer = json.loads(out)
    first, second = answer["fills"]
    assert answer["filled"] == f"Once there was a{first} in the{second} sun."
    assert answer["text"] == first + second
    assert answer["num_new_tokens"] == 6
    assert run("infill", whole, *text)[1] == answer["filled"] + "\n"
    assert run("infill", whole, "--text", "A <gap:2,3> b", "--num-samples", 2)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["--text", "a <gap:4>", "--prefix", "a"], "--prefix 'a' stands beside --text"),
        (["--text", "a <gap:4>", "--num-tokens", "4"], "--num-tokens [4] stands beside --text"),
        (["--text", "a <gap> b"], "the mark '<gap>' gives no number"),
        (["--prefix", "a", "--num-tokens", "4"], "--suffix is missing: give --text"),
        ([], "--prefix is missing: give --text"),
    ],
)
def test_bad_gaps_are_one_clear_line(run: Any, whole: Path, arguments: list[str], bad: str) -> None:
    code, out, err = run("infill", whole, *arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error: ")
    assert bad in last
