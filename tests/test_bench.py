import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import burnish.bench
from burnish.bench import (
    RECORD_KEYS,
    Benchmark,
    BenchmarkError,
    Timing,
    Within,
    benchmark,
    load_records,
    save_records,
)
from burnish.hardware import device


class Clock:
    """A clock that only calls and pauses move, so that these tests count instead of waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("pause")

    def work(self, name: str, seconds: float):  # type: ignore[no-untyped-def]
        def call(*args: object, **kwargs: object) -> None:
            self.now += seconds
            self.log.append(name)

        return call

    def order(self) -> list[str]:
        """The variants in the order of their blocks."""
        return [after for before, after in zip(self.log, self.log[1:], strict=False) if before == "pause"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(burnish.bench, "time", SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    return clock


def records_of(case: str, *variants: str, median_us: float = 1.0) -> list[dict[str, object]]:
    return [{**dict.fromkeys(RECORD_KEYS), "case": case, "variant": v, "median_us": median_us} for v in variants]


def test_medians_and_speedups(clock: Clock) -> None:
    result = benchmark({"slow": clock.work("slow", 0.004), "fast": clock.work("fast", 0.001)}, seconds=0.1, rounds=4)
    assert result.timings["slow"].median_us == pytest.approx(4000)
    assert result.timings["fast"].median_us == pytest.approx(1000)
    assert result.speedups == pytest.approx({"slow": 1.0, "fast": 4.0})


def test_variants_take_turns_and_every_second_round_goes_backwards(clock: Clock) -> None:
    benchmark({name: clock.work(name, 0.01) for name in "abc"}, seconds=0.1, rounds=3)
    assert clock.order() == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_each_block_is_warmed_and_the_time_is_shared_out(clock: Clock) -> None:
    result = benchmark({"a": clock.work("a", 0.001)}, seconds=0.5, rounds=5)
    assert [len(block) for block in result.timings["a"].rounds] == pytest.approx([100] * 5, abs=1)
    warm_ups = len(clock.log) - clock.log.count("pause") - result.timings["a"].calls - 1  # the first call of all
    assert warm_ups >= 5 * 20  # 20 ms of 1 ms calls before each block


def test_slow_calls_get_their_minimum(clock: Clock) -> None:
    result = benchmark({"a": clock.work("a", 10.0)}, seconds=0.1, rounds=2)
    assert [len(block) for block in result.timings["a"].rounds] == [3, 3]


def test_a_context_is_entered_once_for_each_block_and_costs_nothing(clock: Clock) -> None:
    entered: list[float] = []

    @contextmanager
    def slowly() -> Iterator[None]:
        clock.now += 1.0
        entered.append(clock.now)
        yield

    result = benchmark({"a": Within(clock.work("a", 0.01), slowly), "b": clock.work("b", 0.01)}, seconds=0.1, rounds=3)
    assert len(entered) == 1 + 3  # the first call, and each block
    assert result.timings["a"].median_us == pytest.approx(result.timings["b"].median_us)


def test_a_machine_that_slows_down_leaves_the_ratio_alone() -> None:
    base = Timing(((10.0,), (20.0,) * 5, (40.0,)))
    new = Timing(
        ((5.0,) * 5, (10.0,), (20.0,))
    )  # half of base in each round, though a quarter of it by overall medians
    timings = {"base": base, "new": new}
    assert Benchmark(timings, device("cpu", measure=False), "").speedups == {"base": 1.0, "new": 2.0}


def test_percentiles_interpolate() -> None:
    timing = Timing(((5.0, 1.0, 3.0), (2.0, 4.0, 6.0)))
    assert (timing.p20_us, timing.median_us, timing.p80_us, timing.calls) == (2.0, 3.5, 5.0, 6)
    assert Timing(((7.0,),)).p80_us == 7.0


def test_arguments_reach_the_variants_and_the_first_call_is_not_counted() -> None:
    seen = []

    def variant(x: torch.Tensor, *, scale: float) -> torch.Tensor:
        seen.append(scale)
        if len(seen) == 1:
            time.sleep(0.2)  # as if compiling
        return x * scale

    result = benchmark({"only": variant}, (torch.randn(8),), {"scale": 2.0}, seconds=0.01, rounds=1)
    assert set(seen) == {2.0}
    assert max(result.timings["only"].rounds[0]) < 100_000


def test_a_real_difference_is_found() -> None:
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    result = benchmark({"large": lambda: large @ large, "small": lambda: small @ small}, seconds=0.1, rounds=3)
    assert result.speedups["small"] > 5


def test_grad_mode_is_the_callers() -> None:
    modes = set()
    with torch.no_grad():
        benchmark({"a": lambda: modes.add(torch.is_grad_enabled())}, seconds=0.001, rounds=1)
    assert modes == {False}


def test_progress_counts_blocks(clock: Clock) -> None:
    calls: list[tuple[str, int, int]] = []
    variants = {name: clock.work(name, 0.01) for name in "ab"}
    benchmark(variants, seconds=0.1, rounds=2, on_progress=lambda *call: calls.append(call))
    assert calls == [("a", 1, 4), ("b", 2, 4), ("b", 3, 4), ("a", 4, 4)]


def test_a_failing_variant_is_named() -> None:
    def broken() -> None:
        raise ZeroDivisionError("no luck")

    with pytest.raises(BenchmarkError, match="variant 'broken' raised ZeroDivisionError: no luck") as caught:
        benchmark({"fine": lambda: None, "broken": broken})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"variants": {}}, ValueError, "variants is empty"),
        ({"variants": {"a": 3}}, TypeError, r"variants\['a'\] is a int"),
        ({"seconds": 0}, ValueError, "seconds=0 must be a positive"),
        ({"seconds": float("nan")}, ValueError, "seconds=nan must be a positive"),
        ({"rounds": 0}, ValueError, "rounds=0 must be at least 1"),
        ({"cold_l2": True}, ValueError, "cold_l2=True needs CUDA"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        benchmark(**{"variants": {"a": lambda: None}, **arguments})  # type: ignore[arg-type]


def test_prints_as_a_table(clock: Clock) -> None:
    result = benchmark({"eager": clock.work("e", 0.004), "burnish": clock.work("b", 0.002)}, seconds=0.1)
    text = str(result)
    assert "times as fast as eager" in text
    assert "4 ms" in text
    assert "2.00x" in text
    assert "\x1b" not in text


def test_records_have_exactly_the_keys(clock: Clock) -> None:
    result = benchmark({"eager": clock.work("e", 0.004), "new": clock.work("n", 0.002)}, seconds=0.1)
    first, second = result.records("case", "python -m benchmarks x", kernels={"new": 7}, floor_us=123.45678)
    assert tuple(first) == RECORD_KEYS
    assert (first["variant"], first["median_us"], first["kernels"], first["floor_us"]) == ("eager", 4000, None, 123.457)
    assert second["kernels"] == 7
    assert second["versions"]["torch"] == torch.__version__
    json.dumps([first, second])


def test_a_case_measured_again_replaces_all_of_its_records(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "group.json"
    save_records(path, records_of("a", "eager", "gone") + records_of("b", "eager"))
    save_records(path, records_of("a", "eager", median_us=2.0))
    found = {(record["case"], record["variant"]): record["median_us"] for record in load_records(path)}
    assert found == {("b", "eager"): 1.0, ("a", "eager"): 2.0}
    assert [file.name for file in path.parent.iterdir()] == ["group.json"]


def test_to_json(tmp_path: Path, clock: Clock) -> None:
    benchmark({"a": clock.work("a", 0.01)}, seconds=0.1).to_json(tmp_path / "r.json", "case", "command")
    assert [record["command"] for record in load_records(tmp_path / "r.json")] == ["command"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("{}", "holds a dict"), ('[{"case": 1}]', "record 0 lacks variant"), ("[3]", "record 0")],
)
def test_a_damaged_result_file_is_named_and_kept(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        save_records(path, records_of("a", "eager"))
    assert str(path) in str(caught.value)
    assert path.read_text() == text


@pytest.mark.gpu
def test_cuda_calls_are_timed_on_the_gpu() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    result = benchmark({"matmul": lambda: x @ x, "copy": lambda: x.clone()}, (), seconds=0.2, rounds=2)
    assert result.device.kind == "cuda"
    assert result.timings["matmul"].median_us > 5_000  # 1.1 TFLOP in float32: launching alone takes some 20 us
    cold = benchmark({"copy": lambda: x.clone()}, seconds=0.1, rounds=1, cold_l2=True)
    assert cold.timings["copy"].median_us > 50
