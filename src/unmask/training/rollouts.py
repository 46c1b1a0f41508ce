"""Training text that the model writes itself (`--data self`): the beginnings of documents, continued.

A drafter is asked for the continuation its own base would write, not for the corpus's. At temperature 0 that
continuation is a function of the prefix, so even parallel drafts can be right all the way (I-DLM 2604.11035 and
dParallel 2509.26488 train on regenerated text). A diffusion student meets, when it decodes, the states of its own
trajectories: text that it wrote, with what was still masked on the way (OPDLM 2606.06712). Rollouts are made in
batches, once, and kept on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import Key, integer
from unmask.data.documents import Corpus
from unmask.sampling import Request, sample_autoregressive, sample_blocks

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
    first: int = 0,
    student: DiffusionConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Documents of up to `max_length` tokens, about `num_tokens` in all, kept in `folder`.

    Document i goes on from the first 1 to 32 tokens (drawn from the seed) of document first + i of `prompts`,
    going round. author: fingerprint of the model; the file's name is a hash of everything that decides its
    content. student: decode blocks by diffusion as this config says; what is not to be learnt is then all but
    the tokens that were still masked at one step of each block, drawn among the steps that it took.
    """
    key = repr((author, prompts.fingerprint, num_tokens, max_length, temperature, tuple(end_token_ids), seed))
    if student is not None or first:
        key += repr((first, student))
    file = folder / f"rollouts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if file.is_file():
        saved = np.load(file)
        return _corpus(saved["tokens"], saved["offsets"], saved.get("given"))
    key_of: Key = ("rollout", seed, first)
    documents: list[np.ndarray] = []
    given: list[np.ndarray] = []
    made = 0
    while made < num_tokens:
        few = []
        for i in range(len(documents), len(documents) + _BATCH):
            length = 1 + integer(min(LONGEST_PROMPT, max_length - 1), (*key_of, "length", i))
            few.append(torch.from_numpy(prompts[(first + i) % len(prompts)][:length].astype("int64")))
        request = Request(
            max_new_tokens=max_length, context_length=max_length, temperature=temperature,
            seed=integer(2**31, (*key_of, "text", len(documents))), end_token_ids=end_token_ids,
        )  # fmt: skip
        if student is None:
            written = sample_autoregressive(network, few, request).new_tokens
        else:
            clock = _Clock(len(few), max_length)
            written = sample_blocks(network, student, few, replace(request, callback=clock)).new_tokens
            assert student.block_size is not None
            given += clock.committed(few, written, student.block_size, (*key_of, "step", len(documents)))
        new = [np.concatenate([p.numpy(), n]).astype(np.int32) for p, n in zip(few, written, strict=True)]
        documents += new
        made += sum(map(len, new))
        if progress is not None:
            progress(sum(map(len, new)))
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents], dtype=np.int64)])
    saved = {"tokens": np.concatenate(documents), "offsets": offsets}
    if given:
        saved["given"] = np.concatenate(given)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **saved)
    partial.replace(file)
    return _corpus(saved["tokens"], saved["offsets"], saved.get("given"))


class _Clock:
    """A sampler's callback that notes the step of the row at which each of its positions was committed."""

    def __init__(self, rows: int, length: int) -> None:
        self.steps = [0] * rows
        self.at = np.zeros((rows, length), dtype=np.int64)

    def __call__(self, row: int, positions: list[int], _tokens: list[int]) -> None:
        self.steps[row] += 1
        self.at[row, positions] = self.steps[row]

    def committed(
        self, prompts: Sequence[Tensor], new: Sequence[Sequence[int]], block_size: int, key: Key
    ) -> list[np.ndarray]:
        """For each document, True on what stood at a random step of its block; prompts stood from the beginning."""
        documents = []
        for row, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
            at = self.at[row, : len(prompt) + len(tokens)]
            given = at == 0
            for start in range(0, len(at), block_size):
                block = slice(start, start + block_size)
                steps = np.unique(at[block][at[block] > 0])
                if len(steps):
                    step = steps[integer(len(steps), (*key, row, start))]
                    given[block] = at[block] < step
            documents.append(given)
        return documents


def _corpus(tokens: np.ndarray, offsets: np.ndarray, given: np.ndarray | None = None) -> Corpus:
    content = tokens.tobytes() + offsets.tobytes() + (b"" if given is None else given.tobytes())
    return Corpus(tokens, offsets, hashlib.sha256(content).hexdigest()[:16], given)
