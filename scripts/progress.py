"""How the Makefile's targets talk: numbered steps, progress of the long ones, and what to do when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

#: Turns a line of a command's output into what the progress line shows, or None to keep what it shows.
Describe = "Callable[[str], str | None]"

# A log that is not a terminal gets a line this often (seconds), so that a long step is seen to live.
_LOG_INTERVAL = 15.0
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


def run_logged(
    command: Sequence[str | os.PathLike[str]],
    *,
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
    describe: Callable[[str], str | None],
    failure: Callable[[str], str],
) -> None:
    """Runs a long command with its output in a log file and one line of progress on the terminal.

    Args:
        command: What to run.
        log: The file that gets everything the command prints.
        env: The command's whole environment.
        cwd: The command's working directory.
        describe: Called with each line of output; what it returns is shown as the progress.
        failure: Called with the whole output of a command that failed; says what to do.

    Raises:
        StepError: The command could not be started or ended with a status other than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output: list[str] = []
    try:
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise StepError(f"cannot run {os.fspath(command[0])}: {error}") from error

    assert process.stdout is not None
    with _Ticker() as ticker, log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            output.append(line)
            file.write(line)
            shown = describe(line)
            if shown:
                ticker.text = shown
        status = process.wait()

    if status != 0:
        tail = "".join(output[-_TAIL_LINES:])
        what = failure("".join(output))
        raise StepError(f"{tail}\nfailed (exit status {status}): {what}\nthe whole log: {log}")


class _Ticker:
    """Shows the latest progress text with the time gone by: in place on a terminal, now and then in a log."""

    def __init__(self) -> None:
        self.text = ""
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
        while not self._stop.wait(interval):
            line = f"      {duration(time.monotonic() - self._started)}  {self.text}"
            if self._terminal:
                print(f"\r\x1b[K{line[:100]}", end="", flush=True)
            else:
                print(line, flush=True)


def duration(seconds: float) -> str:
    """A time span for people: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
