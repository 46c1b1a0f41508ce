"""One class of transformers' causal language models: does the library read it right, or refuse it for a reason?

`examine` builds a tiny random model of the class and compares the library's passes with stock forwards, which need no
mask and no cache. Texts are longer than every window, chunk and top-k of the tiny model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import NO_TEXT, SETTINGS, VARIANTS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from unmask import hf
from unmask.core.attention import Layout, causal, two_stream
from unmask.core.decoding import begin, denoise
from unmask.core.drafter import DrafterConfig
from unmask.core.network import DiffusionConfig, Pass
from unmask.core.scoring import score
from unmask.hf.network import FastPaths
from unmask.hf.probes import UNTESTED, probe_network
from unmask.hf.tiny import tiny_model, tiny_settings
from unmask.sampling import Request, sample_autoregressive, sample_blocks, sample_speculative

LENGTH, BLOCK = 40, 4
_LENGTHS = (
    "chunk",
    "window_size",
    "sliding_window",
    "topk",
    "top_k",
    "block_size",
    "local_attention",
    "distance",
    "floor_scale",
)
"""Parts of the names of settings that change nothing until a text is longer than they are."""


@dataclass(frozen=True)
class Row:
    """What was found of a class. decoding, drafter: "yes", or why not; empty where the class is not accepted."""

    name: str
    verdict: str
    reason: str = ""
    decoding: str = ""
    drafter: str = ""


def examine(name: str) -> Row:
    """The row of a model type, or of one of `VARIANTS`.

    "accepted" if it is and everything agrees, "refused" for what was measured, "wrong" with what differs.
    """
    kind, given = VARIANTS.get(name, (name, SETTINGS.get(name, {})))
    if kind in NO_TEXT:
        return Row(name, "refused", NO_TEXT[kind])
    whole = AutoConfig.for_model(kind, **given)
    config = copy.deepcopy(whole.get_text_config())
    of_text: Any = AutoModelForCausalLM._model_mapping[type(whole)]
    of_text = of_text if of_text.config_class is type(config) else type(config)
    settings = tiny_settings(config)
    long = {k: v for k, v in json.loads(settings).items() if type(v) is int and v > LENGTH and _is_length(k)}
    long.pop("keep_window_size", None)  # no text is longer than the default
    try:
        model = tiny_model(of_text, settings, None, seed=1)
        tokens = _tokens(model, 2, LENGTH)
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except Exception as error:
        return Row(name, "wrong", f"its tiny model does not run: {_line(error)}")
    try:
        hf.probe(model)
    except hf.UnsupportedModelError as error:
        return _refused(name, str(error))
    if long:
        return Row(name, "wrong", f"the tiny model is not long enough for {long}")
    return _checked(name, model)


def _refused(name: str, reason: str) -> Row:
    verdict = "wrong" if UNTESTED in reason else "refused"
    return Row(name, verdict, reason.split(" cannot be converted: ")[-1].split("A supported model")[0].strip())


def _checked(name: str, model: Any) -> Row:
    model, tolerance = _exact(model)
    found = [_tried(check, model, tolerance) for check in (_whole, _packed, _two_streams, _learns, _decodes, _drafts)]
    wrong = "; ".join(line.removeprefix("wrong: ") for line in found if line.startswith("wrong: "))
    unread = [line for line in found[:4] if line != "yes"]  # refused after the probe had accepted the class
    if wrong or unread:
        return Row(name, "wrong", wrong or unread[0])
    return Row(name, "accepted", "", *found[4:])


def _tried(check: Callable[[Any, float], None], model: Any, tolerance: float) -> str:
    """ "yes", the line with which the library refuses, or "wrong: " and what is wrong."""
    try:
        check(model, tolerance)
    except ValueError as error:
        return _line(error)
    except Exception as error:
        return f"wrong: {check.__name__.strip('_')}: {_line(error)}"
    return "yes"


def _exact(model: Any) -> tuple[Any, float]:
    """The model in float64 where its kernels know that, and the tolerance, a part of the largest logit."""
    twin, name = copy.deepcopy(model).double(), model.config.get_text_config().model_type
    try:
        with torch.no_grad():
            logits = _stock(twin, _tokens(model, 1, LENGTH))
        if logits.dtype == torch.float64:
            exact = twin.config.get_text_config()._attn_implementation == "sdpa" and not name.startswith("llama4")
            return twin, 1e-9 if exact else 2e-5  # eager softmax and Llama 4's rotary tables are of float32
    except Exception:
        pass
    return model, 2e-5


# --- the checks


def _whole(model: Any, tolerance: float) -> None:
    tokens = _tokens(model, 2, LENGTH)
    with torch.no_grad():
        _compare("a causal pass", _network(model)(tokens, _layout(tokens), causal), _stock(model, tokens), tolerance)


def _packed(model: Any, tolerance: float) -> None:
    tokens, lengths = _tokens(model, 1, LENGTH), (LENGTH - 12, 12)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)])[None]
    with torch.no_grad():
        got = _network(model)(tokens, Layout.of(position, document), causal)
        expected = torch.cat([_stock(model, part) for part in tokens.split(lengths, dim=1)], dim=1)
    _compare("packed documents", got, expected, tolerance)


def _two_streams(model: Any, tolerance: float) -> None:
    """[noisy | clean] with causal blocks against a stock forward over each noisy block after its clean prefix."""
    clean, noisy = _tokens(model, 1, LENGTH), _tokens(model, 1, LENGTH, seed=1)
    layout = _layout(clean)
    both = layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)
    with torch.no_grad():
        got = _network(model)(torch.cat([noisy, clean], dim=1), both, two_stream(BLOCK, "causal", "causal"))
        _compare("the clean stream", got[:, LENGTH:], _stock(model, clean), tolerance)
        for start in range(0, LENGTH, BLOCK):
            end = start + BLOCK
            text = torch.cat([clean[:, :start], noisy[:, start:end]], dim=1)
            _compare("the noisy stream", got[:, start:end], _stock(model, text)[:, start:], tolerance)
        reason = probe_network(_network(model))
    if reason:
        raise AssertionError(f"two-way blocks: {reason}")


def _learns(model: Any, tolerance: float) -> None:
    """The gradient of a summed loss against that of the stock logits."""
    tokens = _tokens(model, 1, LENGTH)
    rows, network = torch.arange(0, LENGTH, 3), hf.as_network(model)
    passed = Pass(tokens, _layout(tokens), causal, rows)
    network.weighted_sum(passed, lambda logits, _: logits.logsumexp(-1), torch.ones(len(rows))).backward()
    weight = model.get_input_embeddings().weight
    got, weight.grad = weight.grad.clone(), None
    model(input_ids=tokens, use_cache=False).logits[0, rows].logsumexp(-1).sum().backward()
    expected, weight.grad = weight.grad.clone(), None
    model.zero_grad()
    _compare("the gradient", got, expected, 10 * tolerance)


def _decodes(model: Any, tolerance: float) -> None:
    """Rows on slots against whole passes, and speculation against autoregression."""
    network, config = hf.as_network(model, _mask(model)), _config(model)
    texts = [_tokens(model, 1, n, seed=n)[0] for n in (LENGTH - 9, 3, LENGTH - 4)]
    with torch.no_grad():
        past = begin(network, causal, texts)
        for _ in range(3):  # a token for each row
            last, position = _tokens(model, 3, 1, seed=len(texts[0])), past.lengths[:, None].clone()
            past.set_columns(int(position.max()) + 1)
            got = network(last, Layout.of(position), causal, past=past)
            past.lengths += 1
            texts = [torch.cat([text, token]) for text, token in zip(texts, last, strict=True)]
            for row, text in enumerate(texts):
                _compare("a cached step", got[row], _stock(model, text[None])[0, -1:], tolerance, _mask(model))
        _blocks(model, network, config, tolerance)
    request = Request(max_new_tokens=12)
    prompts = [_tokens(model, 1, n, seed=n)[0] for n in (5, LENGTH - 12, 2)]
    ar = sample_autoregressive(network, prompts, request)
    _same_tokens(model, prompts, sample_speculative(network, config, prompts, request), ar, "speculation")
    sample_blocks(network, config, prompts, request)


def _blocks(model: Any, network: hf.HFNetwork, config: DiffusionConfig, tolerance: float) -> None:
    """Each masked block on its cached prefix against one pass over both streams."""
    x0 = _tokens(model, 1, LENGTH)
    xt = x0.masked_fill(torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.6, _mask(model))
    layout = _layout(x0)
    wanted = layout.position > 0
    expected = score(network, config, xt, x0, layout, wanted).split([BLOCK - 1, *[BLOCK] * (LENGTH // BLOCK - 1)])
    for start, rows in zip(range(0, LENGTH, BLOCK), expected, strict=True):
        at = slice(start, start + BLOCK)
        past = begin(network, config.pattern, x0[:, :start])
        past.columns = start + BLOCK
        got = denoise(network, config, past, xt[:, at], layout.subset(slice(None), at), wanted[:, at])
        _compare("a cached block", got, rows, tolerance, _mask(model))


def _drafts(model: Any, tolerance: float) -> None:
    """A drafter leaves clean rows as they are, changes noisy ones, learns, and drafts without changing the text."""
    tokens, mask = _tokens(model, 1, LENGTH), model.get_input_embeddings().weight.shape[0]
    layout = _layout(tokens)
    with torch.no_grad():
        before = _stock(model, tokens)
    drafter = hf.drafter_on(model, mask, DrafterConfig(rank=2, mask_rows=2))
    try:
        for index, up in enumerate(drafter.up.values()):
            torch.nn.init.normal_(up, std=0.05, generator=torch.Generator().manual_seed(index))
        network, config = hf.as_network(model, mask, gate=drafter.rows), _config(model, mask)
        noisy = torch.full_like(tokens, mask)
        both = layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)
        got = network(torch.cat([noisy, tokens], dim=1), both, two_stream(BLOCK, "causal"))
        _compare("the clean rows of a drafter", got[:, LENGTH:].detach(), before, tolerance)
        got[:, :LENGTH].logsumexp(-1).sum().backward()
        still = [name for name, up in drafter.up.items() if up.grad is None or not bool(up.grad.abs().sum() > 0)]
        if len(still) == len(drafter.up) or drafter.masks.grad is None:
            raise AssertionError("a drafter does not learn")
        request, prompts = Request(max_new_tokens=12), [_tokens(model, 1, n, seed=n)[0] for n in (5, LENGTH - 12, 2)]
        ar = sample_autoregressive(_network(model, mask), prompts, request)
        _same_tokens(model, prompts, sample_speculative(network, config, prompts, request), ar, "a drafter")
    finally:
        drafter.detach()
        model.zero_grad()


# --- what the checks share


def _same_tokens(model: Any, prompts: list[Tensor], got: Any, expected: Any, what: str) -> None:
    """Equal tokens, or a first difference where the two best logits of the stock model are as good as equal."""
    for prompt, ours, theirs in zip(prompts, got.new_tokens, expected.new_tokens, strict=True):
        if ours == theirs:
            continue
        same = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
        with torch.no_grad():
            best = _stock(model, torch.cat([prompt, torch.tensor(theirs[:same], dtype=torch.long)])[None])[0, -1]
        best[_mask(model)] = -torch.inf
        first, second = best.topk(2).values.tolist()
        if model.dtype == torch.float64 or first - second > 1e-4:
            raise AssertionError(f"{what} writes {ours} after {len(prompt)} tokens, not {theirs}")


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float, mask: int | None = None) -> None:
    if mask is not None:
        got, expected = got[..., :mask], expected[..., :mask]
    gap, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if not gap <= tolerance * scale:
        raise AssertionError(f"{what} differs from the stock model's by {gap / scale:.1e} of the largest value")


def _network(model: Any, mask: int | None = None) -> hf.HFNetwork:
    """The network without fast paths."""
    network = hf.as_network(model, mask)
    network.fast_paths = FastPaths()
    return network


def _stock(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _layout(tokens: Tensor) -> Layout:
    return Layout.of(torch.arange(tokens.shape[1]).expand(tokens.shape))


def _mask(model: Any) -> int:
    """The last row of the vocabulary, which no text has."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows - 1


def _tokens(model: Any, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, _mask(model), shape, generator=torch.Generator().manual_seed(seed))


def _config(model: Any, mask: int | None = None) -> DiffusionConfig:
    return DiffusionConfig(_mask(model) if mask is None else mask, "two_stream", "causal", BLOCK, False, "check", "0",
                           mask_rows=1 if mask is None else 2)  # fmt: skip


def _is_length(name: str) -> bool:
    return any(part in name for part in _LENGTHS)


def _line(error: BaseException) -> str:
    """The error in one line."""
    kind = "" if isinstance(error, AssertionError | ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]
