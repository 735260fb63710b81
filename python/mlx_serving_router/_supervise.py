"""Runs one program for as long as somebody holds the other end of this script's standard input.

    python -I -S _supervise.py DIRECTORY PROGRAM [ARGUMENT ...]

The way to end a child together with its parent that every system offers: the parent keeps a pipe open, and the kernel
closes it however the parent ends, SIGKILL included. On end of file (or any byte) the program gets SIGTERM, and SIGKILL
if it is still there after two seconds; then DIRECTORY, the program's scratch space, is removed (an empty name: it has
none).

Standard output tells the parent two things, a line each: the program's process id once it runs, and its exit status
once it has ended. A program that ends by itself leaves its directory in place, for its parent to read the logs, until
standard input ends.

Started by its path, never imported: it must not load the package, whose extension module it has no use for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

_TERMINATE_SECONDS = 2.0


def main(directory: str, command: list[str]) -> None:
    """Runs `command` until standard input ends or this process gets SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        # The program must not hold this script's standard output: its end tells the parent that nobody is left.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error}")
    watch = threading.Thread(target=lambda: _tell(child.wait()), daemon=True)
    try:
        _tell(child.pid)
        watch.start()
        sys.stdin.buffer.read(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.terminate()
        watch.join(_TERMINATE_SECONDS)
        child.kill()  # does nothing to one that has ended
        watch.join()
        if directory:
            shutil.rmtree(directory, ignore_errors=True)


def _tell(number: int) -> None:
    # A parent that is gone has closed the other end.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{number}\n".encode())  # past sys.stdout, which would try again at the exit and complain


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
