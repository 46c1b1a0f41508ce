"""`unmask demo MODEL --data FILE`: convert a model of one's own, and show text and likelihood of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.progress import say

if TYPE_CHECKING:
    from unmask.model import DiffusionLM


def run_demo(model: str, data: list[str], output: Path, max_tokens: int, loading: dict[str, Any]) -> None:
    """Convert a model and show text and likelihood of both. loading: base, device, trust_remote_code of `load`."""
    import unmask
    from unmask.data.readers import read_documents
    from unmask.data.sources import find_files

    converted = output / "converted"
    say(f"convert {model}")
    lm = unmask.adapt(
        model,
        data,
        output_dir=converted,
        resume=True,
        max_tokens=max_tokens,
        eval_every=50,
        **loading,
    )
    files = find_files(data)
    held_out = [text for file in files[-1:] for text in read_documents(file)][-8:] if files else []
    _show(unmask.load(model, **loading), lm, held_out)
    print(f'model          {converted}: try `unmask generate {converted} "..."`', flush=True)


def _show(base: DiffusionLM, lm: DiffusionLM, held_out: list[str]) -> None:
    """What both write after the first words of a document, a gap that only `lm` can fill, and bits per byte of all."""
    from unmask.evaluation.likelihood import summarise

    prompt = held_out[0][:60] if held_out else ""
    ar, fast = (model.generate(prompt, max_new_tokens=48) for model in (base, lm))
    cycles = float(fast.tokens_per_cycle[0]) if fast.tokens_per_cycle is not None else 0.0
    same = "the same text" if ar.texts == fast.texts else "another text"
    filled = lm.infill(prompt[:30], prompt[45:], 6)
    lines = [
        "",
        f"prompt         {prompt!r}",
        f"AR parent      {ar.texts[0]!r}",
        f"converted      {fast.texts[0]!r}",
        f"               {same}, {cycles:.2f} tokens per cycle, "
        f"{int(ar.num_forwards[0])} and {int(fast.num_forwards[0])} forwards for {int(fast.num_new_tokens[0])} tokens",
        f"infilling      {prompt[:30]!r} [{filled.texts[0]}] {prompt[45:]!r}",
    ]
    if held_out:
        nll, bound = summarise(base.nll(held_out)), summarise(lm.nelbo(held_out, seed=0))
        lines.append(f"bits per byte  {nll.bits_per_byte:.3f} (AR parent, exact) and {bound.bits_per_byte:.3f} (bound)")
    print("\n".join(lines), flush=True)
