"""A controller and its workers over a real nats-server: what the end-to-end tests are built of.

`Cluster` is a controller in this process with scripted workers (rawworker.py). `WorkerProcess` and `RawProcess` are
workers in processes of their own: the product's command with the tiny model, and a scripted one that can be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import mlx_serving_router
from mlx_serving_router import ControllerError, ControllerNode, InferenceRequest
from rawworker import RawWorker, answers

if TYPE_CHECKING:
    import signal
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from mlx_serving_router import InferenceResponse, RequestMetadata, TokenEvent, TokenStream, WorkerInfo
    from rawworker import Plan

_T = TypeVar("_T")

ROOT = Path(__file__).resolve().parents[2]
#: Where the package that is tested lies, for processes that test it too.
PACKAGES = str(Path(mlx_serving_router.__file__).parents[1])
MODEL = ROOT / "examples" / "tiny-model" / "model"
#: Seconds within which everything here must have happened.
PATIENCE = 10.0
#: The same for processes that load a model first.
LOADING = 60.0
#: Short limits, and pauses that no test has to wait for.
QUICK: dict[str, Any] = {
    "discovery": {"heartbeatIntervalMs": 200},
    "controller": {"workerOfflineTimeoutMs": 5000},
    "requestRouting": {
        "timeoutMs": 3000,
        "streamingTimeoutMs": 3000,
        "acceptTimeoutMs": 1000,
        "streamIdleTimeoutMs": 1000,
        "retry": {"retryDelayMs": 10, "maxDelayMs": 50},
    },
}

#: Signs of life for which a busy machine is not late: of 200 ms, a worker ends the requests of a controller after 600.
CALM: dict[str, Any] = {
    "discovery": {"heartbeatIntervalMs": 1000},
    "controller": {"workerOfflineTimeoutMs": 15_000},
}


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def settings(url: str, prefix: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a controller or worker on this NATS server."""
    nats = {"mode": "external", "serverUrl": url, "subjectPrefix": prefix}
    return merged(merged(QUICK, {"nats": nats}), changes)


def routing(**changes: Any) -> dict[str, Any]:
    """Changes of `requestRouting`, with `retry` and `breaker` (for `circuitBreaker`) in their short form."""
    if "breaker" in changes:
        changes["circuitBreaker"] = changes.pop("breaker")
    return {"requestRouting": changes}


def ask(text: str = "Hello", **fields: Any) -> InferenceRequest:
    fields = {"model_id": "tiny", "messages": [{"role": "user", "content": text}], **fields}
    return InferenceRequest(**fields)


#: An answer of the tiny model goes on to its limit, far off: the tokens that would end it are ruled out.
ENDLESS: dict[str, Any] = {
    "max_tokens": 1500,
    "logit_bias": {
        str(token): -100.0 for token in json.loads((MODEL / "config.json").read_text())["eos_token_id"]
    },
}


async def failure(call: Awaitable[Any]) -> ControllerError:
    """The error that a call ends with."""
    try:
        result = await call
    except ControllerError as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


async def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Waits for what other processes do; nothing tells us of it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain: {what}")
        await asyncio.sleep(0.01)


async def served(call: Callable[[], Awaitable[_T]], *codes: str) -> _T:
    """Calls again and again for as long as one of these errors is the answer."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except ControllerError as error:
                if error.code not in codes:
                    raise
            await asyncio.sleep(0.01)


async def received(stream: TokenStream) -> tuple[str, ControllerError | None]:
    """What a stream gave, and the error that it ended with."""
    got = []
    try:
        async for event in stream:
            got.append(event.text)  # noqa: PERF401 what came before the error counts
    except ControllerError as error:
        return "".join(got), error
    return "".join(got), None


async def read(stream: TokenStream) -> list[TokenEvent]:
    """All of a stream."""
    async with stream:
        return [event async for event in stream]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


class Cluster:
    """A controller and scripted workers, all with the same plan.

    Leaving it without an error asserts that everything is back at its baseline.

    Attributes:
        controller: It is ready, and all workers are online.
        workers: In the order of their ids.
    """

    def __init__(
        self, url: str, prefix: str, *, workers: int = 1, plan: Plan | None = None, **changes: Any
    ) -> None:
        self.url = url
        self.prefix = prefix
        self.controller = ControllerNode(settings(url, prefix, **changes))
        shared = plan or answers()
        self.workers = [self.another(worker_id=f"w{number}", plan=shared) for number in range(workers)]

    def another(self, **options: Any) -> RawWorker:
        """One more worker of this fleet, not started."""
        return RawWorker(self.url, prefix=self.prefix, **options)

    async def __aenter__(self) -> Self:
        try:
            await self.controller.start()
            await asyncio.gather(*(worker.start() for worker in self.workers))
            await self.controller.wait_for_workers(len(self.workers), timeout=PATIENCE)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.controller.state == "ready":
                await self.settle()
        finally:
            await self._close()

    async def _close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(Exception):
                await worker.stop(deregister=False)
        await self.controller.stop(drain_timeout=0)

    @property
    def worker(self) -> RawWorker:
        """The only worker."""
        (worker,) = self.workers
        return worker

    @property
    def asked(self) -> list[int]:
        """How many requests each worker has got."""
        return [len(worker.jobs) for worker in self.workers]

    def by_id(self, worker_id: str | None) -> RawWorker:
        return next(worker for worker in self.workers if worker.worker_id == worker_id)

    def info(self, worker: RawWorker) -> WorkerInfo:
        info = self.controller.worker(worker.worker_id)
        assert info is not None
        return info

    def breaker(self, worker: RawWorker) -> dict[str, Any]:
        return dict(self.controller.get_circuit_breaker_stats()[worker.worker_id])

    def metadata(self, request_id: str) -> RequestMetadata:
        metadata = self.controller.get_request_metrics(request_id)
        assert metadata is not None
        return metadata

    async def buffered(self, words: str = "Hello", **fields: Any) -> InferenceResponse:
        return await self.controller.handle_buffered_request(ask(words, **fields))

    async def streaming(self, words: str = "Hello", **fields: Any) -> TokenStream:
        return await self.controller.handle_streaming_request(ask(words, **fields))

    def at_rest(self) -> None:
        """Asserts that nothing runs: what holds before a caller sees an end."""
        assert {info.worker_id: info.in_flight for info in self.controller.workers() if info.in_flight} == {}
        requests = self.controller.cluster_status().to_dict()["requests"]
        assert (requests["active"], requests["queued"]) == (0, 0)

    async def settle(self, seconds: float = 1.0) -> None:
        """As `at_rest`, for abandoned work: within a second."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.at_rest()
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.01)
            else:
                return


# === workers as processes ===


class Process:
    """A process of a test, with its lines on standard output and its standard error in a file.

    Args:
        command: What is run, with this interpreter.
    """

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": PACKAGES, **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill it, and forget what it wrote."""
        self.kill()
        self._errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()

    async def ended(self, seconds: float = PATIENCE) -> int:
        """Its exit status."""
        await until(lambda: self.process.poll() is not None, f"the end of process {self.pid}", seconds)
        return self.process.returncode

    def errors(self) -> str:
        """What it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


class WorkerProcess(Process):
    """`mlx-serving-router worker` with the tiny model."""

    def __init__(self, url: str, prefix: str, worker_id: str, **changes: Any) -> None:
        self.worker_id = worker_id
        self._folder = tempfile.TemporaryDirectory()
        config = Path(self._folder.name) / "worker.json"
        config.write_text(json.dumps(settings(url, prefix, **changes)))
        super().__init__(
            "-m", "mlx_serving_router", "worker",
            "--config", config, "--id", worker_id, "--model", f"tiny={MODEL}",
        )  # fmt: skip

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


async def all_online(controller: ControllerNode, workers: Sequence[WorkerProcess]) -> None:
    """Returns when the models are loaded, and fails when a process ends instead."""
    waiting = asyncio.create_task(controller.wait_for_workers(len(workers), timeout=LOADING))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=0.2)
        for worker in workers:
            assert worker.process.poll() is None, worker.errors()
    await waiting


class RawProcess(Process):
    """A scripted worker in a process of its own; `events()` are its lines so far."""

    def __init__(self, url: str, prefix: str, worker_id: str, plan: str, **options: Any) -> None:
        self.worker_id = worker_id
        options = {"prefix": prefix, "worker_id": worker_id, "plan": plan, **options}
        super().__init__(Path(__file__).with_name("rawworker.py"), url, json.dumps(options))
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._read = b""

    def events(self) -> list[dict[str, Any]]:
        return list(self._events())

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        self._read += self.process.stdout.read() or b""
        for line in self._read.splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.events())
