"""`unmask chat`: messages through the template, streamed, with /reset and /exit."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import in_a_terminal
from transformers import AutoTokenizer

import unmask

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    lm = unmask.load(converted)
    lm.tokenizer.chat_template = TEMPLATE
    lm.save_pretrained(folder)
    return folder


def answers(folder: Path, *conversation: str, **options: object) -> list[str]:
    """What generate says, turn by turn."""
    lm, messages, said = unmask.load(folder), [], []
    for line in conversation:
        messages.append({"role": "user", "content": line})
        said.append(lm.generate(messages, seed=0, **options).texts[0])
        messages.append({"role": "assistant", "content": said[-1].strip()})
    return said


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_conversation_is_that_of_generate(run, chatty: Path, mode: str) -> None:
    options = ["--max-new-tokens", 8, "--seed", 0, "--mode", mode]
    expected = answers(chatty, "A cat?", "A dog?", mode=mode, max_new_tokens=8)
    code, out, err = run("chat", chatty, *options, stdin="A cat?\n\n  A dog?  \n/exit\nnever\n")
    assert (code, err) == (0, err)
    assert out == "".join(text + "\n" for text in expected)
    code, out, _ = run("chat", chatty, *options, stdin="A cat?\n/reset\nA cat?\n")  # the end of input ends it too
    assert code == 0
    assert out == 2 * (expected[0] + "\n")


def test_a_conversation_that_grows_too_long_can_begin_anew(run, chatty: Path) -> None:
    long = "Once there was " * 60
    code, out, err = run("chat", chatty, "--max-new-tokens", 4, "--seed", 0, stdin=f"{long}\nA cat?\n")
    assert code == 0
    assert "leaves no room" in err
    assert "/reset" in err
    assert out == answers(chatty, "A cat?", max_new_tokens=4)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["chat", "{converted}"], "messages need a chat template, which this tokenizer lacks"),
        (["chat", "./no-such-model"], "./no-such-model"),
        (["chat", "{chatty}", "--mode", "speculative"], "speculative"),
        (["chat", "{chatty}", "--confidence-threshold", "2"], "2"),
    ],
)
def test_bad_requests_end_at_once(run, converted: Path, chatty: Path, arguments: list[str], bad: str) -> None:
    places = {"converted": converted, "chatty": chatty}
    code, out, err = run(*(a.format(**places) for a in arguments), stdin="hello\n")
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error: ")
    assert bad in last


def test_fine_tuning_on_messages_and_talking(run, tokenizer_and_model: Path, tmp_path: Path) -> None:
    """The whole way on the command line: chat.jsonl, adapt, chat."""
    folder = tmp_path / "parent"
    unmask.load(tokenizer_and_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    data = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "The cat was happy."}]
    data.write_text((json.dumps({"messages": talk}) + "\n") * 8)
    code, _, err = run("adapt", folder, "--data", data, "--output", tmp_path / "run", "--recipe", "ar", "--max-tokens",
                       8000, "max_length=64", "batch_size=4", "learning_rate=0.01", f"eval_data={data}")  # fmt: skip
    assert code == 0, err
    code, out, err = run("chat", tmp_path / "run", stdin="A cat?\n")
    assert (code, out.strip()) == (0, "The cat was happy.")
    shown = in_a_terminal([sys.executable, "-m", "unmask.cli", "chat", str(tmp_path / "run")], b"A cat?\n/exit\n")
    assert shown.count("The cat was happy.") == 1  # streamed, and not printed again
    assert "> " in shown


def test_words_about_the_conversation(run, chatty: Path) -> None:
    expected = answers(chatty, "A cat?", mode="ar", max_new_tokens=8)[0]
    typed = "/help\n/stats\n/nonsense\n/mode speculative\n/mode ar\nA cat?\n/stats\n/mode\n/exit\n"
    code, out, err = run("chat", chatty, "--max-new-tokens", 8, "--seed", 0, stdin=typed)
    assert (code, out) == (0, expected + "\n")
    assert err.splitlines()[1] == "/help lists commands, /exit ends, Ctrl-C ends an answer"
    for said in ("/mode NAME", "last answer: 0 tokens", "/nonsense is unknown: /help", "mode Autoregressive",
                 "last answer: 8 tokens in 8 forwards (1.00 per forward)", "all answers: 8 tokens"):  # fmt: skip
        assert said in err
    assert "mode 'speculative'" in err  # which this model lacks
    assert run("-q", "chat", chatty, "--max-new-tokens", 8, "--seed", 0, "--mode", "ar", stdin="A cat?\n")[1:] == (
        out,
        "",
    )


def test_ctrl_c_ends_the_answer_and_not_the_conversation(run, chatty: Path, monkeypatch) -> None:
    from unmask.streaming import FinalText

    whole = answers(chatty, "A cat?", mode="ar", max_new_tokens=24)[0]
    calls, call = [0], FinalText.__call__

    def pressed(self, *place) -> None:
        calls[0] += 1
        if calls[0] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        call(self, *place)

    monkeypatch.setattr(FinalText, "__call__", pressed)
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = run("chat", chatty, "--max-new-tokens", 24, "--seed", 0, "--mode", "ar",
                         stdin="A cat?\n/reset\nA cat?\n/stats\n")  # fmt: skip
    assert code == 0
    assert out.endswith(whole + "\n")
    stopped = out.removesuffix(whole + "\n").removesuffix("\n")
    assert whole.startswith(stopped)
    assert 0 < len(stopped) < len(whole)
    assert "(stopped)" in err
    assert "all answers: 24 tokens" in err
    assert signal.getsignal(signal.SIGINT) is handler
