"""DiffuLLaMA's training (2410.17891): noise, annealing, normalisation, and the recipe on LLaMA and GPT-2."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import _GPT, MASK, STORIES, SUPPORTED, network, random_tokens, tiny_model
from transformers import AutoTokenizer

import unmask
from unmask import hf
from unmask.core.attention import Layout, bidirectional, causal, dense
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption
from unmask.core.network import DiffusionConfig
from unmask.core.objectives import diffusion_loss, predictable, token_nll
from unmask.core.scoring import score
from unmask.recipe import load_recipe
from unmask.resolve import resolve
from unmask.settings import Settings
from unmask.training.step import annealing, corruptions, step_loss

SHIFTED = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")
CPU = torch.device("cpu")


def settings(**changes: object) -> Settings:
    chosen = {"max_length": 32, "batch_size": 8, "block_size": 1} | changes
    return replace(load_recipe("diffullama"), **chosen)


def one_document(batch: int, length: int) -> Layout:
    return Layout.of(torch.arange(length).expand(batch, length))


class Uniform:
    """A network that finds every token of a vocabulary of 7 equally likely."""

    device = CPU

    def __call__(self, input_ids, layout, pattern, *, rows=None, past=None):  # noqa: ARG002
        return torch.zeros(len(rows), 7)


# --- noise


def test_one_level_a_row_with_the_papers_mean_and_the_first_token_never_masked() -> None:
    chosen = settings(batch_size=64)
    rates, weights = [], []
    for step in range(60):
        (drawn,) = corruptions(chosen, one_document(64, 33), step, torch.arange(64))
        assert not drawn.masked[:, 0].any()
        for row in range(64):
            assert len(set(drawn.weight[row][drawn.masked[row]].tolist())) <= 1
        rates.append(drawn.masked[:, 1:].double().mean())
        weights.append(drawn.weight.max())
    assert torch.stack(rates).mean() == pytest.approx((1 + 0.001) / 2, abs=0.003)  # 3 sd of the Bernoulli draws
    assert max(weights) <= 1000.0


def test_a_natural_mask_token_is_seen_and_never_predicted() -> None:
    """A reused mask token has probability 0: as a target it would make the loss infinite."""
    batch = Batch(random_tokens(8, 32), one_document(8, 32))
    batch.x0[:, 5::7] = MASK
    loss = step_loss(network(), settings(), SHIFTED, batch, 0, torch.arange(8))
    assert torch.isfinite(loss.sum)
    (drawn,) = corruptions(settings(), batch.layout, 0, torch.arange(8))
    assert (drawn.masked & (batch.x0 == MASK)).any()


class NaturalMask:
    """Logits that are a function of the position alone; the mask token has one like any other."""

    device = CPU

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids, layout, pattern, *, rows=None, past=None):  # noqa: ARG002
        return self.logits.expand(len(input_ids), -1, -1).flatten(0, 1)[rows]


def test_predicted_mask_tokens_are_those_of_the_released_code() -> None:
    """A position has a loss if and only if the input shows the mask token there, position 0 apart; weight 1/t."""
    batch, logits = Batch(random_tokens(8, 32), one_document(8, 32)), torch.randn(32, MASK + 1)
    batch.x0[:, 5::7] = MASK
    chosen = settings(predict_mask=True, loss_normaliser="masked")
    for step in range(5):
        plain = corruptions(chosen, batch.layout, step, torch.arange(8))[0]
        x_t = plain.apply(batch.x0, MASK)
        shown = (x_t == MASK)[:, 1:]
        t = 1 / plain.weight.amax(1, keepdim=True).double()
        nll = -logits.log_softmax(-1)[:-1].expand(8, -1, -1).gather(-1, batch.x0[:, 1:, None])[..., 0]
        usual = plain.masked.any(1)  # at a very low level a row may mask nothing but its natural masks
        expected = (nll * shown / t)[usual].sum() / shown[usual].sum()
        loss = step_loss(NaturalMask(logits), chosen, SHIFTED, batch.rows(0, 8), step, torch.arange(8))  # type: ignore[arg-type]
        if bool(usual.all()):
            assert float(loss.sum) / int(loss.count) == pytest.approx(float(expected), rel=1e-5)
        without = step_loss(NaturalMask(logits), replace(chosen, predict_mask=False), SHIFTED, batch, step,
                            torch.arange(8))  # type: ignore[arg-type]  # fmt: skip
        assert float(without.sum) != pytest.approx(float(loss.sum), rel=1e-5)


def test_a_mask_token_that_is_predicted_learns_and_is_still_never_written(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    """With "." as mask token every sentence has one: the loss teaches it, and what is drawn never has it."""
    run = RUN | {"mask_token": ".", "anneal_steps": 1, "max_tokens": 30_000, "learning_rate": 1e-2}
    rows = {}
    for predict in (True, False):
        lm = unmask.adapt(
            tokenizer_and_model, stories, "diffullama", tmp_path / f"{predict}", predict_mask=predict, **run
        )
        ids = torch.tensor([lm.tokenizer(STORIES[0])["input_ids"]])
        assert int((ids == lm.diffusion.mask_token_id).sum()) >= 1
        layout = Layout.of(torch.arange(ids.shape[1])[None])
        inside = hf.as_network(lm.model, None)(ids, layout, bidirectional)[0].softmax(-1)[:, lm.diffusion.mask_token_id]
        end = int((ids[0] == lm.diffusion.mask_token_id).nonzero()[0])
        rows[predict] = float(inside[end - 1].detach())
        assert "." not in lm.generate("Once there", max_new_tokens=12, seed=0).texts[0]
        assert math.isfinite(lm.nelbo([STORIES[0].replace(".", "")], num_samples=1)[0].nats)
    assert rows[True] > 0.5 > rows[False]


# --- normalisation


@pytest.mark.parametrize(("rows", "factor", "steps"), [(2, 2.77, 4000), (4, 2.25, 1500), (64, 2.0, 60)])
def test_factor_between_the_two_normalisers_is_the_papers(rows: int, factor: float, steps: int) -> None:
    """With cross-entropy ln 7 everywhere and long rows, the bound is ln 7 a token."""
    batch = Batch(torch.zeros(rows, 256, dtype=torch.long), one_document(rows, 256))

    def mean(normaliser: str) -> float:
        chosen = settings(batch_size=rows, max_length=256, loss_normaliser=normaliser, anneal_steps=1)
        total = 0.0
        for step in range(steps):
            loss = step_loss(Uniform(), chosen, SHIFTED, batch, step, torch.arange(rows))  # type: ignore[arg-type]
            total += float(loss.sum) / int(loss.count)
        return total / steps / math.log(7)

    assert mean("masked") == pytest.approx(factor, rel=0.06)
    assert mean("tokens") == pytest.approx(1.0, rel=0.1)


def test_one_row_weighs_its_mean_loss_by_one_over_t() -> None:
    """So its expectation is ln(1/eps) / (1 - eps) = 6.9, too heavy-tailed to be seen in draws."""
    batch = Batch(torch.zeros(1, 64, dtype=torch.long), one_document(1, 64))
    chosen = settings(batch_size=1, max_length=64, loss_normaliser="masked", anneal_steps=1)
    for step in range(200):
        (drawn,) = corruptions(chosen, batch.layout, step, torch.arange(1))
        loss = step_loss(Uniform(), chosen, SHIFTED, batch, step, torch.arange(1))  # type: ignore[arg-type]
        weight = float(drawn.weight.max())  # 1/t, 0 where nothing was masked
        assert float(loss.sum) / int(loss.count) == pytest.approx(weight * math.log(7), rel=1e-5)


@torch.no_grad()
def test_parity_loss_is_the_formula_of_the_released_code() -> None:
    batch, chosen = Batch(random_tokens(8, 32), one_document(8, 32)), settings(loss_normaliser="masked", anneal_steps=1)
    net = network()
    (drawn,) = corruptions(chosen, batch.layout, 3, torch.arange(8))
    logits = net(drawn.apply(batch.x0, MASK), batch.layout, bidirectional)
    nll = -logits.log_softmax(-1)[:, :-1].gather(-1, batch.x0[:, 1:, None])[..., 0]
    masked, t = drawn.masked[:, 1:], 1 / drawn.weight.amax(1, keepdim=True).double()
    expected = (nll * masked / t).nan_to_num(0).sum() / masked.sum()
    loss = step_loss(net, chosen, SHIFTED, batch, 3, torch.arange(8))
    assert float(loss.sum) / int(loss.count) == pytest.approx(float(expected), rel=1e-6)


# --- shift


def test_position_zero_never_has_a_loss_and_the_last_row_scores_nothing() -> None:
    net, x0, layout = network(), random_tokens(2, 12), one_document(2, 12)
    everything = Corruption(predictable(layout), torch.ones(2, 12))
    assert not everything.masked[:, 0].any()
    read: list[torch.Tensor] = []

    class Recording:
        device = CPU

        def __call__(self, *args, rows=None, **more):
            read.append(rows)
            return net(*args, rows=rows, **more)

    diffusion_loss(Recording(), SHIFTED, x0, layout, everything)  # type: ignore[arg-type]
    assert sorted(read[0].tolist()) == [r * 12 + i for r in range(2) for i in range(11)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_mask_with_the_last_token_hidden_is_the_next_token_loss(name: str) -> None:
    """The hidden token itself is not seen by the row that scores it, so an AR model is parity-checked exactly."""
    net = hf.as_network(tiny_model(SUPPORTED[name](), torch.float64), MASK)
    x0, layout = random_tokens(3, 9), one_document(3, 9)
    masked = torch.zeros(3, 9, dtype=torch.bool)
    masked[:, -1] = True
    got = token_nll(net, SHIFTED, x0, layout, Corruption(masked, masked.float()), causal)
    stock = net.model(x0).logits
    stock[..., MASK] = -torch.inf
    expected = -stock[:, -2].log_softmax(-1).gather(-1, x0[:, -1:])[:, 0]
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


# --- annealing


def opened(chosen: Settings, step: int, row: int = 0) -> torch.Tensor:
    layout = one_document(3, chosen.max_length)
    pattern = annealing(chosen, step, torch.tensor([row]), CPU)
    return dense(pattern or bidirectional, layout, layout)


def test_open_share_of_the_future_grows_with_the_step() -> None:
    chosen = settings(anneal_steps=10, max_length=128)
    future = torch.ones(128, 128, dtype=torch.bool).triu(1)
    shares = []
    for step in range(12):
        allowed = opened(chosen, step)
        assert allowed[:, ~future].all()
        assert (allowed == allowed[0]).all()  # one matrix for all rows
        share = float(allowed[0][future].double().mean())
        r = min(1.0, (step + 1) / 10)
        assert share == pytest.approx(r, abs=4 * math.sqrt(r * (1 - r) / int(future.sum())) + 1e-12)
        shares.append(share)
    assert shares[9:] == [1.0, 1.0, 1.0]
    assert not torch.equal(opened(chosen, 3), opened(replace(chosen, seed=1), 3))


def test_one_matrix_a_step_or_one_a_forward() -> None:
    chosen = settings(anneal_steps=10)
    assert torch.equal(opened(chosen, 3, row=0), opened(chosen, 3, row=4))
    again = replace(chosen, anneal_redraw=True)
    assert not torch.equal(opened(again, 3, row=0), opened(again, 3, row=4))
    assert torch.equal(opened(again, 3, row=4), opened(again, 3, row=4))


def test_the_future_reaches_the_first_row_only_through_what_is_open() -> None:
    net, x = network(), random_tokens(1, 32)
    other = x.clone()
    other[0, -1] = 5 if int(x[0, -1]) != 5 else 6
    chosen = settings(anneal_steps=4)
    for pattern, moves in (
        (causal, False),
        (annealing(chosen, 1, torch.tensor([0]), CPU), True),
        (bidirectional, True),
    ):
        layout = one_document(1, 32)
        gap = (net(x, layout, pattern)[0, 0] - net(other, layout, pattern)[0, 0]).abs().nan_to_num(0).max()
        assert bool(gap > 0) == moves


def test_training_runs_under_the_annealed_mask_and_scores_under_the_open_one() -> None:
    net, batch = network(), Batch(random_tokens(8, 32), one_document(8, 32))
    rows = torch.arange(8)
    annealed = step_loss(net, settings(anneal_steps=4), SHIFTED, batch, 1, rows)
    (drawn,) = corruptions(settings(), batch.layout, 1, rows)
    by_hand = diffusion_loss(
        net, SHIFTED, batch.x0, batch.layout, drawn, annealing(settings(anneal_steps=4), 1, rows, CPU)
    )
    plain = step_loss(net, settings(anneal_steps=1), SHIFTED, batch, 1, rows)
    assert float(annealed.sum) == pytest.approx(float(by_hand.sum), rel=1e-12)
    assert float(annealed.sum) != pytest.approx(float(plain.sum), rel=1e-6)
    open_logits = score(net, SHIFTED, drawn.apply(batch.x0, MASK), batch.x0, batch.layout, drawn.masked)
    expected = -(open_logits.log_softmax(-1).gather(-1, batch.x0[drawn.masked][:, None])[:, 0])
    assert float(plain.sum) == pytest.approx(float((drawn.weight[drawn.masked] * expected).sum()), rel=1e-9)


@pytest.mark.parametrize("split", [{}, {"loss_normaliser": "masked", "micro_batch_size": 2}])
def test_every_split_of_an_annealed_step_gives_the_same_loss(split: dict) -> None:
    net, batch = network(), Batch(random_tokens(8, 32), one_document(8, 32))
    chosen = settings(anneal_steps=5, **split)
    whole = [step_loss(net, chosen, SHIFTED, batch.rows(a, a + 2), 2, torch.arange(a, a + 2)) for a in (0, 2, 4, 6)]
    again = [step_loss(net, chosen, SHIFTED, batch.rows(a, a + 2), 2, torch.arange(a, a + 2)) for a in (6, 4, 2, 0)]
    assert sum(float(x.sum) for x in whole) == pytest.approx(sum(float(x.sum) for x in again), rel=1e-12)
    if "loss_normaliser" not in split:
        one = step_loss(net, chosen, SHIFTED, batch, 2, torch.arange(8))
        assert sum(float(x.sum) for x in whole) == pytest.approx(float(one.sum), rel=1e-10)


# --- the recipe


@pytest.fixture(scope="session")
def gpt2_parent(tokenizer_and_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with learned positions, tied head and its dropout of 0.1."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer.save_pretrained(folder)
    config = tf.GPT2Config(**(_GPT | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}))
    assert config.attn_pdrop == 0.1
    tiny_model(config).save_pretrained(folder)
    return folder


RUN = {"max_tokens": 3000, "max_length": 64, "batch_size": 4, "log_every": 1, "save_every": 3, "anneal_steps": 8,
       "eval_every": 4, "show_progress": False}  # fmt: skip


def test_an_interrupted_run_resumes_inside_the_annealing(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    straight = unmask.adapt(tokenizer_and_model, stories, "diffullama", tmp_path / "straight", **RUN)
    cut = tmp_path / "cut"
    unmask.adapt(tokenizer_and_model, stories, "diffullama", cut, **(RUN | {"keep_checkpoints": 99}))
    for checkpoint in cut.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > 3:  # annealing ends at step 8
            shutil.rmtree(checkpoint)
    (cut / "model.safetensors").unlink()
    (cut / "run.json").write_text(json.dumps(json.loads((cut / "run.json").read_text()) | {"finished": False}))
    resumed = unmask.adapt(tokenizer_and_model, stories, "diffullama", cut, resume=True, **RUN)
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("parent", ["tokenizer_and_model", "gpt2_parent"])
def test_the_recipe_learns_on_llama_and_gpt2(
    parent: str, request: pytest.FixtureRequest, stories: Path, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(parent)
    lm = unmask.adapt(folder, stories, "diffullama", tmp_path / "run", show_progress=False, max_tokens=80_000,
                      max_length=64, batch_size=8, learning_rate=1e-2, anneal_steps=20)  # fmt: skip
    assert lm.diffusion is not None
    assert (lm.diffusion.attention, lm.diffusion.shift, lm.diffusion.block_size) == ("bidirectional", True, None)
    counts = torch.bincount(torch.cat([torch.tensor(lm.tokenizer(s)["input_ids"][1:]) for s in STORIES])).double()
    p = counts[counts > 0] / counts.sum()
    outputs = lm.nelbo(STORIES[:16], num_samples=8, seed=0)
    bound = sum(o.nats for o in outputs) / sum(o.num_tokens for o in outputs)
    assert bound < 0.7 * float(-(p * p.log()).sum())
    again = unmask.load(tmp_path / "run")
    assert again.diffusion == lm.diffusion


@pytest.mark.parametrize(
    ("name", "length", "rows", "tokens"),
    [
        ("diffullama-gpt2", 512, 256, 1_000_000 * 256 * 512),
        ("diffullama-gpt2-medium", 1024, 1280, 160_000 * 1280 * 1024),
        ("diffullama-llama2-7b", 2048, 15360, 65 * 10**9),
    ],
)
def test_presets_hold_the_published_settings(name: str, length: int, rows: int, tokens: int) -> None:
    chosen = resolve(load_recipe(name), 10**8, 4096)
    assert (chosen.max_length, chosen.batch_size, chosen.max_tokens) == (length, rows, tokens)
    assert chosen.learning_rate == (2e-5 if "7b" in name else 3e-4)
    assert chosen.min_learning_rate_ratio == (1.0 if "7b" in name else 0.0)
    steps = tokens / (length * rows)
    assert round(chosen.warmup_ratio * steps) == (0 if "7b" in name else 2000)


def test_presets_hold_the_parts_of_the_published_loss() -> None:
    """Micro-batches are a part of it: it is divided by the masked tokens of each (2410.17891, released code)."""
    for name, micro in (("gpt2", 32), ("gpt2-medium", 160), ("llama2-7b", 60)):
        chosen = resolve(load_recipe(f"diffullama-{name}"), 10**8, 4096)
        assert (chosen.micro_batch_size, chosen.loss_normaliser, chosen.predict_mask) == (micro, "masked", True)
        assert chosen.batch_size % (8 * micro) == 0
        assert chosen.mask_init_noise == (name == "gpt2-medium")  # the only one with a row of its own for the mask


def test_micro_batches_of_the_parity_loss_stay_when_a_run_goes_on(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    folder, run = tmp_path / "run", RUN | {"max_tokens": 900, "loss_normaliser": "masked", "micro_batch_size": 2}
    unmask.adapt(tokenizer_and_model, stories, "diffullama", folder, **run)
    with pytest.raises(ValueError, match="micro_batch_size"):
        unmask.adapt(tokenizer_and_model, stories, "diffullama", folder, resume=True,
                     **(run | {"max_tokens": 1800, "micro_batch_size": 1}))  # fmt: skip
    unbiased = tmp_path / "unbiased"
    unmask.adapt(tokenizer_and_model, stories, "diffullama", unbiased, **(run | {"loss_normaliser": "tokens"}))
    unmask.adapt(tokenizer_and_model, stories, "diffullama", unbiased, resume=True,
                 **(run | {"loss_normaliser": "tokens", "max_tokens": 1800, "micro_batch_size": 1}))  # fmt: skip


def test_any_length_will_do_without_blocks() -> None:
    assert resolve(load_recipe("diffullama", max_length=250), 10**6, 512).max_length == 250


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"anneal_steps": 0}, "anneal_steps=0 must be above 0"),
        ({"anneal_form": "entries"}, "setting 'anneal_form' is unknown"),
        ({"loss_normaliser": "rows"}, "loss_normaliser='rows' is unknown"),
        ({"min_noise_level": 1.0}, "min_noise_level=1.0 must be at least 0 and below 1"),
        ({"attention": "block_causal", "anneal_steps": 9}, "anneal_steps=9 needs attention='bidirectional'"),
    ],
)
def test_bad_settings_are_named(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("diffullama", **overrides)
