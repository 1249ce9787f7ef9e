"""Markdown: tables that GitHub reads, and names that stay names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from burnish.report import markdown
from burnish.report.data import Explanation, Opportunity
from tests.report.explanations import gpt2, predicted, with_graph, with_strings

CELL_END = re.compile(r"(?<!\\)\|")


def tables_of(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, split where GitHub splits them: at pipes without a backslash."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in CELL_END.split(line)[1:-1]])
        inside = line.startswith("|")
    return tables


@pytest.mark.parametrize(
    "explanation",
    [gpt2(), gpt2(after=False), predicted(), with_strings(gpt2(), lambda text: text + " a|b `|` ``c`` \n|")],
    ids=["both", "before", "predicted", "pipes"],
)
def test_every_row_has_as_many_cells_as_its_heading(explanation: Explanation) -> None:
    tables = tables_of(markdown.render(explanation))
    assert len(tables) >= 4
    for heading, rule, *rows in tables:
        assert all(re.fullmatch(r"--[-:]", cell) for cell in rule)
        assert {len(rule), *map(len, rows)} == {len(heading)}, heading


def test_totals_and_speedup() -> None:
    blocks = tables_of(markdown.render(gpt2()))[0]
    assert blocks[-1] == ["end to end", "**4,620.0**", "**371.0**", "**12.45x**", "**73.6**", "**20%**", "**65**"]
    assert blocks[3] == ["`transformer.h.*` (12 x `GPT2Block`)", "705.6", "276.0", "2.56x", "51.7", "19%", "60"]
    assert tables_of(markdown.render(gpt2(after=False)))[0][-1][1:3] == ["**4,620.0**", "**100%**"]


def test_rewrites_predicted_beside_measured() -> None:
    text = markdown.render(with_graph(gpt2()))
    assert "| `CUDA graph` | `one launch` | `the whole call` | 3,867.1 | 3,8" in text
    assert (
        "| `linear + activation` | `burnish.linear` | 12 x `transformer.h.*.mlp: c_fc, act` | 242.4 | 234.0 |" in text
    )
    assert (
        "- `gated_mlp`, 12 x in `transformer.h.*`: gelu\\_tanh: is burnish::gelu\\_tanh where the pattern has mul"
        in text
    )


def test_how_to_get_it_and_a_faster_kernel() -> None:
    found = gpt2(after=False)
    assert "\n`fast = burnish.optimize(model)` does all of this; `fast.report(args)` measures" in markdown.render(found)
    head = Opportunity("linear: nn.Linear", "burnish.linear", "lm_head", 1, ("linear",), 900.0, 25.0)
    text = markdown.render(replace(found, opportunities=(head, head)))
    assert "| `burnish.linear`, by a faster kernel |" in text
    assert "\nAn op that two rewrites take counts once in the sums at the top.\n" in text


def test_kernels_by_their_short_names() -> None:
    assert "`1 x vectorized_layer_norm_kernel`" in markdown.render(gpt2())


def test_no_html_no_markup_no_mention() -> None:
    text = markdown.render(with_strings(gpt2(), lambda text: text + "<img src=x>*x* @someone [a](b)"))
    # What is left outside of code: nothing that GitHub would read as HTML, emphasis, a link or a person.
    plain = re.sub(r"(`+).*?\1|(?<=<summary>).*(?=</summary>)", "", text)
    assert set(re.findall(r"(?<!\\)<[^>]*>", plain)) <= {
        "<details>",
        "<summary>",
        "</summary>",
        "</details>",
        "<!-- -->",
    }
    assert not re.search(r"@\w", plain)
    assert not re.search(r"(?<!\\)\]\(", plain)
    summaries = re.findall(r"<summary>(.*)</summary>", text)
    assert summaries
    assert not [summary for summary in summaries if re.search(r"<(?!!-- -->)|@\w", summary)]


def test_small_enough_for_an_issue() -> None:
    found = gpt2()
    block = found.before.blocks[1]
    blocks = tuple(replace(block, path=f"layer.{i}", count=1, rows=block.rows * 40) for i in range(40))
    large = replace(found.before, blocks=blocks)
    text = markdown.render(replace(found, before=large, after=large, opportunities=found.opportunities * 20))
    assert len(text) < 65_536  # GitHub's limit
    assert "not shown: 36 smaller blocks" in text
