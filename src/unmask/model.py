"""The face of the library: `load` and `adapt`, and the model object they return.

Each method is a line or two into the layers below; what is decided here is how text meets tokens, which mode
a checkpoint decodes in, and what a run leaves in its folder.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from torch import Tensor

from unmask import hf, lora
from unmask.data import Corpus, HubStream, find_files, load_corpus
from unmask.denoiser import DiffusionConfig
from unmask.drafter import Drafter, DrafterConfig
from unmask.evaluation import likelihood
from unmask.evaluation.likelihood import LikelihoodOutput
from unmask.progress import progress
from unmask.rollouts import roll_out
from unmask.sampling import (
    Acceptance,
    Canvas,
    Remask,
    SampledTokens,
    Selector,
    sample_autoregressive,
    sample_bidirectional,
    sample_blocks,
    sample_canvases,
    sample_speculative,
)
from unmask.sampling.output import Callback
from unmask.supervised import apply_template
from unmask.train import (
    RULE_TEXT,
    Evaluator,
    Progress,
    Settings,
    append_metrics,
    count_steps,
    diffusion_config,
    latest_checkpoint,
    load_recipe,
    read_state,
    recipe_names,
    resolve,
    train,
)
from unmask.version import __version__

Prompts = str | Sequence[str] | Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]] | Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What `generate` returns, one entry a row.

    sequences: (batch, length) int64, prompt included, padded on the right. texts: the new text, without end
    token and stop string. num_new_tokens: (batch,) up to and with the end token or the token that completed a
    stop string. num_forwards: (batch,) passes after the prefill that the row needed. num_prefill_forwards:
    (batch,). cycle_gains: speculative mode only, (batch, n): cycles of the row that gained j tokens each.
    """

    sequences: Tensor
    texts: list[str]
    num_new_tokens: Tensor
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None

    @property
    def tokens_per_cycle(self) -> Tensor | None:
        """(batch,) float: num_new_tokens per draft and verification; None outside speculative mode."""
        if self.cycle_gains is None:
            return None
        return self.num_new_tokens / self.cycle_gains.sum(-1).clamp_min(1)

    @property
    def tokens_per_forward(self) -> Tensor:
        """(batch,) float: num_new_tokens / num_forwards."""
        return self.num_new_tokens / self.num_forwards.clamp_min(1)


class DiffusionLM:
    """A causal language model and, once converted, the diffusion language model it became.

    model: the stock HF model. tokenizer: its tokenizer. diffusion: what it was converted to, None for an
    untouched AR model. drafter: adapters hooked on `model`, with the base they belong to; else None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        diffusion: DiffusionConfig | None = None,
        *,
        drafter: Drafter | None = None,
        base: hf.Base | None = None,
    ) -> None:
        self.model, self.tokenizer, self.diffusion = model, tokenizer, diffusion
        self.drafter, self.base = drafter, base
        self.network = self._network(None)

    def _network(self, forward: Any) -> hf.HFNetwork:
        mask_token_id = None if self.diffusion is None else self.diffusion.mask_token_id
        gate = None if self.drafter is None else self.drafter.rows
        return hf.HFNetwork(self.model, mask_token_id, forward=forward, gate=gate)

    # --- decoding

    def generate(
        self,
        prompts: Prompts,
        mode: str | None = None,
        max_new_tokens: int = 128,
        block_size: int | None = None,
        max_denoising_steps: int | None = None,
        select: Selector | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | None = None,
        callback: Callback | None = None,
        *,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        guidance_scale: float = 1.0,
        remask: Remask | None = None,
        draft_length: int | str | None = None,
        acceptance: Acceptance | None = None,
    ) -> SampleOutput:
        """Continue prompts: text, texts, chat messages, or token ids with an attention mask.

        mode: "diffusion" (block by block, the default of a converted checkpoint), "ar" (every checkpoint) or
        "speculative" (AR's own output in fewer forwards, for a causal clean half: recipes tri-mode, drafter).
        draft_length: positions that speculation drafts at a time, the block size by default, or "auto" to
        follow the recent acceptance. acceptance: `Coupled()` by default, see `unmask.sampling`.
        A checkpoint with bidirectional attention fills whole canvases of block_size tokens, by default one of
        max_new_tokens. select: a commit rule of `unmask.sampling`, Threshold(0.9) by default. temperature 0 is
        greedy. guidance_scale: of classifier-free guidance towards the prompt, 1 is none (diffusion mode).
        remask: take tokens back while sampling (bidirectional attention only).
        callback(row, positions, tokens) is called at each commit. The same seed gives the same output. A row
        ends at the end token, after max_new_tokens, or where the model's context does.
        """
        mode = mode or ("ar" if self.diffusion is None else "diffusion")
        self._check_mode(mode)
        rows = self._prompt_ids(prompts, attention_mask)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
        context = self.network.context_length
        for ids in rows:
            if context is not None and len(ids) >= context:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens leaves no room in the model's context of {context}: shorten it"
                )
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if any(not s for s in stops):
            raise ValueError("stop string '' is empty: it would end every row before it begins")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "context_length": context,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": secrets.randbits(31) if seed is None else seed,
            "end_token_ids": hf.end_token_ids(self.model, self.tokenizer),
            "stop": _StopStrings(self, rows, stops) if stops else None,
            "callback": callback,
        }
        if mode == "ar":
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale {guidance_scale} needs mode 'diffusion': AR mode has no mask token")
            self._check_remask(remask, None)
            return self._output(rows, sample_autoregressive(self.network, rows, **options), stops)
        assert self.diffusion is not None
        if mode == "speculative":
            if guidance_scale != 1:
                raise ValueError(
                    f"guidance_scale {guidance_scale} needs mode 'diffusion': speculation gives AR's output"
                )
            self._check_remask(remask, None)
            if isinstance(draft_length, str) and draft_length != "auto":
                raise ValueError(f"draft_length {draft_length!r} must be a number of tokens or 'auto'")
            sampled = sample_speculative(
                self.network,
                self.diffusion.with_block_size(block_size),
                rows,
                draft_length=None if isinstance(draft_length, str) else draft_length,
                adaptive=draft_length == "auto",
                acceptance=acceptance,
                **options,
            )
            return self._output(rows, sampled, stops)
        self._check_remask(remask, self.diffusion)
        options |= {
            "max_denoising_steps": max_denoising_steps,
            "select": select,
            "guidance_scale": guidance_scale,
        }
        if self.diffusion.attention == "bidirectional":
            sampled = sample_canvases(
                self.network, self.diffusion, rows, canvas_size=block_size, remask=remask, **options
            )
        else:
            sampled = sample_blocks(self.network, self.diffusion.with_block_size(block_size), rows, **options)
        return self._output(rows, sampled, stops)

    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        num_tokens: int | Sequence[int],
        mode: str | None = None,
        max_denoising_steps: int | None = None,
        block_size: int | None = None,
        select: Selector | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | None = None,
        callback: Callback | None = None,
        *,
        top_k: int | None = None,
        guidance_scale: float = 1.0,
        remask: Remask | None = None,
        stop_tokens: Sequence[int] = (),
        attention: str | None = None,
        num_samples: int = 8,
    ) -> SampleOutput:
        """Fill num_tokens tokens between prefix and suffix, which come back unchanged.

        Prefix and suffix are tokenised apart, the suffix without special tokens; texts are the new ones.
        num_tokens may be a list of candidate lengths: each is filled, and the one kept has the lowest NELBO per
        token of span and suffix given the prefix (`num_samples` more forwards a candidate; num_forwards counts
        all of it). stop_tokens, stop_strings: the span ends there, the suffix follows, the rest is dropped;
        end tokens are tokens like others. attention: None, the checkpoint's own: block-wise ones cache the prefix
        and see of the suffix what falls into the active block; "bidirectional" shows them all of it in one noisy
        stream, which they were not trained on. The other options are those of `generate`.
        """
        config = self.diffusion
        if config is None:
            raise ValueError("infill needs a converted checkpoint: this is an untouched AR model; adapt it first")
        if mode not in (None, "diffusion"):
            raise ValueError(f"mode {mode!r} cannot see a suffix: infill works in mode 'diffusion'")
        if attention not in (None, "bidirectional"):
            raise ValueError(f"attention {attention!r} is unknown: leave it out, or use 'bidirectional'")
        if attention == "bidirectional":
            config = replace(config, attention="bidirectional", clean_attention=None, block_size=None)
        self._check_remask(remask, config)
        if block_size is not None and config.attention == "bidirectional":
            raise ValueError(f"block_size {block_size} has no meaning here: a bidirectional span is filled as one")
        prefixes, suffixes = ([text] if isinstance(text, str) else list(text) for text in (prefix, suffix))
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes do not go with {len(suffixes)} suffixes: give as many of each")
        lengths = [num_tokens] if isinstance(num_tokens, int) else list(num_tokens)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"num_tokens {num_tokens} must be at least 1: there is nothing to fill in")
        before = self._prompt_ids(prefixes, None)
        after = [
            torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
            for text in suffixes
        ]
        context = self.network.context_length
        longest = max(len(p) + len(s) for p, s in zip(before, after, strict=True)) + max(lengths)
        if context is not None and longest > context:
            raise ValueError(
                f"prefix, {max(lengths)} tokens and suffix make {longest}, more than the model's context of {context}: "
                "shorten them"
            )
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if any(not s for s in stops):
            raise ValueError("stop string '' is empty: it would end every span before it begins")
        seed = secrets.randbits(31) if seed is None else seed
        options: dict[str, Any] = {
            "max_denoising_steps": max_denoising_steps,
            "select": select,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "end_token_ids": stop_tokens,
            "stop": _StopStrings(self, before, stops) if stops else None,
            "callback": callback,
        }
        candidates = []
        for length in lengths:
            if max_denoising_steps is not None and max_denoising_steps <= max(lengths):
                options["max_denoising_steps"] = min(max_denoising_steps, length)
            if config.attention == "bidirectional":
                canvases = [Canvas.around(p, length, s) for p, s in zip(before, after, strict=True)]
                filled = sample_bidirectional(self.network, config, canvases, remask=remask, **options)
            else:
                filled = sample_blocks(
                    self.network, config.with_block_size(block_size), before, max_new_tokens=length, suffixes=after,
                    context_length=context, **options,
                )  # fmt: skip
            candidates.append(filled)
        sampled = candidates[0]
        if len(candidates) > 1:
            sampled = self._best_length(
                config.with_block_size(block_size), before, after, candidates, num_samples, seed
            )
        return self._output(before, sampled, stops, after)

    def _best_length(
        self,
        config: DiffusionConfig,
        before: list[Tensor],
        after: list[Tensor],
        candidates: list[SampledTokens],
        num_samples: int,
        seed: int,
    ) -> SampledTokens:
        """For each row the candidate of lowest NELBO per token of what follows the prefix, forwards added up."""
        scores = []
        for filled in candidates:
            texts = [
                torch.cat([p, torch.tensor(new, dtype=torch.long), s])
                for p, new, s in zip(before, filled.new_tokens, after, strict=True)
            ]
            bounds = likelihood.continuation_nelbo(
                self.network, config, texts, [len(p) for p in before], num_samples=num_samples, seed=seed
            )
            scores.append([bound.nats / bound.num_tokens for bound in bounds])
        best = [min(range(len(candidates)), key=lambda c: scores[c][row]) for row in range(len(before))]
        return SampledTokens(
            [candidates[c].new_tokens[row] for row, c in enumerate(best)],
            torch.stack([filled.num_forwards + num_samples for filled in candidates]).sum(0),
            torch.stack([filled.num_prefill_forwards for filled in candidates]).sum(0),
        )

    def _check_remask(self, remask: Remask | None, config: DiffusionConfig | None) -> None:
        if remask is not None and (config is None or config.attention != "bidirectional"):
            how = "AR mode" if config is None else f"{config.attention} attention"
            raise ValueError(f"{remask} needs a bidirectional canvas, and {how} has none: leave remask out")

    def _check_mode(self, mode: str) -> None:
        if mode not in ("ar", "diffusion", "speculative"):
            raise ValueError(f"mode {mode!r} is unknown: use 'diffusion', 'ar' or 'speculative'")
        if mode == "speculative" and self.diffusion is None:
            raise ValueError("mode 'speculative' is not available: this checkpoint has no drafter; use 'ar'")
        if mode == "speculative" and self.diffusion is not None and not self.diffusion.serves_ar:
            raise ValueError(
                f"mode 'speculative' is not available: clean attention {self.diffusion.clean_attention!r} of this "
                "checkpoint is not 'causal', so its cache is not the AR model's; use 'diffusion', or adapt with "
                "recipe 'tri-mode' or 'drafter'"
            )
        if mode == "diffusion" and self.diffusion is None:
            raise ValueError("mode 'diffusion' is not available: this is an untouched AR model; adapt it, or use 'ar'")

    def _prompt_ids(self, prompts: Prompts, attention_mask: Tensor | None) -> list[Tensor]:
        if isinstance(prompts, Tensor):
            real = torch.ones_like(prompts) if attention_mask is None else attention_mask
            rows = [row[keep.bool()].to(torch.long) for row, keep in zip(prompts, real, strict=True)]
        else:
            items: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
            if items and isinstance(items[0], dict):
                items = [items]
            rows = [torch.tensor(self._encode(item), dtype=torch.long) for item in items]
        if not rows:
            raise ValueError("prompts is empty: give at least one")
        return [row if len(row) else self._begin() for row in rows]

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        encoded = apply_template(self.tokenizer, prompt, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def _begin(self) -> Tensor:
        """Where an unconditional text starts: the begin token, else the end token."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            begin = next(iter(hf.end_token_ids(self.model, self.tokenizer)), None)
        if begin is None:
            raise ValueError("an empty prompt needs a begin or end token, and this tokenizer has neither")
        return torch.tensor([begin], dtype=torch.long)

    def new_text(self, prompt: Tensor, new: Sequence[int]) -> str:
        """The text that `new` tokens add to the prompt's; decoded together, since a token's text may depend
        on the one before it."""
        before = self.tokenizer.decode(prompt.tolist(), skip_special_tokens=True)
        whole = self.tokenizer.decode([*prompt.tolist(), *new], skip_special_tokens=True)
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)

    def _output(
        self, prompts: list[Tensor], sampled: SampledTokens, stops: list[str], suffixes: list[Tensor] | None = None
    ) -> SampleOutput:
        texts = []
        for prompt, new in zip(prompts, sampled.new_tokens, strict=True):
            text = self.new_text(prompt, new)
            cut = min((at for at in (text.find(s) for s in stops) if at >= 0), default=len(text))
            texts.append(text[:cut])
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = next(iter(hf.end_token_ids(self.model, self.tokenizer)), 0)
        rows = [[*p.tolist(), *new] for p, new in zip(prompts, sampled.new_tokens, strict=True)]
        if suffixes is not None:
            rows = [[*row, *suffix.tolist()] for row, suffix in zip(rows, suffixes, strict=True)]
        width = max(len(row) for row in rows)
        return SampleOutput(
            sequences=torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            texts=texts,
            num_new_tokens=torch.tensor([len(new) for new in sampled.new_tokens]),
            num_forwards=sampled.num_forwards,
            num_prefill_forwards=sampled.num_prefill_forwards,
            cycle_gains=sampled.cycle_gains,
        )

    # --- likelihood

    def nll(self, texts: str | Sequence[str], *, show_progress: bool = False) -> list[LikelihoodOutput]:
        """Exact negative log-likelihood of each text in AR mode (every checkpoint has it)."""
        documents = self._documents(texts)
        with progress("nll", self._num_windows(documents), show=show_progress) as advance:
            return likelihood.nll(self.network, documents, context_length=self.network.context_length, progress=advance)

    def nelbo(
        self,
        texts: str | Sequence[str],
        *,
        num_samples: int = 8,
        exact: bool = False,
        block_size: int | None = None,
        seed: int | None = None,
        show_progress: bool = False,
    ) -> list[LikelihoodOutput]:
        """Upper bound on the negative log-likelihood of each text in diffusion mode, with uniform masks.

        Monte Carlo over `num_samples` masks per block, or exact=True by enumeration for blocks of up to 4.
        """
        if self.diffusion is None:
            raise ValueError("nelbo needs a converted checkpoint: this is an untouched AR model; use nll")
        documents = self._documents(texts)
        with progress("nelbo", self._num_windows(documents), show=show_progress) as advance:
            return likelihood.nelbo(
                self.network,
                self.diffusion.with_block_size(block_size),
                documents,
                num_samples=num_samples,
                exact=exact,
                seed=secrets.randbits(31) if seed is None else seed,
                context_length=self.network.context_length,
                progress=advance,
            )

    def _documents(self, texts: str | Sequence[str]) -> list[likelihood.Document]:
        """Exactly tokenizer(text), with the UTF-8 bytes that each token spells."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("texts is empty: give at least one document")
        offsets = bool(self.tokenizer.is_fast)
        encoded = self.tokenizer(texts, return_offsets_mapping=offsets, return_attention_mask=False, verbose=False)
        documents = []
        for i, text in enumerate(texts):
            ids = encoded["input_ids"][i]
            if offsets:
                spelt = [len(text[a:b].encode()) for a, b in encoded["offset_mapping"][i]]
            else:
                spelt = [len(self.tokenizer.decode([token], skip_special_tokens=True).encode()) for token in ids]
            if spelt:  # white space that the tokenizer drops belongs to the text all the same
                spelt[-1] += len(text.encode()) - sum(spelt)
            documents.append(
                likelihood.Document(torch.tensor(ids, dtype=torch.long), torch.tensor(spelt, dtype=torch.long))
            )
        return documents

    def _num_windows(self, documents: Sequence[likelihood.Document]) -> int:
        context = self.network.context_length
        return sum(1 if context is None else -(-len(d.ids) // context) for d in documents)

    # --- folders

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary HF folder that `load` and `AutoModelForCausalLM.from_pretrained` read.

        A drafter's folder holds the drafter alone, and only `load` reads it.
        """
        if self.drafter is not None:
            assert self.diffusion is not None
            assert self.base is not None
            hf.save_drafter(folder, self.drafter, self.tokenizer, self.diffusion, self.base)
            return
        hf.save_pretrained(folder, self.model, self.tokenizer, self.diffusion)


class _StopStrings:
    """Ends a row at the first token whose text completes a stop string."""

    def __init__(self, lm: DiffusionLM, prompts: list[Tensor], stops: list[str]) -> None:
        self.lm, self.prompts, self.stops = lm, prompts, stops

    def __call__(self, row: int, new: list[int]) -> int | None:
        def stopped(n: int) -> bool:
            text = self.lm.new_text(self.prompts[row], new[:n])
            return any(stop in text for stop in self.stops)

        if not stopped(len(new)):
            return None
        return next(n for n in range(1, len(new) + 1) if stopped(n))


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> DiffusionLM:
    """Load a folder or hub id, converted or not; refuse a model whose attention cannot be controlled.

    An adapter's folder is its base with the adapter merged into it; a drafter's is its base with the drafter on it.
    """
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
    }
    adapted_base = lora.adapter_base(name)
    if adapted_base is not None:
        lm = load(adapted_base, **options)
        lora.load_adapter(lm.model, name)
        return DiffusionLM(lm.model, hf.load_tokenizer(name), hf.read_diffusion(lm.model))
    base = hf.read_base(name)
    if base is not None:
        model, tokenizer, diffusion, drafter = hf.load_drafter(name, base, **options)
        hf.probe(model)
        return DiffusionLM(model, tokenizer, diffusion, drafter=drafter, base=base)
    model, tokenizer = hf.load_pretrained(name, **options)
    hf.probe(model)
    return DiffusionLM(model, tokenizer, hf.read_diffusion(model))


# --- adaptation

IN_MEMORY = "a model in memory"


def recipes() -> dict[str, dict[str, Any]]:
    """Recipe name -> its settings; those left to the parent's size are None, infinity is "inf"."""
    return {name: _plain(load_recipe(name)) for name in recipe_names()}


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: "inf" if value == math.inf else value for name, value in asdict(settings).items()}


def adapt(
    model: str | Path | DiffusionLM,
    data: str | Path | Sequence[str | Path],
    recipe: str = "efficient-dlm",
    output_dir: str | Path = "runs/adapted",
    *,
    resume: bool = False,
    show_progress: bool = True,
    **settings: Any,
) -> DiffusionLM:
    """Turn a causal LM into what `recipe` says, by training it on `data`, and save it to `output_dir`.

    model: folder, hub id or a loaded model (trained in place). data: .txt, .jsonl or .parquet files, folders
    of them, one hub id, or "self" (with self_prompts): text that the model itself writes. settings: any of the
    recipe's, overriding it. resume: go on from the newest checkpoint of the same run; a finished run is loaded
    and returned. Returns the adapted model, in eval mode.
    """
    chosen = load_recipe(recipe, **settings)
    output_dir = Path(output_dir)
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not sources:
        raise ValueError("data is empty: give at least one file, folder or hub id")
    if chosen.lora_rank is not None:
        lora.require_peft()
    own = [str(source) for source in sources] == ["self"]
    if own != (chosen.self_prompts is not None) or (own and not (chosen.self_tokens or chosen.max_tokens)):
        raise ValueError(
            f"data {[str(source) for source in sources]} with self_prompts={chosen.self_prompts!r}: text of the "
            "model's own needs --data self alone, self_prompts=FILE for its beginnings, and --max-tokens or self_tokens"
        )
    files = find_files([chosen.self_prompts] if own and chosen.self_prompts else sources)  # before anything slow
    held_out_files = find_files([chosen.eval_data]) if chosen.eval_data else None
    previous = _read_run(output_dir, resume)

    lm = model if isinstance(model, DiffusionLM) else load(model, dtype=torch.float32)
    name = str(getattr(lm.model.config, "_name_or_path", "") or IN_MEMORY)
    if chosen.lora_rank is not None and not chosen.lora_merge and name == IN_MEMORY:
        raise ValueError("lora_merge=false: an adapter needs the name of its base, and this model is in memory only")
    parent = {"name": name, "class": type(lm.model).__name__, "fingerprint": hf.fingerprint(lm.model)}
    if lm.drafter is not None:
        raise ValueError(f"model {name!r} is a drafter on a frozen base: adapt the base itself")
    if chosen.objective == "distill" and lm.diffusion is not None:
        raise ValueError(f"model {name!r} is converted already: a drafter needs an untouched AR model as its base")
    if chosen.objective == "distill" and chosen.lora_rank is not None:
        raise ValueError(f"lora_rank={chosen.lora_rank} does not go with objective='distill': use drafter_rank")
    if chosen.block_size is None and lm.diffusion is not None:
        chosen = replace(chosen, block_size=lm.diffusion.block_size)
    chosen = resolve(chosen, sum(p.numel() for p in lm.model.parameters()), lm.network.context_length)
    end_token_id = _end_token_id(lm, chosen)

    source: Any
    if files is None:
        source = HubStream(
            str(sources[0]), lm.tokenizer, end_token_id=end_token_id, text_column=chosen.text_column, split=chosen.split
        )
    else:
        total = sum(file.stat().st_size for file in files)
        with progress("tokenise", total, show=show_progress) as advance:
            source = load_corpus(
                files,
                lm.tokenizer,
                end_token_id=end_token_id,
                text_column=chosen.text_column,
                skip_invalid=chosen.skip_invalid,
                max_length=chosen.max_length,
                progress=advance,
            )
    if own:
        asked = chosen.self_tokens or chosen.max_tokens
        assert asked is not None
        assert chosen.max_length is not None
        assert isinstance(source, Corpus)
        with progress("roll out", asked, show=show_progress) as advance:
            source = roll_out(
                lm.network, source, output_dir.parent, author=parent["fingerprint"], num_tokens=asked,
                max_length=chosen.max_length, temperature=chosen.self_temperature,
                end_token_ids=() if end_token_id is None else (end_token_id,), seed=chosen.seed, progress=advance,
            )  # fmt: skip
    run: dict[str, Any] = {
        "parent": parent,
        "settings": _plain(chosen),
        "data": {"sources": [str(s) for s in sources], "fingerprint": source.fingerprint},
    }
    _check_same_run(output_dir, previous, run)
    if previous is not None and previous.get("finished"):
        return load(output_dir)

    held_out = _held_out(lm, chosen, held_out_files, source, end_token_id)
    if isinstance(held_out, int):
        source, tail = source.split(held_out) if held_out else (source, None)
        held_out = [] if tail is None else _as_documents(tail, end_token_id)
    if chosen.predict_padding:
        source = _filled_up(source, chosen, end_token_id)
    total_steps = count_steps(chosen, source)

    config = lm.diffusion
    drafter = None
    if chosen.objective == "distill":
        assert chosen.block_size is not None
        mask_rows = chosen.block_size if chosen.mask_per_place else 1
        shape = DrafterConfig(chosen.drafter_rank, chosen.drafter_scale, chosen.drafter_targets, mask_rows)
        drafter = hf.add_drafter(lm.model, lm.tokenizer, shape, token=chosen.mask_token)
        config = diffusion_config(chosen, drafter.mask_token_id, __version__)
    elif chosen.attention != "ar":
        mask_token_id = (
            config.mask_token_id
            if config is not None
            else hf.add_mask_token(lm.model, lm.tokenizer, token=chosen.mask_token, like=chosen.mask_init)
        )
        config = diffusion_config(chosen, mask_token_id, __version__)
    hf.without_dropout(lm.model)
    tuner = None
    if chosen.lora_rank is not None:
        alpha = 2.0 * chosen.lora_rank if chosen.lora_alpha is None else chosen.lora_alpha
        tuner = lora.add_lora(lm.model, chosen.lora_rank, alpha, chosen.trainable, chosen.seed)
    base = None if drafter is None else hf.Base(parent["name"], parent["fingerprint"])
    adapted = DiffusionLM(lm.model, lm.tokenizer, config, drafter=drafter, base=base)
    learning: Any = lm.model if drafter is None else drafter
    trained = sum(p.numel() for p in learning.parameters() if p.requires_grad)

    ranks = accelerate.PartialState()
    ranks.wait_for_everyone()  # all have read the folder before one writes to it
    versions = {"unmask": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    run |= {"versions": versions, "rule": RULE_TEXT, "trained_parameters": trained, "finished": False}
    show_progress = show_progress and ranks.is_main_process
    if ranks.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_run(output_dir, run)
    if show_progress:
        shown = ("block_size", "max_length", "batch_size", "learning_rate", "min_learning_rate_ratio", "half_life")
        print(f"{RULE_TEXT}: " + ", ".join(f"{name}={run['settings'][name]}" for name in shown), file=sys.stderr)

        if chosen.anneal_steps > total_steps:
            print(f"note: anneal_steps={chosen.anneal_steps} is more than the {total_steps} steps of this run, which "
                  "ends before attention is fully open", file=sys.stderr)  # fmt: skip

    newest = latest_checkpoint(output_dir) if resume else None
    start = read_state(newest).step if newest is not None else 0
    with progress("train", total_steps, start=start, show=show_progress) as advance:
        done = start

        def report(p: Progress) -> None:
            nonlocal done
            figures = "".join(f"  {k} {v:.4g}" for k, v in p.evaluation.items() if k in ("nelbo", "nll"))
            note = (f"step {p.step}/{p.total_steps}  loss {p.loss:.4f}{figures}  lr {p.learning_rate:.2e}  "
                    f"{p.tokens_per_second:,.0f} tokens/s")  # fmt: skip
            advance(p.step - done, note)
            done = p.step

        evaluate = _evaluator(adapted, chosen, held_out) if held_out else None
        with _trained_alone(lm.model, drafter):
            state = train(
                lm.model,
                adapted._network,
                chosen,
                config if chosen.attention != "ar" else None,
                source,
                output_dir,
                resume=resume,
                evaluate=evaluate,
                report=report,
            )
    if tuner is not None:
        if ranks.is_main_process and not chosen.lora_merge:
            hf.write_diffusion(lm.model, config)
            lora.save_adapter(output_dir, tuner, name)
            lm.tokenizer.save_pretrained(output_dir)
        lora.merge(tuner)
    if ranks.is_main_process:
        figures = evaluate(lm.model) if evaluate is not None else {}
        if figures:
            append_metrics(output_dir, {"step": state.step, "tokens": state.tokens, **figures})
        if tuner is None or chosen.lora_merge:
            adapted.save_pretrained(output_dir)
        (output_dir / "README.md").write_text(_model_card(name, adapted, chosen, state.tokens, figures))
        _write_run(output_dir, run | {"finished": True, "tokens": state.tokens, "evaluation": figures})
    ranks.wait_for_everyone()
    lm.model.config._name_or_path = str(output_dir)
    return adapted


@contextmanager
def _trained_alone(model: Any, drafter: Drafter | None) -> Iterator[None]:
    """Within the context the drafter is a part of the model, the only one that learns."""
    if drafter is None:
        yield
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.add_module("drafter", drafter)
    try:
        yield
    finally:
        del model.drafter
        for parameter in learning:
            parameter.requires_grad_(True)


def _end_token_id(lm: DiffusionLM, settings: Settings) -> int | None:
    if settings.end_token is not None:
        ids = lm.tokenizer.get_vocab().get(settings.end_token)
        if ids is None:
            raise ValueError(f"end_token {settings.end_token!r} is no token of this vocabulary")
        lm.model.generation_config.eos_token_id = ids
        return int(ids)
    return next(iter(hf.end_token_ids(lm.model, lm.tokenizer)), None)


def _held_out(
    lm: DiffusionLM, settings: Settings, files: list[Path] | None, source: Any, end_token_id: int | None
) -> list[likelihood.Document] | int:
    """Documents to evaluate on, or how many to hold out of the end of the training corpus.

    Without eval_data, the last 1% of the documents, at most eval_documents; none from a stream.
    """
    if files is not None:
        corpus = load_corpus(
            files,
            lm.tokenizer,
            end_token_id=end_token_id,
            text_column=settings.text_column,
            skip_invalid=settings.skip_invalid,
            max_length=lm.network.context_length,
            max_documents=settings.eval_documents,
        )
        return _as_documents(corpus, end_token_id)
    return 0 if isinstance(source, HubStream) else min(settings.eval_documents, len(source) // 100)


def _as_documents(corpus: Corpus, end_token_id: int | None) -> list[likelihood.Document]:
    """Held-out documents as the likelihood wants them; their bytes are not asked for.

    Texts without their end token. Supervised examples whole, since where an answer ends is part of it.
    """
    documents = []
    for i in range(len(corpus)):
        ids, loss_mask = corpus.document(i)
        if loss_mask is None and end_token_id is not None:
            ids = ids[:-1]
        tokens = torch.from_numpy(ids.astype("int64"))
        learnt = None if loss_mask is None else torch.from_numpy(loss_mask)
        documents.append(likelihood.Document(tokens, torch.zeros_like(tokens), learnt))
    return documents


def _filled_up(source: Any, settings: Settings, end_token_id: int | None) -> Corpus:
    assert settings.max_length is not None
    if not isinstance(source, Corpus) or end_token_id is None:
        lacks = "an end token, which this model lacks" if end_token_id is None else "files, not a streamed data set"
        raise ValueError(f"predict_padding=true needs {lacks}")
    longest = int(np.diff(source.offsets).max())
    if longest > settings.max_length:
        raise ValueError(
            f"predict_padding=true puts each document in a row of its own, and one of {longest} tokens exceeds "
            f"max_length={settings.max_length}: raise max_length"
        )
    return source.filled_up(settings.max_length, end_token_id)


def _evaluator(lm: DiffusionLM, settings: Settings, documents: list[likelihood.Document]) -> Evaluator:
    """Held-out figures, nats per predicted token, always with the same masks."""

    def evaluate(_model: Any) -> dict[str, float]:
        context = lm.network.context_length
        if lm.diffusion is None:
            summary = likelihood.summarise(likelihood.nll(lm.network, documents, context_length=context))
            return {"nll": summary.nats_per_token}
        outputs = likelihood.nelbo(
            lm.network, lm.diffusion, documents, num_samples=settings.eval_samples, context_length=context
        )
        summary = likelihood.summarise(outputs)
        figures = {"nelbo": summary.nats_per_token, "nelbo_standard_error": summary.standard_error or 0.0}
        if settings.objective == "joint":  # the AR model is meant to stay what it was
            exact = likelihood.summarise(likelihood.nll(lm.network, documents, context_length=context))
            figures["nll"] = exact.nats_per_token
        return figures

    return evaluate


# --- the run's folder


def _read_run(output_dir: Path, resume: bool) -> dict[str, Any] | None:
    """run.json of an earlier run here; a folder that holds anything else is left alone."""
    path = output_dir / "run.json"
    if path.is_file():
        if not resume:
            raise ValueError(
                f"output folder {str(output_dir)!r} already holds a run: continue it with --resume, or choose another"
            )
        run: dict[str, Any] = json.loads(path.read_text())
        return run
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output folder {str(output_dir)!r} holds something else: choose an empty or new one")
    return None


_FREE = ("log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "micro_batch_size",
         "eval_data", "eval_documents", "eval_samples")  # fmt: skip
"""Settings that may change from one part of a run to the next."""


def _check_same_run(output_dir: Path, previous: dict[str, Any] | None, run: dict[str, Any]) -> None:
    if previous is None:
        return
    before = previous["settings"] | {"model": previous["parent"], "data": previous["data"]["fingerprint"]}
    now = run["settings"] | {"model": run["parent"], "data": run["data"]["fingerprint"]}
    for key in now:
        if key not in _FREE and before.get(key) != now[key]:
            raise ValueError(
                f"output folder {str(output_dir)!r} holds a different run: its {key} is {before.get(key)!r}, "
                f"not {now[key]!r}; choose another folder"
            )


def _write_run(output_dir: Path, run: dict[str, Any]) -> None:
    partial = output_dir / "run.json.partial"
    partial.write_text(json.dumps(run, indent=2) + "\n")
    partial.replace(output_dir / "run.json")


def _model_card(parent: str, lm: DiffusionLM, settings: Settings, tokens: int, figures: dict[str, float]) -> str:
    config = lm.diffusion
    if lm.drafter is not None:
        loading = "It holds the drafter alone; the `unmask` library loads it together with its base."
    else:
        loading = "`AutoModelForCausalLM` loads the weights; decoding as a diffusion model needs the `unmask` library."
    if config is None:
        what = "Next-token training of an autoregressive language model."
        rows: list[tuple[str, Any]] = []
    else:
        what = f"A masked diffusion language model made from an autoregressive one. {loading}"
        rows = [
            (
                "attention",
                config.attention + (f", clean half {config.clean_attention}" if config.clean_attention else ""),
            ),
            ("block size", config.block_size or "whole canvas"),
            ("token shift", "yes" if config.shift else "no"),
            ("mask token", f"`{lm.tokenizer.mask_token}` (id {config.mask_token_id})"),
        ]
    rows += [
        ("recipe", settings.recipe),
        ("training tokens", f"{tokens:,}"),
        ("learning rate", settings.learning_rate),
        ("rows per step x length", f"{settings.batch_size} x {settings.max_length}"),
        *((f"held-out {name} (nats per token)", f"{value:.4f}") for name, value in figures.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    tags = "tags:\n- diffusion-language-model\n- block-diffusion\n- unmask\n" if config is not None else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: {parent}\n{tags}---\n\n"
        f"{what}\n\n| | |\n|---|---|\n| parent | {parent} |\n{table}\n\n"
        '```python\nimport unmask\n\nlm = unmask.load("this folder")\nprint(lm.generate("...").texts[0])\n```\n'
    )
