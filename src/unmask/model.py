"""The face of the library: `load`, and the model object that it and `adapt` return.

Each method is a line or two into the layers below; what is decided here is how text meets tokens and which
mode a checkpoint decodes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask import hf
from unmask.core.attention import Pattern
from unmask.core.drafter import Drafter
from unmask.core.finite import FiniteWeights
from unmask.core.network import DiffusionConfig
from unmask.data.plain_text import following_ids
from unmask.data.prompts import Prompts, StopStrings, check_room, new_text, prompt_rows, warn_of_cuts
from unmask.evaluation import likelihood
from unmask.evaluation.embed import document_ids, embed, named_pattern
from unmask.evaluation.likelihood import LikelihoodOutput
from unmask.infilling import Pieces, fill_gaps, filling_decoder, texts_with_gaps, tokenised
from unmask.limits import check_whole
from unmask.outputs import SampleOutput, recorded, sample_output
from unmask.plain_numbers import plain
from unmask.progress import progress
from unmask.sampling import Decoder, Request, SampledTokens, Selector, choose_decoder
from unmask.sampling.constraint import Constraint, Constraints, check_unconstrained
from unmask.sampling.guidance import check_guided
from unmask.sampling.request import Callback, given_or_new
from unmask.streaming import FinalText, pieces, together


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
        self._weights = FiniteWeights()

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        read = "an untouched AR model" if self.diffusion is None else f"{self.diffusion.recipe}, {self.diffusion.shape}"
        on = "" if self.base is None else f", a drafter on {self.base.name!r}"
        return (
            f"DiffusionLM({getattr(self.model.config, '_name_or_path', '')!r}: {type(self.model).__name__} of {size:,} "
            f"parameters, {read}{on}, {self.model.dtype} on {self.network.device})"
        )

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> DiffusionLM:
        """Move the weights to a device, to a type, or both, in place; this object. What was compiled is compiled anew.

        Raises ValueError for a device that is not there.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for part in (self.model, self.drafter):
            if part is not None:
                part.to(device=None if device is None else hf.present_device(device), dtype=dtype)
        self.network = self._network(None)
        return self

    def _check_weights(self) -> None:
        """Raise ValueError for weights that are not finite."""
        self._weights.check({"the model": self.model, "the drafter": self.drafter})

    def known_finite(self) -> DiffusionLM:
        """This object, whose weights were looked at when they were loaded."""
        self._weights.trust({"the model": self.model, "the drafter": self.drafter})
        return self

    def _network(self, forward: Any) -> hf.HFNetwork:
        mask_token_id = None if self.diffusion is None else self.diffusion.mask_token_id
        gate = None if self.drafter is None else self.drafter.rows
        return hf.as_network(self.model, mask_token_id, forward=forward, gate=gate)

    def compile(self, **options: Any) -> None:
        """Compile the passes of block-wise, speculative and AR decoding; options: of torch.compile.

        Worth it on a GPU, where each becomes a CUDA graph: a batch shape is compiled when it first occurs, which takes
        from seconds to minutes, and replayed from then on. On a CPU next to nothing is gained.
        """
        self.network.compile(**options)

    def pack(self) -> int:
        """Keep copies of the linear maps' weights, packed for passes on this CPU; returns the bytes that they take.

        For float32 on a CPU, where decoding and scoring then take about half the time on some; the text stays the same
        up to ties that rounding breaks. 0, and nothing changes, where it does not pay.
        """
        return self.network.pack()

    # --- decoding

    @property
    def default_mode(self) -> str:
        """The best mode of the checkpoint: AR's own text, faster, if the clean half is an AR model, else diffusion."""
        if self.diffusion is None:
            return "ar"
        return "speculative" if self.diffusion.serves_ar else "diffusion"

    def decoder(self, mode: str | Decoder | None = None, **options: Any) -> Decoder:
        """The decoder that `generate` uses for a mode and its options, of which None are not set.

        Raises ValueError for a mode that the checkpoint lacks, and for an option that the decoder does not read.
        """
        chosen = self.default_mode if mode is None else mode
        return choose_decoder(chosen, self.diffusion, options, self.network.context_length)

    def generate(
        self,
        prompts: Prompts,
        mode: str | Decoder | None = None,
        max_new_tokens: int = 128,
        block_size: int | None = None,
        max_denoising_steps: int | None = None,
        select: Selector | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        callback: Callback | None = None,
        *,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        confidence_threshold: float | None = None,
        constraint: Any = None,
        **options: Any,
    ) -> SampleOutput:
        """Continue prompts: text, texts, chat messages, or token ids with an attention mask.

        mode: "ar" (every checkpoint), "diffusion" (every converted one), "speculative" (AR's own output in fewer
        forwards, for a causal clean half: recipes tri-mode, drafter), or a decoder of `unmask.sampling` with its
        options, `Blocks(window=4)`; by default the best that the checkpoint has, see `default_mode`. block_size,
        max_denoising_steps, select, confidence_threshold (short for select=Threshold(p)) and `options` are those of
        the mode's decoder: guidance_scale, window, remask, draft_length, acceptance; an unread one is an error.
        temperature 0 is greedy. batch_size: prompts that decode at a time, all unless given; one that ends makes room
        for the next. callback(row, positions, tokens) is called at each commit. The same seed gives the same output;
        a list has a seed for each prompt, which is then sampled as it would be alone.
        constraint: what the new text must obey, in modes "ar" and "speculative": see `constraint`; a list has one for
        each prompt, None for a free one.
        A row ends at the end token, at a stop string, after max_new_tokens, or where the model's context does.
        """
        decoder = self.decoder(
            mode, block_size=block_size, max_denoising_steps=max_denoising_steps, select=select,
            confidence_threshold=confidence_threshold, **options,
        )  # fmt: skip
        rows = self.prompt_ids(prompts, attention_mask)
        stop = self._stop(rows, stop_strings)
        history, callback = recorded(self.tokenizer, rows, decoder, callback)
        request = Request(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=[given_or_new(n) for n in seed] if isinstance(seed, Sequence) else given_or_new(seed),
            end_token_ids=self.end_token_ids, callback=callback, batch_size=batch_size,
            stop=stop if stop.strings else None, context_length=self.network.context_length,
            constraint=self._constraints(constraint),
        )  # fmt: skip
        sampled = self.sample(rows, decoder, request)
        texts = [stop.cut(self.new_text(p, new)) for p, new in zip(rows, sampled.new_tokens, strict=True)]
        sequences = [[*p.tolist(), *new] for p, new in zip(rows, sampled.new_tokens, strict=True)]
        output = sample_output(sequences, sampled, texts, self._pad, history=history)
        warn_of_cuts(rows, output.sequences, output.num_new_tokens.tolist(), request)
        return output

    def sample(self, prompts: Sequence[Tensor], decoder: Decoder, request: Request) -> SampledTokens:
        """Continue rows of token ids, each (length,) int64 of at least one: `generate` without its text.

        Raises ValueError for a prompt that fills the context, and for weights that are not finite.
        """
        self._check_weights()
        check_guided(decoder, is_drafter=self.drafter is not None)
        check_room(prompts, self.network.context_length)
        request.check_rows(len(prompts))
        return decoder(self.network, self.diffusion, prompts, request)

    def constraint(self, spec: Any) -> Constraint:
        """What `generate` makes of its `constraint`, to be used again: the first of a tokenizer takes a second.

        spec: a JSON schema (a dictionary, or a Pydantic model), "json_object", `unmask.Regex("...")`,
        `unmask.Lark("...")`, `unmask.JsonSchema`, which has options, or what OpenAI calls a response_format. Needs the
        extra [grammar]. Raises ValueError for one that is wrong, or that llguidance cannot hold.
        """
        num_tokens = self.model.get_input_embeddings().weight.shape[0]
        mask = None if self.diffusion is None else self.diffusion.mask_token_id
        plain_ids = partial(following_ids, self.tokenizer)
        return hf.grammar_constraint(spec, self.tokenizer, num_tokens, self.end_token_ids, plain_ids, mask)

    def _constraints(self, given: Any) -> Constraints | None:
        if isinstance(given, list | tuple):
            return [None if spec is None else self.constraint(spec) for spec in given]
        return None if given is None else self.constraint(given)

    def _stop(self, prompts: Sequence[Tensor], strings: str | Sequence[str] | None) -> StopStrings:
        """Stop strings, looked for in the text that new tokens add to each prompt."""
        return StopStrings(lambda row, new: self.new_text(prompts[row], new), strings)

    def stream(
        self, prompt: Prompts, mode: str | Decoder | None = None, *, callback: Callback | None = None, **options: Any
    ) -> Iterator[str]:
        """The new text of one prompt, in pieces as they become final; joined they are the text of `generate`.

        options: of `generate`. A piece ends before the first position that is still masked; with `remask`, which
        changes tokens again, there is one piece. Closing the iterator ends decoding at its next commit. Raises
        ValueError as `generate` does, for what is wrong with the options when the first piece is asked for.
        """
        rows = self.prompt_ids(prompt, options.get("attention_mask"))
        if len(rows) != 1:
            raise ValueError(f"stream takes one prompt, not {len(rows)}: use generate")
        revised = options.get("remask") is not None or getattr(mode, "remask", None) is not None

        def generate(heard: Callback, show: Callable[[str], None]) -> str:
            live = self.live_text(rows[0], show, options.get("stop_strings"))
            calls: list[Callback] = [heard, *([] if revised else [live]), *([] if callback is None else [callback])]
            return live.rest(self.generate(prompt, mode, callback=together(calls), **options).texts[0])

        return pieces(generate)

    def live_text(
        self, prompt: Tensor, show: Callable[[str], None], stop_strings: str | Sequence[str] | None = None
    ) -> FinalText:
        """A `callback` for `generate` on one prompt, (length,) int64, which calls `show` with text that is final."""
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        return FinalText(partial(self.new_text, prompt), len(prompt), show, self.end_token_ids, stops)

    def infill(
        self,
        prefix: str | Sequence[str] | Pieces | Sequence[Pieces],
        suffix: str | Sequence[str] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        mode: str | Decoder | None = None,
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
        stop_tokens: Sequence[int] = (),
        attention: str | None = None,
        num_samples: int | None = None,
        confidence_threshold: float | None = None,
        **options: Any,
    ) -> SampleOutput:
        """Fill the gap between prefix and suffix, or the gaps of a text; what is given comes back unchanged.

        infill("Tom had", " The end.", 16): 16 tokens between the two. infill("Tom had <gap:8> dog. <gap:4> end."), or
        infill(["Tom had ", 8, " dog. ", 4, " end."]), where "<gap:8>" is ordinary text: any number of gaps; several
        texts in a list have any number each. Texts are tokenised apart, those behind a gap without special tokens.
        In the output `fills` has the text of each gap, `texts` what is new, `filled` the whole.
        A length may be a list of candidates, [4, 8] or <gap:4,8>: each (of several gaps each combination) is filled,
        and the one kept has the lowest NELBO per token of all that follows the first gap's beginning (`num_samples`
        more forwards a candidate, 8 by default; num_forwards counts all of it; without a seed, with the same masks each
        time). stop_tokens, stop_strings: a gap ends there, what follows it comes next, the rest is dropped; end tokens
        are tokens like others. attention: None, the checkpoint's own: block-wise ones see what is before a gap, and of
        what is behind it the part that falls into the active block; "bidirectional" shows them all of it in one noisy
        stream, which they were not trained on. The other options are those of `generate` in mode "diffusion".
        """
        check_unconstrained(options.get("constraint"))
        config, decoder = filling_decoder(
            self.diffusion, mode, attention,
            {"block_size": block_size, "max_denoising_steps": max_denoising_steps, "select": select,
             "confidence_threshold": confidence_threshold, **options},
            self.network.context_length, is_drafter=self.drafter is not None,
        )  # fmt: skip
        self._check_weights()
        check_guided(decoder, is_drafter=self.drafter is not None)
        rows = tokenised(self.tokenizer, self.prompt_ids, texts_with_gaps(prefix, suffix, num_tokens))
        history, callback = recorded(self.tokenizer, [row.pieces[0] for row in rows], decoder, callback)
        filled = fill_gaps(
            decoder, self.network, config, rows, self.new_text, stop_strings=stop_strings, stop_tokens=stop_tokens,
            num_samples=num_samples, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k,
            callback=callback, context_length=self.network.context_length,
        )  # fmt: skip
        return sample_output(
            filled.sequences, filled.sampled, ["".join(of_row) for of_row in filled.fills], self._pad,
            fills=filled.fills, filled=filled.texts,
            history=None if history is None else replace(history, gaps=filled.gaps, kept=filled.kept),
        )  # fmt: skip

    def prompt_ids(self, prompts: Prompts, attention_mask: Tensor | None = None) -> list[Tensor]:
        """The tokens of each prompt, (length,) int64 of at least one token: an empty prompt is the begin token.

        Raises ValueError for token ids outside the vocabulary, and for no prompts.
        """
        num_tokens = self.model.get_input_embeddings().weight.shape[0]
        rows = prompt_rows(self.tokenizer, prompts, attention_mask, num_tokens)
        return [row if len(row) else self.begin_token() for row in rows]

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of generation_config.json, and the tokenizer's end token."""
        return hf.end_token_ids(self.model, self.tokenizer)

    def begin_token(self) -> Tensor:
        """(1,) int64, where an unconditional text starts: the begin token, else the end token."""
        return torch.tensor([hf.begin_token_id(self.model, self.tokenizer)], dtype=torch.long)

    def new_text(self, prompt: Tensor, new: Sequence[int]) -> str:
        """The text that `new` tokens add to the prompt's."""
        return new_text(self.tokenizer, prompt, new)

    @property
    def _pad(self) -> int:
        """The token after the end of a row."""
        pad = self.tokenizer.pad_token_id
        return int(next(iter(self.end_token_ids), 0) if pad is None else pad)

    # --- likelihood

    def nll(
        self, texts: str | Sequence[str], *, numbers: Sequence[int] | None = None, show_progress: bool = False
    ) -> list[LikelihoodOutput]:
        """Exact negative log-likelihood of each text in AR mode (every checkpoint has it). numbers: as in `nelbo`."""
        documents, context_length = self._documents(texts, numbers), self.network.context_length
        with progress("nll", likelihood.num_windows(documents, context_length), show=show_progress) as advance:
            return likelihood.nll(self.network, documents, context_length=context_length, progress=advance)

    def nelbo(
        self,
        texts: str | Sequence[str],
        *,
        num_samples: int = 8,
        exact: bool = False,
        block_size: int | None = None,
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
        show_progress: bool = False,
    ) -> list[LikelihoodOutput]:
        """Upper bound on the negative log-likelihood of each text in diffusion mode, with uniform masks.

        Monte Carlo over `num_samples` masks per block, or exact=True by enumeration for blocks of up to 4. numbers: of
        the texts in a larger set, from 0, in which they have these masks.
        """
        if self.diffusion is None:
            raise ValueError("nelbo needs a converted checkpoint: this is an untouched AR model; use nll")
        documents, context_length = self._documents(texts, numbers), self.network.context_length
        with progress("nelbo", likelihood.num_windows(documents, context_length), show=show_progress) as advance:
            return likelihood.nelbo(
                self.network,
                self.diffusion.with_block_size(block_size),
                documents,
                num_samples=plain(num_samples),
                exact=exact,
                seed=given_or_new(seed),
                numbers=numbers,
                context_length=context_length,
                progress=advance,
            )

    def _documents(self, texts: str | Sequence[str], numbers: Sequence[int] | None = None) -> list[likelihood.Document]:
        self._check_weights()
        texts = [texts] if isinstance(texts, str) else texts
        mask_token_id = None if self.diffusion is None else self.diffusion.mask_token_id
        return likelihood.documents_of(self.tokenizer, texts, mask_token_id, numbers)

    # --- embeddings

    @property
    def embedding_pattern(self) -> str:
        """The pattern of `embed` by default: "causal" where the clean rows are an AR model's, else "bidirectional"."""
        return "causal" if self.diffusion is None or self.diffusion.serves_ar else "bidirectional"

    def embed(
        self,
        texts: str | Sequence[str],
        pattern: Pattern | str | None = None,
        *,
        batch_tokens: int = 8192,
        show_progress: bool = False,
    ) -> Tensor:
        """(n, hidden) float32: mean over tokenizer(text) of the last hidden states; an empty text is its begin token.

        pattern: "causal", "bidirectional", "block_causal" or any of `unmask.core.attention`; by default causal where
        the clean rows are an AR model's (untouched, drafter, tri-mode), bidirectional for other converted checkpoints.
        A text longer than the context loses its end, with a warning.
        """
        if isinstance(pattern, str) or pattern is None:
            name = self.embedding_pattern if pattern is None else pattern
            pattern = named_pattern(name, None if self.diffusion is None else self.diffusion.block_size)
        check_whole("batch_tokens", batch_tokens)
        self._check_weights()
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("texts is empty: give at least one")
        ids = document_ids(self.tokenizer, texts, self.begin_token, self.network.context_length)
        with progress("embed", len(ids), show=show_progress) as advance:
            return embed(self.network, ids, pattern, batch_tokens=plain(batch_tokens), progress=advance)

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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload the model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, made if there is none; returns the address.

        The options are those of transformers' `push_to_hub`. A repository without a README.md gets a short one. Raises
        ValueError for a name that is none, without the hub, and where the hub says no. A drafter goes without its base.
        """
        return hf.push(
            repo_id, self.save_pretrained, self.diffusion, self.base, commit_message=commit_message, private=private,
            token=token, revision=revision, create_pr=create_pr,
        )  # fmt: skip
