"""Processes that end: with the process that started them, and with a traceback where they hang.

A rank that waits for another's GPU hears no signal that Python would have to handle: it would keep its own GPU busy
for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_GRACE_SECONDS = 3.0  # for a process to print where it is


def end_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, for whatever reason (on Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def say_where_it_ends() -> None:
    """SIGTERM, by which others end this process, prints all threads' tracebacks first."""
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)


def say(who: str, text: str) -> None:
    """One line to stderr, at once and whole: several processes write there."""
    os.write(2, f"[{who} {time.strftime('%H:%M:%S')}] {text}\n".encode())


@contextlib.contextmanager
def deadline(who: str, what: str, seconds: float) -> Iterator[None]:
    """Says to stderr what begins, and how long it took. After so many seconds all threads' tracebacks are printed and
    the process ends with status 1, wherever it waits: the clock is a thread that needs no Python."""
    say(who, f"{what} ...")
    began, how = time.perf_counter(), ""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    except BaseException as error:
        how = f", {type(error).__name__}"
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        say(who, f"{what}: {time.perf_counter() - began:.1f} s{how}")


def run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, shows_progress: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured; what it leaves running is killed, also when this process ends
    first. With `shows_progress` its stderr is printed as it comes."""
    said: list[str] = []
    with subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,
    ) as process:

        def listen() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if shows_progress:
                    sys.stderr.write(line)
                    sys.stderr.flush()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            assert process.stdout is not None
            printed = process.stdout.read()
            process.wait()
        finally:
            _end_group(process)
        listener.join(_GRACE_SECONDS)
    return subprocess.CompletedProcess(command, process.returncode, printed, "".join(said))


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a process's group: it may print where it was, and is killed then."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left
        return
