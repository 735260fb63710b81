"""The processes of the benchmark: started, told what to do a line at a time, ended.

Promises: whatever happens, `Processes` ends what it started and nothing else. Each process ends with its standard input
as well, so that none is left behind even by a harness that was killed.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

_HERE = Path(__file__).resolve().parent
_START_SECONDS = 30.0
_END_SECONDS = 3.0

#: The sides, and what runs each: a role of the Rust program, or a Python file and its event loop.
SIDES: dict[str, tuple[str, ...]] = {
    "raw": ("raw",),
    "raw-headers": ("raw-headers",),
    "rust": ("controller",),
    "python": ("side_controller.py", "asyncio"),
    "python-uvloop": ("side_controller.py", "uvloop"),
    "nats-py": ("side_nats_py.py", "asyncio"),
    "nats-py-uvloop": ("side_nats_py.py", "uvloop"),
}


class SideError(Exception):
    """A process did not do what it was told; the message says which one and why."""


class Processes:
    """The processes of one run.

    Args:
        peers: The Rust program.
        setup: What every process is told at its start (`measure.Setup`).
    """

    def __init__(self, peers: Path, setup: Mapping[str, object]) -> None:
        self._peers = peers
        self._setup = json.dumps(setup)
        self._started: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.end()
        for process in self._started:
            process.wait()

    def start_worker(self, role: str = "worker") -> None:
        """Returns when the worker serves. `role`: `worker` answers at once, the streams of `paced` take their time."""
        self.start(role, [str(self._peers), role, self._setup])

    def start_side(self, name: str) -> Process:
        """Returns when the side has found the worker."""
        program, *rest = SIDES[name]
        if program.endswith(".py"):
            command = [sys.executable, str(_HERE / program), self._setup, *rest]
        else:
            command = [str(self._peers), program, self._setup]
        return self.start(name, command)[0]

    def start(self, name: str, command: list[str]) -> tuple[Process, dict[str, Any]]:
        """Any other process that keeps to the same protocol; returns what it says when it is ready, too."""
        process = Process(name, command)
        self._started.append(process)
        return process, process.read(_START_SECONDS)


class Process:
    """A process that answers each line of its standard input with one of its standard output."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C, which is the harness's business
        )
        # A thread, because a pipe cannot be read with a time limit.
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """Sends a line and returns the answer to it."""
        pipe = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so
            if pipe is not None:
                pipe.write(json.dumps(command) + "\n")
                pipe.flush()
        return self.read(seconds)

    def read(self, seconds: float) -> dict[str, Any]:
        """Returns the next answer."""
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise SideError(f"{self.name} did not answer within {seconds:.0f} s") from None
        if not line:
            raise SideError(
                f"{self.name} ended by itself (exit status {self._process.wait()}); it says why above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        pipe = self._process.stdin
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()

    def wait(self) -> None:
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        with contextlib.suppress(ValueError):  # closed under us
            for line in self._process.stdout or ():
                self._answers.put(line)
        self._answers.put("")
