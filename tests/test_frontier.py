"""Frontier rows: what is counted, and how text is judged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import STORIES

import unmask
from unmask.lab.frontier import (
    Setting,
    accuracy_under_parallelism,
    check_vocabulary,
    decode,
    distinct,
    judge,
    measure,
    prompt_lookup,
    unigram_entropy,
)
from unmask.sampling import Confidence, EntropyBound, Threshold

PROMPTS = [story[:20] for story in STORIES[:5]]


@pytest.fixture(scope="module")
def parent(tokenizer_and_model: Path) -> unmask.DiffusionLM:
    return unmask.load(tokenizer_and_model, dtype=torch.float64)


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted, dtype=torch.float64)


def test_entropy_and_distinct_by_hand() -> None:
    assert unigram_entropy([7, 7, 7, 7]) == 0
    assert unigram_entropy([1, 1, 2, 3]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    texts = [[1, 2, 1, 2], [1, 2]]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4
    assert distinct(texts, 3) == 1
    assert distinct([[1], []], 2) == 0


def test_ar_has_one_token_per_forward(parent: unmask.DiffusionLM) -> None:
    row = measure(parent, parent, PROMPTS, Setting("ar", batch_size=2), max_new_tokens=9)
    assert (row.tokens_per_forward, row.rule, row.value, row.block_size, row.num_texts) == (1, None, None, None, 5)
    assert row.mean_length <= 9
    assert row.tokens_per_second > 0


def test_row_equals_what_generate_and_nll_say(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM) -> None:
    setting = Setting("diffusion", Confidence(2), batch_size=3)
    row = measure(lm, parent, PROMPTS, setting, max_new_tokens=8)
    nats, tokens, forwards = 0.0, 0, 0
    for prompt in PROMPTS:
        out = lm.generate(prompt, max_new_tokens=8, select=Confidence(2))
        n = int(out.num_new_tokens)
        ids = out.sequences[:, : out.sequences.shape[1]]
        with torch.inference_mode():
            log_p = parent.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        nats, tokens, forwards = nats - float(log_p[-n:].sum()), tokens + n, forwards + int(out.num_forwards)
    assert (row.rule, row.value, row.block_size, row.batch_size) == ("Confidence", 2, 4, 3)
    assert row.parent_nll == pytest.approx(nats / tokens, abs=1e-9)
    assert row.tokens_per_forward == pytest.approx(tokens / forwards)
    assert row.mean_length == tokens / 5


def test_texts_never_depend_on_the_batch(lm: unmask.DiffusionLM) -> None:
    one, three, all_ = (
        decode(lm, PROMPTS, Setting(select=Threshold(0.3), batch_size=b), max_new_tokens=11) for b in (1, 3, 64)
    )
    assert one.texts == three.texts == all_.texts
    assert one.num_forwards == three.num_forwards == all_.num_forwards


def test_prompt_lookup_equals_greedy_ar(parent: unmask.DiffusionLM) -> None:
    repeats = parent.tokenizer("the cat sat and the cat sat and the cat", return_tensors="pt")["input_ids"][0]
    greedy = parent.generate(repeats[None], max_new_tokens=24)
    new, calls = prompt_lookup(parent, repeats, 24)
    assert new == greedy.sequences[0, len(repeats) : len(repeats) + int(greedy.num_new_tokens)].tolist()
    assert 1 <= calls <= len(new)
    row = measure(parent, parent, PROMPTS, Setting("prompt_lookup", batch_size=1), max_new_tokens=9)
    assert row.tokens_per_forward >= 1


def test_repetition_has_a_price(parent: unmask.DiffusionLM) -> None:
    prompt, varied = [3, 4, 5], [[10, 11, 12, 13], [14, 15, 16, 17]]
    same = judge(parent, [prompt] * 2, [[9, 9, 9, 9]] * 2)
    other = judge(parent, [prompt] * 2, varied)
    assert same.unigram_entropy == 0 < other.unigram_entropy
    assert (same.distinct_1, same.distinct_2) == (1 / 8, 1 / 6)
    assert other.distinct_3 == 1


def test_score_gets_the_texts_in_order(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM) -> None:
    seen: list[str] = []

    def score(texts: list[str]) -> list[bool]:
        seen.extend(texts)
        return [True, False, False, False, True]

    row = measure(lm, parent, PROMPTS, Setting(batch_size=2), max_new_tokens=6, score=score)
    assert row.accuracy == 0.4
    assert seen == [lm.generate(prompt, max_new_tokens=6).texts[0] for prompt in PROMPTS]


def test_setting_names_its_rule() -> None:
    assert (Setting().rule, Setting().value) == ("Threshold", 0.9)
    assert (Setting(select=EntropyBound(0.25)).rule, Setting(select=EntropyBound(0.25)).value) == ("EntropyBound", 0.25)


def test_bad_settings_say_why(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM) -> None:
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        Setting(batch_size=0)
    with pytest.raises(ValueError, match="batch_size 4: prompt lookup decodes one text at a time"):
        Setting("prompt_lookup", batch_size=4)
    with pytest.raises(ValueError, match="needs mode 'diffusion': ar commits"):
        Setting("ar", Threshold())
    with pytest.raises(ValueError, match="prompts is empty"):
        decode(lm, [], Setting())
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        decode(parent, [""], Setting("ar"))


def test_parent_of_another_vocabulary_is_refused(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM) -> None:
    check_vocabulary(lm, parent)  # the mask token of the converted one is no difference
    with pytest.raises(ValueError, match="has another vocabulary"):
        check_vocabulary(parent, lm)


def test_aup_by_hand() -> None:
    assert accuracy_under_parallelism([(1.0, 0.8)]) == pytest.approx(80)
    # equal accuracies: every weight is 1 and the area is that of a rectangle
    assert accuracy_under_parallelism([(3.0, 0.5), (1.0, 0.5)]) == pytest.approx(150)
    # y = 80, 78, 60: the last is more than 5 below the first and left out
    w = math.exp(-3 * (1 - 78 / 80))
    expected = 1 * 80 + (2.5 - 1) * (78 * w + 80) / 2
    assert accuracy_under_parallelism([(1, 0.8), (2.5, 0.78), (4, 0.6)]) == pytest.approx(expected)
    # y_max of a better system weighs every point down but the first rectangle
    lower = 80 * math.exp(-3 * (1 - 80 / 100)), 78 * math.exp(-3 * (1 - 78 / 100))
    assert accuracy_under_parallelism([(1, 0.8), (2, 0.78)], best_accuracy=1.0) == pytest.approx(80 + sum(lower) / 2)
    assert accuracy_under_parallelism([(1, 0.0), (2, 0.0)]) == 0


def test_aup_refuses_percents_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"accuracy 80 must lie in \[0, 1\]"):
        accuracy_under_parallelism([(1, 80)])
    with pytest.raises(ValueError, match="points is empty"):
        accuracy_under_parallelism([])
