"""A kernel that was launched before is launched again without asking Triton, which would find the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.launch import Config, cdiv, first_config, kinds_of, next_power_of_2


@pytest.fixture(scope="module")
def seen() -> Any:
    """What a process of its own finds, in which kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tests.kernels.aot_launches"], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)


@pytest.mark.parametrize(("name", "kernels"), [("norm", 2), ("attention", 1), ("product", 1)])
def test_the_second_launch_is_the_first_one(seen: Any, name: str, kernels: int) -> None:
    (first, asked), (second, asked_again) = (seen["again"][name][call] for call in ("first", "second"))
    assert len(first) == asked == kernels
    assert second == first
    assert asked_again == 0


def test_other_arguments_are_launched_by_triton(seen: Any) -> None:
    """Rows that begin elsewhere, no weight; and another constant."""
    assert seen["again"]["norm"]["others"] == [1, 1]
    assert seen["again"]["attention"]["others"] == [1]


def test_launches_of_one_kind_are_of_one_kernel(seen: Any) -> None:
    assert seen["distinguished"]["count"] > 1000
    assert seen["distinguished"]["mistaken"] == []


def test_arguments_of_one_kind_are_one_to_triton(seen: Any) -> None:
    assert seen["one by one"]["mistaken"] == []
    assert seen["one by one"]["small"] == 3  # 1, multiples of 16, others: sizes may change at every call


def test_what_is_no_known_kind_is_left_to_triton() -> None:
    class Other(torch.Tensor):
        pass

    assert kinds_of((1, "text")) is None
    assert kinds_of((torch.ones(1).as_subclass(Other),)) is None
    assert kinds_of((torch.nn.Parameter(torch.ones(1)),)) == kinds_of((torch.ones(1),))


def test_configs_are_compared_by_what_they_say() -> None:
    one, same, other = Config.of(BLOCK=16), Config.of(BLOCK=16), Config.of(BLOCK=32)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
    assert one["BLOCK"] == 16
    with pytest.raises(KeyError):
        one["ROWS"]


def test_the_first_config_is_worked_out_once() -> None:
    asked: list[int] = []

    def configs(size: int) -> list[Config]:
        asked.append(size)
        return [Config.of(BLOCK=size), Config.of(BLOCK=1)]

    assert [first_config(configs, n)["BLOCK"] for n in (16, 16, 32, 16)] == [16, 16, 32, 16]
    assert asked == [16, 32]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_sizes_are_rounded_as_triton_does(n: int) -> None:
    import triton

    assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert cdiv(n, 4) == triton.cdiv(n, 4)
