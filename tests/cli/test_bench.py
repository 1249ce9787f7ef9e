"""`burnish bench`: models and Ops against their peers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import burnish
from burnish.bench import RECORD_KEYS, Benchmark, Timing
from burnish.checks import Checks
from burnish.cli.bench import _unsteady
from burnish.models import ModelError
from burnish.peers import op_sizes
from burnish.tuning import Tuner
from tests.cli.running import fails, run, run_json

SHORT = ("--device", "cpu", "--seconds", "0.01")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: what is asked of torch.compile, not what it does, is ours."""
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: function)


@pytest.fixture
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op_sizes.LAYERS, "cpu", op_sizes.Layer(32, 48, 4, 2, 8))
    monkeypatch.setattr(Tuner, "FIRST_BUDGET_US", 1000.0)


def test_bench() -> None:
    args = ("bench", "factory:block", "--device", "cpu", "--seconds", "0.05")
    assert "times as fast as eager" in run(*args)
    data = run_json(*args)
    assert [record["variant"] for record in data["records"]] == ["eager", "burnish"]
    assert all(set(RECORD_KEYS) <= set(record) for record in data["records"])
    assert data["times_as_fast"]["eager"] == 1.0


def test_bench_times_eager_on_weights_that_were_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def benchmark(variants: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.update(variants)
        raise ValueError("seen enough")

    monkeypatch.setattr(burnish, "benchmark", benchmark)
    assert fails("bench", "factory:block", "--device", "cpu") == "seen enough"
    eager, fast = ({p.data_ptr() for p in seen[name].parameters()} for name in ("eager", "burnish"))
    assert eager.isdisjoint(fast)


def test_bench_without_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.cli.stages.free_memory", lambda: 1000)
    assert "a second copy of its weights needs" in fails("bench", "factory:block", "--device", "cpu")


# peers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_peers_that_are_asked_for_and_those_that_are_not_here() -> None:
    assert "Further peers: --compile, --sdpa, --onnx." in run("bench", "factory:block", *SHORT)
    args = ("bench", "factory:block", *SHORT, "--compile-mode", "default", "--compile-mode", "max-autotune", "--sdpa")
    text = run(*args)
    assert "Not timed: sdpa (Block does not call scaled_dot_product_attention)." in text
    assert "Further peers" not in text
    data = run_json(*args)
    names = ["eager", "burnish", "torch.compile", "torch.compile max-autotune"]
    assert [record["variant"] for record in data["records"]] == names
    assert [*data["not_timed"]] == ["sdpa"]


@pytest.mark.slow
def test_onnx_runtime() -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    data = run_json("bench", "factory:positional", *SHORT, "--onnx")
    assert [record["variant"] for record in data["records"]] == ["eager", "burnish", "onnxruntime"]


def test_a_busy_machine_is_said() -> None:
    def measured(**calls: tuple[float, ...]) -> Benchmark:
        timings = {name: Timing((times,)) for name, times in calls.items()}
        return Benchmark(timings, burnish.device("cpu", measure=False), "")

    assert _unsteady({"": measured(eager=(10.0,) * 9 + (90.0,))}) == []
    results = {
        " at 1 tokens": measured(eager=(10.0,) * 4 + (15.0,) * 6),
        " at 16 tokens": measured(eager=(10.0,) * 10, burnish=(10.0,) * 4 + (20.0,) * 6),
    }
    assert _unsteady(results) == [
        "Half of the calls (burnish at 16 tokens) took 20 us and more, the quickest 10 us: the machine was busy."
    ]


# sizes and plots ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_layer")
def test_an_op_at_sizes() -> None:
    text = run("bench", "gated_mlp", *SHORT, "--sizes", "8,1")
    assert "gated_mlp: x 1xnx32, gate_up_weight 96x32, down_weight 32x48, float32" in text
    assert "Not timed: liger (its kernels are for CUDA)." in text
    data = run_json("bench", "gated_mlp", *SHORT, "--sizes", "8,1", "--dtype", "bf16", "--impl", "gated_mlp=torch")
    assert [(record["size"], record["variant"]) for record in data["records"]] == [
        (1, "eager"),
        (1, "burnish"),
        (8, "eager"),
        (8, "burnish"),
    ]
    assert data["impls"] == {"1": "torch", "8": "torch"}
    assert [*data["times_as_fast"]] == ["1", "8"]


@pytest.mark.usefixtures("small_layer", "uncompiled")
def test_a_plot_has_default_sizes_and_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setitem(op_sizes._DEFAULT_SIZES, "tokens", {"cpu": (2, 4)})
    data = run_json("bench", "rms_norm", *SHORT, "--plot", "norm.svg")
    assert {record["variant"] for record in data["records"]} == {"eager", "burnish", "torch.compile"}
    assert {record["size"] for record in data["records"]} == {2, 4}
    assert (folder / "norm.svg").read_text().startswith("<?xml")
    assert data["plot"] == "norm.svg"


def test_a_model_at_sizes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    benchmark = burnish.benchmark

    def watched(variants: Any, args: Any, kwargs: dict[str, Tensor], **more: Any) -> Any:
        seen.append(tuple(kwargs["x"].shape))
        return benchmark(variants, args, kwargs, **more)

    monkeypatch.setattr(burnish, "benchmark", watched)
    text = run("bench", "factory:block", *SHORT, "--sizes", "3,7")
    assert seen == [(2, 3, 16), (2, 7, 16)]
    assert "factory:block: Block; x 2xnx16" in text
    assert "tokens" in text


def test_a_sweep_says_where_the_original_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 1.0, "optimized": 2.0})
    text = run("bench", "factory:block", *SHORT, "--sizes", "3,5")
    assert "burnish runs the original here: no Impl beat the original." in text


def test_a_name_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: Any) -> None:
        raise ModelError("it cannot be loaded")

    monkeypatch.setattr("burnish.cli.bench.load_model", load_model)
    assert fails("bench", "gated_mpl") == "it cannot be loaded; nor is it an Op (burnish ops lists them)"
    assert fails("bench", "org/model") == "it cannot be loaded"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("gated_mlp", "--sizes", "1,two"), "--sizes 1,two: write numbers with commas between, such as 1,16,256"),
        (("gated_mlp", "--sizes", "0"), "--sizes 0: write numbers"),
        (("gated_mlp", "--seq", "4", "--sdpa"), "--seq, --sdpa: gated_mlp is an Op, whose inputs are chosen by"),
        (("no.such:model", "--plot", "mlp.jpg"), "mlp.jpg: a plot ends in .svg, .png or .pdf"),
        (("no.such:model", "--plot", "missing/mlp.svg"), "--plot missing/mlp.svg: there is no folder"),
        (("factory:data_dependent", "--sizes", "2"), "factory:data_dependent cannot be captured: "),
    ],
)
def test_sizes_and_plots_that_cannot_be(args: tuple[str, ...], said: str) -> None:
    assert said in fails("bench", *args, "--device", "cpu")


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fails("bench", "no.such:model", "--plot", "x.svg") == "matplotlib is missing: pip install 'burnish[plot]'"
