"""Continue a prompt, or fill gaps, and keep all of how that came about, for a page or a notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.infilling import filling_decoder, texts_with_gaps
from unmask.model import DiffusionLM
from unmask.outputs import SampleOutput
from unmask.replay_page import Beside, Gap, check_page, facts_of, in_frame, replay_page, token_pieces
from unmask.run_folder import write_text
from unmask.sampling import Step, Trace
from unmask.sampling.request import REQUEST_OPTIONS


@dataclass(frozen=True, repr=False)
class Replay:
    """What `replay` and `replay_infill` return: in a notebook it shows how the text came about.

    output: as of `generate` or `infill`. page: the HTML of the replay.
    """

    output: SampleOutput
    page: str

    def __repr__(self) -> str:
        return f"Replay({self.output!r})"

    def _repr_html_(self) -> str:
        return in_frame(self.page)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file; ValueError for one that does not end in .html, or is there and no replay.

        A replay that is there is replaced whole or, where the disk is full, not at all.
        """
        path = Path(path)
        check_page(path)
        write_text(path, self.page)
        return path


def replay(
    lm: DiffusionLM, prompt: str, mode: Any = None, *, parent: DiffusionLM | None = None, **options: Any
) -> Replay:
    """Continue one prompt, and keep how: `lm.generate(prompt, mode, **options)`, whose text is the same.

    In a notebook the result replays itself; `save` writes its page. parent: the AR model whose text stands beside it;
    by default the model's own AR mode, where it was trained for one.
    """
    of_request = {name: options.pop(name) for name in REQUEST_OPTIONS if name in options}
    decoder: Any = lm.decoder(mode, **options)
    trace = Trace(getattr(decoder, "select", None), callback=of_request.pop("callback", None))
    traced = replace(decoder, select=trace.select) if hasattr(decoder, "select") else decoder
    given = lm.prompt_ids(prompt)
    if len(given) != 1:
        raise ValueError(f"a replay is of one prompt, not of {len(given)}: give a text")
    began = time.perf_counter()
    output = lm.generate(prompt, traced, callback=trace.callback, **of_request)
    seconds = time.perf_counter() - began
    beside = text_beside(lm, prompt, decoder, parent, **of_request)
    return Replay(output, page_of(lm, prompt, decoder, output, trace.steps, seconds, beside, of_request))


def replay_infill(
    lm: DiffusionLM,
    prefix: Any,
    suffix: str | None = None,
    num_tokens: int | Sequence[int] | None = None,
    mode: Any = None,
    *,
    attention: str | None = None,
    **options: Any,
) -> Replay:
    """Fill the gaps of one text, and keep how: `lm.infill(prefix, suffix, num_tokens, ...)`, whose text is the same.

    Of candidate lengths the page shows those that were kept. Raises ValueError as `infill` does, and for several texts.
    """
    of_request = {name: options.pop(name) for name in (*REQUEST_OPTIONS, *_OF_INFILLING) if name in options}
    given = texts_with_gaps(prefix, suffix, num_tokens)
    if len(given) != 1:
        raise ValueError(f"a replay is of one text, not of {len(given)}: give one with gaps")
    _, decoder = filling_decoder(
        lm.diffusion, mode, attention, options, lm.network.context_length, is_drafter=lm.drafter is not None
    )
    trace = Trace(decoder.select, callback=of_request.pop("callback", None))
    traced = replace(decoder, select=trace.select)
    began = time.perf_counter()
    output = lm.infill(prefix, suffix, num_tokens, traced, attention=attention, callback=trace.callback, **of_request)
    seconds = time.perf_counter() - began
    history = output.history
    assert history is not None
    assert history.gaps is not None
    assert history.kept is not None
    of_others, steps = trace.steps[: history.kept[0].start], trace.steps[history.kept[0]]
    before = of_others[-1].number if of_others else 0
    steps = [replace(step, number=step.number - before) for step in steps]
    facts = _facts(decoder, output, seconds, of_request)
    if any(len(lengths) > 1 for lengths in given[0].lengths):
        facts["lengths tried"] = "; ".join(", ".join(map(str, lengths)) for lengths in given[0].lengths)
    page = replay_page(lm.tokenizer, history.gaps[0], steps, title=_name(lm), facts=facts,
                       prompt_text=given[0].texts[0])  # fmt: skip
    return Replay(output, page)


_OF_INFILLING = ("stop_tokens", "num_samples")
"""Options of `infill` that are neither the decoder's nor the request's."""


def page_of(
    lm: DiffusionLM,
    prompt: str,
    decoder: Any,
    output: SampleOutput,
    steps: Sequence[Step],
    seconds: float,
    beside: Beside | None,
    of_request: dict[str, Any],
) -> str:
    """The page of the one row of an output. seconds: it took. of_request: options of `generate`."""
    ids = lm.prompt_ids(prompt)[0].tolist()
    return replay_page(
        lm.tokenizer, [Gap(ids, output.new_tokens(0, len(ids)), len(ids))], steps, title=_name(lm),
        facts=_facts(decoder, output, seconds, of_request), beside=beside,
        prompt_text=prompt if isinstance(prompt, str) else None,
    )  # fmt: skip


def _facts(decoder: Any, output: SampleOutput, seconds: float, of_request: dict[str, Any]) -> dict[str, str]:
    """What is said above the text of the one row of an output."""
    shown = {name: of_request.get(name) for name in ("temperature", "top_p", "top_k", "seed")}
    asked = {name.replace("_", " "): str(value) for name, value in shown.items() if value is not None}
    return facts_of(decoder) | asked | output.counts(0) | {"seconds": f"{seconds:.2f}"}


def text_beside(
    lm: DiffusionLM, prompt: str, decoder: Any, parent: DiffusionLM | None, **of_request: Any
) -> Beside | None:
    """What AR writes after a prompt: the parent, or the model itself.

    None where that is the same call, or the model's AR mode is none. of_request: options of `generate`, no callback.
    """
    own = lm.diffusion is not None and lm.diffusion.serves_ar
    if facts_of(decoder)["mode"] == "ar" or (parent is None and not own):
        return None
    ar = lm if parent is None else parent
    began = time.perf_counter()
    output = ar.generate(prompt, "ar", **of_request)
    seconds = time.perf_counter() - began
    ids = ar.prompt_ids(prompt)[0].tolist()
    name = "The same model, token by token" if parent is None else f"AR parent {_name(ar)}"
    facts = output.counts(0) | {"seconds": f"{seconds:.2f}"}
    return Beside(name, token_pieces(ar.tokenizer, ids, output.new_tokens(0, len(ids))), facts)


def _name(lm: DiffusionLM) -> str:
    return Path(str(lm.model.config._name_or_path)).name
