"""How the Makefile's targets talk: numbered steps, progress of the long ones, and what to do when one fails."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

# A log that is not a terminal is looked after this often (seconds). It gets a line where there is something new, and
# after so many looks without any, so that a long step is seen to live.
_LOG_INTERVAL = 15.0
_SILENT_LOOKS = 8
_TERMINAL_INTERVAL = 0.25
_TAIL_LINES = 30


class StepError(Exception):
    """A step failed; the message says which one and what to do about it."""


class Steps:
    """Numbers the steps of one target as they begin: `[2/5] Python packages`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0

    def begin(self, title: str) -> None:
        """Announces the next step."""
        self._number += 1
        print(f"[{self._number}/{self._total}] {title}", flush=True)


def note(text: str) -> None:
    """Prints a line that belongs to the step in progress."""
    print(f"      {text}", flush=True)


@dataclass(frozen=True)
class Job:
    """A long command with its output in a log file and its progress in a few words.

    Args:
        command: What to run.
        log: The file that gets everything the command prints.
        describe: Called with each line of output; what it returns is shown as the progress, None changes nothing.
        failure: Called with the whole output of a command that failed; says what to do.
    """

    command: Sequence[str | os.PathLike[str]]
    log: Path
    describe: Callable[[str], str | None]
    failure: Callable[[str], str]


def run_together(jobs: Sequence[Job], *, env: Mapping[str, str], cwd: Path) -> None:
    """Runs long commands side by side under one line of progress, and returns when all have succeeded.

    Args:
        jobs: What to run.
        env: The commands' whole environment.
        cwd: The commands' working directory.

    Raises:
        StepError: A command could not be started or ended with a status other than 0; the others were stopped.
    """
    ended: queue.SimpleQueue[_Running] = queue.SimpleQueue()
    running: list[_Running] = []
    try:
        with _Ticker(lambda: "; ".join(job.progress for job in running if job.progress)):
            running.extend(_Running(job, env, cwd, ended) for job in jobs)
            for _ in jobs:
                ended.get().raise_if_failed()
    finally:
        for job in running:
            job.stop()


class _Running:
    """A job's process and the thread that reads what it says."""

    def __init__(
        self, job: Job, env: Mapping[str, str], cwd: Path, ended: queue.SimpleQueue[_Running]
    ) -> None:
        self.progress = ""
        self._job = job
        self._ended = ended
        self._output: list[str] = []
        self._status: int | None = None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._process = subprocess.Popen(
                [os.fspath(part) for part in job.command],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own, so that it ends with all its children
            )
        except OSError as error:
            raise StepError(f"cannot run {os.fspath(job.command[0])}: {error}") from error
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._job.log.open("w", encoding="utf-8") as file:
            for line in self._process.stdout or ():
                self._output.append(line)
                file.write(line)
                self.progress = self._job.describe(line) or self.progress
        self._status = self._process.wait()
        self.progress = ""
        self._ended.put(self)

    def raise_if_failed(self) -> None:
        if self._status != 0:
            tail = "".join(self._output[-_TAIL_LINES:])
            what = self._job.failure("".join(self._output))
            raise StepError(
                f"{tail}\nfailed (exit status {self._status}): {what}\nthe whole log: {self._job.log}"
            )

    def stop(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)


class _Ticker:
    """Shows the latest progress text with the time gone by: in place on a terminal, now and then in a log."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._terminal = sys.stdout.isatty()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._terminal:
            print("\r\x1b[K", end="", flush=True)

    def _run(self) -> None:
        interval = _TERMINAL_INTERVAL if self._terminal else _LOG_INTERVAL
        before, looks = "", 0
        while not self._stop.wait(interval):
            text = self._text()
            line = f"      {duration(time.monotonic() - self._started)}  {text}"
            looks += 1
            if self._terminal:
                print(f"\r\x1b[K{line[:100]}", end="", flush=True)
            elif text != before or looks >= _SILENT_LOOKS:
                print(line, flush=True)
                before, looks = text, 0


def duration(seconds: float) -> str:
    """A time span for people: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
