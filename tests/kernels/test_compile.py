"""Every Triton or Gluon Impl, with every config it offers, compiles for each generation of GPUs and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from burnish.op import OPS
from tests.kernels.aot import CAPABILITIES, _early_arrivals
from tests.slow import slow

import burnish.ops  # noqa: F401 isort: skip

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one block may use
RESERVED = 1024  # bytes that the system takes of each block
WITH_KERNELS = sorted(
    name for name, op in OPS.items() if any("triton" in impl or impl.startswith("gluon") for impl in op.impls)
)


# What these compile beyond other Ops' kernels takes half a minute each.
LONG = ("gated_mlp", "linear_rope", "linear_rope_append", "rms_norm_gated_mlp", "rms_norm_linear")


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in WITH_KERNELS])
def test_kernels_compile_and_do_not_spill(name: str) -> None:
    _assert_compiles(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_config_compiles_on_every_sample(name: str) -> None:
    _assert_compiles("--everything", name)


def test_a_new_number_of_tokens_compiles_nothing() -> None:
    one, several = (_aot("--rows", *map(str, rows)) for rows in ([384], [384, 390, 600, 1000]))
    assert several == one


def test_nothing_is_stored_where_a_barrier_was_initialized() -> None:
    """Triton gives the place of a barrier that nobody waits for to other things. A kernel with one hung on an H200."""
    kernels = _aot("--barriers")
    assert len(kernels) > 10
    assert all(kernel["barriers"] for kernel in kernels)
    assert not [kernel for kernel in kernels if kernel["overwritten"] or kernel["early"]]


def test_attention_by_teams_that_share_queries() -> None:
    _assert_synchronized("--shared-attention")


@pytest.mark.slow
def test_attention_by_teams_that_share_queries_with_every_mask() -> None:
    _assert_synchronized("--shared-attention", "--everything")


def test_tiles_finished_by_a_team_of_their_own() -> None:
    _assert_synchronized("--finishing")


@pytest.mark.slow
def test_tiles_finished_by_a_team_of_their_own_with_every_activation() -> None:
    _assert_synchronized("--finishing", "--everything")


def test_arrivals_for_other_warps_are_found() -> None:
    arrival, meeting = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];", "bar.sync \t2, 128;"
    for access in ("st.shared.b32 [%r2], %r3;", "ld.shared.v4.b32 {%r4}, [%r2];", "$L__BB0_1:", "stmatrix.sync [%r1]"):
        assert _early_arrivals("\n".join((meeting, access, arrival))) == [arrival]
        assert not _early_arrivals("\n".join((access, meeting, arrival)))


def _assert_synchronized(*arguments: str) -> None:
    kernels = _aot(*arguments)
    assert len(kernels) >= 3
    faults = [
        kernel
        for kernel in kernels
        if kernel["spills"]
        or kernel["shared"] > SHARED_MEMORY[90]
        or kernel["overwritten"]
        or kernel["early"]
        or not kernel["barriers"]
    ]
    assert not faults


def _assert_compiles(*arguments: str) -> None:
    compiled = _aot(*arguments)
    assert {entry["capability"] for entry in compiled} == set(CAPABILITIES)
    faults = [
        entry
        for entry in compiled
        if "error" in entry
        or entry["spills"]
        or entry["shared"] > SHARED_MEMORY[entry["capability"]]
        or (entry["shared"] + RESERVED) * entry["per_sm"] > SHARED_MEMORY[entry["capability"]] + RESERVED
    ]
    assert not faults


def _aot(*arguments: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tests.kernels.aot", *arguments], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)
