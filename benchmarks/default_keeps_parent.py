"""What `adapt` without a recipe leaves of the AR model: its NLL above the parent's, on text that chose nothing.

    python benchmarks/default_keeps_parent.py PARENT TRAIN.txt VALID.txt --output FILE.jsonl [--tokens 20000]

Appends a row: nats per predicted token of parent and result, the bound on 32 documents with 4 masks a block, and tokens
per cycle of greedy speculation on the beginnings of 64 documents.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import unmask
from unmask.data.readers import read_documents
from unmask.evaluation.likelihood import summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    given = parser.parse_args()

    torch.set_num_threads(1)
    texts = list(read_documents(given.valid))
    before = summarise(unmask.load(given.parent).nll(texts)).nats_per_token
    with tempfile.TemporaryDirectory() as folder:
        lm = unmask.adapt(given.parent, given.train, output_dir=folder, max_tokens=given.tokens, eval_documents=0)
        settings = json.loads((Path(folder) / "run.json").read_text())["settings"]
        after = summarise(lm.nll(texts)).nats_per_token
        bound = summarise(lm.nelbo(texts[:32], num_samples=4, seed=0)).nats_per_token
        out = lm.generate([text[:40] for text in texts[:64]], max_new_tokens=64)
    assert out.cycle_gains is not None
    row = {
        "parent": Path(given.parent).name,
        "tokens": given.tokens,
        "learning_rate": settings["learning_rate"],
        "parent_nll": round(before, 4),
        "nll_above_parent": round(after - before, 4),
        "nelbo": round(bound, 3),
        "tokens_per_cycle": round(int(out.num_new_tokens.sum()) / int(out.cycle_gains.sum()), 3),
    }
    with given.output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
