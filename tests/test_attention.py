"""Patterns equal a double loop over their definitions, and both expansions equal each other."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from unmask.core import attention
from unmask.core.attention import PADDING, Layout
from unmask.hf.fast import chunked
from unmask.hf.fast.chunked import chunked_attention, picked_attention

B = 4


def packed(length: int = 22) -> Layout:
    """Two rows: documents of 9 + 8 tokens with 5 of padding, and one of 22."""
    position = torch.stack([torch.cat([torch.arange(9), torch.arange(8), torch.arange(5)]), torch.arange(length)])
    document = torch.stack([torch.tensor([0] * 9 + [1] * 8 + [PADDING] * 5), torch.zeros(length, dtype=torch.long)])
    return Layout.of(position, document)


def both_streams(layout: Layout) -> Layout:
    return layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)


def by_definition(name: str, q: tuple[int, bool], kv: tuple[int, bool]) -> bool:
    (i, q_noisy), (j, kv_noisy) = q, kv
    if name == "causal":
        return j <= i
    if name == "bidirectional":
        return True
    if name == "block_causal":
        return j // B <= i // B
    if name == "window":
        return abs(i - j) < 3
    if name == "annealed":
        return j <= i or bool(OPENED[i, j])
    if q_noisy:
        return j // B == i // B if kv_noisy else j // B < i // B
    if kv_noisy:
        return False
    return j <= i if name == "two_stream causal" else j // B <= i // B


OPENED = torch.rand(22, 22, generator=torch.Generator().manual_seed(0)) < 0.4
PATTERNS = {
    "causal": attention.causal,
    "bidirectional": attention.bidirectional,
    "block_causal": attention.block_causal(B),
    "window": attention.window(3),
    "annealed": attention.annealed(OPENED),
    "two_stream block_causal": attention.two_stream(B),
    "two_stream causal": attention.two_stream(B, "causal"),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_dense_pattern_equals_double_loop(name: str) -> None:
    layout = both_streams(packed())
    pattern = attention.intersect(PATTERNS[name], attention.same_document)
    got = attention.dense(pattern, layout, layout)
    for row in range(2):
        where = [tuple(field[row, k].item() for field in layout) for k in range(layout.position.shape[1])]
        for a, (i, q_doc, q_noisy) in enumerate(where):
            for b, (j, kv_doc, kv_noisy) in enumerate(where):
                expected = q_doc == kv_doc and by_definition(name, (i, q_noisy), (j, kv_noisy))
                assert got[row, a, b].item() == expected, (row, a, b)


@pytest.mark.parametrize("name", PATTERNS)
def test_block_mask_equals_dense(name: str) -> None:
    layout = both_streams(packed())
    pattern = attention.intersect(PATTERNS[name], attention.same_document)
    allowed = attention.dense(pattern, layout, layout)
    q, k, v = torch.randn(3, 2, 2, layout.position.shape[1], 8, generator=torch.Generator().manual_seed(0))
    mask = attention.block_mask(pattern, layout, layout)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_token_sees_itself_and_padding_never_leaks(name: str) -> None:
    layout = both_streams(packed())
    allowed = attention.dense(attention.intersect(PATTERNS[name], attention.same_document), layout, layout)
    assert allowed.diagonal(dim1=-2, dim2=-1).all()
    assert not allowed[layout.real[:, :, None] & ~layout.real[:, None, :]].any()


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_block_masks_are_the_plain_ones_and_a_new_layout_compiles_nothing() -> None:
    """As on a GPU, where every step of packed rows has another layout."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for cut in (20, 77, 128, 150):
        position = torch.cat([torch.arange(cut), torch.arange(200 - cut)])
        document = torch.where(torch.arange(200) < cut, 0, 1)
        layout = both_streams(Layout.of(position.repeat(2, 1), document.repeat(2, 1)))
        pattern = attention.intersect(attention.two_stream(8), attention.same_document)
        compiled, plain = (attention.block_mask(pattern, layout, layout, compiled=c) for c in (True, False))
        assert torch.equal(compiled.to_dense(), plain.to_dense())
        assert torch.equal(compiled.kv_num_blocks, plain.kv_num_blocks)
        assert torch.equal(compiled.full_kv_num_blocks, plain.full_kv_num_blocks)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 1]


@pytest.mark.parametrize("length", [100, 128, 300])
def test_chunked_attention_matches_dense_with_gradients(length: int) -> None:
    position = torch.arange(length) % 77
    layout = both_streams(Layout.of(position[None], (torch.arange(length) // 77)[None]))
    pattern = attention.intersect(attention.two_stream(8), attention.same_document)
    allowed = attention.dense(pattern, layout, layout)[:, None]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 2 * length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(3, 2, 2 * length, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "kv"
    )
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    dense = scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=allowed, scale=0.3
    )
    tiled = chunked_attention(q, k, v, allowed, 0.3)
    torch.testing.assert_close(tiled, dense, atol=1e-10, rtol=0)
    for a, b in zip(
        torch.autograd.grad((tiled * weight).sum(), (q, k, v)),
        torch.autograd.grad((dense * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_queries_without_keys_stay_finite_and_change_no_others() -> None:
    """Rows of padding in a pass over slots: whole tiles of them, and some among others."""
    length, generator = 200, torch.Generator().manual_seed(1)
    allowed = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    blind = torch.zeros(2, length, dtype=torch.bool)
    blind[0, 64:150], blind[1, ::3] = True, True
    allowed[:, 0][blind] = False
    q, k, v = (torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    out = chunked_attention(q, k, v, allowed)
    picked = torch.arange(2 * length)[blind.flatten()]
    assert out.isfinite().all()
    assert picked_attention(q.transpose(0, 1).flatten(1, 2)[None][:, :, picked], k, v, allowed, picked).isfinite().all()
    dense = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(*(x.transpose(1, 2)[~blind] for x in (out, dense)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("given", [100, 110])  # a multiple of the grain of spans or not
def test_keys_of_a_cache_without_a_graph_get_no_gradient(given: int) -> None:
    """The queries' gradient, and that of the keys behind the cache's, are the dense ones."""
    length, generator = 100, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
               for heads in (4, 2, 2))  # fmt: skip
    cached = torch.randn(2, 2, 2, given, 8, generator=generator, dtype=torch.float64)
    allowed = torch.rand(2, 1, length, given + length, generator=generator) < 0.3
    allowed[:, :, 64:, given:] = False  # a tile of queries that sees the cache alone
    allowed[:, :, :, 0] = True
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    keys, values = (torch.cat([old, new], dim=-2) for old, new in zip(cached, (k, v), strict=True))
    assert chunked._cached_keys(keys) == given
    for other in ([keys, keys], [k, cached[0]]):
        assert chunked._cached_keys(torch.cat(other, dim=-2)) == 0
    dense = scaled_dot_product_attention(
        q, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), attn_mask=allowed
    )
    for a, b in zip(
        torch.autograd.grad((chunked_attention(q, keys, values, allowed) * weight).sum(), (q, k, v)),
        torch.autograd.grad((dense * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_two_stream_names_an_unknown_clean_attention() -> None:
    with pytest.raises(ValueError, match="'full' is unknown"):
        attention.two_stream(4, "full")
