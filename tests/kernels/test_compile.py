"""Every Triton or Gluon Impl compiles for each generation of GPUs and does not spill: the first config of each, and, in
slow tests, every config that it offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from burnish.op import OPS
from tests.kernels.aot import CAPABILITIES, _early_arrivals

import burnish.ops  # noqa: F401 isort: skip

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one block may use
RESERVED = 1024  # bytes that the system takes of each block
STACK = {
    ("attention_keys_backward_kernel", 90): 768,
    **{("attention_queries_backward_kernel", c): 24 for c in CAPABILITIES},
    ("linear_gelu_wgmma_kernel", 90): 64,  # by triton 3.9: what stays the same, asked for once in a tile
}
"""Bytes that threads may spill, of kernels that were measured to be faster so than by configs that spill nothing, or
that store a few numbers before their loop and load them once after it."""
WITH_KERNELS = sorted(
    name for name, op in OPS.items() if any("triton" in impl or impl.startswith("gluon") for impl in op.impls)
)


@pytest.fixture(scope="module")
def few() -> Any:
    """What one process that compiles a little of all says: to start one takes as long as ten kernels do."""
    return _aot("--few")


def test_every_kernel_compiles_and_does_not_spill(few: Any) -> None:
    _assert_fit(few["first"])
    assert {entry["capability"] for entry in few["first"]} == set(CAPABILITIES)
    compiled = {entry["label"].split()[0] for entry in few["first"]}
    assert compiled == set(WITH_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_config_compiles_on_every_sample(name: str) -> None:
    compiled = _aot(name)
    _assert_fit(compiled)
    assert {entry["capability"] for entry in compiled} == set(CAPABILITIES)


def test_a_new_number_of_tokens_compiles_nothing(few: Any) -> None:
    one, several = few["rows"]
    assert several == one


def test_nothing_is_stored_where_a_barrier_was_initialized(few: Any) -> None:
    """Triton gives the place of a barrier that nobody waits for to other things. A kernel with one hung on an H200."""
    assert len(few["--barriers"]) == 3
    _assert_barriers_are_kept(few["--barriers"])


@pytest.mark.slow
def test_nothing_is_stored_where_a_barrier_was_initialized_with_any_config() -> None:
    kernels = _aot("--barriers")
    assert len(kernels) > 10
    _assert_barriers_are_kept(kernels)


def test_attention_at_models_sizes(few: Any) -> None:
    _assert_fit(few["--attention"])


@pytest.mark.slow
def test_attention_at_models_sizes_with_every_config() -> None:
    _assert_fit(_aot("--attention"))


def test_attention_by_teams_that_share_queries(few: Any) -> None:
    _assert_synchronized(few["--shared-attention"])


@pytest.mark.slow
def test_attention_by_teams_that_share_queries_with_every_mask() -> None:
    _assert_synchronized(_aot("--shared-attention"))


def test_tiles_finished_by_a_team_of_their_own(few: Any) -> None:
    _assert_synchronized(few["--finishing"])


@pytest.mark.slow
def test_tiles_finished_by_a_team_of_their_own_with_every_activation() -> None:
    _assert_synchronized(_aot("--finishing"))


def test_products_around_gelu(few: Any) -> None:
    _assert_synchronized(few["--gelu"])


@pytest.mark.slow
def test_products_around_gelu_with_every_activation() -> None:
    _assert_synchronized(_aot("--gelu"))


def test_sampling_from_full_vocabularies(few: Any) -> None:
    _assert_fit(few["--vocabularies"])


@pytest.mark.slow
def test_sampling_from_full_vocabularies_with_every_config() -> None:
    compiled = _aot("--vocabularies")
    _assert_fit(compiled)
    assert {entry["capability"] for entry in compiled} == set(CAPABILITIES)


def test_what_gpus_exchange_arrives_whole(few: Any) -> None:
    _assert_exchanged_whole(few["--shared-memory"])


@pytest.mark.slow
def test_what_gpus_exchange_arrives_whole_with_every_config() -> None:
    _assert_exchanged_whole(_aot("--shared-memory"))


def test_rows_pushed_to_other_gpus_are_there_before_their_flags(few: Any) -> None:
    _assert_flags_follow(few["--pushed-rows"])


@pytest.mark.slow
def test_rows_pushed_to_other_gpus_are_there_before_their_flags_with_every_config() -> None:
    _assert_flags_follow(_aot("--pushed-rows"))


def test_tokens_of_padded_batches(few: Any) -> None:
    _assert_fit(few["--tokens"])


@pytest.mark.slow
def test_tokens_of_padded_batches_on_every_generation() -> None:
    compiled = _aot("--tokens")
    _assert_fit(compiled)
    assert {entry["capability"] for entry in compiled} == set(CAPABILITIES)


def test_arrivals_for_other_warps_are_found() -> None:
    arrival, meeting = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];", "bar.sync \t2, 128;"
    for access in ("st.shared.b32 [%r2], %r3;", "ld.shared.v4.b32 {%r4}, [%r2];", "$L__BB0_1:", "stmatrix.sync [%r1]"):
        assert _early_arrivals("\n".join((meeting, access, arrival))) == [arrival]
        assert not _early_arrivals("\n".join((access, meeting, arrival)))


def _assert_exchanged_whole(kernels: Any) -> None:
    """By 64 bits, in the scope of the system: PTX takes a volatile load for a relaxed one in that scope, and each entry
    of a vector by itself."""
    assert kernels
    for kernel in kernels:
        assert not kernel["spills"], kernel
        stores, loads = ([i for i in kernel["exchange"] if i.startswith(kind)] for kind in ("st.", "ld."))
        assert stores == ["st.relaxed.sys.global.b64"]
        assert loads
        of_words, of_the_call = "ld.volatile.global.b64", "ld.volatile.global.b32"
        assert {load.replace(".v2", "") for load in loads} == {of_words, of_the_call}


def _assert_flags_follow(kernels: Any) -> None:
    """All threads store, 16 bytes at a time, and meet before one of them passes a fence and writes a flag; rows are
    read behind a load that acquires, and from no cache of this multiprocessor's."""
    assert kernels
    for kernel in kernels:
        assert kernel["spills"] <= 16, kernel  # those of triton 3.6, where 8 ranks' rows of 16 KiB are added up
        steps = [step for step in kernel["steps"] if step != "griddepcontrol.wait"]
        assert steps[:4] == ["st.global.v4", "bar.sync", "fence.acq_rel.sys", "st.relaxed.sys"]
        assert steps.count("st.relaxed.sys") == 1
        assert steps[steps.index("ld.acquire.sys") + 1] == "ld.global.cg.v4"
        assert "ld.global.nc" not in steps
        assert kernel["exchange"] == ["ld.volatile.global.b32", "st.relaxed.sys.global.b32"]


def _assert_barriers_are_kept(kernels: Any) -> None:
    assert all(kernel["barriers"] for kernel in kernels)
    assert not [kernel for kernel in kernels if kernel["overwritten"] or kernel["early"]]


def _assert_synchronized(kernels: Any) -> None:
    assert len(kernels) >= 3
    for kernel in kernels:
        assert kernel["spills"] <= STACK.get((kernel["kernel"].partition(" ")[0], 90), 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[90], kernel
    _assert_barriers_are_kept(kernels)


def _assert_fit(compiled: Any) -> None:
    assert compiled
    faults = [
        entry
        for entry in compiled
        if "error" in entry
        or entry["spills"] > STACK.get((entry["kernel"], entry["capability"]), 0)
        or entry["shared"] > SHARED_MEMORY[entry["capability"]]
        or (entry["shared"] + RESERVED) * entry["per_sm"] > SHARED_MEMORY[entry["capability"]] + RESERVED
    ]
    assert not faults


def _aot(*arguments: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tests.kernels.aot", *arguments], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)
