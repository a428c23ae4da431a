"""Runs a command so that nothing of it outlives the process that asked for it: `python guard.py FD GRACE command …`.

FD is the reading end of a pipe whose writing end only the asking process holds. When it closes, on purpose or because
that process was killed, everything below the guard is told to end, and killed after GRACE seconds. A separate process,
because one that receives SIGKILL can tidy nothing up; started as a file, because it must work in any checkout.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: orphans of our command become our children, whatever session they made


def main() -> int:
    """Run the command; its exit code, 128 + the signal's number where one ended it."""
    lifeline, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Handlers, not SIG_IGN: the command must not inherit them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = subprocess.Popen(command)
    stopped = False
    while child.poll() is None and not stopped:
        readable, _, _ = select.select([lifeline, woken], [], [])
        stopped = lifeline in readable
        if woken in readable:
            os.read(woken, 4096)
    if stopped or child.returncode:
        _end(child, grace)
    code = child.wait()
    return 128 - code if code < 0 else code


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ask everything below us to end, and kill what has not after `grace` seconds.

    The command itself gets SIGINT, which DVC ignores while its own command runs and which otherwise lets it release
    its locks; what it started gets SIGTERM, on which training saves a checkpoint.
    """
    deadline, asked, ask_again = time.monotonic() + grace, set[psutil.Process](), 0.0
    while below := _descendants(child):
        now = time.monotonic()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                if now > deadline:
                    process.kill()
                elif process.pid != child.pid and process not in asked:
                    process.terminate()
                    asked.add(process)
                elif process.pid == child.pid and now > ask_again:
                    process.send_signal(signal.SIGINT if now < deadline - grace / 2 else signal.SIGTERM)
                    ask_again = now + 1
        time.sleep(0.05)


def _descendants(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Living processes below this one; orphans that ended are reaped on the way."""
    child.poll()
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.pid != child.pid:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return living


if __name__ == "__main__":
    sys.exit(main())
