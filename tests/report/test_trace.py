"""The trace against the Trace Event Format: its fields, their types, and events of a thread that do not cross."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from burnish.report.data import Span
from burnish.report.trace import trace_events
from tests.report.explanations import gpt2, predicted


def check(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What the format asks of complete and metadata events; returns the complete ones."""
    trace = json.loads(json.dumps(trace))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    complete = []
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "args"} <= set(event)
        assert isinstance(event["name"], str)
        assert isinstance(event["args"], dict)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
        else:
            assert event["ph"] == "X"
            assert isinstance(event["cat"], str)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            complete.append(event)
    for thread in {event["tid"] for event in complete}:
        events = sorted((e for e in complete if e["tid"] == thread), key=lambda e: e["ts"])
        for first, second in itertools.pairwise(events):
            assert first["ts"] + first["dur"] <= second["ts"] + 2e-3, (first, second)
    return complete


@pytest.mark.parametrize("after", [False, True])
def test_valid_and_complete(after: bool) -> None:
    explanation = gpt2(after)
    events = check(trace_events(explanation))
    kernels = [event for event in events if event["cat"] == "kernel"]
    assert [(k["name"], k["ts"], k["dur"]) for k in kernels] == [
        (span.name, round(span.start_us, 3), round(span.us, 3)) for span in explanation.timeline
    ]
    ops = [event for event in events if event["cat"] == "op"]
    assert len(ops) == len({span.row for span in explanation.timeline})
    assert ops[0]["args"]["source"] in ("modeling_gpt2.py:254", "pytorch_utils.py:116")


def test_names_say_which_block_of_which_version() -> None:
    names = [event["args"]["name"] for event in trace_events(gpt2())["traceEvents"] if event["ph"] == "M"]
    assert names == ["GPT2LMHeadModel, optimized: transformer.h.* (12 x GPT2Block)", "ops", "kernels 1"]


def test_kernels_at_the_same_time_get_threads_of_their_own() -> None:
    spans = (Span("a", "linear", 0.0, 5.0), Span("b", "attention", 2.0, 2.0), Span("c", "linear", 6.0, 1.0))
    events = check(trace_events(replace(gpt2(), timeline=spans)))
    assert {event["name"]: event["tid"] for event in events if event["cat"] == "kernel"} == {"a": 1, "b": 2, "c": 1}
    ops = [(event["name"], event["ts"], event["dur"]) for event in events if event["cat"] == "op"]
    assert ops == [("linear", 0.0, 2.0), ("attention", 2.0, 2.0), ("linear", 6.0, 1.0)]


def test_a_prediction_has_no_events() -> None:
    assert check(trace_events(predicted())) == []
