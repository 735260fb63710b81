"""Long prompts are read beside the answers of others: rendered and cut into tokens on a thread of their own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from enginejobs import PATIENCE, FakeJob, Running, job

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.model

BEES = "Bees make honey."
#: Far too long for the tiny model, so that reading it is all that is done for it.
TOO_LONG = "The cat sat on the mat. " * 4000


class HeldReading:
    """The reading of prompts with a word in them waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        from mlx_serving_router.mlx import _service

        self.begun, self.let_go = threading.Event(), threading.Event()
        read = _service.prompt_tokens

        def held(model: Any, request: Any) -> list[int]:
            if word in (request.prompt or str(request.messages)):
                self.begun.set()
                assert self.let_go.wait(PATIENCE)
            return read(model, request)

        monkeypatch.setattr(_service, "prompt_tokens", held)


@pytest.fixture
def engine() -> Iterator[Running]:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(max_concurrent=2)
    yield running
    running.stop()


@pytest.fixture
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_serving_router.mlx import _reading

    monkeypatch.setattr(_reading, "_LONG", 0)


def test_others_are_answered_while_a_long_prompt_is_read(
    engine: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldReading(monkeypatch, "cat")
    long = job(TOO_LONG)
    engine.jobs.put(long)
    assert held.begun.wait(PATIENCE)
    beside = job("What do bees make?")
    engine.jobs.put(beside)
    engine.jobs.wait_for(beside)
    assert (beside.text, long.end) == (BEES, None)
    held.let_go.set()
    engine.jobs.wait_for(long)
    assert (long.end.code, "2048" in long.end.message) == ("REQUEST_VALIDATION_FAILED", True)


@pytest.mark.usefixtures("everything_is_long")
def test_what_was_read_beside_others_is_answered_as_ever(engine: Running) -> None:
    questions = ["What do bees make?", "What is the capital of France?", "Count to ten."] * 6
    answers = engine.ask_all(job(question) for question in questions)
    assert [answer.text for answer in answers[:2]] == [BEES, "The capital of France is Paris."]
    assert [answer.text for answer in answers] == [answer.text for answer in answers[:3]] * 6
    assert engine.ask(prompt="").end.code == "REQUEST_VALIDATION_FAILED"
    refused = engine.ask(
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]
    )
    assert refused.end.code == "REQUEST_VALIDATION_FAILED"


@pytest.mark.usefixtures("everything_is_long")
def test_what_reading_raises_fails_its_request_alone_and_quotes_nothing(
    engine: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_serving_router.mlx import _service

    def broken(_: Any, request: Any) -> list[int]:
        raise RuntimeError(str(request.messages))

    with monkeypatch.context() as patch:
        patch.setattr(_service, "prompt_tokens", broken)
        failed = engine.ask("secret")
    assert failed.end.code == "WORKER_UNAVAILABLE"
    assert "secret" not in failed.end.message + caplog.text
    assert engine.ask("What do bees make?").text == BEES


def test_a_job_that_is_cancelled_while_it_is_read_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny(max_concurrent=1)
    held = HeldReading(monkeypatch, "cat")
    long: FakeJob = job(TOO_LONG)
    running.jobs.put(long)
    assert held.begun.wait(PATIENCE)
    long.cancelled = True
    held.let_go.set()
    assert running.ask("What do bees make?").text == BEES
    assert long.end is None
    running.stop()


def test_an_engine_that_is_stopped_ends_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    running = Running.tiny()
    held = HeldReading(monkeypatch, "cat")
    long = job(TOO_LONG)
    running.jobs.put(long)
    assert held.begun.wait(PATIENCE)
    running.jobs.close()
    held.let_go.set()
    running.stop()
    assert long.end.code == "REQUEST_VALIDATION_FAILED"
