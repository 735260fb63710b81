"""MlxEngine on a thread of its own, driven through doubles of the runtime's JobQueue and Job."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import pytest

    from mlx_serving_router.engine import Engine
    from mlx_serving_router.mlx._batch import Batch

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-model" / "model"
SECRET = "open sesame"  # what an error may quote, and nobody else
PATIENCE = 60  # seconds within which anything here must have happened
UNSET: dict[str, Any] = dict.fromkeys(
    [
        "messages",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "session_id",
        "stream",
        "priority",
        "resume",
    ]
)


@dataclass(eq=False)
class FakeJob:
    """Records what the engine does with a job; `on_token` runs on the engine's thread after each piece."""

    request: Any
    on_token: Callable[[FakeJob], None] = lambda _: None
    attempt: int = 1
    cancelled: bool = False
    pieces: list[tuple[str, list[int]]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: SimpleNamespace | None = None
    queue: FakeQueue | None = None

    def token(
        self,
        text: str,
        token_ids: Sequence[int] = (),
        *,
        logprobs: Any = None,
    ) -> None:
        assert self.end is None
        self.pieces.append((text, list(token_ids)))
        self.logprobs += [] if logprobs is None else logprobs["content"]
        self.on_token(self)

    def done(self, finish_reason: str = "stop", **usage: Any) -> None:
        assert self.end is None
        self.end = SimpleNamespace(code=None, finish_reason=finish_reason, **usage)

    def error(self, code: str, message: str, *, retry_after_ms: int | None = None) -> None:
        assert self.end is None
        self.end = SimpleNamespace(code=code, message=message, retry_after_ms=retry_after_ms)

    def put_back(self) -> None:
        assert self.end is None
        assert self.queue is not None
        self.queue.put(self)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [token for _, ids in self.pieces for token in ids]


def break_at(monkeypatch: pytest.MonkeyPatch, request_id: str, place: int) -> None:
    """Let the engine fail on a request's so-manieth token, as a tokenizer may."""
    from mlx_serving_router.mlx._answer import Answer

    push = Answer.push

    def broken(answer: Answer, token: int, logprobs: Any) -> bool:
        if answer.job.request.request_id == request_id and answer.generated == place:
            raise RuntimeError(SECRET)
        return push(answer, token, logprobs)

    monkeypatch.setattr(Answer, "push", broken)


class Steps:
    """The steps of engines of this process: counted as they begin, and held up where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlx_serving_router.mlx._batch import Batch

        step, self.count = Batch.step, 0
        self._go, self._held = threading.Event(), threading.Event()
        self._go.set()

        def counted(batch: Batch) -> None:
            if not self._go.is_set():
                self._held.set()
                assert self._go.wait(PATIENCE)
            self.count += 1
            self._batch = batch
            step(batch)

        self._batch: Batch | None = None
        monkeypatch.setattr(Batch, "step", counted)

    def delivered(self) -> dict[str, int]:
        """How many tokens of each running request were handed to the runtime; while steps are held up."""
        answers = () if self._batch is None else self._batch._answers.values()
        return {
            answer.job.request.request_id: answer.generated - len(answer._undelivered) for answer in answers
        }

    def hold(self) -> None:
        """Let no further step begin; returns when the one that runs is over."""
        self._held.clear()
        self._go.clear()
        assert self._held.wait(PATIENCE), "no step begins"

    def go_on(self) -> None:
        """Undo `hold`."""
        self._go.set()


class FakeQueue:
    """A JobQueue that knows when the engine has nothing left to do."""

    def __init__(self) -> None:
        self._jobs: deque[FakeJob] = deque()
        self._changed = threading.Condition()
        self._idle = False
        self.closed = False
        self.reports: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        self.cached_prefixes: list[str] = []
        self.ready = threading.Event()
        self.refused: list[str | None] = []

    def get(self, timeout: float | None = None) -> FakeJob | None:
        with self._changed:
            if timeout != 0:
                self._idle = not self._jobs
                self._changed.notify_all()
                patience = PATIENCE if timeout is None else timeout
                came = self._changed.wait_for(lambda: self._next() or self.closed, patience)
                assert came or timeout is not None, "nobody asks"
                self._idle = False
            if (job := self._next()) is not None:
                self._jobs.remove(job)
            self._changed.notify_all()
            return job

    def _next(self) -> FakeJob | None:
        loading = self.reports[-1][2] if self.reports else ()
        return next((job for job in self._jobs if job.request.model_id not in loading), None)

    @property
    def waiting_models(self) -> list[str]:
        with self._changed:
            return sorted({job.request.model_id for job in self._jobs})

    def refuse(self, up_to: str | None, message: str = "") -> None:
        assert message
        self.refused.append(up_to)

    def deliver(self, pieces: list[tuple[FakeJob, str, list[int], Any]]) -> None:
        for job, text, token_ids, logprobs in pieces:
            if job.end is None:  # else it has no effect
                job.token(text, token_ids, logprobs=logprobs)

    def put(self, *jobs: FakeJob) -> None:
        with self._changed:
            for job in jobs:
                job.queue = self
            self._jobs.extend(jobs)
            self._idle = False
            self._changed.notify_all()

    def wait_for(self, *jobs: FakeJob) -> None:
        """Wait until these have ended."""
        self.wait_until(lambda: all(job.end is not None for job in jobs))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until the engine has brought something about: it is looked for whenever it asks for work."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), "the engine does not bring it about"

    def wait(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._idle, PATIENCE), "the engine does not come to an end"

    def report(
        self,
        phase: str,
        *,
        loaded_models: Sequence[str] = (),
        loading_models: Sequence[str] = (),
        cached_prefixes: Sequence[str] | None = None,
    ) -> None:
        report = (phase, tuple(loaded_models), tuple(loading_models))
        if report not in self.reports[-1:]:
            self.reports.append(report)
        if cached_prefixes is not None:
            self.cached_prefixes = list(cached_prefixes)
        if phase == "ready":
            self.ready.set()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Running:
    """An engine on its thread, and the shortest way to ask it something."""

    def __init__(self, engine: Engine) -> None:
        self.jobs = FakeQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine")
        self._thread.start()

    @classmethod
    def tiny(cls, **options: Any) -> Self:
        """An engine with the tiny model, ready."""
        from mlx_serving_router.mlx import MlxEngine

        running = cls(MlxEngine({"tiny": MODEL}, **options))
        assert running.jobs.ready.wait(PATIENCE)
        return running

    def _run(self, engine: Engine) -> None:
        try:
            engine.run(self.jobs)
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread by stop()
            self._failure = error

    def ask(
        self,
        question: str | None = None,
        *,
        on_token: Callable[[FakeJob], None] = lambda _: None,
        **fields: Any,
    ) -> FakeJob:
        """Ask for one answer, and wait until the engine is done with it."""
        return self.ask_all([job(question, on_token=on_token, **fields)])[0]

    def ask_all(self, jobs: Iterable[FakeJob]) -> list[FakeJob]:
        """Ask for several answers at a time, and wait until the engine is done with all of them."""
        asked = list(jobs)
        self.jobs.put(*asked)
        self.jobs.wait()
        return asked

    def stop(self) -> None:
        """Close the queue and raise what the engine raised."""
        self.jobs.close()
        self.ended()

    def ended(self) -> None:
        """Wait until the engine has ended, and raise what it raised."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


def job(
    question: str | None = None, *, on_token: Callable[[FakeJob], None] = lambda _: None, **fields: Any
) -> FakeJob:
    """A job that asks the tiny model: a question, or whatever the fields say."""
    if question is not None:
        fields["messages"] = [{"role": "user", "content": question}]
    request = SimpleNamespace(**{**UNSET, "request_id": "r-1", "model_id": "tiny", **fields})
    return FakeJob(request, on_token)
