"""Multiple choice: the context is given, the scores are those of slow references, the paper's estimator shrinks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from choices import choice_document, mean_over_levels, shrinkage
from conftest import MASK, STORIES, VOCABULARY, block_config, network, random_tokens

import unmask
from unmask.core.attention import Layout, causal
from unmask.core.noise import uniform
from unmask.evaluation.likelihood import Document, nelbo, nll


class Constant:
    """A network whose every token has the same probability."""

    device = torch.device("cpu")

    def __call__(self, _input_ids, _layout, _pattern, *, rows, **_):
        return torch.zeros(len(rows), VOCABULARY, dtype=torch.float64)


def choice(length: int, given: int, seed: int = 0) -> Document:
    ids = random_tokens(length, seed=seed)
    return Document(ids, torch.zeros_like(ids), torch.arange(length) >= given)


@pytest.mark.parametrize(("n", "spec"), [(1, 0.52), (2, 0.68), (4, 0.82), (8, 0.90), (16, 0.96), (32, 0.98)])
def test_the_papers_estimator_shrinks_short_choices(n: int, spec: float) -> None:
    """A constant loss is 1.0 under the bound and n / (n + 1), nearly, under the estimator."""
    config = block_config(4, attention="bidirectional", clean=None)
    documents = [choice(n + 3, 3)] * 300
    unit = math.log(VOCABULARY)
    for output in nelbo(Constant(), config, documents[:3], num_samples=2):
        assert output.nats / output.num_tokens / unit == pytest.approx(1.0, rel=1e-6)
    got = torch.tensor(mean_over_levels(Constant(), config, documents)) / unit
    assert shrinkage(n) == pytest.approx(spec, abs=0.005)
    assert shrinkage(n) == pytest.approx(n / (n + 1), abs=0.02)
    assert float(got.mean()) == pytest.approx(shrinkage(n), abs=4 * float(got.std()) / math.sqrt(len(got)) + 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_the_papers_estimator_equals_a_plain_loop(shift: bool) -> None:
    net, config = network(), block_config(4, attention="bidirectional", clean=None, shift=shift)
    documents = [choice(9, 4, 1), choice(6, 5, 2), choice(12, 3, 3)]
    for batch_tokens in (1, 10_000):
        got = mean_over_levels(net, config, documents, levels=8, seed=5, batch_tokens=batch_tokens)
        for owner, (document, value) in enumerate(zip(documents, got, strict=True)):
            ids, total = document.ids, 0.0
            for level in range(1, 9):
                # noise is as long as the longest row of the batch, of which a row uses its own beginning
                noise = uniform(12 if batch_tokens > 1 else len(ids), key=("choice", 5, owner, 0, level))[: len(ids)]
                masked = document.loss_mask & (noise < level / 8)
                layout = Layout.of(torch.arange(len(ids))[None])
                log_p = net(ids.masked_fill(masked, MASK)[None], layout, config.pattern)[0].log_softmax(-1)
                places = masked.nonzero()[:, 0].tolist()
                losses = [-float(log_p[i - shift, ids[i]]) for i in places]
                total += sum(losses) / len(losses) / 8 if losses else 0.0
            assert value == pytest.approx(total, rel=1e-9)


def test_a_choice_is_scored_given_its_context(converted: Path) -> None:
    lm = unmask.load(converted, dtype="float64")
    context, options = STORIES[0][:40], [" happy that day.", " tired.", " zzz"]
    documents = [choice_document(lm.tokenizer, context, option) for option in options]
    given = lm.tokenizer(context)["input_ids"]
    for document, option in zip(documents, options, strict=True):
        assert document.ids[: len(given)].tolist() == given
        assert lm.tokenizer.decode(document.ids) == context + option
        layout = Layout.of(torch.arange(len(document.ids))[None])
        with torch.no_grad():
            log_p = lm.network(document.ids[None], layout, causal)[0].log_softmax(-1)
        expected = -sum(float(log_p[i - 1, document.ids[i]]) for i in range(len(given), len(document.ids)))
        output = nll(lm.network, [document])[0]
        assert output.nats == pytest.approx(expected, rel=1e-9)
        assert output.num_tokens == len(document.ids) - len(given)
        assert output.num_bytes == len(option)
    # the exact bound of the choice is that of the whole less that of the context where blocks end there
    whole = Document(documents[0].ids, documents[0].num_bytes)
    cut = len(given) // 4 * 4
    late = Document(whole.ids, whole.num_bytes, torch.arange(len(whole.ids)) >= cut)
    early = Document(whole.ids[:cut], whole.num_bytes[:cut])
    bounds = [nelbo(lm.network, lm.diffusion, [d], exact=True)[0].nats for d in (whole, early, late)]
    assert bounds[0] == pytest.approx(bounds[1] + bounds[2], rel=1e-9)


def test_long_contexts_lose_their_beginning_and_bad_choices_are_named(converted: Path) -> None:
    tokenizer = unmask.load(converted).tokenizer
    full = choice_document(tokenizer, STORIES[0], " The end")
    cut = choice_document(tokenizer, STORIES[0], " The end", context_length=len(full.ids) - 3)
    assert torch.equal(cut.ids, full.ids[3:])
    assert torch.equal(cut.loss_mask, full.loss_mask[3:])
    with pytest.raises(ValueError, match="choice ' ' is empty"):
        choice_document(tokenizer, "Once", " ")
    with pytest.raises(ValueError, match="context '' makes no tokens"):
        choice_document(tokenizer, "", "Once")
    with pytest.raises(ValueError, match="exceeds the context of 4"):
        choice_document(tokenizer, "Once", STORIES[0], context_length=4)
    with pytest.raises(ValueError, match="levels 0"):
        mean_over_levels(Constant(), block_config(4), [full], levels=0)
