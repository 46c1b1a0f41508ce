"""Runs cases from files on one of several processes with sharded parameters: `torchrun ... loading_on_ranks.py FILE`.

FILE: JSON, name -> arguments of `unmask.adapt`. Each rank writes FILE-rank-<n>.json: for each case the devices that
the parent's weights and buffers are on when it is loaded, how often weights were read, and what they ended with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import digest, shard

import unmask
from unmask import conversion, hf, loading
from unmask.training.ranks import join, leave


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {"reads": 0}
    load_parent, read = conversion.load_parent, hf.load_pretrained

    def watched(job: Any) -> Any:
        parent = load_parent(job)
        model = parent.lm.model
        seen["weights"] = sorted({p.device.type for p in model.parameters()})
        seen["buffers"] = sorted({b.device.type for b in model.buffers()})
        seen["fingerprint"] = parent.fingerprint
        return parent

    def counted(*given: Any, **named: Any) -> Any:
        seen["reads"] += 1
        return read(*given, **named)

    conversion.load_parent, loading.hf.load_pretrained = watched, counted
    try:
        seen["end"] = digest(unmask.adapt(show_progress=False, **case))
    except ValueError as error:
        seen["error"] = str(error)
    finally:
        conversion.load_parent, loading.hf.load_pretrained = load_parent, read
    return seen


def main(cases: Path) -> None:
    torch.set_num_threads(1)
    ranks = join()
    shard()
    told = {name: run_case(case) for name, case in json.loads(cases.read_text()).items()}
    cases.with_name(f"{cases.stem}-rank-{ranks.process_index}.json").write_text(json.dumps(told))
    ranks.wait_for_everyone()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
