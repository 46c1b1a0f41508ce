"""Every class of transformers' causal language models, a process each: `python tests/architectures [NAME ...]`.

Prints a line for each class, writes the table of docs/architectures.md with `--output FILE` (all classes only), and
exits 1 if one is wrong or crashed. All of them take a few minutes on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from checks import Row, examine
from shapes import VARIANTS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SECONDS = 300
"""After which a class counts as crashed."""

INTRODUCTION = """# Architectures

Which causal language models of transformers {version} the library takes, one row a model type (and some for settings of
checkpoints that use other parts of a class), as measured on tiny random models by
`python tests/architectures --output docs/architectures.md`.
*Accepted*: passes with patterns, packed documents, two streams and gradients agree with the stock model's.
*Decoding*: steps on a cache agree as well, and speculation writes what autoregression writes.
*Drafter*: gated adapters leave clean rows alone, learn, and draft. *Refused*: `unmask` raises `UnsupportedModelError`
with this reason.

{counts}

| model type | verdict | decoding | drafter | reason |
|---|---|---|---|---|
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, all by default")
    parser.add_argument("--output", type=Path, help="the page to write")
    asked = parser.parse_args(arguments)
    known = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    unknown = sorted(set(asked.names) - set(known))
    if unknown:
        parser.error(f"{unknown[0]!r} is no model type of transformers' causal language models")
    if asked.names and asked.output:
        parser.error("--output needs all classes: leave the names out")
    rows = []
    for name in asked.names or known:
        rows.append(in_a_process(name))
        print(" | ".join(part for part in vars(rows[-1]).values() if part), flush=True)
    if asked.output:
        asked.output.write_text(page(rows))
    return int(any(row.verdict in ("wrong", "crash") for row in rows))


def in_a_process(name: str) -> Row:
    """The row of a class from a process of its own, which may die without taking the others along."""
    context = multiprocessing.get_context("fork")  # nothing has run yet, so no thread is lost
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Row(**receiver.recv())
        return Row(name, "crash", f"not done after {SECONDS} seconds")
    except EOFError:
        process.join()
        return Row(name, "crash", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _examine(name: str, sender: object) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sender.send(vars(examine(name)))  # type: ignore[attr-defined]


def page(rows: list[Row]) -> str:
    """The text of docs/architectures.md."""
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("accepted", "refused", "wrong", "crash") if v in verdicts)
    lines = []
    for row in sorted(rows, key=lambda row: (row.verdict, row.name)):
        cells = [f"`{row.name}`", row.verdict, row.decoding, row.drafter, row.reason]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    introduction = INTRODUCTION.format(version=transformers.__version__, counts=f"{len(rows)} rows: {counts}.")
    return introduction + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
