"""What README and docs show: every Python block runs, every command line parses, every name exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, Block, blocks, commands

import unmask
from unmask import sampling
from unmask.cli import app
from unmask.conversion.trainer import ForTrainer
from unmask.settings import TABLE

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


PYTHON = [block for page in PAGES for block in blocks(page) if block.info == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_blocks_run(
    block: Block, converted: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In a folder with `models`, a converted `runs/q` and text; below `<!-- compile only: why -->` compiled alone."""
    code = compile(block.text, f"{block.page.name}", "exec")
    if block.marker == "compile only":
        return
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted, tmp_path / "runs" / "q")
    (tmp_path / "models").symlink_to(ROOT / "models")
    shutil.copyfile(stories, tmp_path / "corpus.jsonl" if stories.suffix == ".jsonl" else tmp_path / stories.name)
    plain = unmask.adapt

    def adapt(_model: Any, _data: Any, *, output_dir: Any, recipe: str | None = None, **_settings: Any) -> Any:
        shutil.rmtree(output_dir, ignore_errors=True)
        small = {"max_tokens": 500, "max_length": 32, "block_size": 4, "batch_size": 2, "show_progress": False}
        return plain(tokenizer_and_model, stories, recipe, output_dir, **small)

    monkeypatch.setattr(unmask, "adapt", adapt)
    exec(code, {"lm": unmask.load("runs/q"), "unmask": unmask, "prompt": "Once"})


def command_lines() -> Iterator[tuple[str, str]]:
    """(place, command line) of blocks of any kind, and of what stands in backticks."""
    for page in PAGES:
        for block in blocks(page):
            for number, line in commands(block):
                yield f"{page.stem}-{number}", line
        for number, text in enumerate(page.read_text().splitlines(), 1):
            for line in re.findall(r"`((?:unmask|python) [a-z][^`]*)`", text):
                yield f"{page.stem}-{number}", line + " ..."  # names a command and some of its options


@pytest.mark.parametrize("line", [pytest.param(line, id=place) for place, line in command_lines()])
def test_command_lines_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.model_name.locate", lambda name: name)  # the models of examples are not here
    words = shlex.split(line)
    if words[0] == "python" and words[1] != "-m":
        script = ROOT / words[1]
        text = (script / "__main__.py" if script.is_dir() else script).read_text()
        for word in words[2:]:
            if word.startswith("--"):
                assert f'"{word.partition("=")[0]}"' in text, word
        return
    if words[0] != "unmask":
        return
    command = COMMANDS[words[1]]
    if re.search(r"[\[|]|\.\.\.", line):  # a synopsis: its options exist
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= known | {"--help"}
        return
    command.make_context(words[1], words[2:])


MODULES: dict[str, list[str]] = {}
for _file in (ROOT / "src" / "unmask").rglob("*.py"):
    _name = ".".join(_file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    MODULES.setdefault(_name.rsplit(".", 1)[-1], []).append(_name)
for _file in (ROOT / "benchmarks").glob("*.py"):
    MODULES.setdefault(_file.stem, []).append(_file.stem)
OBJECTS = {"lm": unmask.DiffusionLM, "out": unmask.SampleOutput, "parts": ForTrainer}
FILES = ("gguf", "html", "json", "jsonl", "md", "npy", "png", "py", "safetensors", "svg", "toml", "txt")
ELSEWHERE = ("generation_config", "tokenizer", "torch")
"""First words of names that are not this library's."""


def names() -> Iterator[tuple[str, str]]:
    """(page, name) of what stands in backticks as one name with a dot, or as a call of one."""
    for page in PAGES:
        for name in sorted(set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`", page.read_text()))):
            if name.split(".")[0] not in ELSEWHERE and name.rsplit(".", 1)[-1] not in FILES:
                yield page.stem, name


def resolves(name: str) -> bool:
    first, *rest = name.split(".")
    if first in OBJECTS:
        found: Any = OBJECTS[first]
        return (
            hasattr(found, rest[0])
            or rest[0] in found.__annotations__
            or rest[0] in ("model", "tokenizer", "diffusion")
        )
    for start in ["unmask"] if first == "unmask" else MODULES.get(first, []):
        found = importlib.import_module(start)
        for part in rest:
            if not hasattr(found, part):
                try:
                    found = importlib.import_module(f"{found.__name__}.{part}")
                except (ImportError, AttributeError):
                    break
            else:
                found = getattr(found, part)
        else:
            return True
    return False


@pytest.mark.parametrize(("page", "name"), sorted(set(names())))
def test_every_name_in_backticks_exists(page: str, name: str) -> None:
    assert resolves(name), f"docs page {page} names {name!r}, which does not exist"


OPTIONS = set(TABLE).union(
    *(
        inspect.signature(function).parameters
        for function in (unmask.load, unmask.adapt, unmask.DiffusionLM.generate, unmask.DiffusionLM.infill,
                         unmask.DiffusionLM.nelbo, unmask.DiffusionLM.embed)
    ),
    *(inspect.signature(found).parameters for found in vars(sampling).values() if inspect.isclass(found)),
)  # fmt: skip
"""What has a name in `adapt(NAME=VALUE)`, `generate(NAME=VALUE)` and the like."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_with_a_value_in_backticks_exists(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        if not code.startswith("--"):
            assert set(re.findall(r"(?<![\w-])([a-z_]+)=", code)) <= OPTIONS, f"{page.name}: {code}"


def messages() -> str:
    """All texts of the library, "..." where a value stands."""
    texts = []
    for file in (ROOT / "src" / "unmask").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_every_error_that_the_page_explains_is_one_of_the_library() -> None:
    said, page = messages(), (ROOT / "docs" / "errors.md").read_text()
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(explained) > 40
    assert [message for message in explained if message not in said] == []


def test_numbers_beside_the_papers_stand_in_the_results() -> None:
    page = (ROOT / "docs" / "papers.md").read_text()
    rows = re.findall(r"^\|[^|]*\|[^|]*\|([^|]*)\|([^|]*)\| \[.*\]\(\.\./(results/[^)]*)\) \|$", page, re.MULTILINE)
    assert len(rows) > 12
    for here, recipe, folder in rows:
        text = "".join(file.read_text() for file in (ROOT / folder).glob("*.md"))
        numbers = re.findall(r"\d+(?:\.\d+|%)", here)
        assert numbers, here
        assert [number for number in numbers if number not in text] == [], folder
        name = re.search(r"`(?:unmask study )?([\w-]+)", recipe)
        assert name is not None
        kind = "studies" if "study" in recipe else "recipes"
        assert (ROOT / "src" / "unmask" / kind / f"{name[1]}.toml").is_file(), recipe
