"""The web page in a real browser: mathematics is set, every path works by keyboard, and nothing leaves this machine."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.search.embedder import Embedder
from tests.small_collections import PAPERS, entries, serving, write_collection, write_statements

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WAIT_MS = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: extra dev"),
]


@pytest.fixture(scope="module")
def url(statements_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over real vectors, a damaged collection, another model's, and statements without vectors."""
    folder = tmp_path_factory.mktemp("collections")
    with Embedder(statements_repository) as embedder:
        vectors = np.concatenate([embedder.vectors([entry.text]) for entry in entries()])
        write_collection(folder / "algebra", vectors=vectors, model=embedder.model)
    write_collection(folder / "other")
    write_collection(folder / "damaged")
    metadata = folder / "damaged/metadata.jsonl"
    metadata.write_text(metadata.read_text().partition("\n")[2])
    write_statements(folder / "fresh.jsonl")
    with serving(folder, statements_repository) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """An opened page that must not ask for anything elsewhere, nor complain."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=url)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto("/#/algebra")
    page.wait_for_selector("#paper-list a")
    yield page
    context.close()
    assert asked
    assert [address for address in asked if not address.startswith(url)] == []
    # Chromium reports an answer of 4xx in the console; what the page makes of it is tested.
    assert [text for text in complaints if "the server responded with a status of 4" not in text] == []


def open_statements(page: Any, hash_: str) -> Any:
    page.evaluate("hash => { location.hash = hash }", hash_)
    page.wait_for_selector("main:not([aria-busy]) .statements .statement")
    return page.locator(".statements .statement")


def focused_row(page: Any) -> Any:
    return page.evaluate("document.activeElement.closest('.statements .statement')?.dataset.row")


def test_a_collection_is_picked_and_a_paper_browsed(page: Any) -> None:
    assert page.locator("#paper-count").inner_text() == "3 papers"
    page.select_option("#collection", "other")
    page.wait_for_function("() => location.hash == '#/other'")
    page.wait_for_selector("#paper-list a[href='#/other/paper/1']")
    page.fill("#filter", "etale")
    page.wait_for_function("() => document.getElementById('paper-count').textContent == '1 paper'")
    page.click("#paper-list a")
    page.wait_for_selector(".statements .statement")
    assert page.locator("h2").inner_text().startswith("Étale maps")
    assert page.locator("#paper-list [aria-current=page]").count() == 1
    assert page.locator(".statements .statement").count() == 2


def test_papers_of_a_collection_that_was_left_are_not_listed(page: Any) -> None:
    held: list[Any] = []
    page.route("**/api/collections/other/papers?*", lambda route: held.append(route))
    with page.expect_request("**/api/collections/other/papers?*"):
        page.evaluate("location.hash = '#/other'")
    page.evaluate("location.hash = '#/algebra'")
    page.wait_for_selector("main:not([aria-busy])")
    with page.expect_response("**/api/collections/other/papers?*"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert page.locator("#paper-list a[href^='#/algebra/']").count() == 3
    assert page.title().startswith("algebra")


def test_mathematics_is_set_and_nothing_in_a_statement_is_html(page: Any) -> None:
    cards = open_statements(page, "#/algebra/paper/0")
    assert cards.nth(0).locator(".katex").count() == 2
    fonts = page.evaluate(
        "document.fonts.ready.then(() => [...document.fonts].map(font => `${font.family} ${font.status}`))"
    )
    assert "KaTeX_Math loaded" in fonts
    assert "<b>nothing</b> follows & <script>window.hacked = 1</script>" in cards.nth(1).inner_text()
    assert page.evaluate("window.hacked") is None
    assert cards.nth(1).locator("annotation").all_text_contents() == ["a < b", "b > c"]
    assert cards.nth(2).locator("ol > li").count() == 2
    assert cards.nth(2).locator("ol > li .katex").count() == 2  # also D_\QCoh, a macro that the paper defined
    assert cards.nth(2).locator("em").inner_text() == "small"


def test_display_accents_and_broken_latex(page: Any) -> None:
    cards = open_statements(page, "#/algebra/paper/1")
    assert cards.nth(0).inner_text().count("étale") == 1
    assert cards.nth(0).locator(".katex-display").count() == 1
    assert "\\unknown" in cards.nth(1).inner_text()
    assert "x^2" in cards.nth(1).inner_text()


def test_a_very_long_statement_is_cut_until_it_is_asked_for(page: Any) -> None:
    cards = open_statements(page, "#/algebra/paper/2")
    assert len(cards.nth(0).inner_text()) < 2000
    cards.nth(0).get_by_role("button", name="Show all 100,000 characters").click()
    assert len(cards.nth(0).inner_text()) > 99_000
    assert "#/algebra/paper/2" in page.url  # the button is no way to the neighbours


def test_neighbours_by_click_and_back(page: Any) -> None:
    cards = open_statements(page, "#/algebra/paper/0")
    cards.nth(0).locator(".kind").click()
    page.wait_for_selector(".statement.asked")
    assert page.url.endswith("#/algebra/near/0")
    rows = page.locator(".statements .statement").evaluate_all("all => all.map(one => one.dataset.row)")
    assert sorted(rows) == ["1", "2", "3", "4", "5", "6"]
    scores = [float(text) for text in page.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.check("#others")
    page.wait_for_function("() => document.querySelectorAll('.statements .statement').length == 4")
    page.go_back()
    page.go_back()
    page.wait_for_selector("main:not([aria-busy]) h2:has-text('Rings')")
    assert focused_row(page) == "0"


def test_all_of_it_by_keyboard(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type(PAPERS["Rings & ideals"][0])
    page.keyboard.press("Enter")
    page.wait_for_selector(".score")
    page.wait_for_function("() => document.activeElement.matches('.statements .statement')")
    assert focused_row(page) == "0"
    assert float(page.locator(".score").first.inner_text()) == pytest.approx(1, abs=2e-3)
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    second = page.locator(".statements .statement").nth(1).get_attribute("data-row")
    assert focused_row(page) == second
    page.keyboard.press("Enter")
    page.wait_for_selector(".statement.asked")
    assert page.url.endswith(f"/near/{second}")
    page.keyboard.press("Escape")
    page.wait_for_selector(".asked-words")
    page.wait_for_function(f"() => document.activeElement.dataset.row == '{second}'")
    page.keyboard.press("p")
    page.wait_for_function("() => location.hash.includes('/paper/')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".asked-words")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_what_cannot_be_shown_says_why_and_the_rest_still_works(page: Any) -> None:
    page.select_option("#collection", "damaged")
    page.wait_for_selector(".wrong")
    assert "expected 7 lines, one for each row, found 6" in page.locator(".wrong").inner_text()
    page.evaluate("location.hash = '#/other/search/a%20ring'")
    page.wait_for_selector(".wrong:has-text('another model')")
    page.evaluate("location.hash = '#/nowhere'")
    page.wait_for_selector(".wrong:has-text('expected a collection of')")
    page.evaluate("location.hash = '#/algebra/paper/99'")
    page.wait_for_selector(".wrong:has-text('expected a paper')")
    page.evaluate("location.hash = '#/algebra/near/%zz'")
    page.wait_for_selector(".wrong:has-text('expected a page')")
    assert open_statements(page, "#/algebra/paper/0").count() == 3


def test_an_empty_search_asks_for_words_and_a_huge_one_is_answered(page: Any) -> None:
    page.fill("#query", "   ")
    page.press("#query", "Enter")
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Type')")
    page.fill("#query", "$x$ " * 25_000)
    page.press("#query", "Enter")
    page.wait_for_selector(".score")
    assert len(page.locator("h2").inner_text()) < 2000


def test_statements_without_vectors_are_computed_while_the_page_shows_how_far_it_is(page: Any) -> None:
    page.evaluate(
        """() => {
          window.seen = [];
          const words = () => document.querySelector("progress + p")?.innerText ?? "";
          new MutationObserver(() => seen.push(words())).observe(document.getElementById("content"), {childList: true});
        }"""
    )
    page.select_option("#collection", "fresh")
    page.wait_for_selector("#paper-list a[href='#/fresh/paper/1']")
    assert any(re.search("of 7 statements|Opening the model", text) for text in page.evaluate("seen"))
    assert open_statements(page, "#/fresh/near/0").count() == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 800), (390, 844)])
def test_words_are_legible_and_fit_the_window(scheme: str, width: int, height: int, page: Any, tmp_path: Path) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    open_statements(page, "#/algebra/near/2")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for selector in (".statement .text", ".identifier", ".kind"):
        assert contrast(page, selector) >= 4.5  # WCAG 2.2, 1.4.3
    folder = Path(os.environ.get("SLIPWAY_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{scheme}-{width}.png")


def test_the_button_changes_the_colours_and_is_remembered(page: Any) -> None:
    page.wait_for_selector("h2")
    before = contrast_colours(page, "h2")[1]
    page.click("#theme")
    after = contrast_colours(page, "h2")[1]
    page.reload()
    page.wait_for_selector("h2")
    assert before != after == contrast_colours(page, "h2")[1]


def contrast_colours(page: Any, selector: str) -> list[list[float]]:
    """[text, what is behind it], each as red, green, blue from 0 to 1."""
    drawn: list[list[float]] = page.evaluate(
        """selector => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
          const numbers = colour => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(level => level / 255);
          };
          const element = document.querySelector(selector);
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(numbers);
        }""",
        selector,
    )
    return drawn


def contrast(page: Any, selector: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    colours = np.array(contrast_colours(page, selector))
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    light = np.sort(linear @ [0.2126, 0.7152, 0.0722])
    return float((light[1] + 0.05) / (light[0] + 0.05))


def test_an_empty_folder_and_a_server_that_is_silent_are_said(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    with serving(tmp_path, tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("h2:has-text('No collections here')")
        write_collection(tmp_path / "late")
        page.reload()
        page.wait_for_selector("#paper-list a")
        context.set_offline(True)
        page.click("#paper-list a")
        page.wait_for_selector(".wrong:has-text('The server does not answer')")
    context.close()
