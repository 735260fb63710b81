"""The demo does what it says, checks what it shows, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
import time
import urllib.request
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from programs import ROOT, all_gone, program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

DEMO = ROOT / "examples" / "demo" / "main.py"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something else listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.slow
def test_once_shows_everything_and_ends_by_itself(tmp_path: Path, taken: int) -> None:
    begun = time.monotonic()
    with program(sys.executable, DEMO, "--once", "--port", str(taken), scratch=tmp_path) as demo:
        assert demo.ends() == 0, demo.output
    output = demo.output
    assert f"port {taken} is taken" in output
    assert output.count("seven days: Monday, Tuesday") == 2
    assert "Your name is Ada." in output
    assert "first token after" in output
    assert "tokens/s" in output
    assert "WORKER_UNAVAILABLE, then worker-" in output
    assert "processes that it started have ended" in output.splitlines()[-1]
    assert all_gone(tmp_path)
    assert time.monotonic() - begun < 60  # 20 on a machine that does nothing else


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_serves_until_it_is_ended(end: int, status: int, tmp_path: Path, taken: int) -> None:
    with program(sys.executable, DEMO, "--port", str(taken), scratch=tmp_path) as demo:
        demo.line_with("to try", "curl")
        url = demo.line_with("fleet", "http://").split()[-1]
        with urllib.request.urlopen(url, timeout=10) as response:
            assert b"worker-1" in response.read()
        demo.send(end)
        assert demo.ends() == status, demo.output
    assert all_gone(tmp_path)


# === what it checks ===


@pytest.fixture
def demo() -> ModuleType:
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("demo_main", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Victim:
    """A worker that survives."""

    def kill(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [(["a", "a", "b", "b", "b"], "had been killed"), (["a", "b", "b", "b", "c"], "the conversation moved")],
)
def test_it_complains_of_what_is_wrong(
    demo: Any, answers: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(answers)
    monkeypatch.setattr(demo, "ask", lambda *_, **__: demo.Answer(next(given), ""))
    fleet = demo.Fleet("http://127.0.0.1:1", dict.fromkeys("abc", Victim()))
    with pytest.raises(demo.DemoError, match=complaint):
        demo.show(fleet, None)


def test_a_wrong_answer_is_an_error(demo: Any) -> None:
    chunk = SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content="Six."))], usage=None)
    raw = SimpleNamespace(headers={"x-worker-id": "a"}, parse=lambda: [chunk])
    create = SimpleNamespace(create=lambda **_: raw)
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(with_raw_response=create)))
    with pytest.raises(demo.DemoError, match=r"the answer was 'Six\.', not 'Seven\.'"):
        demo.ask(client, [], "How many?", session="s", expected="Seven.")
