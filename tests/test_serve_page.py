"""The server's page in a browser: headless Chromium types, watches and fills."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import running

import unmask
from unmask.tables import number_of

playwright = pytest.importorskip("playwright.sync_api")
PROMPT = "Once there was a cat"
WIDTHS = (390, 1200)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted)


@pytest.fixture(scope="module")
def address(lm: unmask.DiffusionLM) -> Iterator[str]:
    with running(lm, max_new_tokens=64) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 800})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector("#mode option", state="attached")
    yield page
    page.close()
    assert not [what for what in wrong if not what.startswith("data:")]


def test_a_prompt_is_written_in_both_modes_by_keyboard(lm: unmask.DiffusionLM, page: Any) -> None:
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    page.fill("#tokens", "12")
    page.press("#tokens", "Control+Enter")
    for mode in ("diffusion", "ar"):
        page.wait_for_selector(f"[data-mode={mode}] .counts:has-text('per forward')")
        out = lm.generate(PROMPT, mode, 12, seed=0)
        assert page.text_content(f"[data-mode={mode}] .text") == out.texts[0]
        said = f"{number_of(int(out.num_new_tokens[0]), 'token')} · {number_of(int(out.num_forwards[0]), 'forward')} ·"
        assert page.text_content(f"[data-mode={mode}] .counts").startswith(said)
        sure = page.eval_on_selector_all(f"[data-mode={mode}] .token", "all => all.map(t => t.title)")
        assert sure
        assert all(title.startswith("probability ") for title in sure)


def test_the_selected_part_is_filled_and_taken(lm: unmask.DiffusionLM, page: Any) -> None:
    text = "Once there <gap:3> was a happy dog."  # with a selection, this is no gap
    page.fill("#text", text)
    start = text.index("happy")
    page.eval_on_selector("#text", "(box, at) => box.setSelectionRange(at, at + 5)", start)
    page.fill("#gap", "4")
    page.click("#fill-go")
    page.wait_for_selector("#fill-way .counts:has-text('per forward')")
    out = lm.infill([text[:start], 4, text[start + 5 :]], seed=0)
    assert page.text_content("#filled mark") == out.fills[0][0]
    page.click("#take")
    assert page.input_value("#text") == out.filled[0]


def test_marked_gaps_are_filled_where_nothing_is_selected(lm: unmask.DiffusionLM, page: Any) -> None:
    text = "Once <gap:3> was <gap:2> happy."
    page.fill("#text", text)
    page.click("#fill-go")
    page.wait_for_selector("#fill-way .counts:has-text('per forward')")
    assert page.text_content("#filled") == lm.infill(text, seed=0).filled[0]


def test_what_goes_wrong_is_said(page: Any) -> None:
    page.fill("#tokens", "65")
    page.click("#go")
    page.wait_for_selector("#write-error")
    assert "65" in page.text_content("#write-error")
    page.fill("#text", "no gap")
    page.click("#fill-go")
    page.wait_for_selector("#fill-error")
    assert "select" in page.text_content("#fill-error")


def test_escape_stops_and_the_next_text_is_whole(page: Any) -> None:
    page.fill("#tokens", "12")
    begin, escape = "document.querySelector('#write').requestSubmit()", "new KeyboardEvent('keydown', {key: 'Escape'})"
    page.evaluate(f"() => {{ {begin}; document.dispatchEvent({escape}); }}")
    page.wait_for_selector("#ways .counts:has-text('stopped')")
    assert page.query_selector("[data-mode=ar] .token") is None
    assert page.text_content("#write-error") == ""
    page.click("#go")
    page.wait_for_selector("[data-mode=ar] .counts:has-text('12 tokens')")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.fill("#prompt", "word" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_key_is_asked_for(browser: Any, lm: unmask.DiffusionLM) -> None:
    with running(lm, api_key="secret") as address:
        assert "<title>unmask</title>" in httpx.get(address).text
        page = browser.new_page()
        page.goto(address)
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#mode option", state="attached")
        assert not page.is_visible("#key-form")
        page.close()
