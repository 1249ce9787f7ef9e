"""The documentation is true: its Python runs and prints and draws what the page shows, its links lead somewhere, its
tables are those of the result files."""

import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
SVG_TEXT = re.compile(r">([^<]+)</text>")


@dataclass
class Block:
    """One fenced block of Python: the words after the fence's `python`, the code, and the line on which it starts.

    `shown` is the block fenced as `output` after it: what it prints. Fenced as `output measured`, its numbers are those
    of one run, and only the rest must be as printed.
    """

    words: list[str]
    code: str
    line: int
    shown: str | None = None
    measured: bool = False

    def comparable(self, text: str) -> list[str]:
        if self.measured:
            text = re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "0", text))
        return [line.rstrip() for line in text.strip().splitlines()]


def python_blocks(text: str) -> list[Block]:
    found: list[Block] = []
    for match in BLOCK.finditer(text):
        language, *words = match["info"].split() or [""]
        if language == "python":
            found.append(Block(words, match["code"], text.count("\n", 0, match.start("code"))))
        elif language == "output":
            found[-1].shown, found[-1].measured = match["code"], words == ["measured"]
    return found


def by_name(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", by_name([page for page in PAGES if python_blocks(page.read_text())]))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page as one program, in order, in an empty folder, with cache folders of their own.

    They print what the page shows, and draw the pictures of the same names in docs/images, by the text in these.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    for block in python_blocks(page.read_text()):
        if not block.words:
            padding = "\n" * block.line  # so that a traceback names the page's own line
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(padding + block.code, str(page), "exec"), vars(program))
            if block.shown is not None:
                assert block.comparable(printed.getvalue()) == block.comparable(block.shown), f"{page}:{block.line}"
    for picture in tmp_path.glob("*.svg"):
        kept = ROOT / "docs" / "images" / picture.name
        if kept.exists():
            drawn, shown = (SVG_TEXT.findall(file.read_text(encoding="utf-8")) for file in (picture, kept))
            assert drawn == shown, f"put {picture} in the place of {kept}"


@pytest.mark.parametrize("page", by_name(PAGES))
def test_blocks_that_do_not_run_say_why(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        assert block.words in ([], ["no-run"]), f"{page}:{block.line}: unknown words {block.words}"
        if block.words:
            reason = re.match(r"# not run: \w.{10,}", block.code)
            assert reason, f"{page}:{block.line + 1}: the first line must be '# not run: <reason>'"


@pytest.mark.parametrize("page", by_name(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue  # another site: not looked up, the tests have no network
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """The names that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", by_name(PAGES))
def test_tables_are_up_to_date(page: Path) -> None:
    assert tables.renew(page.read_text(), tables.RESULTS) == page.read_text(), "run: make docs-tables"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index]
    assert not missing
