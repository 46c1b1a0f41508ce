"""Watching samplers, and the page and terminal that show what was seen."""

from __future__ import annotations

import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, block_config, in_a_terminal, network, random_tokens
from decode import sample_autoregressive, sample_bidirectional, sample_blocks
from rich.console import Console
from rich.live import Live

import unmask
from unmask.cli.watch import Watch
from unmask.replay_page import Beside, Gap, guess_piece, replay_page, token_pieces
from unmask.sampling import Canvas, Confidence, Guess, Step, Threshold, Trace


@pytest.mark.parametrize("rule", [Threshold(0.02), Confidence(2)])
def test_trace_changes_nothing_and_knows_every_token(rule) -> None:
    net, prompts = network(), [random_tokens(n, seed=n) for n in (3, 4, 9)]
    trace = Trace(rule)
    options = {"max_new_tokens": 10, "temperature": 0.7, "seed": 1}
    seen = sample_blocks(net, block_config(4), prompts, select=trace.select, callback=trace.callback, **options)
    plain = sample_blocks(net, block_config(4), prompts, select=rule, **options)
    assert seen.new_tokens == plain.new_tokens
    for row, prompt in enumerate(prompts):
        steps = [step for step in trace.steps if step.row == row]
        commits = {at: token for step in steps for at, token, _ in step.commits}
        assert [commits[len(prompt) + i] for i in range(10)] == plain.new_tokens[row]
        assert len(steps) == plain.num_forwards[row]


def test_trace_confidences_are_the_networks() -> None:
    """A step's figures equal those of a pass over the text as it stood before the step, made here by hand."""
    net, prompt = network(), random_tokens(3)
    config = block_config(attention="bidirectional", clean=None, block_size=None)
    trace = Trace(Confidence(2))
    sample_bidirectional(net, config, [Canvas.around(prompt, 7)], select=trace.select, callback=trace.callback)
    x = torch.cat([prompt, torch.full((7,), config.mask_token_id)])
    for number, step in enumerate(trace.steps, 1):
        with torch.inference_mode():
            p = net.model(x[None], attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool)).logits[0]
        p = p.index_fill(1, torch.tensor(config.mask_token_id), -torch.inf).softmax(-1)
        for at, token, confidence in step.commits + step.guesses:
            assert token == int(p[at].argmax())
            assert confidence == pytest.approx(float(p[at, token]), abs=1e-9)
        masked = set((x == config.mask_token_id).nonzero()[:, 0].tolist())
        assert {guess.position for guess in step.commits + step.guesses} == masked
        assert step.number == number
        for at, token, _ in step.commits:
            x[at] = token


def test_trace_of_ar_has_no_confidences() -> None:
    trace = Trace()
    out = sample_autoregressive(network(), [random_tokens(3)], max_new_tokens=4, callback=trace.callback)
    assert [step.number for step in trace.steps] == [1, 2, 3, 4]
    assert [step.commits[0] for step in trace.steps] == [Guess(3 + i, t, None) for i, t in enumerate(out.new_tokens[0])]


class Page(HTMLParser):
    """Tags with attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"

    def handle_endtag(self, _tag) -> None:
        self.inside = False

    def handle_data(self, data) -> None:
        if self.inside:
            self.scripts.append(data)


NASTY = 'a </script><script>alert("1")</script> <!-- <b>&amp; \u2028 {"x": 1} é 日本'


def test_page_is_one_file_that_no_text_can_break(tokenizer_and_model: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    prompt = lm.tokenizer(NASTY)["input_ids"]
    new = lm.tokenizer(" the dog</script> 日 was happy")["input_ids"]
    steps = [
        Step(
            0, 1, [Guess(len(prompt), new[0], 0.25)], [Guess(len(prompt) + i, t, 0.1) for i, t in enumerate(new) if i]
        ),
        Step(0, 2, [Guess(len(prompt) + i, t, 0.9) for i, t in enumerate(new) if i], [Guess(len(prompt) + 99, 5, 0.1)]),
        Step(0, 3, [Guess(len(prompt) + 99, 5, 0.5)], []),  # after the end: it was dropped
    ]
    text = replay_page(lm.tokenizer, [Gap(prompt, new, len(prompt))], steps, title=NASTY, facts={NASTY: NASTY},
                       prompt_text=NASTY, beside=Beside(NASTY, [NASTY], {NASTY: NASTY}))  # fmt: skip
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data and ours, none from the text
    assert "b" not in [tag for tag, _ in page.tags]
    assert not any(name in ("src", "href") for _, attributes in page.tags for name in attributes)
    assert not re.findall(r"https?://", text)
    assert "default-src 'none'" in text
    data = json.loads(page.scripts[0])
    assert (data["title"], data["prompt"], data["facts"]) == (NASTY, NASTY, [[NASTY, NASTY]])
    assert data["beside"] == {"name": NASTY, "pieces": [NASTY], "facts": [[NASTY, NASTY]]}
    assert "".join(data["tokens"]) == " the dog</script> 日 was happy"
    assert [step["number"] for step in data["steps"]] == [1, 2]
    assert data["steps"][0]["commits"] == [[0, 0.25]]
    assert data["steps"][1]["guesses"] == []
    assert len(text) < 20_000
    assert "innerHTML" not in text


def test_pieces_join_to_the_text_whatever_the_tokens_cut(tokenizer_and_model: Path) -> None:
    tokenizer = unmask.load(tokenizer_and_model).tokenizer
    prompt, new = tokenizer("Once 日")["input_ids"], tokenizer(" été 日本 dog\n")["input_ids"]
    assert "".join(token_pieces(tokenizer, prompt, new)) == " été 日本 dog\n"
    assert token_pieces(tokenizer, prompt, [*tokenizer(" dog")["input_ids"], 1])[-1] == "</s>"


def test_command_writes_the_page(run, converted: Path, tokenizer_and_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    prompt = STORIES[0][:20] + "</script>"
    code, out, err = run("generate", converted, prompt, "--max-new-tokens", 9, "--replay", page, "--json")
    assert code == 0, err
    found = json.loads(out)
    data = json.loads(Page(page.read_text(encoding="utf-8")).scripts[0])
    assert data["prompt"] == prompt
    assert len(data["tokens"]) == found["num_new_tokens"]
    assert sum(len(step["commits"]) for step in data["steps"]) == found["num_new_tokens"]
    facts = dict(data["facts"])
    assert (facts["tokens"], facts["forwards"]) == (str(found["num_new_tokens"]), str(found["num_forwards"]))
    assert (facts["mode"], facts["threshold"]) == ("diffusion", "0.9")
    assert float(facts["seconds"]) > 0
    assert data["beside"]["name"].startswith("AR parent ")
    assert "".join(data["beside"]["pieces"]).startswith(
        unmask.load(tokenizer_and_model).generate(prompt, "ar", 9).texts[0]
    )
    code, out, _ = run("generate", converted, prompt, "--max-new-tokens", 9, "--mode", "ar", "--replay", page)
    assert code == 0
    assert out.startswith(prompt)
    data = json.loads(Page(page.read_text(encoding="utf-8")).scripts[0])
    assert all(step["commits"][0][1] is None for step in data["steps"])
    assert data["beside"] is None


def test_bad_values_are_named(run, converted: Path, tmp_path: Path) -> None:
    code, _, err = run("generate", converted, "a", "--replay", tmp_path / "no" / "page.html")
    assert code == 2
    assert "is no file in a folder that exists" in err
    code, _, err = run("generate", converted, "a", "--watch", "--json")
    assert code == 2
    assert "--watch draws where --json prints" in err


class Frames(Live):
    """A terminal that also keeps what it showed."""

    def update(self, renderable, *, refresh: bool = False) -> None:
        self.__dict__.setdefault("frames", []).append(renderable)
        super().update(renderable, refresh=refresh)


def test_watch_shows_guesses_then_the_text(converted: Path) -> None:
    lm = unmask.load(converted)
    prompt = "Once [bold]there"
    ids = lm.tokenizer(prompt)["input_ids"]
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="truecolor")
    with Frames(console=console, auto_refresh=False) as live:
        watch = Watch(lm.tokenizer, ids, prompt, live)
        trace = Trace(Confidence(1), on_step=watch)
        out = lm.generate(prompt, max_new_tokens=6, select=trace.select, callback=trace.callback)
        new = out.sequences[0, len(ids) : len(ids) + int(out.num_new_tokens)].tolist()
        watch.finish(new)
    *frames, final = live.frames
    assert len(frames) == len(trace.steps)
    assert all(frame.plain.startswith(prompt) for frame in frames)
    assert any("italic" in str(span.style) for frame in frames for span in frame.spans)
    assert final.plain == prompt + "".join(token_pieces(lm.tokenizer, ids, new))
    assert any("#" in str(span.style) for span in final.spans)
    assert "\x1b[" in console.file.getvalue()


def test_watch_on_a_terminal(converted: Path) -> None:
    command = [sys.executable, "-m", "unmask.cli", "generate", str(converted), STORIES[0][:20]]
    shown = in_a_terminal([*command, "--max-new-tokens", "5", "--watch"])
    assert STORIES[0][:20] in shown
    assert "forwards" in shown


@pytest.mark.parametrize("options", [{}, {"mode": "ar"}, {"confidence_threshold": 0.3, "seed": 1, "temperature": 0.7}])
def test_an_output_replays_itself_in_a_notebook(converted: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    lm = unmask.load(converted)
    replayed = unmask.replay(lm, "Once <b>upon", max_new_tokens=9, **options)
    out = lm.generate("Once <b>upon", max_new_tokens=9, **options)
    assert replayed.output.texts == out.texts
    assert repr(out) in repr(replayed)
    (frame,) = [attributes for tag, attributes in Page(replayed._repr_html_()).tags if tag == "iframe"]
    assert dict(frame)["srcdoc"] == replayed.page
    assert dict(frame)["sandbox"] == "allow-scripts"
    data = json.loads(Page(replayed.page).scripts[0])
    assert data["prompt"] == "Once <b>upon"
    assert "".join(data["tokens"]).startswith(out.texts[0])
    assert len(data["steps"]) > 1
    assert replayed.save(tmp_path / "r.html").read_text(encoding="utf-8") == replayed.page
    with pytest.raises(ValueError, match="let it end in"):
        replayed.save(tmp_path / "r.txt")
    with pytest.raises(ValueError, match="of one prompt, not of 2"):
        unmask.replay(lm, ["a", "b"])


def test_guesses_are_said_where_they_change(tokenizer_and_model: Path) -> None:
    """Put together again, they are those of each step."""
    lm = unmask.load(tokenizer_and_model)
    prompt, new = lm.tokenizer("Once")["input_ids"], lm.tokenizer(" the dog was happy")["input_ids"][-6:]
    steps = [
        Step(0, n + 1, [Guess(len(prompt) + n, new[n], 0.5)],
             [Guess(len(prompt) + i, new[(i + n // 3) % 6], 0.1 * (n // 2 + 1)) for i in range(n + 1, 6)])
        for n in range(6)
    ]  # fmt: skip
    data = json.loads(
        Page(replay_page(lm.tokenizer, [Gap(prompt, new, len(prompt))], steps, title="", facts={})).scripts[0]
    )
    known: dict[int, tuple[str, float]] = {}
    for step, frame in zip(steps, data["steps"], strict=True):
        for at, _ in frame["commits"]:
            known.pop(at, None)
        known |= {at: (data["words"][word], p) for at, word, p in frame["guesses"]}
        piece = {token: guess_piece(lm.tokenizer, token, prompt[-1]) for _, token, _ in step.guesses}
        assert known == {at - len(prompt): (piece[token], round(p, 2)) for at, token, p in step.guesses}
    assert sum(len(frame["guesses"]) for frame in data["steps"]) < sum(len(step.guesses) for step in steps)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_what_generate_returns_replays_itself(converted: Path, mode: str) -> None:
    lm = unmask.load(converted)
    out = lm.generate(["Once <b>upon", "</script>"], mode, max_new_tokens=9)
    frames = [dict(attributes) for tag, attributes in Page(out._repr_html_()).tags if tag == "iframe"]
    assert [frame["sandbox"] for frame in frames] == ["allow-scripts"] * 2
    for frame, text, prompt, forwards in zip(
        frames, out.texts, ["Once <b>upon", "</script>"], out.num_forwards, strict=True
    ):
        data = json.loads(Page(frame["srcdoc"]).scripts[0])
        assert data["prompt"] == prompt
        assert "".join(data["tokens"]).startswith(text)
        assert sorted(at for step in data["steps"] for at, _ in step["commits"]) == list(range(len(data["tokens"])))
        facts = dict(data["facts"])
        assert (facts["mode"], facts["forwards"]) == (mode, str(int(forwards)))
    assert len(out._repr_html_()) < 200_000


def shown(data: dict[str, Any]) -> str:
    """The text that a page shows in the end: the prompt, new tokens, and the given text between them."""
    text, done = data["prompt"], 0
    for end, given in [*data["given"], [len(data["tokens"]), ""]]:
        text += "".join(data["tokens"][done:end]) + given
        done = end
    return text


GAPS = {
    "one gap": (("Once <b>there", " was a</script>", 5), {}),
    "several": (("Once<gap:3> was<gap:2><gap:4>.",), {"confidence_threshold": 0.1}),
    "at both ends": (("<gap:3> dog<gap:2>",), {"seed": 1, "temperature": 0.9}),
    "candidates, the first best": (("Once<gap:2,6> was<gap:1,2> dog",), {"seed": 1, "num_samples": 1}),
    "candidates, the last best": (("Once<gap:6,4,3> was",), {"seed": 0, "num_samples": 1}),
    "an early end": (("Once there was a", " dog who ran.", [6]), {"stop_tokens": "the second", "num_samples": None}),
    "early ends": (("Once<gap:5> there<gap:6> was",), {"stop_tokens": "the second"}),
}


@pytest.mark.parametrize("asked", GAPS)
def test_filled_gaps_replay_between_their_texts(converted: Path, asked: str) -> None:
    """The page ends with the text of the output, every new token is committed once, and none beside its place."""
    lm = unmask.load(converted)
    given, options = GAPS[asked]
    options = {"attention": "bidirectional", **options}
    if options.get("stop_tokens"):  # what the first gap has in its second place when nothing ends it
        plain = lm.infill(*given, attention="bidirectional")
        options["stop_tokens"] = [plain.history.gaps[0][0].new[1]]
    out = lm.infill(*given, **options)
    replayed = unmask.replay_infill(lm, *given, **options)
    assert replayed.output.filled == out.filled
    assert torch.equal(replayed.output.sequences, out.sequences)
    ended = [gap.new for gap in out.history.gaps[0]]
    if asked.startswith(("an early", "early")):
        assert len(ended[0]) <= 2
    (frame,) = [attributes for tag, attributes in Page(out._repr_html_()).tags if tag == "iframe"]
    for page in (dict(frame)["srcdoc"], replayed.page):
        data = json.loads(Page(page).scripts[0])
        assert shown(data) == out.filled[0]
        assert len(data["tokens"]) == int(out.num_new_tokens)
        assert sorted(at for step in data["steps"] for at, _ in step["commits"]) == list(range(len(data["tokens"])))
        numbers = [step["number"] for step in data["steps"]]
        assert numbers == sorted(set(numbers))
        assert numbers[0] == 1 or "stop_tokens" in options
        assert numbers[-1] <= sum(len(new) for new in ended) + 8
    assert all(p is not None for step in data["steps"] for _, p in step["commits"])
    if len(ended) == 1 and len(given) == 1:
        assert dict(data["facts"])["lengths tried"] == "6, 4, 3"


def test_tokens_are_shown_in_the_gap_that_they_fill(converted: Path) -> None:
    """Of rows with other lengths, whose candidates are fewer, each has its own commits in their order."""
    lm = unmask.load(converted)
    texts, seen = ["Once<gap:2,5> dog<gap:2>", "A<gap:3> cat"], {}
    out = lm.infill(texts, attention="bidirectional", seed=3, num_samples=1, callback=lambda *call: seen.setdefault(
        call[0], []).append(call[1:]))  # fmt: skip
    for row, frame in enumerate(attributes for tag, attributes in Page(out._repr_html_()).tags if tag == "iframe"):
        data, gaps = json.loads(Page(dict(frame)["srcdoc"]).scripts[0]), out.history.gaps[row]
        new = [token for gap in gaps for token in gap.new]
        places = [gap.start + i for gap in gaps for i in range(len(gap.new))]
        commits = [dict(zip(*call, strict=True)) for call in seen[row][out.history.kept[row]]]
        assert [[places[at] for at, _ in step["commits"]] for step in data["steps"]] == [list(c) for c in commits]
        assert {at: token for commit in commits for at, token in commit.items()} == dict(zip(places, new, strict=True))
    with pytest.raises(ValueError, match="of one text, not of 2"):
        unmask.replay_infill(lm, texts)


def test_infill_writes_the_page(run, converted: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ("--attention", "bidirectional", "--replay", page, "--json")
    code, out, err = run("infill", converted, "--text", "Once<gap:3> dog<gap:2>.", *options)
    assert code == 0, err
    assert f"replay in {page}" in err
    assert shown(json.loads(Page(page.read_text(encoding="utf-8")).scripts[0])) == json.loads(out)["filled"]
    code, _, err = run("infill", converted, "--text", "Once<gap:3>", "--replay", tmp_path / "no" / "page.html")
    assert code == 2
    assert "is no file in a folder that exists" in err


def test_an_output_without_a_history_is_its_text(converted: Path) -> None:
    lm = unmask.load(converted)
    for out in (
        lm.generate(["a </pre><b>"] * 5, max_new_tokens=2),
        lm.infill(["<b>"] * 5, ["</pre>"] * 5, 3, attention="bidirectional"),
    ):
        page = out._repr_html_()
        assert [tag for tag, _ in Page(page).tags] == ["pre"] * len(out.texts)
        assert out.history is None


def test_a_long_text_makes_a_small_page(tokenizer_and_model: Path) -> None:
    """400 tokens of a whole canvas, whose every forward guesses at all that is masked."""
    lm = unmask.load(tokenizer_and_model)
    prompt = lm.tokenizer("Once")["input_ids"]
    new = (lm.tokenizer(" the dog was happy and ran to the tree.")["input_ids"] * 60)[:400]
    steps = [
        Step(0, n + 1, [Guess(len(prompt) + 2 * n + i, new[2 * n + i], 0.91) for i in (0, 1)],
             [Guess(len(prompt) + i, new[i], (i % 89 + n / 150) / 100) for i in range(2 * n + 2, 400)])
        for n in range(200)
    ]  # fmt: skip
    page = replay_page(lm.tokenizer, [Gap(prompt, new, len(prompt))], steps, title="long", facts={})
    assert len(page) < 200_000
