"""Texts as vectors: the mean over a text's tokens of the network's last hidden states.

Zero-shot, as Efficient-DLM's Table 4 (2512.14067, section 5.3): a converted model reads a text under a
bidirectional pattern, an AR model under its causal one. Nothing is corrupted: every token is clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout, Pattern, bidirectional, block_causal, causal
from unmask.core.transfer import to_device
from unmask.data.plain_text import encode
from unmask.plain_json import to_json
from unmask.progress import warn
from unmask.run_folder import check_can_be_written, whole_file


class Encoder(Protocol):
    """A network whose last hidden states can be had; `hf.HFNetwork` is one."""

    @property
    def device(self) -> torch.device: ...

    def hidden_states(self, input_ids: Tensor, layout: Layout, pattern: Pattern) -> Tensor: ...


def named_pattern(name: str, block_size: int | None) -> Pattern:
    """The pattern "causal", "bidirectional" or "block_causal" (in blocks of block_size)."""
    if name == "block_causal" and block_size is None:
        raise ValueError("pattern 'block_causal' needs a block size, and this model has none: use 'bidirectional'")
    patterns = {"causal": causal, "bidirectional": bidirectional, "block_causal": block_causal(block_size or 1)}
    if name not in patterns:
        raise ValueError(f"pattern {name!r} is unknown: use {', '.join(patterns)}")
    return patterns[name]


def document_ids(
    tokenizer: Any, texts: Sequence[str], begin_token: Callable[[], Tensor], context_length: int | None
) -> list[Tensor]:
    """The token ids (length,) of each text, cut to the context; an empty text is its begin token."""
    rows = encode(tokenizer, texts)["input_ids"]
    return beginnings([torch.tensor(row) if row else begin_token() for row in rows], context_length)


def beginnings(rows: Sequence[Tensor], context_length: int | None) -> list[Tensor]:
    """Rows of token ids, (length,), cut to the context, with a warning if one is longer."""
    long = [i for i, row in enumerate(rows) if context_length is not None and len(row) > context_length]
    if long:
        warn(
            f"{len(long)} of {len(rows)} texts are longer than the context of {context_length} tokens (the first is "
            f"number {long[0] + 1}): only their beginnings are embedded"
        )
    return [row[:context_length] for row in rows]


@torch.inference_mode()
def embed(
    network: Encoder,
    documents: Sequence[Tensor],
    pattern: Pattern,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """(n, hidden) float32: mean over each document's token ids (length,) of the last hidden states.

    Documents of like length share a batch, longest first; padding is neither seen nor counted.
    """
    vectors: list[Tensor | None] = [None] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    while order:
        width = len(documents[order[0]])
        take = max(1, batch_tokens // width)
        rows, order = order[:take], order[take:]
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        document = torch.full_like(ids, PADDING)
        for row, i in enumerate(rows):
            ids[row, : len(documents[i])] = documents[i]
            document[row, : len(documents[i])] = 0
        layout = Layout.of(torch.arange(width).expand(len(rows), width), document)
        states = network.hidden_states(ids, layout, pattern).double()
        real = to_device(layout.real[..., None].double(), states.device)
        means = ((states * real).sum(1) / real.sum(1)).float().cpu()
        for i, vector in zip(rows, means, strict=True):
            vectors[i] = vector
        if progress is not None:
            progress(len(rows))
    return torch.stack([vector for vector in vectors if vector is not None])


# --- files

OUTPUTS = (".npy", ".jsonl", ".parquet")


def check_output(path: Path) -> None:
    """Raise on a file that `write_embeddings` cannot write."""
    if path.suffix not in OUTPUTS:
        raise ValueError(f"output {str(path)!r} has an unknown type: use {', '.join(OUTPUTS)}")
    if path.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder: give a file")
    check_can_be_written(path, "output")


def write_embeddings(path: Path, texts: Sequence[str], vectors: Tensor) -> None:
    """One vector a text, in order: the float32 matrix (.npy), or rows of `text` and `embedding`."""
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, vectors.numpy())
        elif path.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as lines:
                for text, vector in zip(texts, vectors.tolist(), strict=True):
                    lines.write(to_json({"text": text, "embedding": vector}) + "\n")
        else:
            import pyarrow
            import pyarrow.parquet

            columns = {"text": list(texts), "embedding": list(vectors.numpy())}
            pyarrow.parquet.write_table(pyarrow.table(columns), partial)
