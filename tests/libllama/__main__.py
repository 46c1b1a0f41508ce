"""Compare a model of any size with its GGUF file in libllama: logits, tokens of texts, AR and block decoding.

    python tests/libllama MODEL TEXTS.txt [--texts 1000] [--prompts 20] [--tokens 32]

TEXTS.txt: texts between <|endoftext|>. Takes minutes for 100M parameters on a CPU, so it is no part of the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from library import LIBRARY
from llama_cpp import Llama, autoregressive, blocks

import unmask
from unmask.export import export_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("texts", type=Path)
parser.add_argument("--texts", dest="count", type=int, default=1000)
parser.add_argument("--prompts", type=int, default=20)
parser.add_argument("--tokens", type=int, default=32)
asked = parser.parse_args()

texts = [text.strip() for text in asked.texts.read_text().split("<|endoftext|>")]
pieces = [text[i : i + 300] for text in texts for i in range(0, len(text), 300)][: asked.count]
lm = unmask.load(asked.model)
with tempfile.TemporaryDirectory() as folder:
    export_model(lm, "gguf", Path(folder) / "out")
    llama = Llama(LIBRARY, Path(folder) / "out" / "model.gguf")

odd = [piece for piece in pieces if llama.tokenize(piece) != lm.prompt_ids(piece)[0].tolist()]
print(f"{len(pieces) - len(odd)} of {len(pieces)} texts have our tokens" + (f"; not {odd[0]!r}" if odd else ""))

has_blocks = lm.diffusion is not None and lm.diffusion.attention != "bidirectional" and lm.drafter is None
worst, equal = 0.0, {"ar": 0, "diffusion": 0} if has_blocks else {"ar": 0}
prompts = [lm.prompt_ids(text[:80])[0] for text in texts if len(text) > 80][: asked.prompts]
for prompt in prompts:
    theirs, ours = llama.forward(prompt.tolist(), 0), lm.model(prompt[None]).logits[0].detach().float().numpy()
    seen = np.isfinite(theirs[:, : ours.shape[1]])
    worst = max(worst, float(np.abs(theirs[:, : ours.shape[1]] - ours)[seen].max()))
    for mode, decode in (("ar", autoregressive), ("diffusion", blocks))[: len(equal)]:
        out = lm.generate(prompt, mode=mode, max_new_tokens=asked.tokens)
        new = out.sequences[0, len(prompt) :][: int(out.num_new_tokens[0])].tolist()
        equal[mode] += decode(llama, prompt.tolist(), asked.tokens, lm.end_token_ids) == new
print(f"logits differ by at most {worst:.1e}")
for mode, number in equal.items():
    print(f"{number} of {len(prompts)} continuations in mode {mode} have our tokens")
sys.exit(bool(odd) or any(number < len(prompts) for number in equal.values()))
