"""Runs a command until stdin closes, then removes its processes, shared memory and folder.

`BackgroundServer` starts this file as a process of its own and holds the other end of its stdin. The pipe closes when
the holder closes it or is killed, so that a server never outlives the program that started it. If this process is
killed itself, the kernel sends the server SIGTERM.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SHARED_MEMORY = Path("/dev/shm")
STOP_TIMEOUT_S = 15.0
GROUP_TIMEOUT_S = 2.0  # for helpers that still clean up, such as the shared memory of vLLM's processes


def guard(folder: Path, shared_memory_prefix: str, command: Sequence[str]) -> int:
    """The exit status of `command`, once it has ended, or was stopped because stdin closed, and all is cleared away."""
    ends_with_us = partial(end_with, os.getpid())
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=ends_with_us)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the clearing below
    try:
        ended = os.pidfd_open(server.pid)
        select.select([sys.stdin, ended], [], [])
        os.close(ended)
    finally:
        stop(server)
        for region in SHARED_MEMORY.glob(f"{shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    if server.returncode < 0:  # Triton 2.51 can crash when one model fails to load while others still do
        print(f"error: the server was ended by {signal.Signals(-server.returncode).name}", flush=True)
    return server.returncode


def end_with(guard: int) -> None:
    """This process, which is about to become the server, receives SIGTERM when the guard ends for any reason.

    The guard has one thread and runs nothing else at that time, so calling this between fork and exec is safe.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guard:  # the guard ended before the call of prctl
        os._exit(1)


def stop(server: "subprocess.Popen[bytes]") -> None:
    """End the server, with SIGTERM and then SIGKILL, and the rest of its session: a stub may outlive it."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        end = time.monotonic() + GROUP_TIMEOUT_S
        while server.poll() is not None and time.monotonic() < end:
            os.killpg(server.pid, 0)  # no such process once the session is empty
            time.sleep(0.02)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(guard(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
