"""Embeddings: the mean of the stock model's last hidden states; STS figures as scipy has them; MTEB's encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import STORIES, SUPPORTED, random_tokens, tiny_model
from scipy.stats import spearmanr
from sts import Pair, read_pairs, spearman, sts_spearman

import unmask
from unmask.core.attention import Layout, bidirectional, block_causal, causal
from unmask.evaluation.embed import embed
from unmask.hf import as_network


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_causal_embeddings_equal_the_stock_models_last_hidden_states(name: str) -> None:
    """Every architecture; ragged batches with padding equal each text alone."""
    model = tiny_model(SUPPORTED[name]())
    documents = [random_tokens(n, seed=n) for n in (5, 9, 9, 1)]
    got = embed(as_network(model), documents, causal, batch_tokens=30)
    for document, vector in zip(documents, got, strict=True):
        states = model(input_ids=document[None], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vector, states[0].mean(0), rtol=0, atol=1e-5 * float(states.abs().max()))


@torch.no_grad()
def test_hidden_states_are_what_the_head_reads() -> None:
    network = as_network(tiny_model(SUPPORTED["llama"](), torch.float64))
    ids, layout = random_tokens(2, 7), Layout.of(torch.arange(7).expand(2, 7))
    for pattern in (causal, bidirectional, block_causal(3)):
        states = network.hidden_states(ids, layout, pattern)
        torch.testing.assert_close(network.head(states), network(ids, layout, pattern), rtol=1e-10, atol=1e-10)


def test_patterns_decide_what_a_token_sees(converted: Path, tokenizer_and_model: Path) -> None:
    lm, parent = unmask.load(converted), unmask.load(tokenizer_and_model)
    texts = [STORIES[0], STORIES[5][:30], ""]
    vectors = lm.embed(texts)
    assert vectors.shape == (3, 32)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, lm.embed(texts, "bidirectional"))
    assert torch.equal(vectors, lm.embed(texts, bidirectional))
    assert torch.equal(parent.embed(texts), parent.embed(texts, "causal"))
    assert not torch.allclose(vectors[:2], lm.embed(texts, "causal")[:2])
    torch.testing.assert_close(lm.embed(texts, "block_causal"), lm.embed(texts, block_causal(4)))
    torch.testing.assert_close(lm.embed(STORIES[0]), vectors[:1])
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than the context of 128 tokens"):
        long = lm.embed([" ".join(STORIES), "a"])
    assert bool(long.isfinite().all())


def test_a_drafters_adapters_leave_embeddings_alone(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path / "d", show_progress=False, max_tokens=500,
                      max_length=64, block_size=4, batch_size=4)  # fmt: skip
    base = unmask.load(tokenizer_and_model)
    torch.testing.assert_close(lm.embed(STORIES[:2], "causal"), base.embed(STORIES[:2]))


def test_files_hold_one_vector_a_document(run, converted: Path, stories: Path, tmp_path: Path) -> None:
    expected = unmask.load(converted).embed(STORIES).numpy()
    code, out, err = run("embed", converted, stories, "--output", tmp_path / "v.npy", "--json")
    assert code == 0, err
    assert json.loads(out) == {"output": str(tmp_path / "v.npy"), "num_texts": len(STORIES), "size": 32,
                               "pattern": "bidirectional"}  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=1e-6)
    assert run("embed", converted, stories, "--output", tmp_path / "v.jsonl")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == STORIES
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, rtol=1e-6)
    code, out, _ = run("embed", converted, stories, "--output", tmp_path / "v.parquet", "--pattern", "causal")
    assert (code, "causal" in out) == (0, True)
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["text"] == STORIES
    assert not np.allclose(table["embedding"], expected)


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["{parent}", "{stories}", "--output", "{out}/v.pt"], "v.pt' has an unknown type"),
        (["{parent}", "{stories}", "--output", "{out}/d.npy"], "d.npy' is a folder"),
        (["{parent}", "./nothing.txt", "--output", "{out}/v.npy"], "nothing.txt"),
        (["{parent}", "nothing", "--output", "{out}/v.npy"], "'nothing' is no file here"),
        (["{parent}", "{empty}", "--output", "{out}/v.npy"], "holds no documents"),
        (["{parent}", "{stories}", "--output", "{out}/v.npy", "--pattern", "diagonal"], "'diagonal' is unknown"),
        (["{parent}", "{stories}", "--output", "{out}/v.npy", "--pattern", "block_causal"], "needs a block size"),
    ],
)
def test_bad_input_is_one_clear_line(
    run, arguments: list[str], bad: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "d.npy").mkdir()
    (tmp_path / "empty.txt").write_text("")
    places = {"parent": tokenizer_and_model, "stories": stories, "out": tmp_path, "empty": tmp_path / "empty.txt"}
    code, out, err = run("embed", *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("unmask: error:")
    assert bad in err
    assert out == ""


def test_no_texts_is_bad_input(converted: Path) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        unmask.load(converted).embed([])


def test_spearman_equals_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    y = (x + torch.randn(60, generator=generator)).mul(2).round() / 2  # ties
    assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0], rel=1e-12)
    assert spearman(x, 3 * x) == pytest.approx(1)


def test_sts_ranks_pairs_by_cosine(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('"a, b",c,5.0\nd,e,2.5\nf,g,0\n')
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert pairs[0] == Pair("a, b", "c", 5.0)
    vectors = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0.1], [1, 1], [-1, 0]])
    assert sts_spearman(lambda texts: vectors[: len(texts)], pairs) == pytest.approx(1)
    (tmp_path / "bad.csv").write_text("a,b,5\na,b\n")
    with pytest.raises(ValueError, match=r"bad.csv', line 2"):
        read_pairs(tmp_path / "bad.csv")


def test_mteb_takes_the_encoder(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of MTEB's own kind on local pairs gives the figure of `sts_spearman`."""
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.tasks import STSBenchmarkSTS

    from unmask.lab.mteb import MTEBEncoder

    pairs = [Pair(STORIES[i], STORIES[(7 * i) % len(STORIES)], float(i % 5)) for i in range(12)]

    class Stories(AbsTaskSTS):
        metadata = STSBenchmarkSTS.metadata.model_copy(update={"name": "Stories"})

        def load_data(self, **_: object) -> None:
            rows = [{"sentence1": p.first, "sentence2": p.second, "score": p.score} for p in pairs]
            self.dataset, self.data_loaded = {"default": {"test": Dataset.from_list(rows)}}, True

    lm = unmask.load(converted)
    result = mteb.evaluate(MTEBEncoder(lm), [Stories()], cache=None, co2_tracker=False)
    got = result.task_results[0].get_score()
    assert got == pytest.approx(sts_spearman(lm.embed, pairs), abs=1e-5)
