"""Text that obeys a grammar: constrained AR decoding, faster, in AR and speculative mode."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import _GQA, STORIES, tiny_model
from structured import random_schema, validates
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, normalizers, trainers
from torch import Tensor

import unmask
from unmask.core.attention import Layout, causal
from unmask.core.network import DiffusionConfig
from unmask.sampling import Autoregressive, Coupled, Rejection, Speculative
from unmask.sampling.tokens import choose_tokens, token_noise

jsonschema = pytest.importorskip("jsonschema")
llguidance = pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["cats", "dogs", "käse"]}, "maxItems": 3},
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "likes", "happy"],
    "additionalProperties": False,
}
SPECS: list[Any] = [
    PERSON,
    unmask.JsonSchema(PERSON, any_whitespace=True),
    "json_object",
    unmask.Regex("(cat|dog|little bird){1,4}!"),
    unmask.Lark('start: "Once " noun (" and " noun)~0..3 "."\nnoun: "a cat" | "the old house" | /[0-9]{3}/'),
    {"const": {"every": "token", "is": ["forced", 1]}},
    {"type": "string", "pattern": "^[a-z]{2}-[0-9]{2}$"},
    None,
]
PROMPTS = ["Once there was a cat", "", "The dog: ", "grey", "Answer in JSON. ", "x", "The garden was", "A"]


def byte_level() -> tf.PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(STORIES, 320, special_tokens=["<s>", "</s>"], show_progress=False)
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> tf.PreTrainedTokenizerFast:
    """As Llama's: spaces are ▁, and bytes that no piece has are tokens of their own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(STORIES, trainers.BpeTrainer(vocab_size=400, special_tokens=specials[:3],
                                                               show_progress=False))  # fmt: skip
    state = json.loads(tokenizer.to_str())
    pieces = [piece for piece in state["model"]["vocab"] if piece not in specials]
    state["model"]["vocab"] = {piece: i for i, piece in enumerate([*specials, *pieces])}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def model_of(name: str, *, ends: Any = None, **changes: Any) -> unmask.DiffusionLM:
    """A random float64 llama over this vocabulary, with a causal clean half; its last row is the mask token."""
    tokenizer = TOKENIZERS[name]
    size = len(tokenizer) + 3  # as vocabularies that are rounded up
    sizes = _GQA | {"vocab_size": size, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    model = tiny_model(tf.LlamaConfig(**sizes), torch.float64)
    model.generation_config.eos_token_id = ends or tokenizer.eos_token_id
    config = DiffusionConfig(size - 1, "two_stream", "causal", 4, False, "test", "0")
    return unmask.DiffusionLM(model, tokenizer, replace(config, **changes))


def twin(
    lm: unmask.DiffusionLM, prompt: Tensor, spec: Any, limit: int, *, row: int = 0, seed: int = 0,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int | None = None,
) -> list[int]:  # fmt: skip
    """Constrained AR decoding as it is defined: for each token a forward over the whole text, and llguidance's mask."""
    ids, new, matcher = prompt.tolist(), list[int](), None
    if spec is not None:
        matcher = lm.constraint(spec).begin()._matcher  # type: ignore[attr-defined]
    while len(new) < limit:
        text = torch.tensor([ids + new])
        with torch.no_grad():
            logits = lm.network(text, Layout.of(torch.arange(text.shape[1])[None]), causal)[0, -1:]
        if matcher is not None:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits = logits.masked_fill(~torch.from_numpy(bits[: logits.shape[1]]).bool(), -torch.inf)
        noise = token_noise(logits.shape[1], seed, torch.tensor([row]), torch.tensor([[text.shape[1]]]))[0]
        token = int(choose_tokens(logits, temperature, top_p, noise, top_k))
        new.append(token)
        if matcher is not None:
            assert matcher.consume_token(token)
        if token in lm.end_token_ids:
            break
    return new


CYCLES: list[dict[str, Any]] = [
    {"cycle": "two"}, {"cycle": "one"}, {"cycle": "one", "draft_length": 3}, {"draft_length": "auto", "block_size": 8},
    {"cycle": "auto", "block_size": 6},
]  # fmt: skip


def rows_of(out: Any, prompts: list[Tensor]) -> list[list[int]]:
    return [
        row[len(p) : len(p) + n].tolist()
        for row, p, n in zip(out.sequences, prompts, out.num_new_tokens.tolist(), strict=True)
    ]


def check_equals_twin(lm: unmask.DiffusionLM, cycles: list[dict[str, Any]], **sampling: Any) -> None:
    """AR and these cycles give the tokens of the slow twin, in one batch and in a queue, and their counts add up."""
    prompts = lm.prompt_ids(PROMPTS)
    pairs = enumerate(zip(prompts, SPECS, strict=True))
    expected = [twin(lm, prompt, spec, 28, row=row, **sampling) for row, (prompt, spec) in pairs]
    specs = [None if spec is None else lm.constraint(spec) for spec in SPECS]
    for n, decoder in enumerate([Autoregressive(), *(Speculative(**cycle) for cycle in cycles)]):
        out = lm.generate(PROMPTS, decoder, max_new_tokens=28, constraint=specs, batch_size=3 if n % 2 else None,
                          **sampling)  # fmt: skip
        assert rows_of(out, prompts) == expected, decoder
        if n:
            gains, cycles = torch.arange(out.cycle_gains.shape[1]), out.cycle_gains.sum(-1)
            assert torch.equal((out.cycle_gains * gains).sum(-1), out.num_new_tokens)
            assert (out.num_forwards <= 2 * cycles).all()
        else:
            assert torch.equal(out.num_forwards, out.num_new_tokens - out.num_forced)
        assert (out.num_forced[5], out.num_forwards[5], out.num_prefill_forwards[5]) == (out.num_new_tokens[5], 0, 0)
        assert out.num_forced[7] == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 2}], ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_way_to_decode_gives_the_tokens_of_constrained_ar(name: str, sampling: dict[str, Any]) -> None:
    check_equals_twin(model_of(name), CYCLES, **sampling)


@pytest.mark.parametrize("changes", [
    {"shift": True}, {"noisy_attention": "causal"}, {"shift": True, "noisy_attention": "causal", "noise_tokens": 50},
    {"adapt_anchor": True}, {"adapt_anchor": True, "shift": True},
], ids=str)  # fmt: skip
def test_whatever_drafts(changes: dict[str, Any]) -> None:
    cycles: list[dict[str, Any]] = [{"cycle": "two", "draft_length": 6}, {"cycle": "one", "draft_length": 3}]
    cycles = cycles[:1] if "adapt_anchor" in changes else cycles
    check_equals_twin(model_of("byte_level", **changes), cycles, temperature=1.0, seed=1)


def test_several_end_tokens_end_a_text_and_are_chosen_by_the_model() -> None:
    lm = model_of("byte_level", ends=[1, 7])
    check_equals_twin(lm, CYCLES[:2], temperature=1.0, seed=3)


@pytest.mark.parametrize("acceptance", [Coupled(), Rejection()], ids=str)
def test_drafts_that_masks_correct_leave_the_distribution_of_constrained_ar(acceptance: Any) -> None:
    """Three letters of three, which a random model drafts badly, against their exact probabilities."""
    lm, rows, prompt = model_of("byte_level"), 1000, model_of("byte_level").prompt_ids("Once")[0]
    spec = lm.constraint(unmask.Regex("[abc]{3}"))
    texts = [tuple(lm.tokenizer.convert_tokens_to_ids(list(text))) for text in itertools.product("abc", repeat=3)]
    exact = []
    for text in texts:
        with torch.no_grad():
            whole = torch.tensor([[*prompt.tolist(), *text]])
            logits = lm.network(whole, Layout.of(torch.arange(whole.shape[1])[None]), causal)[0, len(prompt) - 1 :]
        state, log = spec.begin(), 0.0
        for i, token in enumerate(text):
            log += float(logits[i].masked_fill(~state.allowed(), -torch.inf).log_softmax(-1)[token])
            state.accept(token)
        exact.append(log)
    decoder = Speculative(cycle="one", draft_length=3, acceptance=acceptance)
    out = lm.generate(["Once"] * rows, decoder, max_new_tokens=8, constraint=spec, temperature=1.0, seed=11)
    new = [tuple(row[:-1]) for row in rows_of(out, [prompt] * rows)]
    found, expected = torch.tensor([new.count(text) for text in texts]), rows * torch.tensor(exact).exp()
    assert float(expected.sum()) > 0.3 * rows  # the others are spelt with longer tokens
    assert float(((found - expected) ** 2 / expected).sum()) < 55  # of 27 degrees of freedom: once in 1000


def test_an_answer_validates_and_keys_are_free() -> None:
    lm = model_of("byte_level")
    for decoder in (Autoregressive(), Speculative(cycle="two")):
        out = lm.generate(PROMPTS, decoder, max_new_tokens=200, constraint=PERSON, temperature=1.0, seed=4)
        for text, new, forced in zip(out.texts, out.num_new_tokens, out.num_forced, strict=True):
            assert text == json.dumps(json.loads(text), ensure_ascii=False)
            jsonschema.validate(json.loads(text), PERSON)
            assert forced > 0.3 * new
        assert (out.tokens_per_forward > 1.5).all()


def test_a_schema_comes_as_users_have_it() -> None:
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(Literal["Tom", "Ann"], ...), old=(bool, ...))
    lm = model_of("byte_level")
    schema = person.model_json_schema()
    expected = lm.generate("A", constraint=schema, seed=1, temperature=1.0).texts
    assert person.model_validate_json(expected[0])
    openai = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for spec in (person, unmask.JsonSchema(json.dumps(schema)), lm.constraint(person), [schema], openai):
        assert lm.generate("A", constraint=spec, seed=1, temperature=1.0).texts == expected
    assert lm.generate("A", constraint=re.compile("(no){2}")).texts == ["nono"]
    for anything in ("json_object", {"type": "json_object"}):
        assert lm.generate("A", constraint=anything, max_new_tokens=3).texts[0].startswith("{")
    free = lm.generate("A", max_new_tokens=9)
    assert free.num_forced is None
    assert lm.generate("A", constraint=[None], max_new_tokens=9).texts == free.texts


@pytest.mark.parametrize(("spec", "said"), [
    ({"type": "obj"}, "Invalid type: obj"), ({"not": {"const": 1}}, "Unimplemented keys"),
    (unmask.Regex("(a"), "unclosed"),
    (unmask.Lark("start: foo"), "unknown name"), ("json", "give a JSON schema"), (3, "give a JSON schema"),
    (unmask.JsonSchema("{"), "is no JSON"), ({"const": {1, 2}}, "is no JSON"), ([{}, {}], "a list of 2 for 1 prompts"),
    ([], "a list of 0 for 1 prompts"), ({"type": "json_schema"}, "has no schema"), ({"type": "text"}, "Invalid type"),
     (True, "give a JSON schema"),
], ids=str)  # fmt: skip
def test_bad_constraints_are_refused(spec: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        model_of("byte_level").generate("A", constraint=spec)
    assert "\n" not in str(error.value)


def test_modes_without_an_order_refuse_constraints() -> None:
    for attention, clean in (("bidirectional", None), ("two_stream", "block_causal")):
        lm = model_of("byte_level", attention=attention, clean_attention=clean)
        with pytest.raises(ValueError, match=r"^constraint \{'type': 'object'.*left to right.*use mode 'ar'"):
            lm.generate("A", mode="diffusion", constraint=PERSON if clean else lm.constraint(PERSON))
        with pytest.raises(ValueError, match=r"left to right.*use mode 'ar'"):
            lm.infill("A", "B", 4, constraint=PERSON)
        assert lm.generate("A", mode="ar", constraint={"enum": [7]}).texts == ["7"]


def test_a_model_without_an_end_token_is_refused() -> None:
    lm = model_of("byte_level")
    lm.model.generation_config.eos_token_id, lm.tokenizer = None, byte_level()
    lm.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs an end token"):
        lm.generate("A", constraint=PERSON)


def test_a_tokenizer_whose_tokens_spell_no_bytes_is_refused() -> None:
    lm = unmask.load(Path(__file__).parents[1] / "models/tasks-base")
    with pytest.raises(ValueError, match=r"constraint needs to know which bytes each token spells.* this WordLevel"):
        lm.generate("reverse c n > ", max_new_tokens=4, constraint={"type": "boolean"})


def test_the_stream_and_callbacks_hear_of_forced_tokens() -> None:
    lm = model_of("byte_level")
    for mode in ("ar", "speculative"):
        calls: list[tuple[int, list[int], list[int]]] = []
        out = lm.generate("A", mode, constraint=PERSON, callback=lambda *call, calls=calls: calls.append(call))
        heard = [token for _, _, tokens in calls for token in tokens]
        assert [heard] == rows_of(out, lm.prompt_ids("A"))
        assert "".join(lm.stream("A", mode, constraint=PERSON)) == out.texts[0]
        stopped = lm.generate("A", mode, constraint=PERSON, stop_strings='"age')
        assert stopped.texts[0] == out.texts[0].split('"age')[0]
        cut = lm.generate("A", mode, constraint=PERSON, max_new_tokens=6)
        assert rows_of(cut, lm.prompt_ids("A")) == [heard[:6]]


def test_the_command_takes_a_schema_a_regular_expression_or_a_grammar(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unmask import cli

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", "generate", str(tokenizer_and_model), "Once", "--json", *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    schema, grammar = tmp_path / "schema.json", tmp_path / "start.lark"
    schema.write_text('{"enum": ["yes"]}')
    grammar.write_text('start: "a"~3')
    for options, text in {
        ("--json-schema", '{"const": [1, 2]}'): "[1, 2]", ("--json-schema", str(schema)): '"yes"',
        ("--regex", "(ab){2}"): "abab", ("--grammar", str(grammar)): "aaa", ("--grammar", 'start: "b" "c"'): "bc",
    }.items():  # fmt: skip
        code, out, _ = run(*options)
        answer = json.loads(out)
        assert (code, answer["text"]) == (0, text), options
        assert answer["num_forced"] + answer["num_forwards"] == answer["num_new_tokens"]
    for options, said in {
        ("--json-schema", "nowhere.json"): "'nowhere.json' is neither the text itself nor a file",
        ("--grammar", str(tmp_path)): "nor a file that can be read (Is a directory)",
        ("--json-schema", '{"type": "obj"}'): "Invalid type: obj", ("--json-schema", "{"): "is no JSON",
        ("--regex", "a", "--json-schema", "{}"): "both say what the text must be: leave one of them out",
    }.items():  # fmt: skip
        code, out, error = run(*options)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert said in error


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_that_spells_special_tokens_is_ordinary(name: str) -> None:
    lm = model_of(name)
    schema = {"type": "object", "properties": {"</s>": {"const": "<s> a</s>"}}, "required": ["</s>"],
              "additionalProperties": False}  # fmt: skip
    for spec, text in ((schema, '{"</s>": "<s> a</s>"}'), (unmask.Regex("x</s>y"), "x</s>y")):
        for mode in ("ar", "speculative"):
            out = lm.generate("A", mode, constraint=spec)
            assert (out.texts[0], int(out.num_forwards[0])) == (text, 0)
    either = {"enum": ["</s>", "<s>", "<unk>"]}
    texts = lm.generate(["A"] * 20, constraint=either, temperature=1.0, seed=0).texts
    assert {json.loads(text) for text in texts} == {"</s>", "<s>", "<unk>"}


def test_answers_to_random_schemas_validate_and_are_those_of_ar() -> None:
    """As `benchmarks/structured.py`, which asks a real model for a hundred."""
    lm = model_of("byte_level")
    schemas = [random_schema(seed, bounded=True) for seed in range(10)]
    options: dict[str, Any] = {"max_new_tokens": 300, "temperature": 1.0, "seed": 6}
    out = lm.generate(["A"] * 10, "ar", constraint=schemas, **options)
    assert lm.generate(["A"] * 10, Speculative(cycle="two"), constraint=schemas, **options).texts == out.texts
    ended = (out.num_new_tokens < 300).tolist()
    assert sum(ended) >= 8
    assert all(validates(text, schema) for text, schema, end in zip(out.texts, schemas, ended, strict=True) if end)
    assert not validates(out.texts[0][:-1], schemas[0])
    assert not validates("{}", PERSON)
