"""Every mode and recipe as one model class of lm-evaluation-harness 0.4; `harness` runs it.

Log-likelihoods are exact in the modes "ar" and "speculative" (whose text is AR's), and minus the NELBO of the
continuation given its context in mode "diffusion", a lower bound. Text comes from `DiffusionLM.generate`.
Tokens, prefix token and windows are those of the harness's own `hf` model, so an AR model's numbers are too.
Where a text is longer than the context it loses its beginning; blocks count from what is left.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from unmask.core.attention import causal
from unmask.core.network import Network, Pass, run_rows
from unmask.core.noise import seed_for
from unmask.core.objectives import predictable, row_nll
from unmask.data.plain_text import ids_of, open_ids, rendered_ids
from unmask.data.prompts import StopStrings, chat_text
from unmask.evaluation.likelihood import (
    Document,
    Progress,
    batches,
    check_estimator,
    check_finite,
    nelbo,
    row_sums,
)
from unmask.limits import check_seed, check_whole
from unmask.progress import progress
from unmask.sampling import Request

SCORED_ROW = 512
"""Tokens of a scored row: `batch_size` rows of so many tokens make a batch."""

UNSTATED_CONTEXT = 2048
"""The context of a model that states none, as in the harness."""

GENERATION_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "until")


@dataclass
class Cost:
    """What a task's requests took. num_truncated: those (or their windows) that lost a beginning to the context.
    num_forwards: passes of the network for a row, prefills left out, as `generate` counts them. num_new_tokens: of
    generated text, 0 where texts were scored."""

    num_requests: int = 0
    num_truncated: int = 0
    num_forwards: int = 0
    num_new_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float | None:
        """Mean over all generated tokens; None where nothing was generated."""
        return self.num_new_tokens / self.num_forwards if self.num_new_tokens else None


class HarnessLM(TemplateLM):
    """A `DiffusionLM` as a model of the harness: `lm_eval.simple_evaluate(model=HarnessLM(unmask.load(folder)), ...)`.

    mode: as in `generate`; by default what the checkpoint is. num_samples, exact, block_size: of the bound.
    batch_size: rows decoded at a time; rows of 512 tokens scored at a time. max_length: a shorter context than
    the model's. decoding: further options of `generate`; temperature, top_p, top_k, stop strings and length are
    the task's. costs: filled while running, by task.
    """

    def __init__(
        self,
        lm: Any,
        mode: str | None = None,
        *,
        num_samples: int = 8,
        exact: bool = False,
        block_size: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
        show_progress: bool = False,
        **decoding: Any,
    ) -> None:
        super().__init__()
        self.mode = lm.default_mode if mode is None else mode
        lm.decoder(self.mode, **decoding)
        self.bound = None if self.mode != "diffusion" else lm.diffusion.with_block_size(block_size)
        if self.bound is None and (exact or (block_size is not None and self.mode == "ar")):
            raise ValueError(f"mode {self.mode!r} scores exactly, without a bound's block_size and exact: leave them")
        if self.bound is not None:
            check_estimator(self.bound, num_samples, exact)
        check_whole("batch_size", batch_size)
        check_seed(seed)
        context = lm.network.context_length or UNSTATED_CONTEXT
        check_whole("max_length", max_length, least=2)
        if max_length is not None and not 2 <= max_length <= context:
            raise ValueError(f"max_length {max_length} must be from 2 up to the model's context of {context}")
        self.lm, self.tokenizer = lm, lm.tokenizer
        self._templated = False
        self.num_samples, self.exact, self.seed = num_samples, exact, seed
        self.batch_size, self.max_length = batch_size, max_length or context
        self.show_progress = show_progress
        self.decoding = decoding | ({} if block_size is None else {"block_size": block_size})
        self.costs: dict[str, Cost] = {}

    # --- what the harness asks of a model with a tokenizer

    @property
    def device(self) -> torch.device:
        return self.lm.network.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: the begin token, else the end token."""
        return int(self.lm.begin_token())

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = self.tokenizer.bos_token or self.tokenizer.eos_token
        begun = add_special_tokens is None and begin is not None and string.startswith(begin)
        if begun and not self._templated:  # the one special token that a task's text may spell
            return [self.prefix_token_id, *ids_of(self.tokenizer, string[len(begin) :], add_special_tokens=False)]
        if add_special_tokens is None:  # as the tokenizer does by default, but never a second begin token
            add_special_tokens = not begun
        if self._templated:  # special tokens that a chat template wrote are special tokens
            return rendered_ids(self.tokenizer, string, add_special_tokens=add_special_tokens)
        return open_ids(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._templated = True
        return chat_text(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What the numbers depend on besides the task; the harness puts it into its results too."""
        sampled = self.bound is not None and not self.exact
        return {
            "mode": self.mode,
            "estimator": "exact" if self.bound is None else "nelbo",
            "enumerated": self.exact if self.bound is not None else None,
            "num_samples": self.num_samples if sampled else None,
            "block_size": self.bound and self.bound.block_size,
            "max_length": self.max_length,
            "seed": self.seed,
        }

    # --- likelihoods

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives it) of each request.

        In diffusion mode the second is found by decoding, and only where it is read: where a document has
        one request. The choices of multiple choice get False.
        """
        answers: list[tuple[float, bool]] = []
        for task, group in _by_task(requests):
            pairs = [self._encode(task, *request.args) for request in group]
            scores = self._score(task, pairs)
            if self.bound is not None:
                requests_of = Counter(request.doc_id for request in group)
                single = [i for i, request in enumerate(group) if requests_of[request.doc_id] == 1]
                for i, equal in zip(single, self._decodes_to(task, [pairs[i] for i in single]), strict=True):
                    scores[i] = (scores[i][0], equal)
            for request, score in zip(group, scores, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, score)
            answers += scores
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """log p of each whole text after the prefix token, in the harness's windows: each token is predicted once.

        An AR window reads max_length tokens and predicts one more; a window of the bound holds what it predicts.
        """
        reach = self.max_length - 1 if self.bound is not None else self.max_length
        totals: list[float] = []
        for task, group in _by_task(requests):
            windows: list[tuple[list[int], list[int]]] = []
            owners: list[int] = []
            for owner, request in enumerate(group):
                ids = self.tok_encode(request.args[0])
                for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, reach, 1):
                    windows.append(utils.make_disjoint_window(window))
                    owners.append(owner)
            sums = [0.0] * len(group)
            for owner, score in zip(owners, self._score(task, windows), strict=True):
                sums[owner] += score[0]
            for request, log_p in zip(group, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_p)
            totals += sums
        return totals

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self._score("", [(context, continuation) for _, context, continuation in requests])

    def _encode(self, task: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, split as the harness splits them; a context is never empty."""
        if context:
            prompt, scored = self._encode_pair(context, continuation)
        else:
            prompt, scored = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if scored[:1] == prompt:
                scored = scored[1:]
        if not prompt or not scored:
            raise ValueError(f"task {task!r}: {continuation!r} after {context[-40:]!r} makes no tokens to score")
        return prompt, scored

    def _score(self, task: str, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        cost = self.costs.setdefault(task, Cost())
        cost.num_requests += len(pairs)
        longest = self.max_length + (self.bound is None)
        documents = []
        for context, scored in pairs:
            if len(scored) >= longest:
                raise ValueError(
                    f"task {task!r}: a continuation of {len(scored)} tokens exceeds the context of {self.max_length}"
                )
            ids = torch.tensor([*context, *scored][-longest:])
            cost.num_truncated += len(context) + len(scored) > longest
            documents.append(Document(ids, torch.zeros_like(ids), torch.arange(len(ids)) >= len(ids) - len(scored)))
        size: dict[str, Any] = {"batch_tokens": self.batch_size * SCORED_ROW}
        with progress(f"{task} log-likelihoods", len(pairs), show=self.show_progress) as advance:
            if self.bound is None:
                cost.num_forwards += len(pairs)
                return continuation_log_p(self.lm.network, documents, progress=advance, **size)
            draws = 2 ** (self.bound.block_size or 0) - 1 if self.exact else self.num_samples
            cost.num_forwards += len(pairs) * draws
            bounds = nelbo(
                self.lm.network,
                self.bound,
                documents,
                num_samples=self.num_samples,
                exact=self.exact,
                seed=self.seed,
                numbers=[
                    seed_for((*context, "|", *scored)) for context, scored in pairs
                ],  # the masks of a text are its own
                progress=advance,
                **size,
            )
            return [(-bound.nats, False) for bound in bounds]

    def _decodes_to(self, task: str, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether decoding at temperature 0 continues each context by exactly its continuation."""
        equal = [False] * len(pairs)
        lengths: dict[int, list[int]] = {}
        for i, (_, scored) in enumerate(pairs):
            lengths.setdefault(len(scored), []).append(i)
        with progress(f"{task} greedy", len(pairs), show=self.show_progress) as advance:
            for length, members in sorted(lengths.items(), reverse=True):
                prompts = [pairs[i][0][-(self.max_length - length) :] for i in members]
                for n, new in self._decode(prompts, Request(length), [], advance):
                    equal[members[n]] = new == pairs[members[n]][1]
        return equal

    # --- text

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """The text that continues each context, up to its stop strings, the end token or max_gen_toks."""
        answers: list[str] = []
        for task, group in _by_task(requests):
            texts = [""] * len(group)
            seeds = self._seeds(task, group)
            cost = self.costs.setdefault(task, Cost())
            cost.num_requests += len(group)
            by_settings: dict[str, list[int]] = {}
            for i, request in enumerate(group):
                by_settings.setdefault(repr(request.args[1]), []).append(i)
            with progress(f"{task} texts", len(group), show=self.show_progress) as advance:
                for members in by_settings.values():
                    wanted, until = self._settings(task, group[members[0]].args[1])
                    room = self.max_length - wanted.max_new_tokens
                    prompts = [self.tok_encode(group[i].args[0]) for i in members]
                    cost.num_truncated += sum(len(prompt) > room for prompt in prompts)
                    prompts = [prompt[-room:] or [self.prefix_token_id] for prompt in prompts]
                    wanted = replace(wanted, seed=[seeds[i] for i in members])
                    for n, new in self._decode(prompts, wanted, until, advance, cost):
                        texts[members[n]] = StopStrings(self._text, until).cut(self._text(n, new))
            for request, text in zip(group, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            answers += texts
        return answers

    def _seeds(self, task: str, group: Sequence[Instance]) -> list[int]:
        """A seed for each request: of its document, whatever its place is, and of how often it was asked before."""
        asked: Counter[tuple[int | None, int]] = Counter()
        seeds = []
        for request in group:
            of_document = (request.doc_id, request.idx)
            seeds.append(seed_for(("harness", self.seed, task, *map(str, of_document), asked[of_document])))
            asked[of_document] += 1
        return seeds

    def _text(self, _row: int, new: list[int]) -> str:
        """The text of new tokens, decoded alone, as the harness's `hf` model does: a first space may be missing."""
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text

    def _settings(self, task: str, settings: dict[str, Any]) -> tuple[Request, list[str]]:
        """What a request asks for, and its stop strings; what no mode can do is refused.

        A stop string that is a special token ends the text by its id. Sampling without a temperature is at 1.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        if settings.get("do_sample"):
            settings = {"temperature": 1.0} | settings
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        unknown = {k: v for k, v in wanted.items() if k not in GENERATION_SETTINGS and (k, v) != ("num_beams", 1)}
        if unknown:
            raise ValueError(
                f"task {task!r} asks for {unknown}, and decoding here knows {', '.join(GENERATION_SETTINGS)}: "
                "change the task"
            )
        length = wanted["max_gen_toks"]
        if not 0 < length < self.max_length:
            raise ValueError(
                f"task {task!r} asks for max_gen_toks {length}, and a context of {self.max_length} has room for 1 to "
                f"{self.max_length - 1}: set another with --gen-kwargs max_gen_toks=N"
            )
        sampling = {
            k: v for k, v in wanted.items() if k in ("temperature", "top_p", "top_k") and (k, v) != ("top_k", 0)
        }
        until = [*wanted["until"], self.tokenizer.eos_token]
        ids = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = dict.fromkeys([*self.lm.end_token_ids, *(ids[text] for text in until if text in ids)])
        return Request(length, end_token_ids=tuple(ends), **sampling), [text for text in until if text]

    def _decode(
        self,
        prompts: Sequence[list[int]],
        wanted: Request,
        until: list[str],
        advance: Callable[[int], None],
        cost: Cost | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, its new tokens), prompts of like length together, longest first."""
        decoder = self.lm.decoder(self.mode, **self.decoding)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            request = replace(
                wanted,
                seed=[wanted.seed[i] for i in rows] if isinstance(wanted.seed, Sequence) else wanted.seed,
                stop=StopStrings(self._text, until) if until else None,
                context_length=self.lm.network.context_length,
            )
            sampled = self.lm.sample([torch.tensor(prompts[i]) for i in rows], decoder, request)
            if cost is not None:
                cost.num_forwards += int(sampled.num_forwards.sum())
                cost.num_new_tokens += sum(map(len, sampled.new_tokens))
            yield from zip(rows, sampled.new_tokens, strict=True)
            advance(len(rows))


def _nll_and_miss(target: Tensor, logits: Tensor, part: slice) -> Tensor:
    """-log p of the target of each row, and 1 where another token is likelier: (n, 2) from logits (n, vocabulary)."""
    missed = logits.argmax(-1) != target[part].to(logits.device)
    return torch.stack([row_nll(target)(logits, part), missed.to(logits.dtype)], -1)


@torch.inference_mode()
def continuation_log_p(
    network: Network,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """(log p of the scored tokens, whether each has the largest logit) of each document under the causal pattern.

    As `likelihood.nll`, but the last token is not run, so that a full context can predict one token more.
    """
    answers = [(0.0, False)] * len(documents)
    for windows, x0, layout, loss_mask in batches(documents, None, batch_tokens, network.device):
        wanted = predictable(layout, loss_mask)
        rows = wanted[:, 1:].flatten().nonzero()[:, 0]
        passed = Pass(x0[:, :-1], layout.subset(..., slice(None, -1)), causal, rows)
        values = run_rows(network, passed, functools.partial(_nll_and_miss, x0[wanted]))
        sums, misses = (row_sums(value, wanted) for value in values.unbind(-1))
        for (owner, _), total, missed in zip(windows, sums, misses, strict=True):
            answers[owner] = (-total, missed == 0)
        if progress is not None:
            progress(len(windows))
    check_finite([total for total, _ in answers])
    return answers


def _by_task(requests: Sequence[Instance]) -> Iterator[tuple[str, list[Instance]]]:
    """Requests of one task at a time: its masks and batches do not depend on what else is run."""
    for task, group in groupby(requests, key=lambda request: request.task_name):
        yield task or "task", list(group)
