"""Every command line that README and docs show runs, at a tiny size, the lines of a page one after the other.

A page has a folder of its own with what its lines name: a converted model `runs/q`, texts, records, task files, and
the checkout's models. What is a placeholder or large is replaced (`PLACES`, `ADDED`, `REPLACED`), nothing else; a block
that cannot run says why in its page, and `NOT_RUN` lists it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import uvicorn
from conftest import _GQA, STORIES, tiny_model
from datasets import Dataset
from pages import PAGES, ROOT, Block, blocks, commands
from tokenizers import ByteLevelBPETokenizer

import unmask
from unmask import cli
from unmask.lab.tasks import problems, write_problems

NOT_RUN = {
    ("README", "it sets up a virtual environment"),
    ("README", "needs the weights of SmolLM2"),
    ("export", "a server of transformers"),
    ("frontier", "draws on a terminal"),
    ("export", "needs llama.cpp; tests/test_gguf_export.py runs this example where it is installed"),
    ("processes", "tests/processes starts runs on several processes"),
}
PLACES = {"MODEL": "parent", "DATA": "corpus.jsonl", "../shared/models/stories260k": "parent"}
"""What stands for what a reader has; hub ids become `tiny`."""

SETTINGS = {"max_length": 32, "block_size": 4, "batch_size": 2}
ADDED: dict[str, dict[str, str]] = {
    "adapt": {"--max-tokens": "200"},
    "frontier": {"--prompts": "2", "--prompt-tokens": "4", "--max-new-tokens": "6", "--rounds": "1",
                 "--batch-sizes": "1"},
    "generate": {"--max-new-tokens": "8"},
    "study": {"--max-tokens": "200", "--seeds": "0", "--arms": "clean"},
}  # fmt: skip
"""Options that a command gets, in place of its own values if it has some."""

REPLACED: dict[str, dict[str, str]] = {
    "evaluate": {"--tasks": "my_task", "--tasks-folder": "tasks", "--limit": "2", "--num-fewshot": "1",
                 "--gen-kwargs": "max_gen_toks=4"},
    "frontier": {"--thresholds": "0.5", "--block-sizes": "4", "--oracle": "1"},
}  # fmt: skip
"""Other values of options where they stand."""

SHELL = {page: [block for block in blocks(page) if block.info in ("bash", "console")] for page in PAGES}


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.info in ("python", "bash", "console", "text", "toml", "json"), block.place
            for _, line in commands(block) if block.info == "text" else ():
                assert "MODEL" in block.text, f"{block.place} is text, and could run: {line}"
        assert not re.search(r"^ {4}(unmask|python|pip) ", page.read_text(), re.MULTILINE), f"{page.name}: indented"


def test_what_does_not_run_is_known() -> None:
    assert {(page.stem, b.reason) for page, shown in SHELL.items() for b in shown if b.marker == "not run"} == NOT_RUN


def write_model(folder: Path, config: Any, **sizes: Any) -> None:
    """An ordinary HF folder with a tokenizer that llama.cpp knows and a chat template."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(STORIES, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    sizes |= {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    tiny_model(config(**(_GQA | sizes | {"max_position_embeddings": 512}))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TASK = """task: my_task
dataset_path: json
dataset_kwargs: {data_files: tasks/stories.jsonl}
test_split: train
fewshot_split: train
output_type: generate_until
doc_to_text: '{{text[:20]}}'
doc_to_target: '{{text[20:]}}'
generation_kwargs: {until: ['.'], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lines of a page name."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "parent", tf.LlamaConfig)
    write_model(folder / "tiny", tf.Qwen3Config, head_dim=8)
    records = [{"text": story} for story in STORIES]
    turns = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a mouse"}]
    for name in ("corpus.jsonl", "test.jsonl", "sentences.jsonl", "tasks/stories.jsonl", "web/a.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("text.txt", "train.txt", "test.txt"):
        (folder / name).write_text(
            "<|endoftext|>".join(" ".join(STORIES[i : i + 6]) for i in range(0, len(STORIES), 6))
        )
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    (folder / "person.json").write_text('{"enum": ["Tom", "Ann"]}')
    (folder / "tasks" / "my_task.yaml").write_text(TASK)
    Dataset.from_list(records).to_parquet(folder / "code.parquet")
    write_problems(folder / "train.jsonl", problems(["copy", "reverse"], "train", 40))
    unmask.adapt(str(folder / "parent"), str(folder / "corpus.jsonl"), output_dir=folder / "runs" / "q",
                 show_progress=False, max_tokens=200, **SETTINGS)  # fmt: skip
    return folder


class Shell:
    """Runs command lines in a folder; in this process, those of `unmask`."""

    def __init__(self, folder: Path, run: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run, self.capsys, self.monkeypatch = folder, run, capsys, monkeypatch
        self.server: tuple[uvicorn.Server, threading.Thread, int] | None = None

    def says(self, line: str) -> str:
        """What a command line prints; it must end well."""
        words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"))
        return getattr(self, words[0])(words)

    def unmask(self, words: list[str]) -> str:
        words = small(words[1:])
        if words[0] == "serve":
            return self.serve(words)
        if words[0] in ("adapt", "export"):  # the page's folder may be there already
            shutil.rmtree(self.folder / words[words.index("--output") + 1], ignore_errors=True)
        code, out, err = self.run(*words, stdin="a dog?\n/exit\n")
        assert code == 0, (words, err)
        return out + err

    def serve(self, words: list[str]) -> str:
        """Starts a server in a thread, at a free port."""
        self.close()
        started: list[uvicorn.Server] = []

        class Server(uvicorn.Server):
            def __init__(self, config: uvicorn.Config) -> None:
                super().__init__(config)
                started.append(self)

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [*(words[: words.index("--port")] if "--port" in words else words), "--port", str(port)]
        self.monkeypatch.setattr(uvicorn, "Server", Server)
        self.monkeypatch.setattr(sys, "argv", ["unmask", *words])
        self.capsys.readouterr()
        thread = threading.Thread(target=until_it_ends)
        thread.start()
        while not (started and started[0].started):
            assert thread.is_alive(), self.capsys.readouterr().err
            time.sleep(0.01)
        self.server = (started[0], thread, port)
        return self.capsys.readouterr().err.replace(str(port), "8123")

    def curl(self, words: list[str]) -> str:
        assert self.server is not None, "curl without a server"
        words = [re.sub(r"(localhost|127\.0\.0\.1):\d+", f"127.0.0.1:{self.server[2]}", word) for word in words]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def pip(self, words: list[str]) -> str:
        """What is installed is known: nothing is downloaded."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words[2:]:
            assert word in (".", "torch", "--index-url") or word.startswith("https://") or (
                set(word.removeprefix("unmask[").removesuffix("]").split(",")) <= set(extras)
            ), word  # fmt: skip
        return ""

    def close(self) -> None:
        if self.server is not None:
            self.server[0].should_exit = True
            self.server[1].join()
            self.server = None


def until_it_ends() -> None:
    with contextlib.suppress(SystemExit):
        cli.main()


def small(words: list[str]) -> list[str]:
    """The words of a command with what is a placeholder or large replaced."""
    name, *rest = (PLACES.get(word, "tiny" if re.fullmatch(r"Qwen/\S+", word) else word) for word in words)
    for option, value in (ADDED.get(name, {}) | REPLACED.get(name, {})).items():
        if option in rest:
            rest[rest.index(option) + 1] = value
        elif option in ADDED.get(name, {}):
            rest += [option, value]
    if name == "evaluate" and "--tasks" in rest and "--tasks-folder" not in rest:
        rest += ["--tasks-folder", "tasks"]
    if name == "adapt" and "--config" not in rest:
        rest = [word for word in rest if word.partition("=")[0] not in SETTINGS]
        rest += [f"{setting}={value}".lower() for setting, value in SETTINGS.items()]
    return [name, *rest]


@pytest.fixture
def shell(world: Path, tmp_path: Path, run: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    for name in ("benchmarks", "configs", "drafters", "examples", "models", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    page = Shell(tmp_path, run, capsys, monkeypatch)
    yield page
    page.close()


CLOCKED = re.compile(r'(in |"num_forwards":|"tokens_per_forward":|forwards \()[\d.]+')
"""Counts of speculation, whose cycles follow the clock of the machine: the text does not."""


def shown_output(block: Block, line: int) -> list[str]:
    """The lines that a console block shows below the command at this line of the page."""
    after = block.text.splitlines()[line - block.line :]
    return after[: next((i for i, text in enumerate(after) if text.startswith("$ ")), len(after))]


@pytest.mark.parametrize("page", [page for page in PAGES if SHELL[page]], ids=lambda page: page.stem)
def test_the_command_lines_of_a_page_run(page: Path, shell: Shell) -> None:
    for block in SHELL[page]:
        for number, line in [] if block.marker == "not run" else commands(block):
            said, shown = shell.says(line), shown_output(block, number)
            if block.info == "bash" or block.marker == "not compared":
                continue
            if "speculative" in said:
                said, shown = CLOCKED.sub(r"\1#", said), [CLOCKED.sub(r"\1#", text) for text in shown]
            if not any("..." in text for text in shown):
                assert sorted(said.splitlines()) == sorted(shown), (block.place, number)
            for part in [part.strip("{} ") for text in shown for part in text.split("...")]:
                assert part in said, (block.place, number, said)
