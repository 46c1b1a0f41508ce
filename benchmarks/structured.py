"""Answers that obey random JSON schemas: do they validate and end, are they constrained AR's own, in how many forwards?

    python benchmarks/structured.py drafters/smollm2-135m-instruct --output results/structured [--bounded] [--base B]

Each schema is shown to the model, which is asked for an example, in AR and in speculative mode, with forced tokens and
without: one row each. `different` counts texts unlike those of AR, which in float32 may part where two tokens tie.
"""

import argparse
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import torch

import unmask
from unmask.sampling import Autoregressive, Decoder, Speculative
from unmask.version import __version__

NAMES = ("name", "age", "city", "tags", "price", "active", "colour", "address", "items", "notes", "id", "score")
WORDS = ("red", "green", "blue", "small", "large", "on", "off", "Paris", "Rome", "cat", "dog")


def random_schema(seed: int, *, bounded: bool = False) -> dict[str, Any]:
    """An object of random fields, up to three levels deep. bounded: no string and no number may go on without end."""
    schema = _object(random.Random(seed), 3)
    return _bounded(schema) if bounded else schema


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with an end for every string and number."""
    if schema.get("format") == "time":
        return {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"}
    if schema.get("type") == "number":
        return {"type": "integer", "minimum": 0, "maximum": 100}
    if schema.get("pattern") == "^[a-z]+$":
        return {"type": "string", "pattern": "^[a-z]{1,12}$"}
    if schema == {"type": "string"}:
        return {"type": "string", "maxLength": 24}
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: _bounded(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _bounded(schema["items"])
    if "anyOf" in schema:
        schema["anyOf"] = [_bounded(value) for value in schema["anyOf"]]
    return schema


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.7]
    schema = {"type": "object", "properties": {name: _value(draw, depth - 1) for name in names}}
    return schema | {"required": required, "additionalProperties": False}


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-5, 50)
    leaves: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(3, 20)},
        {"type": "string", "pattern": draw.choice(["^[A-Z]{3}-[0-9]{2,4}$", "^[a-z]+$", "^(yes|no|maybe)$"])},
        {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4"])},
        {"enum": draw.sample(WORDS, 3)},
        {"const": draw.choice([*WORDS, 7, None])},
        {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
        {"type": "number", "minimum": 0, "maximum": 100},
        {"type": ["boolean", "null"]},
    ]
    if depth <= 0 or draw.random() < 0.6:
        return draw.choice(leaves)
    kind = draw.choice(["object", "array", "either"])
    if kind == "object":
        return _object(draw, depth)
    if kind == "either":
        return {"anyOf": [draw.choice(leaves), _value(draw, depth - 1)]}
    return {"type": "array", "items": _value(draw, depth - 1), "minItems": draw.randint(0, 2), "maxItems": 4}


def validates(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that the schema allows."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lm = unmask.load(options.checkpoint, base=options.base)
        self.lm.pack()
        self.schemas = [random_schema(seed, bounded=options.bounded) for seed in range(options.number)]
        ask = "Write an example of JSON data that this schema allows, with realistic short values: "
        self.prompts = [[{"role": "user", "content": ask + json.dumps(schema)}] for schema in self.schemas]
        self.constraints = [self.lm.constraint(schema) for schema in self.schemas]

    def answers(self, decoder: Decoder) -> tuple[dict[str, Any], list[str]]:
        """Figures of all answers, and their texts."""
        counts, texts = torch.zeros(3, dtype=torch.long), list[str]()
        ended = valid = 0
        for first in range(0, len(self.schemas), self.options.batch_size):
            part = slice(first, first + self.options.batch_size)
            out = self.lm.generate(self.prompts[part], decoder, max_new_tokens=self.options.max_new_tokens,
                                   constraint=self.constraints[part])  # fmt: skip
            assert out.num_forced is not None
            counts += torch.stack([out.num_new_tokens.sum(), out.num_forwards.sum(), out.num_forced.sum()])
            done = (out.num_new_tokens < self.options.max_new_tokens).tolist()
            ended += sum(done)
            pairs = zip(out.texts, self.schemas[part], strict=True)
            valid += sum(end and validates(*pair) for end, pair in zip(done, pairs, strict=True))
            texts += out.texts
            print(f"{len(texts)} of {len(self.schemas)}", flush=True)
        tokens, forwards, forced = counts.tolist()
        row = {"schemas": len(texts), "ended": ended, "valid": valid, "tokens": tokens, "forced": forced,
               "forwards": forwards, "tokens_per_forward": round(tokens / forwards, 3)}  # fmt: skip
        return row, texts

    def run(self) -> None:
        """A row for each mode, with and without forced tokens."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        decoders: dict[str, Decoder] = {"ar": Autoregressive()}
        if self.lm.diffusion is not None and self.lm.diffusion.serves_ar:
            decoders["speculative"] = Speculative(cycle="two")
        expected: list[str] | None = None
        for forced in (True, False):
            for mode, decoder in decoders.items():
                with patch("unmask.sampling.scheduler.forced_token", lambda _: None) if not forced else nullcontext():
                    row, texts = self.answers(decoder)
                expected = expected or texts
                different = sum(a != b for a, b in zip(texts, expected, strict=True))
                row = {
                    "mode": mode,
                    "takes_forced": forced,
                    "bounded": self.options.bounded,
                    **row,
                    "different": different,
                    "unmask": __version__,
                }
                with (self.options.output / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--base", default=None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--max-new-tokens", type=int, default=384)
    Bench(parser.parse_args()).run()
