"""What blocks a rewrite is said once, with the number of places, in every form of a report."""

from __future__ import annotations

from dataclasses import replace

from burnish._text import plain
from burnish.report import html, markdown, terminal
from burnish.report.blocked import Blocked, blocked
from burnish.report.data import Explanation, Opportunity
from tests.report.explanations import gpt2


def explanation(*opportunities: Opportunity) -> Explanation:
    return replace(gpt2(after=False), opportunities=opportunities)


def miss(block: str, reason: str, saves: float, count: int = 12, rewrite: str = "norm prologue") -> Opportunity:
    return Opportunity(rewrite, "", block, count, (), 10.0, 10.0 - saves, blocked_by=reason)


TWICE = explanation(
    miss("h.*", "linear_3 reads it", 1.0),
    miss("other", "2 rows", 2.0, count=1, rewrite="other"),
    miss("g.*", "linear_7 reads it", 2.0),
    Opportunity("done", "burnish.x", "h.*", 1, (), 2.0, 1.0),
)


def test_one_reason_is_one_entry_by_what_it_would_save() -> None:
    assert blocked(TWICE) == [
        Blocked("norm prologue", "linear_7 reads it", "g.*; h.*", 24, 36.0),
        Blocked("other", "2 rows", "other", 1, 2.0),
    ]


def test_many_places_are_not_all_named() -> None:
    (one,) = blocked(explanation(*(miss(f"block{i}", "no", 1.0) for i in range(9))))
    assert one.where == "block0; block1; and 7 more"
    (one,) = blocked(explanation(*(miss(f"block{i}", "no", 1.0) for i in range(3))))
    assert one.where == "block0; block1; block2"  # "and 1 more" would say less


def test_every_form_tells_it_once() -> None:
    shown = plain(*terminal.render(TWICE), width=100)
    assert "blocked norm prologue, 24 x in g.*; h.*: linear_7 reads it\nblocked other in other: 2 rows" in shown
    assert r"- `norm prologue`, 24 x in `g.*; h.*`: linear\_7 reads it" in markdown.render(TWICE).splitlines()
    page = html.render(TWICE)
    assert page.count("reads it") == 1
    assert "<strong>norm prologue</strong>, at 24 places in" in page


def test_a_terminal_says_how_many_it_leaves_out() -> None:
    many = explanation(*(miss("h.*", f"{i} rows", 1.0) for i in range(13)))
    shown = plain(*terminal.render(many), width=100)
    assert shown.count("blocked norm prologue") == 10
    assert "3 more are blocked" in shown
