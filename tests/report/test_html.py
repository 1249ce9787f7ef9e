"""The page as text: one file that is all there is, every name escaped, small."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest

from burnish.report.data import Explanation, GraphPicture, Opportunity
from burnish.report.html import render
from tests.report.explanations import gpt2, predicted, with_graph, with_strings

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
HOSTILE = "</script></style></title></svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}&lt;"


class Page(HTMLParser):
    """Tags with their attributes, text by tag, and what is wrong with the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def all_of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


CASES = {
    "both": gpt2(),
    "before": with_graph(gpt2(after=False)),
    "predicted": predicted(),
    "hostile": with_strings(gpt2(), lambda text: text + HOSTILE),
}


@pytest.fixture(scope="module", params=CASES)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(render(CASES[request.param]))


def test_ids_are_unique_and_links_lead_to_them(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = page.attributes("href")
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {each for names in page.attributes("aria-labelledby") for each in names.split()} <= set(ids)


def test_loads_nothing_and_runs_only_its_own_script(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"img", "iframe", "object", "embed", "form", "base", "image", "foreignobject", "use"})
    assert not page.attributes("src")
    assert not page.attributes("style")
    assert not page.attributes("xlink:href")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.all_of("script") == [{}]
    assert page.all_of("style") == [{}]
    [policy] = [meta["content"] for meta in page.all_of("meta") if "http-equiv" in meta]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(page.text[tag].encode()).digest()).decode() for tag in ("script", "style")
    }
    style, script = hashes["style"], hashes["script"]
    own = f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:"
    assert policy == f"default-src 'none'; base-uri 'none'; form-action 'none'; {own}"
    assert "url(" not in page.text["style"]
    assert "@import" not in page.text["style"]


def test_a_cuda_graph_is_told_beside_what_fusing_saves() -> None:
    text = html.unescape(re.sub(r"<[^>]*>", " ", render(CASES["before"])))
    words = " ".join(text.replace("\N{MICRO SIGN}", "u").split())
    assert "A CUDA graph would save 3.87 ms 84% of the call Fusing would save 419 us 9.1% of the call and 56%" in words
    assert "A call would take then 334 us 14\N{MULTIPLICATION SIGN} as fast Ops as they are: at least 120 us" in words
    assert "What to do first and what it would save 1 CUDA graph \N{MINUS SIGN}3.87 ms" in words
    assert "makes one launch of the whole call 84% of the call" in words


def test_how_to_get_it_stands_beneath_the_summary() -> None:
    how = "<code>fast = burnish.optimize(model)</code> does all of this; <code>fast.report(args)</code> measures it."
    assert how in render(CASES["before"])
    assert "burnish.optimize" not in render(CASES["both"])


def test_every_word_is_explained() -> None:
    text = render(CASES["before"])
    terms = re.findall(r"<dt>([^<]+)</dt><dd>", text[text.index('id="terms"') :])
    known = {"floor", "of floor", "bound by", "host", "unattributed", "as it was", "rewrite", "at capture", "h.*"}
    assert set(terms) == known | {"predicted", "by its cost", "places"}
    assert "us by its cost" in text.replace("\N{MICRO SIGN}", "u")
    assert "predicted 1.6" not in text


def test_gaps_under_the_profiler_are_accounted_for() -> None:
    said = "the profiler, which slows the host"
    assert said in render(CASES["before"])
    assert said not in render(CASES["both"])


def test_a_faster_kernel_of_the_same_op_says_so() -> None:
    found = gpt2(after=False)
    head = Opportunity("linear: nn.Linear", "burnish.linear", "lm_head", 1, ("linear",), 900.0, 25.0)
    text = render(replace(found, opportunities=(head, head)))
    assert text.count("linear, by a faster kernel") == 4, "twice at the head, twice in the table"
    assert "An op that two rewrites take counts once" in text


def test_what_the_times_are_of_is_at_the_head() -> None:
    text = render(replace(gpt2(), dtype="float16", torch="2.13.0"))
    assert "float16 weights, torch 2.13.0" in text[: text.index("<h1>")]


def test_what_was_lost_has_a_plus() -> None:
    found = gpt2()
    first, *rest = found.opportunities
    text = render(replace(found, opportunities=(replace(first, measured_us=first.before_us + 4e3), *rest)))
    assert "+48 ms" in text
    assert "\N{MINUS SIGN}-" not in text
    assert "&minus;-" not in text


def test_names_come_out_as_they_are() -> None:
    text = render(CASES["hostile"])
    page = Page(text)
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert "49" not in page.text["h1"]
    assert "{{ 7 * 7 }}" in page.text["h1"]
    joined = "".join(page.text.values())
    assert joined.count("<script>alert(1)</script>") > 100


def test_tables_can_be_sorted_and_are_described(page: Page) -> None:
    headings = [attrs for attrs in page.all_of("th") if attrs.get("scope") == "col"]
    assert len([attrs for attrs in headings if attrs.get("aria-sort") == "descending"]) == page.text["caption"].count(
        "Ops,"
    )
    assert page.all_of("html") == [{"lang": "en"}]
    for svg in page.all_of("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("aria-label") or svg.get("class") == "clip"


def test_every_op_has_a_row_and_every_point_leads_to_one() -> None:
    explanation = gpt2()
    page = Page(render(explanation))
    ids = {f"{version}-{number}" for version, count in (("before", 26), ("after", 10)) for number in range(count)}
    assert {attrs["id"] for attrs in page.all_of("tr") if "id" in attrs} == ids
    marks = [attrs for tag, attrs in page.tags if attrs.get("class") == "mark" and tag == "a"]
    assert {attrs["href"][1:] for attrs in marks} <= ids
    points = [attrs for attrs in page.all_of("circle") if attrs.get("class", "").startswith("point")]
    assert len(points) == 32  # every op that takes time


def test_what_a_newcomer_asks_is_at_the_head() -> None:
    text = render(gpt2(after=False))
    head = re.sub(r"<wbr>", "", text[text.index('class="columns"') : text.index('id="time"')])
    assert re.findall(r'class="name"[^>]*>([^<]+)<', head) == [
        "unattributed",
        "transformer.h.*.mlp.act",
        "transformer.h.*.mlp.c_proj",
        "linear + activation",
        "add_layer_norm",
        "add_layer_norm (next layer)",
    ]
    values = ["3.88 ms", "217 µs", "99.6 µs", "428 µs", "242 µs", "74.4 µs", "62.4 µs", "39.6 µs"]
    assert re.findall(r'class="value">(?:\N{MINUS SIGN})?([^<]+)<', head) == values


def test_a_prediction_says_so_and_leaves_out_what_it_cannot_know() -> None:
    text = render(predicted())
    assert "One call, predicted" in text
    assert "NVIDIA A100, predicted" in text
    assert 'id="timeline"' not in text
    assert 'id="graph"' not in text
    assert 'id="code"' not in text


def test_an_explanation_of_nothing() -> None:
    empty = Explanation("Empty", (), replace(gpt2().before, blocks=(), end_to_end_us=0.0))
    Page(render(empty))


def test_a_page_stays_under_3_mb() -> None:
    found = gpt2()
    block = found.before.blocks[1]
    profile = replace(found.before, blocks=tuple(replace(block, path=f"layer.{i}", count=1) for i in range(200)))
    names = tuple((f"node_{i}", "aten.add", "") for i in range(2000))
    picture = GraphPicture("large", names, tuple((f"node_{i}", f"node_{i + 1}") for i in range(1999)))
    large = replace(
        found,
        before=profile,
        after=profile,
        pictures=(picture,),
        timeline=found.timeline * 500,
        code="x = torch.ops.aten.add(x, y)\n" * 100_000,
    )
    text = render(large)
    assert len(text.encode()) < 3e6
    assert "3700 ops more" in text
    assert "the rest cut off" in text


def test_templates_are_in_the_package() -> None:
    folder = resources.files("burnish.report").joinpath("templates")
    assert {file.name for file in folder.iterdir()} >= {
        "report.html.j2",
        "charts.html.j2",
        "tables.html.j2",
        "report.css",
        "report.js",
    }
