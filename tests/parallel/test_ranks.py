"""Ranks that fail or hang end, and say where; nothing outlives the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import processes
from tests.parallel import ranks

ROOT = Path(__file__).parents[2]
SLEEP = "import time; print('started', flush=True); time.sleep(600)"


def fails_on_the_second(rank: int, folder: Path) -> None:
    if rank == 1:
        raise AssertionError("wrong on the second")
    dist.barrier()


def hangs(rank: int, folder: Path) -> None:
    time.sleep(600)


FAILING: dict[str, ranks.Check] = {"fails_on_the_second": fails_on_the_second, "never": hangs}
HANGING: dict[str, ranks.Check] = {"hangs": hangs}


def test_a_rank_that_fails_ends_the_other(tmp_path: Path) -> None:
    wrong = ranks.run("tests.parallel.test_ranks", "FAILING", tmp_path)
    assert {name for name, _ in wrong} == {"fails_on_the_second"}
    assert "wrong on the second" in wrong[-1][1]


def test_ranks_that_hang_say_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ((name, how),) = ranks.run("tests.parallel.test_ranks", "HANGING", tmp_path, seconds=2)
    assert name == "a rank"
    assert "stderr says where" in how
    printed = capfd.readouterr().err
    assert "Timeout (0:00:02)!" in printed
    assert "in hangs" in printed


def test_a_childs_progress_is_printed_as_it_comes(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('step 1', file=sys.stderr); print('{}')"
    done = processes.run([sys.executable, "-c", code], dict(os.environ), ROOT, shows_progress=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{}\n", "step 1\n")
    assert capfd.readouterr().err == "step 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT], ids=str)
def test_nothing_outlives_who_started_it(number: int) -> None:
    inner = f"import os; print(os.getpid(), file=__import__('sys').stderr, flush=True); {SLEEP}"
    outer = (
        "import os, sys; from pathlib import Path; from benchmarks.processes import run; "
        f"run([sys.executable, '-c', {inner!r}], dict(os.environ), Path('.'), shows_progress=True)"
    )
    with subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        child = int(parent.stderr.readline())
        assert is_running(child)
        parent.send_signal(number)
        parent.wait()
        eventually(lambda: not is_running(child))


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
