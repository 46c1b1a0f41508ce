"""Lines of a training run on stderr: its settings at the start, and its figures beside the progress bar."""

from __future__ import annotations

from collections.abc import Callable

from unmask.progress import Advance, note, say
from unmask.resolve import RULE_TEXT, Resolved
from unmask.settings import to_plain
from unmask.training.loop import Progress


def announce(settings: Resolved, total_steps: int) -> None:
    """Print the settings that the size of the parent decides, and a note if the run is too short for its schedule."""
    blocks = ("block_size",) if settings.attention in ("two_stream", "block_causal") else ()
    names = (*blocks, "max_length", "batch_size", "learning_rate", "min_learning_rate_ratio", "half_life")
    values = to_plain(settings)
    say(f"{RULE_TEXT}: " + ", ".join(f"{name}={values[name]}" for name in names))
    if settings.anneal_steps > total_steps:
        note(
            f"anneal_steps={settings.anneal_steps} is more than the {total_steps} steps of this run, which ends before "
            "attention is fully open"
        )


def reporter(advance: Advance, start: int) -> Callable[[Progress], None]:
    """A function that advances the progress bar to each log step. start: the step at which the run begins."""
    done = start

    def report(p: Progress) -> None:
        nonlocal done
        figures = "".join(f"  {k} {v:.4g}" for k, v in p.evaluation.items() if k in ("nelbo", "nll"))
        shown = (f"step {p.step}/{p.total_steps}  loss {p.loss:.4f}{figures}  lr {p.learning_rate:.2e}  "
                f"{p.tokens_per_second:,.0f} tokens/s  gradient {p.gradient_norm:.3g}  {p.memory:.1f} GiB")  # fmt: skip
        advance(p.step - done, shown)
        done = p.step

    return report
