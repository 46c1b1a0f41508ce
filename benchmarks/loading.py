"""Memory of two processes that share a model out (FSDP2, gloo), by whether the main one alone loads it.

    python benchmarks/loading.py TOKENIZER [MILLIONS OF PARAMETERS]

TOKENIZER: a folder or hub id. A random Llama in float32, and a drafter on it, whose frozen weights are all that is
large. GiB above what a process has before it loads anything: at most until it has loaded, and at most in the run, in
which the layers that run are whole for the moment.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

STORIES = "Once upon a time there was a fox. " * 200


def write_parent(folder: Path, tokenizer_name: str, millions: float) -> None:
    """A random model of about so many parameters, with this tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    width, layers = 1024, max(1, round(millions / 12.6))
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2816, num_hidden_layers=layers,
                         num_attention_heads=16, max_position_embeddings=256, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_rank(way: str, parent: Path, work: Path) -> None:
    """One of two processes; way: "once", or "each" loads the model itself."""
    import unmask
    from unmask import conversion
    from unmask.training.ranks import join, leave

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from ranks import become

    torch.set_num_threads(1)
    ranks = join()
    become("fsdp2")
    load_parent, peaks = conversion.load_parent, [_peak()]

    def watched(job: Any) -> Any:
        parent = load_parent(job)
        peaks.append(_peak())
        return parent

    conversion.load_parent = watched
    model = parent if way == "once" else unmask.load(parent, dtype="float32")
    unmask.adapt(model, work / "text.txt", "drafter", work / way, drafter_rank=2, max_tokens=64, max_length=32,
                 batch_size=2, eval_documents=0, save_every=1000, show_progress=False)  # fmt: skip
    peaks.append(_peak())
    (work / f"{way}-{ranks.process_index}.json").write_text(json.dumps([peak - peaks[0] for peak in peaks[1:]]))
    ranks.wait_for_everyone()
    leave()


def _peak() -> float:
    """GiB that this process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    tokenizer_name, millions = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 200.0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_parent(work / "parent", tokenizer_name, millions)
        size = (work / "parent" / "model.safetensors").stat().st_size / 2**30
        (work / "text.txt").write_text(STORIES)
        for way in ("each", "once"):
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631",
                       __file__, "--rank", way, str(work / "parent"), str(work)]  # fmt: skip
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            peaks = [json.loads((work / f"{way}-{rank}.json").read_text()) for rank in (0, 1)]
            for who, (loaded, run) in zip(("main", "other"), peaks, strict=True):
                print(f"{size:.2f} GiB of weights, loaded {way}, {who} process: {loaded:.2f} GiB, in the run {run:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
