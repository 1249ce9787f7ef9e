"""The sentences that every form begins with: what came out, what would stay, how to get it, how it was timed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from burnish._text import plain
from burnish.report import digest, html, markdown, sentences, terminal
from burnish.report.data import NOT_IN_USE
from tests.report.explanations import gpt2, predicted, with_graph


def test_the_sentence() -> None:
    assert sentences.summary(gpt2()) == (
        "GPT2LMHeadModel takes 371 us a call on NVIDIA H200, 12.45x as fast as before (4.62 ms). "
        "Its ops as they are need at least 73.6 us there (20%)."
    )
    before = sentences.summary(gpt2(after=False))
    assert "For 84% of the call no op runs" in before
    assert "Fusing what can be fused would save about 419 us, 9.1% of the call and 56% of what the ops take." in before
    assert before.endswith("That leaves about 4.2 ms a call, 1.1x as fast.")
    imagined = predicted()
    assert "would take about 404 us a call on NVIDIA A100, by the costs of its ops alone." in sentences.summary(
        imagined
    )
    faster = replace(imagined, after=replace(imagined.before, end_to_end_us=202.0))
    assert ", and 202 us with what can be fused, 2.00x as fast, by the costs" in sentences.summary(faster)
    unused = gpt2()
    assert unused.after is not None
    unused = replace(unused, after=replace(unused.after, version=NOT_IN_USE, end_to_end_us=5000.0))
    assert sentences.summary(unused).startswith(
        "GPT2LMHeadModel takes 4.62 ms a call on NVIDIA H200, and stays as it was: optimized it takes 5 ms."
    )


def test_a_cpu_is_the_host_itself() -> None:
    there = gpt2(after=False)
    here = replace(there, before=replace(there.before, device="a CPU", cuda=False))
    assert "no op runs: the device waits for the host." in sentences.summary(there)
    assert "For 84% of the call no op runs: Python does, between the ops." in sentences.summary(here)
    forms = {
        "terminal": lambda found: plain(*terminal.render(found), width=100),
        "markdown": markdown.render,
        "page": html.render,
    }
    for form, render in forms.items():
        assert re.search(r"the host\b", render(there)), form
        assert not re.search(r"the host\b|the device waits|on the device", render(here)), form


def test_a_cuda_graph_is_told_apart_from_fusing() -> None:
    found = with_graph(gpt2(after=False))
    said = "Capturing its launches once as a CUDA graph would save about 3.87 ms, fusing what can be fused 419 us, 9.1%"
    assert said in sentences.summary(found)
    assert sentences.summary(found).endswith("Together: about 334 us a call, 14x as fast.")
    assert digest.together_us(found.opportunities) == digest.together_us(gpt2(after=False).opportunities)
    first = digest.possible(found.opportunities)[0]
    assert digest.places(found)[first] == "the whole call"
    alone = replace(found, opportunities=found.opportunities[:1])
    assert sentences.summary(alone).endswith("would save about 3.87 ms. That leaves about 753 us a call, 6.1x as fast.")
    done = with_graph(gpt2())
    assert digest.capturing_us(done.opportunities) == pytest.approx(
        found.before.unattributed_us - done.after.unattributed_us  # type: ignore[union-attr]
    )


def test_how_to_get_it_before_it_is_done() -> None:
    does = "`fast = burnish.optimize(model)` does all of this"
    assert sentences.how(gpt2(after=False)) == f"{does}; `fast.report(args)` measures it."
    assert sentences.how(predicted()) == f"{does}."
    own = replace(gpt2(after=False), rewrites=("attention: einsum",))
    assert sentences.how(own).startswith("`fast = burnish.optimize(model, rewrites=[...])` does all of this")
    assert sentences.how(gpt2()) == ""
    assert sentences.how(replace(gpt2(after=False), opportunities=())) == ""


def test_an_op_that_two_rewrites_take_is_accounted_for() -> None:
    found = with_graph(gpt2(after=False))
    assert not sentences.counts_once(found)
    twice = replace(found.opportunities[1], rewrite="other")
    assert sentences.counts_once(replace(found, opportunities=(*found.opportunities, twice)))
    assert not sentences.counts_once(replace(gpt2(), opportunities=(*gpt2().opportunities, twice)))


def test_what_the_times_are_of() -> None:
    found = gpt2(after=False)
    assert sentences.conditions(found) == ""
    known = replace(found, dtype="float16", torch="2.13.0", before=replace(found.before, calls=30))
    said = "float16 weights, torch 2.13.0, time of a call: mean of the fastest third of 30 calls"
    assert sentences.conditions(known) == said
