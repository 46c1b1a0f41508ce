"""What `evaluate --data` says of a model: the likelihood of each document, and the figures of all of them.

Documents may be measured in parts: masks are keyed by a document's number in the whole set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unmask import hf
from unmask.evaluation.beside import beginnings, check_same_vocabulary, write
from unmask.evaluation.likelihood import LikelihoodOutput, LikelihoodSummary, summarise
from unmask.parts import Shard
from unmask.version import __version__

_LOOKED_AT = 1000
"""The first documents, whose beginnings models continue."""


@dataclass(frozen=True)
class Documents:
    """A part of a set of documents. texts: by their numbers in the set, from 0. first: the first ones of the set.

    number: of documents in the set. fingerprint: of all its texts.
    """

    texts: Mapping[int, str]
    first: Sequence[str]
    number: int
    fingerprint: str


def part_of(texts: Iterable[str], shard: Shard) -> Documents:
    """The documents of a part; all are read, those of the part are kept."""
    kept, first, number, digest = {}, [], 0, hashlib.sha256()
    for text in texts:
        if shard.takes(number):
            kept[number] = text
        if number < _LOOKED_AT:
            first.append(text)
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        number += 1
    return Documents(kept, first, number, digest.hexdigest()[:16])


def describe(
    name: str, lm: Any, documents: Documents, data: Sequence[str], bound: Mapping[str, Any], parent: Any, of_parent: Any
) -> dict[str, Any]:
    """What run.json says of the measurement. bound: options of `DiffusionLM.nelbo`. of_parent: its `DiffusionLM`."""
    exact, config = bound["exact"], lm.diffusion
    return {
        "measured": "likelihood",
        "model": name,
        "model_fingerprint": fingerprint(lm),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "parent": parent,
        "parent_fingerprint": of_parent and fingerprint(of_parent),
        "data": list(data),
        "num_documents": documents.number,
        "documents_fingerprint": documents.fingerprint,
        "num_samples": None if config is None or exact else bound["num_samples"],
        "exact": exact,
        "block_size": config and (bound["block_size"] or config.block_size),
        "seed": bound["seed"],
        "versions": {"unmask": __version__, "torch": torch.__version__},
    }


def fingerprint(lm: Any) -> str:
    """Of a model's weights, and its drafter's."""
    return hf.fingerprint(lm.model) + ("" if lm.drafter is None else "-" + hf.fingerprint(lm.drafter))


def measure(lm: Any, parent: Any, documents: Documents, bound: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each document: its number, and `LikelihoodOutput` of what the model has, and of its parent."""
    if not documents.texts:
        return []
    texts, numbers = list(documents.texts.values()), list(documents.texts)
    shared: dict[str, Any] = {"numbers": numbers, "show_progress": True}
    found = {"nll": lm.nll(texts, **shared)}
    if lm.diffusion is not None:
        found["nelbo"] = lm.nelbo(texts, **bound, **shared)
    if parent is not None:
        found["parent_nll"] = parent.nll(texts, **shared)
    return [
        {"document": number} | {name: asdict(outputs[i]) for name, outputs in found.items()}
        for i, number in enumerate(numbers)
    ]


def figures(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], written: Any = None) -> dict[str, Any]:
    """What `evaluate --json` prints of the rows of all documents.

    Nats per predicted token and bits per byte, None where the checkpoint has no such mode. written: of
    `written_beside`, where there is a parent.
    """
    exact = _summary(rows, "nll")
    bound = _summary(rows, "nelbo") if "nelbo" in rows[0] else None
    found = {
        "nll": exact.nats_per_token,
        "nelbo": bound and bound.nats_per_token,
        "nelbo_standard_error": bound and (0.0 if record["exact"] else bound.standard_error),
        "nll_bits_per_byte": exact.bits_per_byte,
        "nelbo_bits_per_byte": bound and bound.bits_per_byte,
        "num_documents": exact.num_documents,
        "num_tokens": exact.num_tokens,
        "num_samples": record["num_samples"],
        "block_size": record["block_size"],
    }
    if written is None:
        return found
    of_parent = _summary(rows, "parent_nll")
    parent = {"model": record["parent"], "nll": of_parent.nats_per_token, "nll_bits_per_byte": of_parent.bits_per_byte}
    return found | written | {"parent": parent | written.get("parent", {})}


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> LikelihoodSummary:
    return summarise([LikelihoodOutput(**row[name]) for row in rows])


def check_parent(parent: Any, named: str, lm: Any) -> None:
    """Raise ValueError for a parent that `lm` cannot be compared with."""
    check_same_vocabulary(parent.tokenizer, lm.tokenizer, f"parent {named!r}", "the model")


def written_beside(parent: Any, lm: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What the parent and `lm` write after the beginnings of texts; empty if none is long enough."""
    mask_token_id = lm.diffusion and lm.diffusion.mask_token_id
    prompts = beginnings([document.ids for document in lm._documents(texts)], mask_token_id)
    if not len(prompts):
        return {}
    theirs, ours = write(parent, prompts, "ar"), write(lm, prompts)
    return {
        "parent": {"text": theirs.text, "tokens_per_forward": theirs.tokens_per_forward},
        "prompt": lm.tokenizer.decode(prompts[0]),
        "text": ours.text,
        "mode": lm.default_mode,
        "tokens_per_forward": ours.tokens_per_forward,
    }
