"""What a study measures on a checkpoint: each measure is a function that returns rows of named figures.

A row is a flat dict of figures; `at` in it is their place on the measure's own axis (an evaluation block size, a
layer, a threshold, a place in the block). A measure that a checkpoint lacks has no rows.

Knows checkpoints and held-out text. Knows no training, no arms and no seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask.core.noise import seed_for
from unmask.data.corpus import Corpus
from unmask.evaluation import likelihood
from unmask.evaluation.held_out import held_out_document
from unmask.lab.frontier import Score, Setting, measure, padded
from unmask.model import DiffusionLM
from unmask.sampling import Candidates, Confidence, Selector, Threshold

Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """How much is measured. thresholds, paces, block_sizes: the axes of `frontier`, `pace` and `block_sizes`.

    documents, samples: held-out documents and masks per block of a bound. prompts, prompt_tokens, new_tokens: of
    what is generated. votes: samples of each prompt that `votes` takes, at vote_temperature.
    """

    documents: int = 64
    samples: int = 4
    block_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    paces: tuple[int, ...] = (1, 2, 4, 8)
    prompts: int = 48
    prompt_tokens: int = 24
    new_tokens: int = 64
    votes: int = 5
    vote_temperature: float = 0.7


@dataclass(frozen=True)
class HeldOut:
    """What checkpoints are measured on, the same for all of them.

    documents: tokenised, with their loss masks. prompts: token ids to continue. score: which new texts are right,
    None for text without a gold answer. answer: what a new text says, to count votes by.
    """

    documents: list[likelihood.Document]
    prompts: list[Tensor]
    score: Score | None = None
    answer: Callable[[str], str] = str.strip


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the AR parent it was made from, and whether it still is (or is again) a next-token model."""

    lm: DiffusionLM
    parent: DiffusionLM
    budget: Budget
    held_out: HeldOut

    @property
    def serves_ar(self) -> bool:
        return self.lm.diffusion is None or self.lm.diffusion.serves_ar

    def decode(self, setting: Setting, temperature: float = 0.0, seed: int = 0) -> Row:
        """The figures of one way of decoding, without its times and without the setting itself."""
        row = measure(
            self.lm, self.parent, self.held_out.prompts, setting, max_new_tokens=self.budget.new_tokens,
            temperature=temperature, seed=seed, score=self.held_out.score,
        )  # fmt: skip
        excluded = ("mode", "rule", "value", "block_size", "batch_size", "num_texts", "tokens_per_second")
        return {k: v for k, v in vars(row).items() if k not in excluded and v is not None}


Measure = Callable[[Subject], list[Row]]
_BATCH = 64


def measure_likelihood(s: Subject) -> list[Row]:
    """Exact NLL where the checkpoint is a next-token model, NELBO with the standard error of its masks."""
    row: Row = {}
    context = s.lm.network.context_length
    if s.serves_ar:
        exact = likelihood.summarise(likelihood.nll(s.lm.network, s.held_out.documents, context_length=context))
        row["nll"] = exact.nats_per_token
    if s.lm.diffusion is not None:
        row |= _nelbo(s, None)
    return [row]


def measure_block_sizes(s: Subject) -> list[Row]:
    """NELBO at other evaluation block sizes (Efficient-DLM 2512.14067, Fig. 3, which shows accuracies)."""
    if s.lm.diffusion is None or s.lm.diffusion.segment_size is None:
        return []
    return [{"at": size, **_nelbo(s, size)} for size in s.budget.block_sizes]


def _nelbo(s: Subject, block_size: int | None) -> Row:
    assert s.lm.diffusion is not None
    bound = likelihood.summarise(
        likelihood.nelbo(
            s.lm.network, s.lm.diffusion.with_block_size(block_size), s.held_out.documents,
            num_samples=s.budget.samples, context_length=s.lm.network.context_length,
        )
    )  # fmt: skip
    return {"nelbo": bound.nats_per_token, "nelbo_masks_error": bound.standard_error}


def measure_quality(s: Subject) -> list[Row]:
    """Greedy text at one token per forward, judged by the parent: what the model can write when it has all the time."""
    mode = "ar" if s.lm.diffusion is None else "diffusion"
    select = Threshold(1.0) if mode == "diffusion" else None
    return [s.decode(Setting(mode, select, batch_size=_BATCH))]


def measure_frontier(s: Subject) -> list[Row]:
    """Greedy text at falling thresholds: quality against tokens per forward. `at` is the threshold."""
    if s.lm.diffusion is None:
        return [{"at": None, **s.decode(Setting("ar", batch_size=_BATCH))}]
    return [
        {"at": p, **s.decode(Setting("diffusion", Threshold(p), batch_size=_BATCH))}
        for p in sorted(s.budget.thresholds, reverse=True)
    ]


def measure_pace(s: Subject) -> list[Row]:
    """Greedy text at a fixed number of tokens per forward, the most confident ones. `at` is the number."""
    if s.lm.diffusion is None:
        return []
    return [{"at": n, **s.decode(Setting("diffusion", Confidence(n), batch_size=_BATCH))} for n in s.budget.paces]


def measure_speculation(s: Subject) -> list[Row]:
    """Tokens per cycle and per forward of self-speculation, `at` temperature 0 and 1 (coupled noise)."""
    if s.lm.diffusion is None or not s.lm.diffusion.serves_ar:
        return []
    figures = ("tokens_per_cycle", "tokens_per_forward", "accuracy")
    rows = {t: s.decode(Setting("speculative", batch_size=_BATCH), temperature=t) for t in (0.0, 1.0)}
    return [{"at": t, **{k: row[k] for k in figures if k in row}} for t, row in rows.items()]


def measure_votes(s: Subject) -> list[Row]:
    """Majority of k samples and any of k right (DiffuLLaMA 2410.17891, Table 2), on tasks with answers. `at` is k."""
    if s.held_out.score is None:
        return []
    decoding: dict[str, Any] = {"mode": "ar"}
    if s.lm.diffusion is not None:
        decoding = {"mode": "diffusion", "select": Threshold(1.0)}
    right: list[list[bool]] = []
    answers: list[list[str]] = []
    for k in range(s.budget.votes):
        texts: list[str] = []
        for start in range(0, len(s.held_out.prompts), _BATCH):
            ids, real = padded(s.held_out.prompts[start : start + _BATCH])
            out = s.lm.generate(
                ids, max_new_tokens=s.budget.new_tokens, attention_mask=real, **decoding,
                temperature=s.budget.vote_temperature, seed=seed_for(("vote", k, start)),
            )  # fmt: skip
            texts += out.texts
        right.append(s.held_out.score(texts))
        answers.append([s.held_out.answer(text) for text in texts])
    return count_votes(answers, right)


def count_votes(answers: Sequence[Sequence[str]], right: Sequence[Sequence[bool]]) -> list[Row]:
    """Accuracy of the majority, and of any, of the first k samples; answers and right by sample, then prompt."""
    number = len(answers[0])
    rows = []
    for k in range(1, len(answers) + 1):
        majority = any_of = 0
        for i in range(number):
            votes = [answers[j][i] for j in range(k)]
            majority += right[votes.index(max(votes, key=votes.count))][i]  # a tie goes to the earlier sample
            any_of += any(right[j][i] for j in range(k))
        rows.append({"at": k, "majority_accuracy": majority / number, "any_accuracy": any_of / number})
    return rows


_LAYER = re.compile(r"\.(\d+)\.")


def measure_drift(s: Subject) -> list[Row]:
    """How far the weights of each layer moved from the parent's (Efficient-DLM 2512.14067, Figs. 2e and 4).

    mean_change: mean |w - w_parent| over the entries of a layer's matrices, attention and MLP apart (the paper's
    figure). relative_change: Frobenius norm of the change over that of the parent's weights. `at` is the layer.
    """
    of_parent = {name: p.detach() for name, p in s.parent.model.named_parameters()}
    sums: dict[tuple[int, str], Tensor] = {}
    for name, weight in s.lm.model.named_parameters():
        layer = _LAYER.search(name)
        if layer is None or weight.ndim < 2 or name not in of_parent:
            continue
        part = "attention" if "attn" in name or "attention" in name else "mlp"
        change = (weight.detach() - of_parent[name]).double()
        squares = (of_parent[name].double() ** 2).sum()
        figures = torch.stack([change.abs().sum(), (change**2).sum(), squares, squares.new_tensor(change.numel())])
        sums[int(layer[1]), part] = sums.get((int(layer[1]), part), 0) + figures.cpu()
    return [
        {"at": layer, "part": part, "mean_change": a / n, "relative_change": (c / p) ** 0.5}
        for (layer, part), (a, c, p, n) in sorted((key, total.tolist()) for key, total in sums.items())
    ]


@dataclass
class _Watched:
    """A commit rule that notes at which forward of its block each place was committed, and with what confidence.

    steps, confidence: (forward, place) counts of commits, and sums of their confidence. still_masked: after the last
    call, None before a block's first.
    """

    rule: Selector
    places: int
    steps: Tensor = field(init=False)
    confidence: Tensor = field(init=False)
    step: int = 0
    still_masked: Tensor | None = None

    def __post_init__(self) -> None:
        self.steps, self.confidence = torch.zeros(2, self.places, self.places, dtype=torch.float64)

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        masked, expected = candidates.masked, self.still_masked
        new_block = expected is None or masked.shape != expected.shape or bool((masked & ~expected).any())
        self.step = 0 if new_block else self.step + 1
        commit = self.rule(candidates, at_least)
        self.still_masked = masked & ~commit
        place = commit.nonzero()[:, 1]
        self.steps[self.step].index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
        self.confidence[self.step].index_add_(0, place, candidates.confidence[commit])
        return commit


def measure_order(s: Subject) -> list[Row]:
    """When each place of a block is committed, and with what confidence, one token a forward (Efficient-DLM, Fig. 6).

    `at` is the place. counts[k]: how often it was committed in forward k; confidence[k]: the mean confidence then.
    """
    config = s.lm.diffusion
    if config is None or config.block_size is None:
        return []
    places = config.block_size
    watched = _Watched(Threshold(1.0), places)
    whole = [ids[: len(ids) // places * places] for ids in s.held_out.prompts if len(ids) >= places]
    if not whole:  # prompts end within their first block: no block is decoded from its first place on
        return []
    for start in range(0, len(whole), _BATCH):
        watched.still_masked = None
        ids, real = padded(whole[start : start + _BATCH])
        s.lm.generate(ids, "diffusion", s.budget.new_tokens, attention_mask=real, select=watched)
    steps = torch.arange(places, dtype=torch.float64)
    rows = []
    for place in range(places):
        counts, confidence = watched.steps[:, place], watched.confidence[:, place]
        total = counts.sum().clamp_min(1)
        rows.append({
            "at": place, "mean_step": float((steps * counts).sum() / total),
            "mean_confidence": float(confidence.sum() / total), "counts": counts.long().tolist(),
            "confidence": [round(float(v), 4) for v in confidence / counts.clamp_min(1)],
        })  # fmt: skip
    return rows


MEASURES: dict[str, Measure] = {
    "likelihood": measure_likelihood,
    "quality": measure_quality,
    "frontier": measure_frontier,
    "pace": measure_pace,
    "block_sizes": measure_block_sizes,
    "drift": measure_drift,
    "order": measure_order,
    "speculation": measure_speculation,
    "votes": measure_votes,
}


def hold_out(corpus: Corpus, budget: Budget, end_token_id: int | None) -> HeldOut:
    """The first documents of a corpus, and the beginnings of the first that are long enough to be continued.

    A prompt has prompt_tokens tokens; that of a supervised example is what it gives.
    """
    documents: list[likelihood.Document] = []
    prompts: list[Tensor] = []
    for i in range(len(corpus)):
        document = held_out_document(corpus.document(i), end_token_id)
        tokens = document.ids
        if len(documents) < budget.documents:
            documents.append(document)
        if len(prompts) < budget.prompts:
            if document.loss_mask is not None:
                prompts.append(tokens[: int(document.loss_mask.int().argmax())])
            elif len(tokens) >= budget.prompt_tokens + budget.new_tokens:
                prompts.append(tokens[: budget.prompt_tokens])
    if not prompts:
        raise ValueError(
            f"no held-out document has the {budget.prompt_tokens} + {budget.new_tokens} tokens of a prompt and its "
            "continuation: give longer text, or lower prompt_tokens and new_tokens"
        )
    return HeldOut(documents, prompts)
