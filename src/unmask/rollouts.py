"""Training text that the model writes itself (`--data self`): the beginnings of documents, continued by AR decoding.

A drafter is asked for the continuation its own base would write, not for the corpus's. At temperature 0 that
continuation is a function of the prefix, so even parallel drafts can be right all the way (I-DLM 2604.11035 and
dParallel 2509.26488 train on regenerated text). Rollouts are made once, in batches, and kept on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from unmask.data import Corpus
from unmask.denoiser import Network
from unmask.noise import generator
from unmask.sampling import sample_autoregressive

LONGEST_PROMPT = 32
_BATCH = 64


def roll_out(
    network: Network,
    prompts: Corpus,
    folder: Path,
    *,
    author: str,
    num_tokens: int,
    max_length: int,
    temperature: float,
    end_token_ids: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Documents of up to `max_length` tokens, about `num_tokens` in all, kept in `folder`.

    Document i goes on from the first 1 to 32 tokens (drawn from the seed) of document i of `prompts`, going
    round. author: fingerprint of the model; the file's name is a hash of everything that decides its content.
    """
    key = repr((author, prompts.fingerprint, num_tokens, max_length, temperature, tuple(end_token_ids), seed))
    file = folder / f"rollouts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if file.is_file():
        saved = np.load(file)
        return _corpus(saved["tokens"], saved["offsets"])
    draw = generator("rollout", seed)
    documents: list[np.ndarray] = []
    made = 0
    while made < num_tokens:
        few = []
        for i in range(len(documents), len(documents) + _BATCH):
            length = int(torch.randint(1, min(LONGEST_PROMPT, max_length - 1) + 1, (), generator=draw))
            few.append(torch.from_numpy(prompts[i % len(prompts)][:length].astype("int64")))
        sampled = sample_autoregressive(
            network, few, max_new_tokens=max_length, context_length=max_length, temperature=temperature,
            seed=int(torch.randint(2**31, (), generator=draw)), end_token_ids=end_token_ids,
        )  # fmt: skip
        new = [np.concatenate([p.numpy(), n]).astype(np.int32) for p, n in zip(few, sampled.new_tokens, strict=True)]
        documents += new
        made += sum(map(len, new))
        if progress is not None:
            progress(sum(map(len, new)))
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents], dtype=np.int64)])
    tokens = np.concatenate(documents)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, tokens=tokens, offsets=offsets)
    partial.replace(file)
    return _corpus(tokens, offsets)


def _corpus(tokens: np.ndarray, offsets: np.ndarray) -> Corpus:
    return Corpus(tokens, offsets, hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()[:16])
