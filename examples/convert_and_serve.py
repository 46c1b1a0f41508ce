"""Convert a model and serve it over HTTP, as OpenAI's clients ask for it; needs the extra [serve].

    python examples/convert_and_serve.py Qwen/Qwen3-0.6B-Base corpus.jsonl runs/q [MAX_TOKENS]

The address is http://127.0.0.1:8000/v1, the model's name "converted".
"""

from __future__ import annotations

import sys

import uvicorn

import unmask
from unmask.serve.app import create_app
from unmask.serve.options import ServeOptions


def main(model: str, data: str, output: str, max_tokens: str = "4000000", **settings: object) -> object:
    """The server's application: a conversion that is finished is loaded, not made again."""
    lm = unmask.adapt(model, data, output_dir=output, resume=True, max_tokens=int(max_tokens), **settings)
    return create_app(lm, ServeOptions("converted"))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    uvicorn.run(main(*sys.argv[1:]), host="127.0.0.1", port=8000)
