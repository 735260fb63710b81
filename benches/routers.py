"""Routers over HTTP as sides of the comparison: others' programs, and our front-end.

Promises: a program that is started here ends with `Routers`, and with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import uvloop
from measure import Outcome, WrongAnswerError
from over_http import Load
from sides import Process, SideError

from mlx_serving_router.processes import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from measure import Setup

_START_SECONDS = 30.0
_TAIL_CHARACTERS = 600


#: The programs of others in `bin` of their environments; the options that all of them have are in `Routers.theirs`.
COMMANDS: dict[str, list[str]] = {
    "vllm-router": ["vllm-router", "--log-level=warning"],
    "sglang-router": ["sglang-router", "launch", "--log-level=warn"],
    "smg": ["smg", "launch", "--log-level=warn"],
}


class Routed:
    """A side that is asked over HTTP, with the load made in this process.

    Args:
        name: What it is called in errors.
        port: Where it listens.
        pid: Whose CPU is counted.
        setup: What is asked, and what the answers are.
    """

    def __init__(self, name: str, port: int, pid: int, setup: Setup) -> None:
        self.name = name
        self._pid = pid
        self._loads = {}
        for mode, stream in (("buffered", False), ("streaming", True)):
            question = {
                "model": setup.model,
                "messages": setup.messages(),
                "max_tokens": setup.tokens,
                "stream": stream,
            }
            self._loads[mode] = Load(port, json.dumps(question).encode(), stream=stream, tokens=setup.tokens)

    def ask(self, command: Mapping[str, Any], _seconds: float) -> dict[str, Any]:
        return uvloop.run(self._round(command))

    async def _round(self, command: Mapping[str, Any]) -> dict[str, Any]:
        before = cpu_seconds(self._pid)
        try:
            outcome = await self._loads[command["mode"]].run(
                command["concurrency"], command["seconds"], command["requests"]
            )
        except (OSError, WrongAnswerError) as error:
            outcome = Outcome(failures=[str(error)])
        outcome.cpu_seconds = cpu_seconds(self._pid) - before
        return asdict(outcome)


class Routers:
    """What one run starts."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def ours(self, name: str, config: Mapping[str, Any]) -> Routed:
        """Our front-end, when it can reach a worker."""
        script = Path(__file__).with_name("side_front.py")
        process = Process(name, [sys.executable, str(script), json.dumps(config)])
        self._ends.callback(process.wait)
        self._ends.callback(process.end)
        port = process.read(_START_SECONDS)["port"]
        return self._ready(Routed(name, port, process.pid, self._setup))

    def theirs(self, name: str, home: Path, urls: Sequence[str]) -> Routed:
        """A program of a peer, when it can reach a worker. Raises SideError with what it printed last."""
        program, *options = COMMANDS[name]
        port = _free_port()
        options += ["--host=127.0.0.1", f"--port={port}", f"--prometheus-port={_free_port()}"]
        command = [home / "bin" / program, *options, "--policy=round_robin", "--worker-urls", *urls]
        log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with everything else
        self._ends.callback(log.close)
        child = ChildProcess(command, output=log)
        self._ends.callback(child.close)
        try:
            while child.pid is None and child.running:
                time.sleep(0.01)
            return self._ready(Routed(name, port, child.pid or 0, self._setup), child)
        except SideError as error:
            log.seek(0)
            printed = log.read().decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
            raise SideError(f"{error}; it printed last: {printed!r}") from None

    def direct(self, port: int, pid: int) -> Routed:
        """A worker without a router."""
        return self._ready(Routed("direct", port, pid, self._setup))

    def _ready(self, side: Routed, program: ChildProcess | None = None) -> Routed:
        command = {"mode": "buffered", "concurrency": 1, "seconds": 1.0, "requests": 1}
        until = time.monotonic() + _START_SECONDS
        while failures := side.ask(command, 1.0)["failures"]:
            if program is not None and not program.running:
                why = "could not be started" if program.status is None else f"ended ({program.status})"
                raise SideError(f"{side.name} {why}")
            if time.monotonic() > until:
                raise SideError(f"{side.name} did not answer within {_START_SECONDS:.0f} s: {failures[0]}")
            time.sleep(0.1)
        return side


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads. 0 for one that is not there."""
    if sys.platform == "linux":
        # What clock_getcpuclockid(3) gives, for which Python has no function: /proc counts in steps of 10 ms.
        try:
            return time.clock_gettime((~pid << 3) | 2)
        except OSError:
            return 0.0
    done = subprocess.run(
        ["/bin/ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    seconds = 0.0
    for part in done.stdout.strip().split(":"):
        seconds = seconds * 60 + float(part or 0)
    return seconds
