"""What holds for every test: nothing reaches the user's cache folder, and no decision depends on a stopwatch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import interpreter

# The same examples each time: no run fails by the luck of a draw. `HYPOTHESIS_PROFILE=explore` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Inductor would try a compiler on every set of instructions first, for 15 s; read when it is imported.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads in each would stand in each other's way for minutes
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any is imported
    if importlib.util.find_spec("triton") is not None:
        interpreter.quicken()


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the user's cache folder during one test."""
    home = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`optimize` measures nothing: each Op runs by its first Impl that can, and the result is never given up as slower.

    Every weight that may be stored (K, N) is, because no clock says that it should not.
    """
    from burnish.checks import Checks
    from burnish.prepare import Preparer
    from burnish.tuning import Tuner

    monkeypatch.setattr(Tuner, "FIRST_BUDGET_US", 0.0)
    monkeypatch.setattr(Tuner, "NEW_SIZE_BUDGET_US", 0.0)
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 2.0, "optimized": 1.0})
    monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight: True)
