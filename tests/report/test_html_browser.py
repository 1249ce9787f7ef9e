"""The page in a headless Chromium: it loads without a word on the console, sorts, shows tooltips, fits a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish.report import html
from burnish.report.data import Explanation
from tests.report.explanations import gpt2, predicted, with_strings
from tests.report.test_html import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="what the page does is tested with playwright")

COLUMNS = [
    "op",
    "in",
    "source",
    "output",
    "one",
    "places",
    "all",
    "of call",
    "floor",
    "of floor",
    "bound by",
    "kernels",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(
                "no Chromium on this machine: what the page does is not tested (Debian: apt-get install chromium)"
            )
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


class Opened:
    """A page, and everything that it complained about."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def column(self, name: str) -> list[str]:
        """The cells of a column of the table of ops, from the top."""
        texts = "([selector, at]) => [...document.querySelectorAll(selector)].map((row) => row.cells[at].innerText)"
        return self.page.evaluate(texts, ["#ops-before tbody tr", COLUMNS.index(name)])


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Opened] = []

    def open_page(explanation: Explanation, **options: Any) -> Opened:
        file = tmp_path / "page.html"
        file.write_text(html.render(explanation), encoding="utf-8")
        opened.append(Opened(chromium, file, **options))
        return opened[-1]

    yield open_page
    for each in opened:
        assert each.complaints == []
        assert {url.split(":")[0] for url in each.requests} <= {"file", "data"}
        each.page.context.close()


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace(",", "").rstrip("%") or 0) for text in texts]


def test_a_click_on_a_heading_sorts_and_a_second_turns_round(open_page: Any) -> None:
    opened = open_page(gpt2(after=False))
    heading = opened.page.locator("#ops-before th", has_text="floor").first
    assert numbers(opened.column("all")) == sorted(numbers(opened.column("all")), reverse=True)
    heading.get_by_role("button").click()
    found = numbers(opened.column("floor"))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 3
    assert heading.get_attribute("aria-sort") == "descending"
    heading.get_by_role("button").click()
    assert numbers(opened.column("floor")) == sorted(found)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert opened.page.locator("#ops-before th[aria-sort]").count() == 1


def test_enter_on_a_heading_sorts(open_page: Any) -> None:
    opened = open_page(gpt2(after=False))
    opened.page.locator("#ops-before th button", has_text="source").focus()
    opened.page.keyboard.press("Enter")
    found = opened.column("source")
    assert found == sorted(found)
    assert len(set(found)) > 5
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Space")
    assert numbers(opened.column("one")) == sorted(numbers(opened.column("one")), reverse=True)


def test_a_point_shows_its_op_on_hover(open_page: Any) -> None:
    opened = open_page(gpt2())
    tip = opened.page.locator("#tip")
    assert tip.is_hidden()
    opened.page.locator("#roofline .mark[href='#after-4'] circle").hover()
    assert tip.inner_text().splitlines() == [
        "attention, transformer.h.*.attn",
        "sdpa_attention.py:92",
        "3.2 µs at each of 12 places, floor 0.187 µs (5.9%)",
        "bound by launch",
    ]
    opened.page.mouse.move(1, 1)
    assert tip.is_hidden()


def test_points_by_keyboard(open_page: Any) -> None:
    opened = open_page(gpt2())
    page, tip = opened.page, opened.page.locator("#tip")
    assert page.locator("#roofline .mark[tabindex='0']").count() == 1
    page.locator("nav a").last.focus()
    while not page.evaluate("document.activeElement.closest('#roofline svg')"):
        page.keyboard.press("Tab")
    page.wait_for_function("!document.getElementById('tip').hidden")
    assert tip.inner_text().startswith("addmm, transformer.h.*.mlp.c_proj")
    box = tip.bounding_box()
    assert 0 <= box["y"] <= page.viewport_size["height"] - box["height"]
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.getElementById('tip').innerText.startsWith('scaled_dot')")
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    # Enter leads to the op's row, which lies in a table that is folded away.
    page.keyboard.press("Enter")
    page.wait_for_selector("#ops-before tr.aimed", state="visible")
    assert "scaled_dot_product_attention" in page.locator("tr.aimed").inner_text()


def test_a_long_table_shows_its_first_rows(open_page: Any) -> None:
    found = gpt2(after=False)
    blocks = [block for number in range(3) for block in found.before.blocks]
    opened = open_page(with_blocks(found, blocks))
    rows = opened.page.locator("#ops-before tbody tr:visible")
    assert rows.count() == 25
    opened.page.get_by_role("button", name="Show all 78").click()
    assert rows.count() == 78


def with_blocks(found: Explanation, blocks: list[Any]) -> Explanation:
    named = tuple(replace(block, path=f"{block.path}.{i}") for i, block in enumerate(blocks))
    return replace(found, before=replace(found.before, blocks=named))


@pytest.mark.parametrize(("explanation", "scheme"), [(gpt2(), "light"), (predicted(), "dark")], ids=["light", "dark"])
def test_fits_a_phone_in_light_and_dark(open_page: Any, explanation: Explanation, scheme: str) -> None:
    opened = open_page(explanation, viewport={"width": 375, "height": 812}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 375
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(253, 252, 250)", "dark": "rgb(24, 22, 19)"}[scheme]


def test_an_opened_row_is_as_wide_as_its_box(open_page: Any) -> None:
    for width in (1280, 375):
        page = open_page(gpt2(after=False), viewport={"width": width, "height": 812}).page
        box = page.locator("#ops .scroll").bounding_box()
        op = page.locator("#ops-before th[scope=row]").nth(3)
        before = op.bounding_box()["width"]
        op.locator("summary").click()
        opened = op.locator("dl").bounding_box()
        assert opened["width"] == pytest.approx(box["width"], abs=1)
        assert op.bounding_box()["width"] == pytest.approx(before, abs=30), "the column stays as it is"
        if width == 1280:
            assert page.locator("#ops-before tr").nth(4).locator("td .long").bounding_box()["height"] < 24


def test_a_phone_shows_the_numbers_first(open_page: Any) -> None:
    page = open_page(gpt2(), viewport={"width": 375, "height": 812}).page
    shown = "(id) => [...document.querySelectorAll(`${id} th[scope=col]`)].filter((th) => th.offsetWidth).map("
    shown += "(th) => [th.innerText.replace(/\\s+/g, ' ').trim(), th.getBoundingClientRect().right <= 375])"
    assert page.evaluate(shown, "#ops-after") == [
        [name, True] for name in ("op", "all", "of call", "of floor", "bound by")
    ]
    found = [["rewrite", True], ["saves, µs predicted", True], ["saved, µs measured", True]]
    assert page.evaluate(shown, "#rewrites") == found


def test_hostile_names_do_nothing(open_page: Any) -> None:
    opened = open_page(with_strings(gpt2(), lambda text: text + HOSTILE), viewport={"width": 375, "height": 812})
    assert opened.page.locator("h1").inner_text() == "GPT2LMHeadModel" + HOSTILE
    opened.page.locator("#ops-after th button").first.click()
    opened.page.locator("#timeline .mark rect").first.hover()
    assert "<script>alert(1)</script>" in opened.page.locator("#tip").inner_text()
    assert opened.page.locator("img").count() == 0
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 375
