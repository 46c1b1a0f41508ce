"""The picture of the house in docs/architecture.md agrees with the tree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_module_stands_in_the_picture_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = page.split("```")[1]
    words = set(re.findall(r"[a-z_0-9]+", picture))
    for file in (ROOT / "src" / "unmask").rglob("*.py"):
        if not file.stem.startswith("__"):
            assert file.stem in words, file
    for folder in re.findall(r"^ +([a-z]+)/ ", picture, re.MULTILINE):
        assert list((ROOT / "src" / "unmask").rglob(folder)), folder
    for name in re.findall(r"^ +([a-z_]+)\.py", picture, re.MULTILINE):
        assert (ROOT / "src" / "unmask" / f"{name}.py").is_file(), name


def test_every_module_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for path in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", page.read_text()):
            places = (ROOT / "src" / "unmask" / path, ROOT / "tests" / path, ROOT / "benchmarks" / path, ROOT / path)
            assert any(place.is_file() for place in places), (page.name, path)


def test_the_page_names_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " > ".join(layer.replace("unmask.", "") for layer in contracts[0]["layers"])
    assert f"`{layers}`" in (ROOT / "docs" / "architecture.md").read_text()
    rooms = set(re.findall(r"[a-z_]+", layers))
    for entry in (ROOT / "src" / "unmask").iterdir():
        if (entry.is_dir() and list(entry.glob("*.py"))) or entry.suffix == ".py":
            assert entry.stem in rooms | {"__init__", "__pycache__"}, f"{entry.name} stands in no layer"


def test_nothing_but_the_command_imports_the_lab() -> None:
    for file in (ROOT / "src" / "unmask").rglob("*.py"):
        folder = file.relative_to(ROOT / "src" / "unmask").parts[0]
        if folder in ("lab", "cli"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(re.match(r"unmask\.lab\b", name) for name in names), file


def test_functions_and_modules_are_short() -> None:
    """No function above 60 lines but commands, whose options make them long, and no module above 450."""
    for file in (ROOT / "src" / "unmask").rglob("*.py"):
        text = file.read_text()
        if file.name == "conversion.py":
            continue
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                command = any("takes_decoding" in ast.unparse(d) or "app.command" in ast.unparse(d)
                              for d in node.decorator_list)  # fmt: skip
                first = node.body[0].lineno if command else node.lineno
                assert (node.end_lineno or 0) - first < 60, (file, node.name)
