"""Autoregressive sampling: one token per forward on top of a cache, the mode every checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import Layout, causal
from unmask.core.decoding import with_backlog
from unmask.core.network import Network
from unmask.sampling.constraint import restrict
from unmask.sampling.request import Request, SampledTokens
from unmask.sampling.scheduler import AutoregressiveRows
from unmask.sampling.tokens import choose_tokens, token_noise


@torch.inference_mode()
def sample_autoregressive(network: Network, prompts: Sequence[Tensor], request: Request) -> SampledTokens:
    """Continue ragged `prompts`, each (length,) int64 of at least one token.

    The prefill ends before the last prompt token, so a row needs exactly one forward per new token that no constraint
    forces.
    """
    state = AutoregressiveRows(network, prompts, request)
    scheduler, past = state.scheduler, state.scheduler.past
    while True:
        state.admit_rows()
        if not scheduler.rows:
            break
        backlog, known = state.take_backlog()
        position = (past.lengths + known)[:, None]
        past.set_columns(int(position.max()) + 1)
        ids, layout, slots = with_backlog(past, state.last, Layout.of(position), backlog)
        logits = network(ids, layout, causal, rows=torch.arange(len(position)), past=slots)
        past.lengths += 1 + known
        logits = restrict(logits, [state.allowed(row) for row in scheduler.rows])
        noise = None
        if request.temperature > 0:
            rows = torch.tensor(scheduler.rows)
            noise = token_noise(logits.shape[-1], request.seed, rows, position + 1, device=logits.device)[:, 0]
        tokens = choose_tokens(logits, request.temperature, request.top_p, noise, request.top_k)
        state.last = tokens[:, None]
        for slot, token in enumerate(tokens.cpu().tolist()):
            if state.add(scheduler.rows[slot], [token]):
                scheduler.release(slot)
    counts = torch.tensor([len(tokens) for tokens in state.new_tokens]) - state.num_forced
    return SampledTokens(state.new_tokens, counts, state.num_prefill_forwards, num_forced=state.forced_or_none)
