"""Train a drafter for a model, and write the model's own text in fewer forwards.

    python examples/drafter.py HuggingFaceTB/SmolLM2-135M-Instruct corpus.txt runs/d "Once upon a time" [MAX_TOKENS]

The model stays as it is; the drafter is a small file beside it. How long to train: docs/recipes.md.
"""

from __future__ import annotations

import sys

import unmask


def main(model: str, data: str, output: str, prompt: str, max_tokens: str = "4000000", **settings: object) -> float:
    """Tokens per forward of the prompt's continuation; AR has 1."""
    lm = unmask.adapt(model, data, "drafter", output, max_tokens=int(max_tokens), **settings)
    plain = lm.generate(prompt, "ar", max_new_tokens=64)
    faster = lm.generate(prompt, "speculative", max_new_tokens=64)
    print(faster.texts[0])
    if faster.texts != plain.texts:  # float32 rounds a forward of several tokens otherwise than one of a single token
        print("a near tie fell the other way:", plain.texts[0], sep="\n")
    return float(faster.tokens_per_forward[0])


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    print(f"{main(*sys.argv[1:]):.2f} tokens per forward")
