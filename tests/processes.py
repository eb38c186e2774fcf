"""Whatever a test starts ends with it, also when the test fails or pytest itself is killed.

Environments are inherited, by launchers, ranks and DataLoader workers alike. `guard` puts a mark
into that of pytest, and `end` kills every process that began with this mark.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

NAME = "KIT_TESTS"  # of the mark's variable

_guards: list[subprocess.Popen[bytes]] = []


def guard() -> str:
    """Mark what this process starts from now on, and have it killed when this process is gone.

    A process of its own waits for that, and learns it from the end of its standard input.
    """
    mark = os.environ[NAME] = secrets.token_hex(8)
    command = [sys.executable, __file__, mark]
    # In another session, so that Ctrl-C does not end it, and without any mark.
    _guards.append(subprocess.Popen(command, stdin=subprocess.PIPE, env={}, start_new_session=True))
    return mark


def marked(mark: str) -> set[int]:
    """The pids of all processes that began with `mark` in their environment."""
    variable, found = f"{NAME}={mark}".encode(), set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if variable in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


def servers() -> set[int]:
    """The pids of multiprocessing's two helpers, which serve all tests of a process."""
    found = (
        forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    )
    return {pid for pid in found if pid is not None}


def end(mark: str, spared: Collection[int] = ()) -> None:
    """Kill the processes with `mark` that are not `spared`, and those that they still start."""
    deadline = time.monotonic() + 10
    while (left := marked(mark).difference(spared)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    sys.stdin.read()
    end(sys.argv[1])
