"""A part of the tests under other versions of the libraries, for the night: `python tests/versions [WHICH ...]`.

    oldest   those of `unmask.requirements`, all at once
    newest   the newest transformers

Both by default, under the torch that is installed; `--torch 2.9.1` installs that one too, which takes gigabytes where
its wheels bring CUDA. The versions are installed into --folder and stand before this environment on the path, so that
nothing here changes; what is there already is used again. Exits 1 if a test fails. Each takes some ten minutes on one
core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from unmask.requirements import OLDEST  # noqa: E402

NAMES = """
    cache_keyword slots hf fast_paths sampling speculative cycles structured model infill embed train trainer lora
    drafter packed gguf export_hf serve
"""
TESTS = [*(f"tests/test_{name}.py" for name in NAMES.split()), "tests/invariant"]
WITHOUT = "trajectory and gpt2"
"""A random GPT-2 begins with other weights in transformers 5.0 than in the recorded trajectories."""

LIBRARIES = {
    # The Hub's client and the tokenizers: the newest that such a transformers allows.
    "oldest": [*(f"{name}=={version}.*" for name, version in OLDEST.items() if name != "torch"),
               "huggingface_hub<2", "tokenizers<0.23"],
    "newest": ["transformers", "huggingface_hub", "tokenizers"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=" or ".join(LIBRARIES))
    parser.add_argument("--torch", help="a version of torch")
    parser.add_argument("--folder", type=Path, help="where to install; a new one by default")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="instead of those in TESTS")
    asked = parser.parse_args()
    unknown = sorted(set(asked.which) - set(LIBRARIES))
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(LIBRARIES)}")
    folder = (asked.folder or Path(tempfile.mkdtemp())).resolve()
    failed = [which for which in asked.which or LIBRARIES if not passes(which, asked.torch, folder, asked.tests)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


def passes(which: str, torch: str | None, folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass under these libraries."""
    paths = [ROOT / "src", install(folder / which, ["--no-deps", *LIBRARIES[which]])]
    if torch is not None:
        paths.append(install(folder / f"torch-{torch}", [f"torch=={torch}"]))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    subprocess.run([sys.executable, "-m", "unmask.cli", "env"], env=env)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-k", f"not ({WITHOUT})", *tests]
    return subprocess.run(command, env=env, cwd=ROOT).returncode == 0


def install(target: Path, what: list[str]) -> Path:
    """The folder with these packages."""
    if not target.exists():
        print(f"installing {' '.join(what)} into {target}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", target, *what], check=True)
    return target


if __name__ == "__main__":
    sys.exit(main())
