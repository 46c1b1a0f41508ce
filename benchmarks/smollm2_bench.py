"""What the stages of `gpu_smollm2.py` share: options, clock, rows, prompts; and the quality of what they train."""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.core.network import DiffusionConfig
from unmask.evaluation import likelihood
from unmask.sampling import Request, Speculative, Threshold, sample_autoregressive, sample_blocks
from unmask.version import __version__


class Bench:
    """What all stages share: the options, the clock, the rows and the prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.perf_counter()
        self.until = self.began + 60 * options.minutes
        self.output, self.work = options.output, options.work
        for folder in (self.output, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        self.cuda = options.device == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.low = torch.bfloat16 if self.cuda else torch.float32
        self.text = self.work / "own-text.jsonl"

    def keep(self, case: str, **figures: Any) -> None:
        seconds = round(time.perf_counter() - self.began, 1)
        row = {"case": case, **figures, "at_second": seconds, "device": self.name, "torch": torch.__version__,
               "unmask": __version__}  # fmt: skip
        with (self.output / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{seconds:6.0f} s  {case}  {figures}", flush=True)

    def left(self) -> float:
        """Seconds until the present stage ends."""
        return self.until - time.perf_counter()

    def load(self, dtype: torch.dtype, folder: Path | None = None) -> unmask.DiffusionLM:
        """The base, or a checkpoint of an earlier stage; a drafter on the base at hand, wherever it was trained."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        drafter = folder is not None and (folder / "drafter.safetensors").is_file()
        base = self.options.model if drafter else None
        lm = unmask.load(folder or self.options.model, self.options.device, dtype, base=base)
        if folder is None:
            lm.model.config._name_or_path = self.options.base_name  # what a drafter calls its base
        return lm

    def prompts(self, lm: unmask.DiffusionLM, name: str) -> dict[str, list[tuple[dict[str, Any], list[int]]]]:
        """Domain -> records with the token ids of their prompts."""
        with (self.options.prompts / f"{name}.jsonl").open(encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        texts = []
        for record in records:
            text = record["prompt"]
            if record.get("chat") and lm.tokenizer.chat_template:
                turns = [{"role": "user", "content": text}]
                text = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            texts.append(text)
        ids = lm.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        longest = max(16, self.options.length - self.options.new)
        found: dict[str, list[tuple[dict[str, Any], list[int]]]] = {}
        for record, row in zip(records, ids, strict=True):
            if 0 < len(row) <= longest:
                found.setdefault(record["domain"], []).append((record, row))
        return found

    def held_out(self, lm: unmask.DiffusionLM) -> tuple[list[str], list[torch.Tensor], list[dict[str, Any]]]:
        """Domain, prompt ids and record of each held-out prompt, the same number of each domain."""
        domains, rows, records = [], [], []
        for domain, some in self.prompts(lm, "held-out").items():
            for record, ids in some[: self.options.held_out]:
                domains.append(domain)
                rows.append(torch.tensor(ids))
                records.append(record)
        return domains, rows, records


def by_domain(domains: Sequence[str], figure: Callable[[list[int]], float]) -> dict[str, float]:
    """A figure of the rows of each domain, and the mean of the domains."""
    each = {name: round(figure(_numbers(domains, name)), 4) for name in dict.fromkeys(domains)}
    return each | {"mean": round(sum(each.values()) / len(each), 4)}


# --- quality


def parent(bench: Bench) -> tuple[list[likelihood.Document], list[list[int]]]:
    """Held-out documents and greedy answers of the base in float32, made once."""
    file = bench.work / "answers.json"
    if not file.is_file():
        lm = bench.load(torch.float32)
        domains, prompts, records = bench.held_out(lm)
        out = sample_autoregressive(lm.network, prompts, Request(max_new_tokens=bench.options.new_held_out))
        documents = []
        for prompt, new, record in zip(prompts, out.new_tokens, records, strict=True):
            text = record.get("reference")
            ids = lm.tokenizer(text)["input_ids"][: bench.options.length] if text else [*prompt.tolist(), *new]
            documents.append(ids)
        file.write_text(json.dumps({"answers": out.new_tokens, "documents": documents}))
        outputs = likelihood.nll(lm.network, [document(ids) for ids in documents])
        bench.keep("quality", recipe="parent", nll=by_domain(domains, nats_per_token(outputs)), prompts=len(prompts))
    saved = json.loads(file.read_text())
    return [document(ids) for ids in saved["documents"]], saved["answers"]


def document(ids: Sequence[int], prompt_length: int = 0) -> likelihood.Document:
    tokens = torch.tensor(list(ids))
    loss_mask = torch.arange(len(tokens)) >= prompt_length if prompt_length else None
    return likelihood.Document(tokens, torch.zeros_like(tokens), loss_mask)


def nats_per_token(outputs: Sequence[likelihood.LikelihoodOutput]) -> Callable[[list[int]], float]:
    """A function of row numbers: the mean over the predicted tokens of these rows."""
    return lambda rows: sum(outputs[i].nats for i in rows) / max(1, sum(outputs[i].num_tokens for i in rows))


def tokens_per(counts: torch.Tensor, new_tokens: Sequence[Sequence[int]]) -> Callable[[list[int]], float]:
    """A function of row numbers: the new tokens of these rows over their counts (forwards or cycles)."""
    made = torch.tensor([len(row) for row in new_tokens])
    return lambda rows: float(made[rows].sum() / counts[rows].sum())


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint, the held-out prompts and documents, and the base's greedy answers to the prompts."""

    bench: Bench
    recipe: str
    lm: unmask.DiffusionLM
    config: DiffusionConfig
    trained_tokens: int
    domains: list[str]
    prompts: list[torch.Tensor]
    documents: list[likelihood.Document]
    answers: list[list[int]]

    def keep(self, **figures: Any) -> None:
        self.bench.keep(
            "quality", recipe=self.recipe, trained_tokens=self.trained_tokens, prompts=len(self.prompts),
            new_tokens=self.bench.options.new_held_out, **figures,
        )  # fmt: skip

    def likelihoods(self) -> None:
        figures = {}
        if self.config.serves_ar:
            exact = likelihood.nll(self.lm.network, self.documents)
            figures["nll"] = by_domain(self.domains, nats_per_token(exact))
        bound = likelihood.nelbo(self.lm.network, self.config, self.documents, num_samples=2)
        self.keep(**figures, nelbo=by_domain(self.domains, nats_per_token(bound)))

    def speculation(self, draft_length: int, temperature: float = 0.0) -> None:
        rows = list(range(len(self.prompts)))
        if temperature > 0:  # noise is drawn on the host: four rows of a domain will do
            rows = [i for name in dict.fromkeys(self.domains) for i in _numbers(self.domains, name)[:4]]
        domains = [self.domains[i] for i in rows]
        request = Request(self.bench.options.new_held_out, temperature)
        decoder = Speculative(draft_length=draft_length)
        out = decoder(self.lm.network, self.config, [self.prompts[i] for i in rows], request)
        assert out.cycle_gains is not None
        figures: dict[str, Any] = {
            "tokens_per_cycle": by_domain(domains, tokens_per(out.cycle_gains.sum(-1), out.new_tokens)),
            "tokens_per_forward": by_domain(domains, tokens_per(out.num_forwards, out.new_tokens)),
            "cycle_gains": out.cycle_gains.sum(0).tolist(),
        }
        if temperature == 0 and self.recipe == "drafter":
            different = sum(a != b for a, b in zip(self.answers, out.new_tokens, strict=True))
            figures["rows_that_left_the_base_s_text"] = different
        self.keep(draft_length=draft_length, temperature=temperature, **figures)

    def diffusion(self, threshold: float) -> None:
        request = Request(max_new_tokens=self.bench.options.new_held_out)
        out = sample_blocks(self.lm.network, self.config, self.prompts, request, select=Threshold(threshold))
        figures: dict[str, Any] = {
            "tokens_per_forward": by_domain(self.domains, tokens_per(out.num_forwards, out.new_tokens))
        }
        base = self.bench.load(self.bench.low)
        for key, texts in (("parent_nll_of_text", out.new_tokens), ("parent_nll_of_own_text", self.answers)):
            documents = [document([*p.tolist(), *text], len(p)) for p, text in zip(self.prompts, texts, strict=True)]
            figures[key] = by_domain(self.domains, nats_per_token(likelihood.nll(base.network, documents)))
        first = {name: _numbers(self.domains, name)[0] for name in self.domains}
        figures["samples"] = {name: self.lm.tokenizer.decode(out.new_tokens[i]) for name, i in first.items()}
        self.keep(threshold=threshold, **figures)


def _numbers(domains: Sequence[str], name: str) -> list[int]:
    """The rows of a domain."""
    return [i for i, domain in enumerate(domains) if domain == name]


def quality(bench: Bench, recipe: str, lm: unmask.DiffusionLM, trained_tokens: int) -> None:
    """NLL, NELBO, tokens per cycle and per forward of held-out prompts, a row each, while the stage lasts."""
    assert lm.diffusion is not None
    lm.model.eval()
    documents, answers = parent(bench)
    domains, prompts, _ = bench.held_out(lm)
    trained = Trained(bench, recipe, lm, lm.diffusion, trained_tokens, domains, prompts, documents, answers)
    serves_ar, longest = lm.diffusion.serves_ar, lm.diffusion.block_size or 8
    cases: list[Callable[[], None]] = [partial(trained.speculation, longest)] if serves_ar else []
    cases.append(trained.likelihoods)
    if serves_ar:
        cases += [partial(trained.speculation, length) for length in (4, 2)]
    if recipe != "drafter":
        cases += [partial(trained.diffusion, threshold) for threshold in (0.9, 0.7, 0.5)]
    if serves_ar:
        cases.append(partial(trained.speculation, longest, 1.0))
    for case in cases:
        if bench.left() < 2:
            bench.keep("left_out", stage=recipe, why="no time")
            break
        case()
