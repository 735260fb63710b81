"""Programs of this process's own, such as workers: started, watched, and gone with it, however it ends.

Promises: a `ChildProcess` ends with `close()` and with this process, even one ended by SIGKILL, and even where the
program itself is stuck; nothing is left behind. Ctrl-C in a terminal reaches this process alone, so that it can
still use its children while it winds up.

Knows nothing of what the programs do. Nothing here is forked: children of a process that has threads and a model are
new programs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import IO, Self

__all__ = ["ChildProcess"]

#: More than the supervisor takes at most (_supervise.py: two seconds, then SIGKILL).
_CLOSE_SECONDS = 5.0
_SUPERVISOR = Path(__file__).with_name("_supervise.py")


class ChildProcess:
    """A program that ends together with this process: two processes, the program and its supervisor.

    The program starts at once. Every method may be called from any thread and any number of times.

    Args:
        command: The program and its arguments.
        directory: The program's scratch directory: removed when all is over, whoever is left to do it.
        output: Where everything goes that the program prints; this process's standard error where left out.
        on_exit: Called with the exit status when the program ends without `close()`, in a thread that `close()` waits
            for: it must hand on what it wants done and return.

    Attributes:
        pid: The program's process id; None until it runs, a few milliseconds after the start.
        status: Its exit status once it has ended, negative for a signal.
        ended: Set when it has ended, in whatever way, or could not be started.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        directory: Path | None = None,
        output: IO[bytes] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        self.pid: int | None = None
        self.status: int | None = None
        self.ended = threading.Event()
        self._on_exit = on_exit
        self._directory = directory
        self._owner = os.getpid()
        self._closing = False
        self._lock = threading.Lock()
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", _SUPERVISOR, directory or "", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            bufsize=0,  # a buffer's lock, held by the listening thread, would be in the way at interpreter exit
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
        self._watch = threading.Thread(target=self._listen, name="child-process-watch", daemon=True)
        self._watch.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.is_set()

    def terminate(self) -> None:
        """Asks the program to end (SIGTERM) and returns at once."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the program with SIGKILL and returns when it is gone."""
        self._signal(signal.SIGKILL)
        self.ended.wait(_CLOSE_SECONDS)

    def close(self) -> None:
        """Stops the program if it runs (SIGTERM, after two seconds SIGKILL), and waits until it is gone."""
        if os.getpid() != self._owner:
            return  # a forked child holds a copy of its parent's program
        self._closing = True
        self._let_go()
        try:
            self._supervisor.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        if threading.current_thread() is not self._watch:
            self._watch.join(_CLOSE_SECONDS)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _let_go(self) -> None:
        """Tells the supervisor to end the program."""
        pipe = self._supervisor.stdin
        with self._lock:
            if pipe is None or pipe.closed:
                return
            # The byte counts where a forked child of ours still holds the pipe open.
            with contextlib.suppress(OSError):
                pipe.write(b"\n")
            with contextlib.suppress(OSError):
                pipe.close()

    def _signal(self, number: int) -> None:
        if self.pid is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _listen(self) -> None:
        """Takes down what the supervisor says: the program's process id, then its exit status, then end of file."""
        pipe = self._supervisor.stdout
        if pipe is None:
            return
        with pipe:
            for line in pipe:
                if self.pid is None:
                    self.pid = int(line)
                else:
                    self._note_end(int(line))
        if self.pid is not None and self.status is None:
            # The supervisor itself was killed: its program is nobody's now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._note_end(-signal.SIGKILL)
        self.ended.set()

    def _note_end(self, status: int) -> None:
        self.status = status
        self.ended.set()
        if not self._closing and self._on_exit is not None:
            self._on_exit(status)
