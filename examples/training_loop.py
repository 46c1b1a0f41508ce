"""Convert a model in a training loop of your own: the model's forward gives the loss, everything else is PyTorch.

    python examples/training_loop.py Qwen/Qwen3-0.6B-Base corpus.txt runs/mine [STEPS]

corpus.txt: documents separated by "<|endoftext|>". A row is one document, cut at
the length that the recipe chooses; `unmask.adapt` packs several into a row.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import unmask

ROWS = 8
"""Of a batch."""


def main(model: str, data: str, output: str, steps: str = "1000") -> list[float]:
    """The loss of each step, in nats per token."""
    parts = unmask.for_trainer(model, recipe="efficient-dlm")
    length = parts.settings.max_length
    texts = [text for text in Path(data).read_text().split("<|endoftext|>") if text.strip()]
    examples = [{"input_ids": parts.tokenizer(text)["input_ids"][:length]} for text in texts]
    optimiser = torch.optim.AdamW(parts.model.parameters(), lr=parts.settings.learning_rate)
    order = torch.Generator().manual_seed(0)
    losses = []
    parts.model.train()
    for _ in range(int(steps)):
        rows = torch.randint(len(examples), (ROWS,), generator=order).tolist()
        batch = parts.collator([examples[row] for row in rows])
        labels = batch.pop("labels")  # with labels the forward would be the stock one
        loss = parts.loss(parts.model(**batch), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: {losses[-1]:.3f} nats per token")
    parts.model.eval()
    parts.lm.save_pretrained(output)
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
