import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import burnish.hardware
from burnish.hardware import DeviceInfo, Rates, device, fingerprint

RATES = Rates(copy_gbs=30.0, gflops={"float32": 200.0, "bfloat16": 400.0}, date="2026-01-01T00:00:00+00:00")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """An empty cache folder and a measurement that costs nothing; the devices measured are listed."""
    calls: list[torch.device] = []

    def measure(target: torch.device) -> Rates:
        calls.append(target)
        return RATES

    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(burnish.hardware, "_measure", measure)
    monkeypatch.setattr(burnish.hardware, "_remembered", {})
    return calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: only what is on disk is known."""
    monkeypatch.setattr(burnish.hardware, "_remembered", {})


def saved_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


def test_describes_this_cpu() -> None:
    info = device("cpu", measure=False)
    assert info.kind == "cpu"
    assert info.name
    assert info.architecture
    assert info.cores >= 1
    assert info.threads == torch.get_num_threads()
    assert "float32" in info.capabilities
    assert info.versions["torch"] == torch.__version__
    assert info.rates is None


def test_every_way_to_say_cpu() -> None:
    assert device(torch.device("cpu"), measure=False) == device("cpu:0", measure=False) == device("cpu", measure=False)


def test_default_is_cuda_where_there_is_one() -> None:
    assert device(measure=False).kind == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("target", ["tpu9000", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(target: str) -> None:
    with pytest.raises(ValueError, match=rf"target='{target}' is not .*; these are here: 'cpu'"):
        device(target)


def test_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="target=7 is a int"):
        device(7)  # type: ignore[arg-type]


def test_measures_plausible_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(burnish.hardware, "_remembered", {})
    rates = device("cpu").rates
    assert rates is not None
    assert 0.5 < rates.copy_gbs < 5_000
    assert 1 < rates.gflops["float32"] < 500_000
    assert ("bfloat16" in rates.gflops) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_measures_once_per_process_and_once_per_machine(
    measured: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device("cpu").rates == device("cpu").rates == RATES
    assert len(measured) == 1
    forget(monkeypatch)
    assert device("cpu").rates == RATES
    assert len(measured) == 1
    device("cpu", refresh=True)
    assert len(measured) == 2


def test_another_number_of_threads_is_another_device(measured: list[torch.device]) -> None:
    threads = torch.get_num_threads()
    first = fingerprint("cpu")
    device("cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert fingerprint("cpu") != first
        device("cpu")
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2
    assert fingerprint("cpu") == first


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda saved: "not json", id="not json"),
        pytest.param(lambda saved: "[1, 2]", id="a list"),
        pytest.param(lambda saved: json.dumps({**saved, "copy_gbs": -1}), id="negative"),
        pytest.param(lambda saved: json.dumps({**saved, "copy_gbs": math.nan}), id="NaN"),
        pytest.param(lambda saved: json.dumps({**saved, "gflops": {}}), id="no rates"),
        pytest.param(lambda saved: json.dumps({**saved, "gflops": [3]}), id="rates of another type"),
        pytest.param(lambda saved: json.dumps({**saved, "date": "yesterday"}), id="no date"),
        pytest.param(lambda saved: json.dumps({**saved, "fingerprint": "another machine"}), id="another machine"),
    ],
)
def test_a_damaged_cache_is_measured_again(measured, tmp_path, monkeypatch, damage) -> None:  # type: ignore[no-untyped-def]
    device("cpu")
    path = saved_file(tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    forget(monkeypatch)
    assert device("cpu").rates == RATES
    assert len(measured) == 2
    assert json.loads(path.read_text())["copy_gbs"] == RATES.copy_gbs


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    measured: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath("file", *parts))
    assert device("cpu").rates == RATES


def test_fingerprint_measures_nothing(measured: list[torch.device]) -> None:
    assert fingerprint("cpu") == device("cpu", measure=False).fingerprint
    assert torch.__version__ in fingerprint("cpu")
    assert not measured


def test_floor_is_the_larger_of_memory_and_compute() -> None:
    info = replace(device("cpu", measure=False), rates=RATES)
    assert info.floor_us(flops=200e3, num_bytes=0) == pytest.approx(1.0)
    assert info.floor_us(flops=0, num_bytes=30e3) == pytest.approx(1.0)
    assert info.floor_us(flops=200e3, num_bytes=90e3) == pytest.approx(3.0)
    assert info.floor_us(400e3, 0, torch.bfloat16) == pytest.approx(1.0)
    assert info.floor_us(400e3, 0, torch.float16) == pytest.approx(1.0)  # not measured: the highest rate


def test_floor_without_rates_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="without measure=False"):
        device("cpu", measure=False).floor_us(1, 1)


def test_prints_as_a_table_and_as_json() -> None:
    info = DeviceInfo(
        name="Test CPU",
        kind="cpu",
        architecture="family 1 model 2",
        cores=4,
        threads=2,
        capabilities=("AVX2", "float32"),
        memory_bytes=8 * 2**30,
        caches={"L2": 2**20},
        versions={"torch": "2.13.0"},
        rates=RATES,
    )
    text = str(info)
    for expected in ("Test CPU", "8 GiB", "L2 1 MiB", "30.0 GB/s", "200 GFLOP/s", "torch 2.13.0"):
        assert expected in text
    assert "\x1b" not in text
    assert json.loads(json.dumps(info.to_dict()))["rates"]["gflops"]["bfloat16"] == 400.0
    assert info.slug == "test-cpu-family-1-model-2-4-cores"
    assert info.label == "Test CPU (family 1 model 2), 2 threads"


@pytest.mark.gpu
def test_measures_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(burnish.hardware, "_remembered", {})
    info = device("cuda")
    assert info.rates is not None
    assert info.architecture.startswith("sm_")
    assert info.rates.copy_gbs > 100
    assert info.rates.gflops["float16"] > info.rates.gflops["float32"] > 1_000
    assert "cuda" in info.versions
