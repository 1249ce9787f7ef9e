"""Choosing Impls: by measured time, by memory, by neighbours, by the user's word; and the file that remembers."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish import tuning, tuning_store
from burnish.hardware import device
from burnish.measure import measure
from burnish.op import ImplUnavailable
from burnish.ops import attention, linear, rms_norm
from burnish.tuning import Key, Tuner, key_of
from burnish.tuning_store import cache_path, clear_cache

BUDGET_US = 1_000.0
TIMES = {"vector_norm": 9.0, "torch": 5.0, "reference": 20.0}


def x_of(rows: int = 4, width: int = 8) -> Tensor:
    return torch.randn(rows, width)


class Stopwatch:
    """Stands in for `measure`: gives the times it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times: dict[str, float] = TIMES
        self.measured: list[list[str]] = []

    def __call__(
        self, functions: dict[str, Callable[..., Any]], arguments: Any, *, budget_us: float
    ) -> dict[str, float]:
        self.measured.append(list(functions))
        return {name: self.times[name] for name in functions}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(tuning, "measure", watch)
    return watch


def choose(tuner: Tuner, *args: Any, budget_us: float = BUDGET_US, thorough: bool = True) -> tuning.Choice:
    function, choice = tuner.choose(rms_norm, args or (x_of(),), budget_us=budget_us, thorough=thorough)
    assert function is rms_norm.impls[choice.impl].fn
    return choice


def saved(*args: Any) -> Tuner:
    """A tuner that measured one call and wrote it down."""
    tuner = Tuner()
    choose(tuner, *args)
    tuner.save()
    return tuner


# --- which one ---


def test_the_fastest_is_chosen_and_measured_once(stopwatch: Stopwatch) -> None:
    tuner = Tuner()
    choices = [choose(tuner), choose(tuner), choose(Tuner("off"))]
    assert [(c.impl, c.times_us, c.source) for c in choices] == [("torch", TIMES, "measured")] * 3
    assert stopwatch.measured == [list(TIMES)] * 2
    assert choices[0] is choices[1]


@pytest.mark.parametrize(("us", "impl"), [(5.1, "vector_norm"), (5.2, "torch")])
def test_only_a_faster_one_displaces_the_preferred_one(us: float, impl: str, stopwatch: Stopwatch) -> None:
    stopwatch.times = {**TIMES, "vector_norm": us}
    assert choose(Tuner()).impl == impl


def test_what_cannot_take_the_call_is_not_measured_and_the_reason_kept(stopwatch: Stopwatch) -> None:
    choice = choose(Tuner(), x_of(), torch.ones(8, dtype=torch.float64))
    assert stopwatch.measured == [["vector_norm", "reference"]]
    assert list(choice.rejected) == ["torch", "triton"]
    assert "weight" in choice.rejected["torch"][0]
    assert choice.impl == "vector_norm"


def test_without_a_budget_the_first_that_can_is_taken(stopwatch: Stopwatch) -> None:
    choice = choose(Tuner(), budget_us=0)
    assert (choice.impl, choice.source, stopwatch.measured) == ("vector_norm", "default", [])


def test_the_only_one_that_can_is_not_measured(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "impls", {n: i for n, i in rms_norm.impls.items() if n != "vector_norm"})
    choice = choose(Tuner(), x_of(), torch.ones(8, dtype=torch.float64))
    assert (choice.impl, choice.source, stopwatch.measured) == ("reference", "only", [])


def test_rivals_in_a_model_are_the_nearest_few_of_each_impl(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"torch": 5, "vector_norm": 5, "triton": 4, "reference": 1}
    names = {f"{impl} {config}": (impl, str(config)) for impl, count in configs.items() for config in range(count)}
    monkeypatch.setattr(
        tuning, "candidates_of", lambda op, args, able, live_rows: {n: names[n] for n in names if names[n][0] in able}
    )
    times = {name: 10.0 + 0.1 * place for place, name in enumerate(names)} | {"reference 0": 15.0}
    choice = tuning.Choice("torch", times, source="measured", config="0")

    def of(choice: tuning.Choice) -> list[str]:
        return [rival.candidate for _, rival in Tuner("off").rivals(rms_norm, rms_norm.bind(x_of()), choice, False)]

    triton = ["triton 0", "triton 1", "triton 2"]  # up to 8 in all, 3 of an Impl, the chosen one left out
    torchs, vectors = ["torch 1", "torch 2", "torch 3"], ["vector_norm 0", "vector_norm 1", "vector_norm 2"]
    assert of(choice) == torchs + vectors + triton[:2]
    assert of(dataclasses.replace(choice, rejected={"vector_norm": ["no"]})) == torchs + triton  # the reference: 1.5x
    slow = dict.fromkeys(times, 14.1) | {"torch 0": 10.0, "reference 0": 13.9}
    assert of(dataclasses.replace(choice, times_us=slow)) == ["reference 0"]


# --- the user's word ---


def test_an_explicit_impl_is_never_measured(stopwatch: Stopwatch) -> None:
    choice = choose(Tuner(explicit={"rms_norm": "reference"}))
    assert (choice.impl, choice.source, stopwatch.measured) == ("reference", "explicit", [])


def test_an_explicit_impl_that_cannot_raises_with_every_reason() -> None:
    x = torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 16)
    reasons = attention.impls["torch_flash"].why_not(*x)
    assert len(reasons) > 1
    with pytest.raises(ImplUnavailable) as error:
        Tuner(explicit={"attention": "torch_flash"}).choose(attention, x, budget_us=BUDGET_US)
    assert error.value.reasons == reasons
    assert all(reason in str(error.value) for reason in reasons)


def test_optimize_takes_an_explicit_impl_or_raises() -> None:
    model = nn.RMSNorm(8, eps=1e-5).eval()
    fast = burnish.optimize(model, (x_of(),), impls={"rms_norm": "reference"}, cache="off")
    assert [choice.impl for choice in fast.schedule.served[0].choices.values()] == ["reference"]
    with pytest.raises(ValueError, match="rms_norm has no Impl 'nonsense'; it has: vector_norm, torch, triton"):
        burnish.optimize(model, impls={"rms_norm": "nonsense"})
    with pytest.raises(ImplUnavailable, match=r"onednn_float32.*float16"):
        burnish.optimize(nn.Linear(8, 8), (x_of(),), impls={"linear": "onednn_float32"}, cache="off")


# --- signatures ---


def test_a_key_tells_apart_what_may_be_served_differently() -> None:
    x, weight = x_of(), torch.randn(6, 8)
    keys = [
        key_of(linear, args)
        for args in (
            (x, weight, None),
            (x, weight, weight[:, 0].contiguous()),
            (x.double(), weight.double(), None),
            (x[None], weight, None),
            (x, torch.randn(8, 6).t(), None),
            (x[:1].expand(4, 8), weight, None),
            (torch.randn(4, 9)[:, :8], weight, None),
            (x, weight, None, "relu"),
        )
    ]
    assert len({key.family for key in keys}) == len(keys)
    assert key_of(linear, (x, weight, None), differentiable=True).family != keys[0].family
    assert key_of(linear, (x_of(5), weight, None)) == Key(keys[0].family, (5, 8, 6, 8))


# --- told how many rows are wanted ---


def count(live: int) -> Tensor:
    return torch.tensor([live], dtype=torch.int32)


def test_how_many_rows_are_wanted_is_a_size() -> None:
    args = (torch.zeros(1, 600, 8), torch.zeros(6, 8), None)
    keys = [key_of(linear, args, live_rows=count(live)) for live in (0, 1, 128, 129, 600)]
    assert [key.sizes[-1] for key in keys] == [128, 128, 128, 256, 640]
    assert len({key.family for key in keys}) == 1
    assert keys[0].family != key_of(linear, args).family


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, int]]:
    """Calls of rms_norm's Impls: one is told, and has configs by its number of rows, the others are not."""
    calls: list[tuple[str, Any, int]] = []

    def aware(x: Tensor, weight: Any, eps: float, config: Any = None, live_rows: Tensor | None = None) -> Tensor:
        assert live_rows is not None
        calls.append(("aware", config, int(live_rows)))
        return x

    def other(x: Tensor, weight: Any, eps: float) -> Tensor:
        calls.append(("other", None, x.shape[1]))
        return x

    made = dataclasses.replace
    torch_impl = rms_norm.impls["torch"]
    impls = {
        "aware": made(
            torch_impl, name="aware", fn=aware, live_rows=True, configs=lambda x, *rest: [f"for {x.shape[1]} rows"]
        ),
        "other": made(torch_impl, name="other", fn=other),
    }
    monkeypatch.setattr(rms_norm, "impls", impls)
    return calls


def test_measured_with_as_many_rows_as_are_wanted(
    told: list[tuple[str, Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"aware for 600 rows": 2.5, "aware for 256 rows": 2.0, "other": 4.0}

    def run_and_time(functions: dict[str, Callable[..., Any]], arguments: Any, **_: Any) -> dict[str, float]:
        for function in functions.values():
            function(*arguments[0])
        return {name: times[name] for name in functions}

    monkeypatch.setattr(tuning, "measure", run_and_time)
    args, live, tuner = (torch.zeros(1, 600, 8), None, 1e-6), count(200), Tuner("off")
    function, choice = tuner.choose(rms_norm, args, budget_us=BUDGET_US, thorough=True, live_rows=live)
    assert sorted(told) == sorted(
        [("aware", "for 600 rows", 200), ("aware", "for 256 rows", 200), ("other", None, 600)]
    )
    assert choice.candidate == "aware for 256 rows"
    function(*args, live_rows=count(7))
    assert told[-1] == ("aware", "for 256 rows", 7)
    rivals = {rival.candidate: run for run, rival in tuner.rivals(rms_norm, args, choice, False, live)}
    rivals["aware for 600 rows"](*args, live_rows=count(9))
    assert told[-1] == ("aware", "for 600 rows", 9)
    times["other"] = 1.0
    function, choice = Tuner("off").choose(rms_norm, args, budget_us=BUDGET_US, thorough=True, live_rows=live)
    assert choice.candidate == "other"
    function(*args, live_rows=count(7))  # which takes no such thing
    assert told[-1] == ("other", None, 600)


# --- memory ---


def test_choices_are_remembered_on_disk(stopwatch: Stopwatch) -> None:
    saved()
    choice = choose(Tuner())
    assert (choice.impl, choice.times_us, choice.source) == ("torch", TIMES, "cached")
    assert len(stopwatch.measured) == 1


@pytest.mark.parametrize(
    ("rows", "budget_us", "source"),
    [(8, BUDGET_US, "nearby"), (3, BUDGET_US, "nearby"), (9, BUDGET_US, "measured"), (900, 0, "nearby")],
)
def test_a_neighbour_within_a_factor_of_two_will_do(
    rows: int, budget_us: float, source: str, stopwatch: Stopwatch
) -> None:
    saved()
    assert choose(Tuner(), x_of(rows), budget_us=budget_us, thorough=False).source == source


def test_the_nearest_neighbour_counts(stopwatch: Stopwatch) -> None:
    saved(x_of(4))
    stopwatch.times = {**TIMES, "vector_norm": 1.0}
    saved(x_of(16))
    assert [choose(Tuner(), x_of(rows), thorough=False).impl for rows in (5, 12)] == ["torch", "vector_norm"]


def test_a_thorough_choice_measures_where_a_neighbour_would_do(stopwatch: Stopwatch) -> None:
    saved()
    assert choose(Tuner(), x_of(5)).source == "measured"


def test_what_would_take_longer_than_the_budget_is_not_measured(stopwatch: Stopwatch) -> None:
    saved()  # 34 us for one call of each Impl at 4 rows
    assert choose(Tuner(), x_of(400), budget_us=34 * 5 * 101, thorough=False).source == "measured"
    assert choose(Tuner(), x_of(401), budget_us=34 * 5 * 99, thorough=False).source == "nearby"


def test_a_neighbour_that_lacks_an_impl_is_better_than_none(stopwatch: Stopwatch) -> None:
    """As at 64 rows on a GPU, which a kernel takes that those measured with 128 did not have."""
    saved()
    edit(lambda data: [times.pop("reference") for entries in data["families"].values() for times in entries.values()])
    choice = choose(Tuner(), x_of(900), thorough=False)
    assert (choice.impl, choice.source, len(stopwatch.measured)) == ("torch", "nearby", 1)
    edit(lambda data: [times.clear() for entries in data["families"].values() for times in entries.values()])
    assert choose(Tuner(), x_of(900), thorough=False).source == "default"


def test_without_a_neighbour_the_order_of_preference_decides(stopwatch: Stopwatch) -> None:
    choice = choose(Tuner(), thorough=False)
    assert (choice.impl, choice.source) == ("vector_norm", "default")
    assert not stopwatch.measured


def test_an_impl_that_is_new_is_measured(stopwatch: Stopwatch) -> None:
    saved()
    edit(lambda data: [times.pop("torch") for entries in data["families"].values() for times in entries.values()])
    assert choose(Tuner()).source == "measured"


def edit(change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(cache_path().read_text())
    change(data)
    cache_path().write_text(json.dumps(data))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: cache_path().write_text("{"),
        lambda: cache_path().write_text("[]"),
        lambda: cache_path().write_bytes(b"\xff\xfe\x00"),
        lambda: edit(lambda data: data.update(device="another machine")),
        lambda: edit(lambda data: data.update(format=0)),
        lambda: edit(lambda data: data.update(families=[])),
        lambda: edit(lambda data: data.update(families=dict.fromkeys(data["families"], 3))),
        lambda: edit(
            lambda data: data.update(families={family: {"4,8": {"torch": -1}} for family in data["families"]})
        ),
        lambda: edit(
            lambda data: data.update(families={family: {"four": {"torch": 1}} for family in data["families"]})
        ),
        lambda: cache_path().unlink(),
    ],
    ids=["cut off", "list", "binary", "device", "format", "families", "entries", "times", "sizes", "absent"],
)
def test_a_file_that_is_not_ours_counts_as_absent(spoil: Callable[[], Any], stopwatch: Stopwatch) -> None:
    saved()
    spoil()
    assert choose(saved()).source == "measured"
    assert choose(Tuner()).source == "cached", "the next save mends it"


def test_what_others_wrote_meanwhile_is_kept(stopwatch: Stopwatch) -> None:
    first, second = Tuner(), Tuner()
    for tuner, rows in ((first, 4), (second, 64)):
        choose(tuner, x_of(rows))
        tuner.save()
    assert [choose(Tuner(), x_of(rows)).source for rows in (4, 64)] == ["cached", "cached"]
    assert [file.name for file in cache_path().parent.iterdir()] == [cache_path().name]


def test_readonly_reads_and_never_writes(stopwatch: Stopwatch) -> None:
    saved()
    before = cache_path().read_text()
    tuner = Tuner("readonly")
    assert [choose(tuner).source, choose(tuner, x_of(64)).source] == ["cached", "measured"]
    tuner.save()
    assert cache_path().read_text() == before


def test_off_neither_reads_nor_writes(stopwatch: Stopwatch) -> None:
    off = Tuner("off")
    choose(off)
    off.save()
    assert not cache_path().exists()
    saved()
    assert choose(Tuner("off")).source == "measured"


def test_a_folder_that_cannot_be_written_is_no_error(stopwatch: Stopwatch) -> None:
    cache_path().parent.parent.mkdir(parents=True)
    cache_path().parent.write_text("a file where the folder should be")
    tuner = saved()
    assert choose(tuner).source == "measured"
    assert cache_path().parent.is_file()


def test_clear_cache_deletes_ours_and_nothing_else(stopwatch: Stopwatch) -> None:
    saved()
    other = cache_path().with_name("tuning-another-device.json")
    other.write_text("{}")
    foreign = cache_path().with_name("notes.txt")
    foreign.write_text("")
    assert clear_cache() == sorted([cache_path(), other])
    assert [file.name for file in cache_path().parent.iterdir()] == ["notes.txt"]
    assert clear_cache() == []


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="cache='always': use 'readwrite', 'readonly' or 'off'"):
        Tuner("always")  # type: ignore[arg-type]


# --- storage of weights ---


@pytest.mark.parametrize("wins", ["transposed", "plain"])
def test_the_storage_of_a_weight_is_measured_once(
    wins: str, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(functions: dict[str, Any], arguments: Sequence[Any], *, budget_us: float) -> dict[str, float]:
        assert all(torch.is_tensor(function(0)) for function in functions.values())
        return {name: 1.0 if name.endswith(wins) else 2.0 for name in functions}

    monkeypatch.setattr(tuning, "measure", times)
    tuner = Tuner()
    assert tuner.prefers_transposed(linear, 4, torch.randn(6, 8), budget_us=BUDGET_US) is (wins == "transposed")
    tuner.save()
    monkeypatch.setattr(tuning, "measure", None)
    assert Tuner().prefers_transposed(linear, 4, torch.randn(6, 8), budget_us=0) is (wins == "transposed")


# --- Impls that can be run in several ways ---


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """rms_norm by "torch" can be run in two ways; the list tells which configs were asked for."""
    asked: list[Any] = []
    plain = rms_norm.impls["torch"]

    def fn(*args: Any, config: str = "small") -> Tensor:
        asked.append(config)
        return plain.fn(*args)

    impl = dataclasses.replace(plain, fn=fn, configs=lambda *args: ["small", "large"])
    monkeypatch.setitem(rms_norm.impls, "torch", impl)
    return asked


@pytest.mark.parametrize("cache", ["readwrite", "off"])
def test_each_config_is_a_candidate_and_the_fastest_is_run(
    two_ways: list[Any], monkeypatch: pytest.MonkeyPatch, cache: tuning.CacheMode
) -> None:
    times = {"vector_norm": 3.0, "torch small": 2.0, "torch large": 1.0, "reference": 9.0}
    monkeypatch.setattr(tuning, "measure", lambda functions, arguments, budget_us: {n: times[n] for n in functions})
    tuner = Tuner(cache)
    function, choice = tuner.choose(rms_norm, (x_of(), None, 1e-6), budget_us=BUDGET_US, thorough=True)
    assert (choice.impl, choice.config, choice.times_us) == ("torch", "large", times)
    function(x_of(), None, 1e-6)
    assert two_ways == ["large"]
    tuner.save()
    if cache == "readwrite":
        monkeypatch.setattr(tuning, "measure", None)
        function, choice = Tuner().choose(rms_norm, (x_of(), None, 1e-6), budget_us=0, thorough=True)
        assert (choice.impl, choice.config, choice.source) == ("torch", "large", "cached")


def test_a_config_that_is_no_longer_offered_is_not_run(two_ways: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"vector_norm": 3.0, "torch small": 2.0, "torch large": 1.0, "reference": 9.0}
    monkeypatch.setattr(tuning, "measure", lambda functions, arguments, budget_us: {n: times[n] for n in functions})
    tuner = Tuner()
    tuner.choose(rms_norm, (x_of(), None, 1e-6), budget_us=BUDGET_US, thorough=True)
    tuner.save()
    only_small = dataclasses.replace(rms_norm.impls["torch"], configs=lambda *args: ["small"])
    monkeypatch.setitem(rms_norm.impls, "torch", only_small)
    _, choice = Tuner().choose(rms_norm, (x_of(), None, 1e-6), budget_us=0, thorough=True)
    assert (choice.impl, choice.config) == ("torch", "small")


def test_a_table_that_comes_with_the_package_counts_where_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = dataclasses.replace(device(measure=False), kind="cuda", name="Some GPU")
    monkeypatch.setattr(tuning_store, "device", lambda measure: info)
    monkeypatch.setattr(tuning_store, "fingerprint", lambda: info.fingerprint)
    monkeypatch.setattr(tuning_store, "TABLES", tmp_path)
    families = {"f": {"1": {"a": 1.0}, "2": {"a": 2.0}}}
    (tmp_path / f"{info.slug}.json").write_text(json.dumps({"format": 1, "device": "Some GPU", "families": families}))
    assert tuning_store.read_all() == families
    assert tuning_store.write({"f": {"2": {"b": 5.0}}})
    assert tuning_store.read_all() == {"f": {"1": {"a": 1.0}, "2": {"b": 5.0}}}
    assert '"a"' not in cache_path().read_text(), "the table stays where it is"
    (tmp_path / f"{info.slug}.json").write_text(json.dumps({"format": 1, "device": "Another", "families": families}))
    assert tuning_store.read_all() == {"f": {"2": {"b": 5.0}}}


def test_the_tables_that_ship_are_read_whole() -> None:
    files = sorted(tuning_store.TABLES.glob("*.json"))
    assert files
    for file in files:
        data = json.loads(file.read_text())
        assert tuning_store._read(file, data["device"]) == data["families"]


# --- the clock itself ---


def test_measure_walks_through_the_arguments_and_drops_what_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls: dict[str, list[int]] = {"quick": [], "slow": []}

    def function(name: str, us: float) -> Callable[[int], None]:
        def call(i: int) -> None:
            assert not torch.is_grad_enabled()
            calls[name].append(i)
            # The machine is busy in every third call: the fastest ones tell.
            clock[0] += us * (10 if len(calls[name]) % 3 == 0 else 1) / 1e6

        return call

    functions = {"quick": function("quick", 3.0), "slow": function("slow", 7.0)}
    assert measure(functions, [(0,), (1,)], budget_us=1e9) == {"quick": 3.0, "slow": 7.0}
    assert calls["quick"][:5] == [0, 0, 1, 0, 1]
    assert calls["slow"][:2] == [0, 1], "one ahead: what the other has just read is in the cache"
    assert len(calls["slow"]) < len(calls["quick"])
    calls["quick"].clear()
    measure({"quick": functions["quick"]}, [(0,)], budget_us=1.0)
    assert len(calls["quick"]) == 5, "the first call warms up; fewer than four would be noise"
