"""ChildProcess: watched, ended on request, and gone with its parent."""

from __future__ import annotations

import queue
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving_router.processes import ChildProcess
from programs import PATIENCE, all_gone, program

if TYPE_CHECKING:
    from pathlib import Path

READY = "print('ready', flush=True); "
SLEEPS = READY + "import time; time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


def python(code: str, marker: Path) -> list[str]:
    return [sys.executable, "-c", code, str(marker)]


def wait_for_output(log: Path) -> None:
    """Its output is a file, and nothing tells of a file's growth on every system."""
    deadline = time.monotonic() + PATIENCE
    while not log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_its_end_is_told_with_its_status(tmp_path: Path) -> None:
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()
    with ChildProcess(python("raise SystemExit(7)", tmp_path), on_exit=ends.put) as child:
        assert ends.get(timeout=PATIENCE) == 7
        assert child.status == 7
        assert not child.running


def test_a_signal_that_ended_it_is_a_negative_status(tmp_path: Path) -> None:
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()
    with ChildProcess(python("import os; os.kill(os.getpid(), 9)", tmp_path), on_exit=ends.put):
        assert ends.get(timeout=PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("code", [SLEEPS, STUBBORN])
def test_close_ends_it_and_nobody_is_told(code: str, tmp_path: Path) -> None:
    told: list[int] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with (scratch / "log").open("wb") as log:
        child = ChildProcess(python(code, tmp_path), directory=scratch, output=log, on_exit=told.append)
    wait_for_output(scratch / "log")
    child.close()
    child.close()
    assert not child.running
    assert told == []
    assert not scratch.exists()
    assert all_gone(tmp_path)


def test_it_can_be_asked_and_killed(tmp_path: Path) -> None:
    for end, status in ((ChildProcess.terminate, -signal.SIGTERM), (ChildProcess.kill, -signal.SIGKILL)):
        log = tmp_path / "log"
        with log.open("wb") as output, ChildProcess(python(SLEEPS, tmp_path), output=output) as child:
            wait_for_output(log)
            end(child)
            assert child.ended.wait(PATIENCE)
            assert child.status == status


def test_a_program_that_is_not_there_has_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output, ChildProcess([tmp_path / "nothing"], output=output) as child:
        assert child.ended.wait(PATIENCE)
        assert child.pid is None
        assert child.status is None
        child.terminate()
        child.kill()
    assert "cannot run" in log.read_text()


_PARENT = """
import sys, time
from mlx_serving_router.processes import ChildProcess
child = ChildProcess([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(600)
"""


@pytest.mark.parametrize("code", [SLEEPS, STUBBORN])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent(end: int, code: str, tmp_path: Path) -> None:
    with program(sys.executable, "-c", _PARENT, code, tmp_path, scratch=tmp_path) as parent:
        parent.line_with("ready")
        parent.send(end)
        assert parent.process.wait(PATIENCE) != 0
        assert all_gone(tmp_path)
