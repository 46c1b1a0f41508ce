"""STS-B: do cosines of mean-pooled last hidden states rank sentence pairs as people do?

    python benchmarks/stsb.py MODEL stsb-en-dev.csv stsb-en-test.csv --output results/NAME [--patterns NAME,NAME]

Zero-shot, no instruction, as Efficient-DLM's Table 4 (2512.14067, section 5.3), of which STS-B is one set: a converted
model reads with the bidirectional pattern, an AR model with its causal one; the other is there to compare.
Appends a line with Spearman's rho of each file and pattern to rows.jsonl and prints it.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--patterns", default="causal,bidirectional")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    import torch
    from sts import read_pairs, sts_spearman

    import unmask

    torch.set_num_threads(1)
    lm = unmask.load(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "rows.jsonl").open("a") as rows:
        for file in options.files:
            pairs = read_pairs(file)
            for pattern in options.patterns.split(","):
                rho = sts_spearman(partial(lm.embed, pattern=pattern), pairs)
                row = {"model": options.model, "file": file.name, "pairs": len(pairs), "pattern": pattern,
                       "converted": lm.diffusion is not None, "spearman": round(rho, 4)}  # fmt: skip
                rows.write(json.dumps(row | {"command": shlex.join(["python", *sys.argv])}) + "\n")
                rows.flush()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
