"""Programs under test as a user runs them: real processes, ended by id, with a look at what they leave behind."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-model" / "model"
PATIENCE = 60.0
"""Seconds within which anything here must have happened."""


class Program:
    """A running program and what it has written so far, both outputs together."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Begin to read."""
        self.process = process
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    @property
    def output(self) -> str:
        """What it has written."""
        with self._changed:
            return "".join(self._lines)

    def line_with(self, *words: str) -> str:
        """The first line with all these words, once it is there."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                for line in self._lines:
                    if all(word in line for word in words):
                        return line.strip()
                assert self._reader.is_alive(), f"it ended without {words}:\n{''.join(self._lines)}"
                assert self._changed.wait(max(0.0, deadline - time.monotonic())), "".join(self._lines)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def ends(self) -> int:
        """Its exit status, once it has ended and said all."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@contextlib.contextmanager
def program(*command: str | Path, scratch: Path, **environment: str) -> Iterator[Program]:
    """A program that runs; it is gone afterwards. `scratch` is its directory for temporary files."""
    with subprocess.Popen(
        [os.fspath(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=scratch,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    ) as process:
        started = Program(process)
        try:
            yield started
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE)
            started.ends()


def cli(*arguments: str | Path, scratch: Path, **environment: str) -> Program:
    """A command that is expected to end by itself, after it has."""
    command = [sys.executable, "-m", "mlx_serving_router", *arguments]
    with program(*command, scratch=scratch, **environment) as started:
        started.ends()
    return started


def load(path: Path) -> ModuleType:
    """The module of an example, freshly made."""
    name = f"{path.parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def modules_of(folder: str) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of a folder of this checkout that is no package, by name; they are forgotten afterwards."""
    home = ROOT / folder
    sys.path.insert(0, str(home))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(home))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == home:
                del sys.modules[name]


def free_port() -> int:
    """A port on which nothing listens.

    It is none of those that systems hand out by themselves, so that nobody gets it before it is used: tests run beside
    others, and connections have ports, too.
    """
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def left_behind(marker: Path) -> list[str]:
    """The commands of processes that have this path in them."""
    if Path("/proc/self/cmdline").exists():
        commands = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:  # it has ended meanwhile
                continue
    else:
        commands = subprocess.run(
            ["ps", "-Awwo", "command="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    return [command for command in commands if str(marker) in command]


def all_gone(marker: Path) -> bool:
    """Whether nothing with this path is left; what others end takes a moment, and nothing tells us of it."""
    deadline = time.monotonic() + 15
    while left_behind(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def built_bench(name: str) -> Path:
    """A Rust program of the benchmark, in a debug build: other tests have built most of it already."""
    done = subprocess.run(
        ["cargo", "build", f"--bench={name}", "--message-format=json-render-diagnostics"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = re.search(r'"executable":"([^"]+)"', done.stdout)
    assert found is not None
    return Path(found[1])
