"""The site: it builds without a warning, its blocks are blocks, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import typer
from markdown.extensions.toc import slugify

import unmask
from unmask.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra [docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.utils import CountHandler

    counter = CountHandler()
    counter.setLevel(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(counter)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    finally:
        logging.getLogger("mkdocs").removeHandler(counter)
    assert not counter.get_counts()
    assert (tmp_path / "quickstart.html").is_file()
    measured = (tmp_path / "measured.html").read_text()
    assert "<code>results/smollm2</code>" in measured
    assert "results/smollm2 (" not in measured  # said once
    assert 'src="images/measured_tasks.svg"' in measured
    for page in tmp_path.glob("*.html"):
        assert "```" not in page.read_text(), f"{page.name} shows a block as text"
    commands, python = ((tmp_path / f"reference-{name}.html").read_text() for name in ("command", "python"))
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'id="unmask-{name}"' in commands
        assert all(option in commands for parameter in command.params for option in parameter.opts)
    for name in [*(f"unmask{name}" for name in unmask.__all__ if name[0] != "_"), "unmasksamplingthreshold"]:
        assert f'id="{name.lower()}"' in python, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, f"{page.name}: {anchor}"


def test_the_figures_are_those_of_the_predicates() -> None:
    spec = importlib.util.spec_from_file_location("patterns", ROOT / "docs" / "site" / "patterns.py")
    assert spec is not None
    assert spec.loader is not None
    patterns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patterns)
    files = {f"pattern_{name}.svg": patterns.drawn(*figure) for name, figure in patterns.FIGURES.items()}
    images = ROOT / "docs" / "images"
    assert files == {file.name: file.read_text() for file in images.glob("pattern_*.svg")}
    page = (ROOT / "docs" / "patterns.md").read_text()
    assert set(re.findall(r"images/(\w+\.svg)", page)) == set(files)
