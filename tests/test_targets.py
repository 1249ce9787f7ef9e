"""Data sheets: they agree with themselves, their names are found, and their floors are what a device measures."""

from __future__ import annotations

import json
import re

import pytest
import torch

from burnish._text import plain
from burnish.hardware import DeviceInfo, Rates
from burnish.targets import TARGETS, Target, find_target, target_of

each = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.aliases[0])
FP32_LANES = {(7, 5): 64, (8, 0): 64, (8, 9): 128, (9, 0): 128, (10, 0): 128}  # per SM


@each
def test_float32_is_what_the_sms_do_at_their_clock(target: Target) -> None:
    lanes = FP32_LANES[target.compute_capability]
    assert target.gflops["float32"] == pytest.approx(target.sms * lanes * 2 * target.boost_mhz / 1e3, rel=0.02)


@each
def test_each_halving_of_a_dtype_doubles_its_rate(target: Target) -> None:
    """As the tensor cores of all these GPUs do; a rate with sparsity would stand out by a factor of 2."""
    rates = target.gflops
    assert rates.get("bfloat16", rates["float16"]) == rates["float16"]
    assert rates.get("tf32", rates["float16"] / 2) == pytest.approx(rates["float16"] / 2, rel=0.03)
    assert rates.get("fp8", rates["float16"] * 2) == pytest.approx(rates["float16"] * 2, rel=0.03)
    assert ("bfloat16" in rates) == (target.compute_capability >= (8, 0))
    assert ("fp8" in rates) == (target.compute_capability >= (8, 9))


@each
def test_every_share_is_of_something_stated_and_plausible(target: Target) -> None:
    assert set(target.measured_gflops) <= set(target.gflops)
    assert set(target.attained) == {"memory", *target.gflops}
    assert all(0.4 < share < 1.1 for share in target.attained.values())


@each
def test_every_number_says_where_it_is_from(target: Target) -> None:
    assert re.search(r"NVIDIA .*, https://\S+", target.source)
    assert target.measured_by


def test_shares_that_nobody_measured_are_assumed() -> None:
    h200, b200 = find_target("h200"), find_target("b200")
    assert h200.attained["memory"] == pytest.approx(4.24 / 4.8)
    assert b200.attained["memory"] == h200.attained["memory"]
    assert b200.attained["fp8"] == b200.attained["float16"]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h200", "NVIDIA H200"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("H100", "NVIDIA H100 SXM"),
        ("h100 pcie", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("a100", "NVIDIA A100 80GB SXM"),
        ("A100-40GB", "NVIDIA A100 40GB SXM"),
        ("rtx4090", "NVIDIA RTX 4090"),
        ("GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("4090", "NVIDIA RTX 4090"),
        ("Tesla T4", "NVIDIA T4"),
        ("l4", "NVIDIA L4"),
        ("B200", "NVIDIA B200"),
    ],
)
def test_names_are_found_as_people_write_them(name: str, expected: str) -> None:
    assert find_target(name).label == expected


def test_no_name_means_two_targets() -> None:
    names = [name for target in TARGETS for name in {target.name, target.driver_name, *target.aliases}]
    assert len({re.sub("[^a-z0-9]", "", name.lower()) for name in names}) == len(names)
    assert all(find_target(name) is target for target in TARGETS for name in target.aliases)


@pytest.mark.parametrize("name", ["v100", "", "nvidia"])
def test_an_unknown_name_is_refused_with_all_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^there is no target '{name}'; there are: a100-40gb, .*, t4$"):
        find_target(name)


def test_the_drivers_name_leads_to_the_data_sheet() -> None:
    sheet = target_of("Tesla T4")
    assert sheet is not None
    assert sheet.aliases == ("t4",)
    assert target_of("NVIDIA A100-PCIE-40GB") is None


# Floors ---------------------------------------------------------------------------------------------------------------


def test_a_product_on_the_h200_takes_what_it_was_measured_to_take() -> None:
    floor = find_target("h200").floor_us(2 * 8192**3, 3 * 2 * 8192**2, torch.bfloat16)
    assert floor == pytest.approx(2 * 8192**3 / 774e12 * 1e6, rel=0.05)


def test_floors_are_those_of_the_device_with_the_same_rates() -> None:
    target = find_target("h200")
    rates = Rates(4_240, {"float32": 51_000, "float16": 744_000, "bfloat16": 774_000}, "2026-01-01")
    here = DeviceInfo("NVIDIA H200", "cuda", "sm_90", 132, 0, (), 0, {}, {}, rates)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for flops, num_bytes in ((1e12, 1e6), (1e6, 1e9), (0, 1e6), (1e9, 0)):
            assert target.floor_us(flops, num_bytes, dtype) == pytest.approx(here.floor_us(flops, num_bytes, dtype))


def test_the_vendors_peaks_give_lower_floors() -> None:
    target = find_target("h200")
    assert target.floor_us(0, 4_800e3, attained=False) == pytest.approx(1.0)
    assert target.floor_us(989_400e3, 0, torch.float16, attained=False) == pytest.approx(1.0)
    assert target.floor_us(0, 4_240e3) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "dtype", "runs_as"),
    [
        ("t4", torch.bfloat16, "float32"),
        ("a100", torch.float8_e4m3fn, "float16"),
        ("h200", torch.float8_e5m2, "fp8"),
        ("h200", torch.float64, "float32"),
    ],
)
def test_a_dtype_without_matrix_units_counts_as_what_it_is_converted_to(
    name: str, dtype: torch.dtype, runs_as: str
) -> None:
    target = find_target(name)
    assert target.floor_us(target.gflops[runs_as] * 1e3, 0, dtype, attained=False) == pytest.approx(1.0)


# Text and JSON --------------------------------------------------------------------------------------------------------


@each
def test_it_prints_in_80_columns(target: Target) -> None:
    text = plain(target, width=80)
    assert text.splitlines()[0] == target.name
    assert max(map(len, text.splitlines())) <= 80
    assert all(f" {dtype} " in text for dtype in target.gflops)
    assert ("assumed" in text) == (target.measured_gbs is None or set(target.measured_gflops) != set(target.gflops))


@each
def test_json(target: Target) -> None:
    data = json.loads(json.dumps(target.to_dict()))
    assert data["gflops"] == target.gflops
    assert data["attained"]["memory"] == target.attained["memory"]
    assert data["architecture"] == f"sm_{target.compute_capability[0]}{target.compute_capability[1]}"
