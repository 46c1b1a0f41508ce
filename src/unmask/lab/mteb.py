"""A `DiffusionLM` as an encoder of MTEB 2, so that Efficient-DLM's Table 4 (2512.14067) can be rerun:

    mteb.evaluate(MTEBEncoder(unmask.load(folder)), mteb.get_tasks(tasks=["STSBenchmark"]))

Zero-shot: no instruction is put before a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from unmask.core.attention import Pattern
from unmask.version import __version__


class MTEBEncoder(AbsEncoder):
    """pattern, batch_tokens: as in `DiffusionLM.embed`. name: what MTEB files the results under."""

    def __init__(
        self, lm: Any, pattern: Pattern | str | None = None, *, name: str | None = None, batch_tokens: int = 8192
    ) -> None:
        self.model, self.pattern, self.batch_tokens = lm, pattern, batch_tokens
        network = lm.network
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name or "unmask/" + (Path(lm.tokenizer.name_or_path).name or "model"),
                "revision": __version__,
                "max_tokens": network.context_length,
                "embed_dim": network.config.hidden_size,
                "n_parameters": sum(p.numel() for p in lm.model.parameters()),
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """(number of texts, hidden) float32 of the batches' "text", whatever the task and its prompts are."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.embed(texts, self.pattern, batch_tokens=self.batch_tokens).numpy()
