"""Supervised fine-tuning: what is given is never corrupted and never in the loss, however rows are packed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import MASK, STORIES, block_config, network, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import unmask
from unmask.core.attention import PADDING, Layout
from unmask.core.batch import Batch
from unmask.core.objectives import diffusion_loss
from unmask.data.documents import Corpus, load_corpus
from unmask.data.packing import Packer, PackState
from unmask.data.readers import read_examples
from unmask.data.supervised import Completion, Conversation, continue_ids, encode_example
from unmask.evaluation.likelihood import Document, nelbo, nll
from unmask.settings import Settings
from unmask.training.batches import packed_documents
from unmask.training.step import corruptions, step_loss

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # earlier answers lose what stands in brackets
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{{ m.content if loop.last else m.content.split(']')[-1] }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "A cat?"},
    {"role": "assistant", "content": "[soft] The cat was happy."},
    {"role": "user", "content": "A dog?"},
    {"role": "assistant", "content": "[loud] The dog was tired."},
    {"role": "user", "content": "Thanks"},
]
PAIRS = [{"prompt": s.split(".")[0] + ".", "completion": s.split(".", 1)[1]} for s in STORIES]


@pytest.fixture
def tokenizer(tokenizer_and_model: Path):
    return AutoTokenizer.from_pretrained(tokenizer_and_model)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


# --- records and tokens


def test_columns_tell_what_a_record_is(tmp_path: Path) -> None:
    records = [{"messages": TALK}, {"prompt": "a ", "completion": " b\n", "n": 1}, {"text": " c "}]
    expected = [Conversation(TALK), Completion("a ", " b\n"), "c"]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert list(read_examples(path)) == expected
    for record, example in zip(records, expected, strict=True):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "one.parquet")
        assert list(read_examples(tmp_path / "one.parquet")) == [example]
    assert list(read_examples(path, text_column="prompt", skip_invalid=True))[1] == "a"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TALK, "prompt": "x"}, "has both 'prompt' and 'messages'"),
        ({"messages": TALK, "text": "x"}, "has both 'text' and 'messages'"),
        ({"prompt": "x", "completion": "y", "text": "z"}, "has both 'text' and 'completion'"),
        ({"prompt": "x", "completion": "  "}, "has an empty completion"),
        ({"prompt": "", "completion": "y"}, "has an empty prompt"),
        ({"completion": "y"}, "has no column 'prompt'"),
        ({"prompt": "x", "completion": 3}, "holds a number in column 'completion'"),
        ({"text": 3}, "holds a number in column 'text', not text"),
        ({"prompt": "x"}, r"no text column 'text', found \['prompt'\]"),
        ({"messages": "hello"}, "no list of objects with a role"),
        ({"messages": [{"role": "user"}]}, "no list of objects with a role"),
        ({"messages": TALK[:2]}, "without one of the role 'assistant'"),
        ({"messages": TALK[2:3]}, "begins with a message of the role 'assistant'"),
        ({"messages": [*TALK, {"role": "assistant", "content": " "}]}, "empty message of the role 'assistant'"),
    ],
)
def test_records_that_are_no_example_are_named(tmp_path: Path, record: dict, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl', line 2: .*{message}"):
        list(read_examples(path))
    assert list(read_examples(path, skip_invalid=True)) == ["good"]


def test_a_prompt_is_what_generate_is_given(tokenizer) -> None:
    for pair in PAIRS[:6]:
        ((ids, loss_mask),) = encode_example(tokenizer, Completion(**pair), 1)
        prompt = tokenizer(pair["prompt"])["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert loss_mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert ids[-1] == 1
        assert tokenizer.decode(ids[:-1]) == pair["prompt"] + pair["completion"]


def test_what_follows_joins_its_text_unless_that_changes_the_prompt(tokenizer) -> None:
    prompt = "Once there was"
    ids = tokenizer(prompt)["input_ids"]
    assert [*ids, *continue_ids(tokenizer, ids, prompt, " a cat")] == tokenizer(prompt + " a cat")["input_ids"]
    broken = "Once ther"  # the word is one token with its end
    ids = tokenizer(broken)["input_ids"]
    assert tokenizer(broken + "e was")["input_ids"][: len(ids)] != ids
    assert continue_ids(tokenizer, ids, broken, "e was") == tokenizer("e was")["input_ids"]


def learnt_text(tokenizer, ids: list[int], loss_mask: list[bool]) -> list[str]:
    runs = itertools.groupby(zip(ids, loss_mask, strict=True), lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for learnt, run in runs if learnt]


def test_messages_are_learnt_on_assistant_turns_only(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    ((ids, loss_mask),) = encode_example(tokenizer, Conversation(TALK), 1)
    assert learnt_text(tokenizer, ids, loss_mask) == [
        "[soft] The cat was happy.<|im_end|>\n",
        "[loud] The dog was tired.<|im_end|>\n</s>",
    ]
    prompt = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[:-1]) == tokenizer.apply_chat_template(TALK[:5], tokenize=False)


def test_an_end_token_of_the_template_is_not_doubled(tokenizer) -> None:
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    ((ids, loss_mask),) = encode_example(tokenizer, Conversation(TALK), 1)
    assert ids.count(1) == 5  # one for each message up to the last answer
    assert learnt_text(tokenizer, ids, loss_mask)[-1] == "[loud] The dog was tired.</s>\n"


def test_a_template_that_rewrites_answers_gives_a_document_each(tokenizer) -> None:
    tokenizer.chat_template = FORGETFUL
    documents = encode_example(tokenizer, Conversation(TALK), None)
    assert [learnt_text(tokenizer, *d) for d in documents] == [
        ["[soft] The cat was happy.\n"],
        ["[loud] The dog was tired.\n"],
    ]
    for (ids, loss_mask), upto in zip(documents, (2, 4), strict=True):
        prompt = tokenizer.apply_chat_template(TALK[:upto], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: loss_mask.index(True)] == prompt


def test_templates_that_cannot_be_followed_are_named(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(ValueError, match="messages need a chat template, which this tokenizer lacks"):
        load_corpus([path], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chat.jsonl'.*the chat template refuses .*roles must alternate"):
        load_corpus([path], tokenizer)
    tokenizer.chat_template = "{% if add_generation_prompt %}ask{% else %}tell{% endif %}"
    with pytest.raises(ValueError, match=r"chat.jsonl'.*does not begin with its own generation prompt \('ask'\)"):
        load_corpus([path], tokenizer)


def test_real_templates_round_trip(shared: Path) -> None:
    """SDAR's template rewrites earlier answers; the prompt of each document is still what decoding sees."""
    real = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2-sdar")
    documents = encode_example(real, Conversation(TALK[:5]), real.convert_tokens_to_ids("<|im_end|>"))
    for ids, loss_mask in documents:
        assert ids.count(real.convert_tokens_to_ids("<|im_end|>")) >= 1
        assert any(loss_mask)
    last = documents[-1]
    prompt = real.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert last[0][: len(prompt)] == list(prompt)
    assert not any(last[1][len(prompt) - 4 : len(prompt)])


def test_long_examples_are_named_or_left_out(tokenizer, pairs: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs.jsonl'.*makes \d+ tokens: raise max_length=20"):
        load_corpus([pairs], tokenizer, max_length=20)
    lengths = np.diff(load_corpus([pairs], tokenizer).offsets)
    middle = int(np.median(lengths))
    kept = load_corpus([pairs], tokenizer, max_length=middle, skip_invalid=True)
    assert np.diff(kept.offsets).tolist() == [n for n in lengths if n <= middle]


# --- packing


def mixed_corpus(lengths: list[int], prompts: list[int]) -> Corpus:
    """Documents of tokens 1, 2, 3 ..., the first `prompts[i]` of each not learnt; 0 makes it a text."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learnt = np.concatenate([np.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)])
    return Corpus(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, "test", learnt)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 15)), min_size=1, max_size=12),
    size=st.integers(1, 4),
    steps=st.integers(0, 3),
)
def test_packing_keeps_examples_whole_and_their_masks(documents: list[tuple[int, int]], size: int, steps: int) -> None:
    lengths, prompts = [n for n, _ in documents], [min(p, n - 1) for n, p in documents]
    source = mixed_corpus(lengths, prompts)
    if source.loss_mask.all():
        source = Corpus(source.tokens, source.offsets, "test")
    packer, seen, rows = Packer(source, 16, seed=0, epochs=1), {}, 0
    while (batch := packer.batch(size)) is not None:
        loss_mask = torch.ones_like(batch.x0, dtype=torch.bool) if batch.loss_mask is None else batch.loss_mask
        rows += int(batch.layout.real.any(-1).sum())
        for ids, learnt, document in zip(batch.x0, loss_mask, batch.layout.document, strict=True):
            for number in document[document != PADDING].unique():
                owner = int(np.searchsorted(source.offsets, int(ids[document == number][0]), side="left")) - 1
                piece = document == number
                if prompts[owner]:
                    assert ids[piece].tolist() == source[owner].tolist()
                    assert (~learnt[piece]).tolist() == [i < prompts[owner] for i in range(lengths[owner])]
                else:
                    assert bool(learnt[piece].all())
            seen |= dict(zip(ids[document != PADDING].tolist(), learnt[document != PADDING].tolist(), strict=True))
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
    assert sum(not learnt for learnt in seen.values()) == sum(prompts)
    # and a packer goes on where another stopped
    straight, first = (Packer(source, 16, seed=3) for _ in "ab")
    for _ in range(steps):
        straight.batch(size)
        first.batch(size)
    resumed = Packer(source, 16, seed=3, state=PackState(**vars(first.state)))
    for _ in range(3):
        expected, got = straight.batch(size), resumed.batch(size)
        assert torch.equal(got.x0, expected.x0)
        assert (got.loss_mask is None) == (expected.loss_mask is None)
        assert got.loss_mask is None or torch.equal(got.loss_mask, expected.loss_mask)


def test_steps_count_the_rows_that_are_packed(tokenizer, pairs: Path) -> None:
    source = load_corpus([pairs], tokenizer, end_token_id=1)
    settings = Settings("test", max_length=64, batch_size=2, block_size=4)
    packer, steps = Packer(source, 64, seed=0, epochs=1), 0
    while packer.batch(2) is not None:
        steps += 1
    assert abs(packed_documents(settings, source).num_steps - steps) <= 1
    assert steps > math.ceil(source.num_tokens / 128)


# --- the loss


def packed() -> tuple[Batch, list[slice]]:
    """One row of three examples with prompts of 4, 3 and 2 tokens, and padding."""
    lengths, prompts = (11, 9, 6), (4, 3, 2)
    position = torch.cat([torch.arange(n) for n in (*lengths, 2)])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate((*lengths, 2))])[None]
    document[document == 3] = PADDING
    loss_mask = torch.cat([torch.arange(n) >= p for n, p in zip((*lengths, 2), (*prompts, 0), strict=True)])[None]
    batch = Batch(random_tokens(1, 28), Layout.of(position, document), loss_mask)
    return batch, [slice(0, 11), slice(11, 20), slice(20, 26)]


EVERY = [{"half_life": h} for h in (math.inf, 0.1)] + [
    {"masking": "bernoulli", "half_life": math.inf},
    {"complementary": True, "half_life": math.inf},
    {"noise_level": "sequence", "half_life": math.inf},
    {"attention": "bidirectional", "noise_level": "sequence", "masking": "bernoulli", "half_life": math.inf,
     "min_noise_level": 1e-3, "loss_normaliser": "masked"},
]  # fmt: skip


@pytest.mark.parametrize("options", EVERY)
def test_prompts_are_never_masked_and_all_else_is(options: dict) -> None:
    batch, _ = packed()
    chosen = Settings("test", block_size=4, batch_size=1, max_length=28, **options)
    ever = torch.zeros(1, 28, dtype=torch.bool)
    for step in range(200):
        for drawn in corruptions(chosen, batch.layout, step, torch.arange(1), batch.loss_mask):
            assert not (drawn.masked & ~batch.loss_mask).any()
            assert bool((drawn.weight[~drawn.masked] == 0).all())
            ever |= drawn.masked
    assert torch.equal(ever, batch.loss_mask & batch.layout.real)


def test_a_blocks_n_counts_what_is_learnt() -> None:
    """Position 4..7 of the second example: all learnt; 0..3: one of four. Weights are n / k of these n."""
    batch, _ = packed()
    chosen = Settings("test", block_size=4, batch_size=1, max_length=28)
    for step in range(50):
        (drawn,) = corruptions(chosen, batch.layout, step, torch.arange(1), batch.loss_mask)
        first, second = slice(11, 15), slice(15, 19)
        assert drawn.masked[0, first].sum() == 1  # n = 1, so k = 1
        assert float(drawn.weight[0, 14]) == 1.0
        k = int(drawn.masked[0, second].sum())
        torch.testing.assert_close(drawn.weight[0, second][drawn.masked[0, second]], torch.full((k,), 4 / k))


@pytest.mark.parametrize("config", [
    block_config(4), block_config(4, shift=True, clean="causal"), block_config(4, attention="block_causal", clean=None),
    block_config(4, attention="bidirectional", clean=None, shift=True), None,
])  # fmt: skip
def test_packed_loss_and_gradients_equal_each_example_alone(config) -> None:
    net, (batch, pieces) = network(), packed()
    if config is None:
        net.mask_token_id = None
    chosen = Settings("test", block_size=4, batch_size=1, max_length=28)
    (drawn,) = corruptions(chosen, batch.layout, 3, torch.arange(1), batch.loss_mask)

    def loss_of(x0, layout, corruption, loss_mask):
        if config is None:
            return step_loss(net, chosen, None, Batch(x0, layout, loss_mask), 3, torch.arange(1))
        return diffusion_loss(net, config, x0, layout, corruption, loss_mask=loss_mask)

    def gradients(loss) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss.sum, list(net.model.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, net.model.parameters(), strict=True)]

    whole = loss_of(batch.x0, batch.layout, drawn, batch.loss_mask)
    expected = gradients(whole)
    total, count, apart = 0.0, 0, [torch.zeros_like(p) for p in net.model.parameters()]
    for piece in pieces:
        cut = type(drawn)(drawn.masked[:, piece], drawn.weight[:, piece])
        layout = Layout.of(torch.arange(piece.stop - piece.start)[None])
        loss = loss_of(batch.x0[:, piece], layout, cut, batch.loss_mask[:, piece])
        total, count = total + float(loss.sum.detach()), count + int(loss.count)
        apart = [a + g for a, g in zip(apart, gradients(loss), strict=True)]
    assert float(whole.sum.detach()) == pytest.approx(total, rel=1e-10)
    assert int(whole.count) == count == 7 + 6 + 4
    for a, b in zip(expected, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_prompt_is_no_target() -> None:
    """Without the prompt's own embedding rows in play, changing what stands there as a target changes no loss."""
    net, (batch, _) = network(), packed()
    net.mask_token_id = None
    chosen = Settings("test", attention="ar", block_size=4, batch_size=1, max_length=28)
    loss = step_loss(net, chosen, None, batch, 0, torch.arange(1))
    stock = net.model(
        input_ids=batch.x0[:, :11], labels=batch.x0[:, :11].masked_fill(~batch.loss_mask[:, :11], -100)
    ).loss
    alone = step_loss(net, chosen, None, Batch(batch.x0[:, :11], batch.layout.subset(..., slice(0, 11)),
                                               batch.loss_mask[:, :11]), 0, torch.arange(1))  # fmt: skip
    assert float(alone.sum.detach()) == pytest.approx(7 * float(stock.detach()), rel=1e-6)  # stock: float32
    assert int(loss.count) == 17


# --- the bound of a completion


@torch.no_grad()
def test_bound_of_a_completion_equals_enumeration() -> None:
    net, config, ids = network(), block_config(4), random_tokens(10, seed=4)
    given_ = 6
    total = 0.0
    for start, places in ((4, [6, 7]), (8, [8, 9])):
        stop = min(start + 4, 10)
        for k in range(1, len(places) + 1):
            for masked in itertools.combinations(places, k):
                xt = ids[:stop].clone()
                xt[list(masked)] = MASK
                layout = Layout.of(torch.arange(stop)[None])
                layout = layout._replace(noisy=layout.position >= start)
                log_p = net(xt[None], layout, config.pattern)[0].log_softmax(-1)
                total -= sum(float(log_p[i, ids[i]]) for i in masked) / (k * math.comb(len(places), k))
    document = Document(ids, torch.full_like(ids, 2), torch.arange(10) >= given_)
    exact = nelbo(net, config, [document], exact=True)[0]
    assert exact.nats == pytest.approx(total, rel=1e-6)
    assert (exact.num_tokens, exact.num_bytes) == (4, 8)
    drawn = nelbo(net, config, [document], num_samples=400)[0]
    assert abs(drawn.nats - exact.nats) < 4 * drawn.standard_error
    log_p = net(ids[None], Layout.of(torch.arange(10)[None]), lambda q, kv: kv.position <= q.position)[0]
    expected = -sum(float(log_p[i - 1].log_softmax(-1)[ids[i]]) for i in range(given_, 10))
    assert nll(net, [document])[0].nats == pytest.approx(expected, rel=1e-6)


# --- runs

RUN = {"max_tokens": 6000, "max_length": 64, "block_size": 4, "batch_size": 4, "learning_rate": 1e-2,
       "show_progress": False}  # fmt: skip


def completion_bound(lm: unmask.DiffusionLM) -> float:
    documents = []
    for pair in PAIRS[:8]:
        ((ids, loss_mask),) = encode_example(lm.tokenizer, Completion(**pair), 1)
        documents.append(Document(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long), torch.tensor(loss_mask)))
    outputs = nelbo(lm.network, lm.diffusion, documents, exact=True)
    return sum(o.nats for o in outputs) / sum(o.num_tokens for o in outputs)


def test_fine_tuning_a_converted_checkpoint_lowers_the_completions_bound(
    converted: Path, pairs: Path, tmp_path: Path
) -> None:
    before = unmask.load(converted)
    options = {k: v for k, v in RUN.items() if k != "block_size"}
    lm = unmask.adapt(converted, pairs, "efficient-dlm", tmp_path / "run", eval_data=str(pairs), eval_every=5,
                      eval_samples=64, **options)  # fmt: skip
    assert lm.diffusion.mask_token_id == before.diffusion.mask_token_id
    assert lm.diffusion.block_size == before.diffusion.block_size == 4  # the checkpoint's, unless set
    assert len(lm.tokenizer) == len(before.tokenizer)
    assert completion_bound(lm) < 0.8 * completion_bound(before)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = [row["nelbo"] for row in rows if "nelbo" in row]
    assert figures[-1] < figures[0]
    assert len(figures) > 2


SAMPLES = {"eval_samples": 8}


@pytest.mark.parametrize(("recipe", "options"), [
    ("ar", {}), ("efficient-dlm", SAMPLES), ("tri-mode-published", SAMPLES), ("diffullama", SAMPLES),
    ("diffullama", SAMPLES | {"loss_normaliser": "masked"}), ("efficient-dlm", SAMPLES | {"lora_rank": 4}),
    ("diffullama", SAMPLES | {"predict_padding": True}),
])  # fmt: skip
def test_every_recipe_learns_completions(
    recipe: str, options: dict, tokenizer_and_model: Path, pairs: Path, tmp_path: Path
) -> None:
    options = options if recipe == "ar" else options | {"eval_samples": 8}
    lm = unmask.adapt(tokenizer_and_model, pairs, recipe, tmp_path, eval_data=str(pairs), eval_every=2, log_every=1,
                      eval_documents=8, **(RUN | {"max_tokens": 5000} | options))  # fmt: skip
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    name = "nll" if recipe == "ar" else "nelbo"
    figures = [row[name] for row in rows if name in row]
    assert figures[-1] < 0.85 * figures[0]
    assert (lm.diffusion is None) == (recipe == "ar")


def test_fine_tuning_resumes_bit_for_bit(tokenizer_and_model: Path, pairs: Path, tmp_path: Path) -> None:
    import shutil

    options = RUN | {"save_every": 4, "keep_checkpoints": 99}
    straight = unmask.adapt(tokenizer_and_model, pairs, "efficient-dlm", tmp_path / "straight", **options)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")
    run = json.loads((tmp_path / "straight" / "run.json").read_text())
    (tmp_path / "cut" / "run.json").write_text(json.dumps(run | {"finished": False}))
    resumed = unmask.adapt(tokenizer_and_model, pairs, "efficient-dlm", tmp_path / "cut", resume=True, **options)
    expected = straight.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items())


def test_next_token_fine_tuning_and_the_padded_variant(tokenizer_and_model: Path, pairs: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(tokenizer_and_model, pairs, "ar", tmp_path / "ar", **RUN)
    assert lm.diffusion is None
    out = lm.generate(PAIRS[0]["prompt"], max_new_tokens=40)
    assert int(out.num_new_tokens[0]) < 40  # it learnt where an answer ends
    unmask.adapt(tokenizer_and_model, pairs, "efficient-dlm", tmp_path / "padded", predict_padding=True, **RUN)
    long = tmp_path / "long.txt"
    long.write_text("<|endoftext|>".join(STORIES))
    with pytest.raises(ValueError, match=r"predict_padding.*max_length=16"):
        unmask.adapt(tokenizer_and_model, long, "ar", tmp_path / "x", predict_padding=True,
                     **(RUN | {"max_length": 16}))  # fmt: skip


def test_padding_is_predicted_only_in_the_padded_variant(tokenizer, pairs: Path) -> None:
    source = load_corpus([pairs], tokenizer, end_token_id=1)
    batch = Packer(source.filled_up(64, 1), 64, seed=0).batch(3)
    assert bool(batch.layout.real.all())
    assert bool((batch.layout.position == torch.arange(64)).all())
    for ids, learnt in zip(batch.x0, batch.loss_mask, strict=True):
        end = int((ids == 1).nonzero()[0])
        assert bool((ids[end:] == 1).all())
        assert bool(learnt[end:].all())
    assert Packer(source, 64, seed=0).batch(3).layout.document.eq(PADDING).any()


def test_supervised_files_are_no_text_for_evaluation(pairs: Path) -> None:
    from unmask.data.readers import read_documents

    with pytest.raises(ValueError, match=r"pairs.jsonl' holds supervised examples"):
        list(read_documents(pairs))
    assert next(iter(read_documents(pairs, text_column="prompt"))) == PAIRS[0]["prompt"]
