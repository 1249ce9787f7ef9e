"""The kernels of a CUDA graph's replays: split by launch, told apart by a walk, or scaled where that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from burnish.report.kernels import Launch, Launches
from burnish.report.pieces import timeline_of
from burnish.report.replays import replays_of, told_apart
from burnish.report.rows import Rows, Seen
from tests.report.traces import host, on_device

GRAPH = fx.Graph()
X = GRAPH.placeholder("x")
LINEAR, NORM, VIEW = (GRAPH.call_function(torch.relu, (X,)) for _ in range(3))

WALKED: Launches = {
    LINEAR: [Launch("Memset (Device)", 0, 2), Launch("gemm", 10, 12)],
    VIEW: [],
    NORM: [Launch("norm", 30, 6, (4, 1, 1), (64, 1, 1))],
}
WALKED_US = {LINEAR: 14.0, VIEW: 0.0, NORM: 6.0}


def replay(start: float, correlation: int, *, last: str = "norm", slower: float = 0.0) -> list[dict[str, Any]]:
    """A fill, a product, and a norm that begins before the product has ended."""
    return [
        host("cuda_runtime", "cudaGraphLaunch", start - 20, 8, correlation=correlation),
        on_device("Memset (Unknown)", start, 1, correlation, "gpu_memset"),
        on_device("gemm", start + 2, 8 + slower, correlation, grid=[8, 1, 1]),
        on_device(last, start + 8 + slower, 4, correlation, grid=[4, 1, 1]),
    ]


def beside(start: float, correlation: int) -> list[dict[str, Any]]:
    """What a call launches besides its graph: it copies its inputs in and its outputs out."""
    return [
        host("cuda_runtime", "cudaMemcpyAsync", start - 25, 2, correlation=correlation),
        on_device("Memcpy DtoD (Device -> Device)", start - 6, 3, correlation, "gpu_memcpy"),
        host("cuda_runtime", "cudaLaunchKernel", start - 5, 2, correlation=correlation + 1),
        on_device("copy", start + 40, 3, correlation + 1),
    ]


def test_a_replay_is_what_one_launch_of_a_graph_ran() -> None:
    first, second = replays_of([*replay(300, 3), *beside(300, 5), *replay(100, 4, slower=1.0), *beside(100, 8)])
    assert [launch.name for launch in first] == ["Memset (Unknown)", "gemm", "norm"]
    assert [launch.us for launch in first] == [1, 8, 2], "the norm overlaps with the product for 2 us"
    assert (first[2].start_us, first[2].beside_us, first[2].grid) == (308, 2, (4, 1, 1))
    assert [launch.us for launch in second] == [1, 9, 2]
    assert replays_of(beside(100, 1)) == []


def test_names_tell_whose_a_kernel_is() -> None:
    quick, slow = replays_of([*replay(100, 1), *replay(200, 2, slower=5.0)])
    found = told_apart([slow, quick], WALKED, WALKED_US)
    assert found.told_apart
    assert found.launches == {LINEAR: quick[:2], VIEW: [], NORM: quick[2:]}
    assert found.us == {LINEAR: 9, VIEW: 0, NORM: 2}, "of the third that took least"


def test_times_are_means_over_the_quickest_replays() -> None:
    trace = [event for i in range(6) for event in replay(100 * (i + 1), i, slower=float(i))]
    assert told_apart(replays_of(trace), WALKED, WALKED_US).us == {LINEAR: 9.5, VIEW: 0, NORM: 2}


def test_a_walk_may_have_launched_more() -> None:
    walked = {**WALKED, NORM: [Launch("cast", 25, 1), *WALKED[NORM]]}
    (only,) = replays_of(replay(100, 1))
    found = told_apart([only], walked, WALKED_US)
    assert found.told_apart
    assert found.launches[NORM] == only[2:]


def test_the_timeline_shows_kernels_that_overlap() -> None:
    (only,) = replays_of(replay(100, 1))
    seen = Seen(fx.GraphModule({}, GRAPH), {}, launches=told_apart([only], WALKED, WALKED_US).launches)
    spans = timeline_of(seen, Rows((), {LINEAR: ("", "linear"), NORM: ("", "norm")}), [LINEAR, VIEW, NORM])
    assert [(span.row, span.start_us, span.us) for span in spans] == [
        ("linear", 0, 1),
        ("linear", 2, 8),
        ("norm", 8, 4),
    ]


def test_where_names_do_not_fit_the_walk_is_scaled_to_the_replay() -> None:
    found = told_apart(replays_of(replay(100, 1, last="another norm")), WALKED, WALKED_US)
    assert not found.told_apart
    assert found.us == pytest.approx({LINEAR: 11 * 14 / 20, VIEW: 0, NORM: 11 * 6 / 20}), "a replay takes 11 us"
    assert [launch.name for launch in found.launches[LINEAR]] == ["Memset (Device)", "gemm"]


def test_the_order_counts() -> None:
    swapped = {NORM: WALKED[LINEAR], VIEW: [], LINEAR: WALKED[NORM]}
    assert told_apart(replays_of(replay(100, 1)), swapped, WALKED_US).launches[NORM][1].name == "gemm"
    late = {**WALKED, NORM: [Launch("norm", -5, 6)]}
    assert not told_apart(replays_of(replay(100, 1)), late, WALKED_US).told_apart


def test_without_a_replay_the_walk_has_to_do() -> None:
    found = told_apart([], WALKED, WALKED_US)
    assert not found.told_apart
    assert found.us == WALKED_US
