"""NLL and NELBO against enumeration, stock losses, and each other."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MASK, STORIES, Rows, block_config, network, random_tokens
from torch.nn.functional import cross_entropy

import unmask
from unmask import hf
from unmask.core import head_loss
from unmask.core.attention import PADDING, Layout
from unmask.core.corruption import Corruption, mask_exact, segments
from unmask.core.objectives import ar_loss, diffusion_loss, predictable, token_nll
from unmask.core.scoring import score
from unmask.evaluation.clean import noisy_nll, read_clean
from unmask.evaluation.likelihood import Document, nelbo, nll
from unmask.resolve import resolve
from unmask.settings import Settings
from unmask.training.step import corruptions


def document(length: int, seed: int = 0) -> Document:
    ids = random_tokens(length, seed=seed)
    return Document(ids, torch.full_like(ids, 2))


def enumerate_nelbo(net, config, ids: torch.Tensor) -> float:
    """The bound by its definition: every block, every mask, one pass each."""
    total = 0.0
    for start in range(0, len(ids), config.block_size):
        places = [i for i in range(start, min(start + config.block_size, len(ids))) if i > 0]
        for k in range(1, len(places) + 1):
            for masked in itertools.combinations(places, k):
                stop = min(start + config.block_size, len(ids))
                xt = ids[:stop].clone()
                xt[list(masked)] = MASK
                layout = Layout.of(torch.arange(stop)[None])
                log_p = net(xt[None], layout._replace(noisy=layout.position >= start), config.pattern)[0].log_softmax(
                    -1
                )
                loss = -sum(float(log_p[i - config.shift, ids[i]]) for i in masked)
                total += loss / (k * math.comb(len(places), k))
    return total


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("clean", ["block_causal", "causal"])
@torch.no_grad()
def test_exact_nelbo_equals_enumeration(shift: bool, clean: str) -> None:
    net, config = network(), block_config(3, shift=shift, clean=clean)
    documents = [document(8, 1), document(5, 2), document(1, 3)]
    got = nelbo(net, config, documents, exact=True)
    for output, doc in zip(got, documents, strict=True):
        assert output.nats == pytest.approx(enumerate_nelbo(net, config, doc.ids), rel=1e-6)
        assert output.num_tokens == len(doc.ids) - 1
        assert output.num_bytes == 2 * (len(doc.ids) - 1)


@pytest.mark.parametrize("mask_rows", [1, 3])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("clean", ["block_causal", "causal"])
@torch.no_grad()
def test_reading_the_clean_stream_once_changes_nothing(shift: bool, clean: str, mask_rows: int) -> None:
    """Ragged packed rows of which some parts are wanted, and one row of which nothing is; mask after mask."""
    net, config = network(), replace(block_config(3, shift=shift, clean=clean), mask_rows=mask_rows)
    config = replace(config, mask_token_id=MASK - mask_rows + 1)
    x0, generator = random_tokens(4, 17) % (MASK - 3), torch.Generator().manual_seed(1)
    layout = Layout.of(
        torch.tensor([[*range(17)], [*range(11), *range(6)], [*range(8), *range(9)], [*range(17)]]),
        torch.tensor([[0] * 17, [0] * 11 + [1] * 6, [0] * 8 + [PADDING] * 9, [0] * 17]),
    )
    wanted = predictable(layout) & (torch.arange(17) > torch.tensor([[9], [7], [0], [17]]))
    clean_read = read_clean(net, config, x0, layout, wanted)
    assert clean_read.columns.shape[1] < 17 + config.block_size
    for _ in range(4):
        masked = wanted & (torch.rand(4, 17, generator=generator) < 0.5)
        corruption = Corruption(masked, masked.double())
        logits = score(net, config, corruption.apply(x0, config.mask_token_id), x0, layout, masked)
        expected = cross_entropy(logits, x0[masked], reduction="none")
        torch.testing.assert_close(token_nll(net, config, x0, layout, corruption), expected, rtol=1e-10, atol=1e-10)
        got = noisy_nll(net, config, clean_read, x0, corruption)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="bidirectional attention has no clean stream"):
        read_clean(net, block_config(4, attention="bidirectional", clean=None), x0, layout, wanted)


WHOLE = block_config(4, attention="bidirectional", clean=None)


@pytest.mark.parametrize("figure", ["nll", "continuations", "one stream", "two streams", "two streams, shifted"])
def test_figures_hold_few_logits_at_a_time(figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_AT_ONCE_CPU", 1)
    monkeypatch.setattr(head_loss, "_ROWS", 7)
    net, documents = network(), [document(14, n) for n in range(4)]

    def measured() -> tuple[int, list[float]]:
        with Rows() as rows:
            if figure == "nll":
                found = [o.nats for o in nll(net, documents)]
            elif figure == "continuations":
                lm_eval = pytest.importorskip("unmask.evaluation.lm_eval")
                found = [log_p for log_p, _ in lm_eval.continuation_log_p(net, documents)]
            else:
                config = WHOLE if figure == "one stream" else block_config(2, shift=figure.endswith("shifted"))
                found = [o.nats for o in nelbo(net, config, documents, num_samples=2)]
        return rows.most, found

    most, found = measured()
    assert most <= 7
    net.fast_paths = hf.FastPaths()
    most, expected = measured()
    assert most > 7
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_monte_carlo_nelbo_lies_in_its_interval_of_the_exact_one(shift: bool) -> None:
    net, config = network(dtype=torch.float32), block_config(4, shift=shift)
    documents = [document(n, n) for n in (9, 14)]
    exact = nelbo(net, config, documents, exact=True)
    drawn = nelbo(net, config, documents, num_samples=400, seed=3)
    for e, d in zip(exact, drawn, strict=True):
        assert d.standard_error is not None
        assert abs(d.nats - e.nats) < 4 * d.standard_error
        assert d.standard_error < 0.05 * e.nats


@torch.no_grad()
def test_nelbo_bounds_the_order_averaged_likelihood() -> None:
    """-log of the mean over reveal orders of p(x) <= NELBO, block by block, on the same denoiser."""
    net, config, ids = network(), block_config(4), random_tokens(4, seed=5)
    likelihoods = []
    for order in itertools.permutations(range(1, 4)):
        x, log_p = ids.clone(), 0.0
        x[1:] = MASK
        for place in order:
            layout = Layout.of(torch.arange(4)[None], noisy=True)
            log_p += float(net(x[None], layout, config.pattern)[0, place].log_softmax(-1)[ids[place]])
            x[place] = ids[place]
        likelihoods.append(log_p)
    averaged = -(torch.tensor(likelihoods).logsumexp(0) - math.log(len(likelihoods)))
    bound = nelbo(net, config, [Document(ids, torch.ones_like(ids))], exact=True)[0].nats
    assert bound >= float(averaged) - 1e-9
    assert bound == pytest.approx(-sum(likelihoods) / len(likelihoods), rel=1e-6)  # the mean over orders


def test_block_size_one_with_shift_equals_ar_nll() -> None:
    net, config = network(), block_config(1, shift=True, clean="causal")
    documents = [document(n, n) for n in (3, 12, 7)]
    for bound, exact in zip(nelbo(net, config, documents, exact=True), nll(net, documents), strict=True):
        assert bound.nats == pytest.approx(exact.nats, rel=1e-9)


@torch.no_grad()
def test_nll_equals_stock_loss() -> None:
    net = network()
    net.mask_token_id = None
    ids = random_tokens(20)
    stock = net.model(input_ids=ids[None], labels=ids[None]).loss
    output = nll(net, [Document(ids, torch.ones_like(ids))])[0]
    assert output.nats / output.num_tokens == pytest.approx(float(stock), rel=1e-6)  # stock: float32


def test_long_documents_are_cut_into_windows_of_their_own() -> None:
    net, config = network(), block_config(4)
    whole = document(23, 4)
    parts = [Document(whole.ids[a : a + 10], whole.num_bytes[a : a + 10]) for a in (0, 10, 20)]
    for scored in (lambda d, **k: nll(net, d, **k), lambda d, **k: nelbo(net, config, d, exact=True, **k)):
        cut, apart = scored([whole], context_length=10)[0], scored(parts)
        assert cut.nats == pytest.approx(sum(p.nats for p in apart), rel=1e-9)
        assert cut.num_tokens == sum(p.num_tokens for p in apart) == 20
        assert cut.num_bytes == sum(p.num_bytes for p in apart)


def test_batching_never_changes_a_figure() -> None:
    net, config = network(), block_config(4)
    documents = [document(n, n) for n in (3, 30, 11, 19)]
    for tokens in (1, 40, 10_000):
        together = nelbo(net, config, documents, num_samples=3, batch_tokens=tokens)
        for i, output in enumerate(together):
            reference = nelbo(net, config, documents, num_samples=3, batch_tokens=64)[i]
            assert output.nats == pytest.approx(reference.nats, rel=1e-9)


# --- the trained objective


@pytest.mark.parametrize("masking", ["exact", "bernoulli", "complementary"])
def test_expected_training_loss_equals_nelbo(masking: str) -> None:
    """Drawn over many steps, the loss of the training code has the bound as its mean."""
    net, config, rows = network(dtype=torch.float32), block_config(4), 256
    ids = random_tokens(7, seed=2)
    bound = nelbo(net, config, [Document(ids, torch.ones_like(ids))], exact=True)[0].nats
    chosen = Settings("test", block_size=4, batch_size=rows, max_length=8, complementary=masking == "complementary",
                      masking="bernoulli" if masking == "bernoulli" else "exact")  # fmt: skip
    layout = Layout.of(torch.arange(7).expand(rows, 7))
    x0, values = ids.expand(rows, 7), []
    with torch.no_grad():
        for step in range(12):
            for drawn in corruptions(chosen, layout, step, torch.arange(rows)):
                loss = diffusion_loss(net, config, x0, layout, drawn)
                assert int(loss.count) == rows * 6
                values.append(float(loss.sum) / rows)
    spread = torch.tensor(values).std() / math.sqrt(len(values))
    assert abs(sum(values) / len(values) - bound) < 5 * spread
    assert spread < 0.05 * bound


def test_one_noise_level_per_sequence_shares_t() -> None:
    chosen = Settings("test", block_size=4, batch_size=4, max_length=16, noise_level="sequence")
    layout = Layout.of(torch.arange(16).expand(4, 16))
    drawn = corruptions(chosen, layout, 0, torch.arange(4))[0]
    k = drawn.masked.sum(-1)
    torch.testing.assert_close(drawn.weight[drawn.masked], (15 / k)[:, None].expand(4, 16)[drawn.masked])


def _packed() -> tuple[torch.Tensor, Layout, list[slice]]:
    lengths = (11, 9, 6)
    x0 = random_tokens(1, 26)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    document[0, 24:] = PADDING
    starts = [0, 11, 20]
    return x0, Layout.of(position, document), [slice(0, 11), slice(11, 20), slice(starts[2], 24)]


@pytest.mark.parametrize("shift", [False, True])
def test_packed_loss_and_gradients_equal_documents_apart(shift: bool) -> None:
    net, config = network(), block_config(4, shift=shift)
    x0, layout, pieces = _packed()
    drawn = mask_exact(
        torch.full((1, 26), 0.6, dtype=torch.float64),
        torch.rand(1, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        segments(layout, 4),
        predictable(layout),
    )

    def gradients(loss) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss.sum, net.model.parameters(), allow_unused=True))

    whole = diffusion_loss(net, config, x0, layout, drawn)
    expected = gradients(whole)
    total, apart = 0.0, [torch.zeros_like(p) for p in net.model.parameters()]
    for piece in pieces:
        cut = type(drawn)(drawn.masked[:, piece], drawn.weight[:, piece])
        n = piece.stop - piece.start
        loss = diffusion_loss(net, config, x0[:, piece], Layout.of(torch.arange(n)[None]), cut)
        total += float(loss.sum.detach())
        apart = [a + g for a, g in zip(apart, gradients(loss), strict=True)]
    assert float(whole.sum) == pytest.approx(total, rel=1e-10)
    assert int(whole.count) == 10 + 8 + 3
    for a, b in zip(expected, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_ar_loss_equals_stock_labels_loss_and_skips_padding() -> None:
    net = network()
    net.mask_token_id = None
    x0, layout, pieces = _packed()
    loss = ar_loss(net, x0, layout)
    expected = sum(
        float(net.model(input_ids=x0[:, p], labels=x0[:, p]).loss.detach()) * (p.stop - p.start - 1) for p in pieces
    )
    assert float(loss.sum) == pytest.approx(expected, rel=1e-6)  # stock upcasts to float32 only
    assert int(loss.count) == 21


def test_position_dependent_masks_never_reach_a_bound() -> None:
    """nelbo takes no half_life: the measured bound is the same whatever the recipe trained with."""
    import inspect

    assert "half_life" not in inspect.signature(nelbo).parameters
    assert "half_life" not in inspect.signature(unmask.DiffusionLM.nelbo).parameters


# --- the public methods


def test_public_likelihoods(converted: Path) -> None:
    lm = unmask.load(converted)
    texts = STORIES[:3]
    for output, text in zip(lm.nll(texts), texts, strict=True):
        ids = lm.tokenizer(text)["input_ids"]
        assert output.num_tokens == len(ids) - 1
        first = len(lm.tokenizer.decode(ids[:1]).encode())
        assert output.num_bytes == len(text.encode()) - first
    exact = lm.nelbo(texts, exact=True)
    drawn = lm.nelbo(texts, num_samples=64, seed=1)
    for e, d in zip(exact, drawn, strict=True):
        assert abs(e.nats - d.nats) < 4 * d.standard_error
    again = lm.nelbo(texts, num_samples=64, seed=1)
    assert [d.nats for d in drawn] == [d.nats for d in again]
    assert lm.nelbo(texts[:1], num_samples=1)[0].standard_error is None


def test_bytes_count_characters_of_several_bytes(converted: Path) -> None:
    lm = unmask.load(converted)
    text = "Ä cat ☂ was häppy"
    output = lm.nll(text)[0]
    ids = lm.tokenizer(text)["input_ids"]
    assert 0 <= len(text.encode()) - output.num_bytes <= len(text[:1].encode())
    assert output.num_tokens == len(ids) - 1


def test_bad_requests_are_named(converted: Path, tokenizer_and_model: Path) -> None:
    lm, parent = unmask.load(converted), unmask.load(tokenizer_and_model)
    with pytest.raises(ValueError, match="block_size 8"):
        lm.nelbo("Once", exact=True, block_size=8)
    with pytest.raises(ValueError, match="num_samples 0"):
        lm.nelbo("Once", num_samples=0)
    with pytest.raises(ValueError, match="untouched AR model"):
        parent.nelbo("Once")
    with pytest.raises(ValueError, match="texts is empty"):
        lm.nll([])
    assert resolve(Settings("x", batch_size=2), 10**6, 64).max_length == 64
