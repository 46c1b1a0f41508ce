"""The picture of the house in docs/architecture.md agrees with the tree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "unmask"


def pictured(text: str) -> tuple[set[str], set[str]]:
    """Modules ("core/noise") and folders ("core") that a picture shows by name and indentation.

    The first column of a line, which two spaces end, holds names: a folder's ends with a slash, a module's may end
    with .py. What is indented deeper is inside. Folders of TOML hold no modules.
    """
    modules, folders, inside = set(), set(), [(-1, "")]
    for line in text.splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        while indent <= inside[-1][0]:
            inside.pop()
        for name in line.strip().split("  ", 1)[0].split():
            path = inside[-1][1] + name
            if name.endswith("/"):
                folders.add(path.rstrip("/"))
                inside.append((indent, path))
            else:
                modules.add(path.removesuffix(".py"))
    return modules, folders


def test_a_picture_is_read_by_its_indentation() -> None:
    picture = "src/\n  one.py     a\n  core/      the mathematics\n    two three\n    fast/\n      four\n  five.py  b\n"
    assert pictured(picture) == (
        {"src/one", "src/core/two", "src/core/three", "src/core/fast/four", "src/five"},
        {"src", "src/core", "src/core/fast"},
    )


def test_the_picture_of_the_tree_is_the_tree() -> None:
    modules, folders = pictured((ROOT / "docs" / "architecture.md").read_text().split("```")[1].removeprefix("text"))
    files = {str(file.relative_to(ROOT).with_suffix("")) for file in SOURCE.rglob("*.py")}
    assert modules == {file for file in files if not file.rsplit("/", 1)[-1].startswith("__")}
    found = {str(file.parent.relative_to(ROOT)) for kind in ("*.py", "*.toml") for file in SOURCE.rglob(kind)}
    assert folders == found


def test_the_readme_shows_the_folders_and_no_file_that_is_not_there() -> None:
    (tree,) = re.findall(r"```text\n(src/unmask/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    modules, folders = pictured(tree)
    assert all((ROOT / f"{module}.py").is_file() for module in modules), modules
    assert folders == {"src/unmask", "benchmarks"} | {
        str(folder.relative_to(ROOT)) for folder in SOURCE.iterdir() if list(folder.glob("*.py"))
    }


def test_every_module_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for path in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", page.read_text()):
            places = (SOURCE / path, ROOT / "tests" / path, ROOT / "benchmarks" / path, ROOT / path)
            assert any(place.is_file() for place in places), (page.name, path)


def test_every_test_that_the_page_of_papers_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "papers.md").read_text())
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_the_page_names_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " > ".join(layer.replace("unmask.", "") for layer in contracts[0]["layers"])
    assert f"`{layers}`" in (ROOT / "docs" / "architecture.md").read_text()
    rooms = set(re.findall(r"[a-z_]+", layers))
    for entry in SOURCE.iterdir():
        if (entry.is_dir() and list(entry.glob("*.py"))) or entry.suffix == ".py":
            assert entry.stem in rooms | {"__init__", "__main__", "__pycache__"}, f"{entry.name} stands in no layer"


def test_nothing_but_the_command_imports_the_lab() -> None:
    for file in SOURCE.rglob("*.py"):
        folder = file.relative_to(SOURCE).parts[0]
        if folder in ("lab", "cli"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not any(re.match(r"unmask\.lab\b", name) for name in names), file


def test_functions_and_modules_are_short() -> None:
    """No function above 60 lines but commands, whose options make them long, and no module above 450."""
    for file in [*SOURCE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = file.read_text()
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                command = any("takes_options" in ast.unparse(d) or "app.command" in ast.unparse(d)
                              for d in node.decorator_list)  # fmt: skip
                first = node.body[0].lineno if command else node.lineno
                assert (node.end_lineno or 0) - first < 60, (file, node.name)
