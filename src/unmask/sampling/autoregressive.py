"""Autoregressive sampling: one token per forward on top of a cache, the mode every checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.attention import PADDING, Layout, causal
from unmask.denoiser import Network, prefill
from unmask.sampling.output import Callback, SampledTokens, Stop, left_pad
from unmask.sampling.tokens import check_sampling, choose_tokens, token_noise


@torch.inference_mode()
def sample_autoregressive(
    network: Network,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    context_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_token_ids: Sequence[int] = (),
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token); finished rows leave the batch.

    The prefill ends before the last prompt token, so a row needs exactly one forward per new token.
    """
    check_sampling(temperature, top_p, top_k)
    device, batch = network.device, len(prompts)
    ids, position, real = left_pad([prompt[:-1] for prompt in prompts], 0, device)
    layout = Layout.of(position, torch.where(real, 0, PADDING))
    past = prefill(network, causal, ids, layout)

    new_tokens: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(batch, device=device)
    last = torch.stack([prompt[-1] for prompt in prompts]).to(device)[:, None]
    position = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=device)
    for _ in range(max_new_tokens):
        if not len(rows):
            break
        here = Layout.of(position)
        logits = network(last, here, causal, rows=torch.arange(len(rows), device=device), past=past)
        past.layout = past.layout.then(here)
        position = position + 1
        noise = None
        if temperature > 0:
            noise = token_noise(logits.shape[-1], seed, rows, position)[:, 0]
        tokens = choose_tokens(logits, temperature, top_p, noise, top_k)
        going = []
        for i, (row, token, place) in enumerate(
            zip(rows.tolist(), tokens.tolist(), position[:, 0].tolist(), strict=True)
        ):
            new_tokens[row].append(token)
            if callback is not None:
                callback(row, [place], [token])
            kept = len(new_tokens[row]) if token in end_token_ids else None
            if kept is None and stop is not None:
                kept = stop(row, new_tokens[row])
            if kept is None and place + 1 == context_length:
                kept = len(new_tokens[row])
            if kept is None:
                going.append(i)
            else:
                del new_tokens[row][kept:]
        last = tokens[:, None]
        if len(going) < len(rows):
            keep = torch.tensor(going, dtype=torch.long, device=device)
            rows, last, position = rows[keep], last[keep], position[keep]
            if going:
                past.select(keep)
    counts = torch.tensor([len(tokens) for tokens in new_tokens])
    prefilled = torch.tensor([int(len(prompt) > 1) for prompt in prompts])
    return SampledTokens(new_tokens, counts, prefilled)
