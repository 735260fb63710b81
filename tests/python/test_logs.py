"""What is logged: each record with its logger, level and fields, and nothing of prompts and answers."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from cluster import PATIENCE, Cluster, failure, served, settings, until
from mlx_serving_router import (
    ControllerError,
    ControllerNode,
    InferenceRequest,
    TokenEvent,
    WorkerNode,
)
from mlx_serving_router.nats_server import NatsServer
from rawworker import babbles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROOT = "mlx_serving_router"
SECRET = "sesame"
LOCAL: dict[str, Any] = {
    "nats": {"mode": "none"},
    "requestRouting": {
        "retry": {"retryDelayMs": 0},
        "circuitBreaker": {"failureThreshold": 1, "timeoutMs": 50},
    },
}
# What a record has by itself.
STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in STANDARD}


class Log:
    """The records so far, which a thread of the package hands over."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def of(self, logger: str, message: str) -> list[logging.LogRecord]:
        name = f"{ROOT}.{logger}"
        return [
            record
            for record in self._caplog.records
            if record.name == name and record.getMessage().startswith(message)
        ]

    async def one(self, logger: str, message: str, level: str, **fields: Any) -> logging.LogRecord:
        """Waits for the only record of this logger and message; its level and all its fields are as given.

        A field that is given as a type has any value of that type.
        """
        await until(lambda: self.of(logger, message), f"a record {message!r}")
        [record] = self.of(logger, message)
        assert record.levelname == level
        found = fields_of(record)
        assert found.keys() == fields.keys()
        for key, value in fields.items():
            assert isinstance(found[key], value) if isinstance(value, type) else found[key] == value, key
        return record

    async def all_told(self) -> None:
        """Waits until the thread has handed over what came before."""
        async with ControllerNode(LOCAL) as controller:
            last = controller.controller_id

        def told() -> bool:
            stopped = self.of("dispatch.lifecycle", "controller stopped")
            return any(vars(record)["controller_id"] == last for record in stopped)

        await until(told, "the end of what was logged")


@pytest.fixture
async def log(caplog: pytest.LogCaptureFixture) -> Log:
    """Everything from DEBUG on. The level is known to the core from the next record that is waited for."""
    caplog.set_level(logging.DEBUG, logger=ROOT)
    log = Log(caplog)
    # A change of the level is noticed within a second.
    async with asyncio.timeout(PATIENCE):
        while not log.of("dispatch.core", "controller state"):
            async with ControllerNode(LOCAL):
                await asyncio.sleep(0.05)
    await log.all_told()
    caplog.clear()
    return log


class Worker:
    """A local worker that fails while it is told to."""

    def __init__(self, controller: ControllerNode, worker_id: str = "w") -> None:
        self.fails = False
        self.asked = asyncio.Event()
        controller.add_local_worker(self._answer, worker_id=worker_id, models=["tiny"])

    async def _answer(self, request: InferenceRequest) -> AsyncIterator[str]:
        self.asked.set()
        if request.prompt == "stall":
            await asyncio.Event().wait()
        if self.fails:
            raise ControllerError("WORKER_UNAVAILABLE", "it broke")
        yield "one "
        yield "two"


def request(prompt: str = "x", **fields: Any) -> InferenceRequest:
    return InferenceRequest(model_id="tiny", prompt=prompt, **fields)


async def test_the_life_of_a_controller_and_of_a_worker(log: Log) -> None:
    async with ControllerNode(LOCAL, controller_id="c") as controller:
        Worker(controller)
        controller.drain_worker("w")
    await log.one(
        "dispatch.lifecycle",
        "controller started",
        "INFO",
        controller_id="c",
        nats="none",
        strategy="least_requests",
        session_affinity=True,
        max_retries=2,
        timeout_ms=30000,
        circuit_breaker=True,
    )
    await log.one("dispatch.lifecycle", "controller stopping", "INFO", controller_id="c", active=0)
    await log.one("dispatch.lifecycle", "controller stopped", "INFO", controller_id="c")
    states = [vars(record)["state"] for record in log.of("dispatch.core", "controller state")]
    assert states == ["connecting", "starting", "ready", "draining", "stopping", "stopped"]
    assert {record.levelname for record in log.of("dispatch.core", "controller state")} == {"DEBUG"}
    await log.one("dispatch.events", "worker registered", "INFO", worker_id="w", models='["tiny"]')
    await log.one("dispatch.events", "worker draining", "INFO", worker_id="w")


async def test_a_request_that_succeeds(log: Log) -> None:
    async with ControllerNode(LOCAL) as controller:
        Worker(controller)
        response = await controller.handle_buffered_request(request(request_id="r"))
    await log.one(
        "dispatch.call",
        "worker selected",
        "DEBUG",
        request_id="r",
        worker_id="w",
        choice="strategy",
        attempt=1,
    )
    await log.one(
        "dispatch.call",
        "request completed",
        "INFO",
        request_id="r",
        worker_id="w",
        duration_ms=response.metadata.duration_ms,
        attempts=1,
        tokens=2,
    )


async def test_a_request_that_is_cancelled(log: Log) -> None:
    async with ControllerNode(LOCAL) as controller:
        worker = Worker(controller)
        call = asyncio.create_task(controller.handle_buffered_request(request("stall", request_id="r")))
        await worker.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(
            lambda: not controller.cluster_status().requests["active"], "the end of what was abandoned"
        )
        metadata = controller.get_request_metrics("r")
    assert metadata is not None
    await log.one(
        "dispatch.call",
        "request cancelled: its caller went away",
        "INFO",
        request_id="r",
        worker_id="w",
        duration_ms=metadata.duration_ms,
        attempts=1,
    )


async def test_a_retry_a_breaker_and_who_is_left_out(log: Log) -> None:
    routing = {"requestRouting": LOCAL["requestRouting"] | {"circuitBreaker": {"failureThreshold": 1}}}
    async with ControllerNode(LOCAL | routing) as controller:
        a, b = Worker(controller, "a"), Worker(controller, "b")
        a.fails = True
        answered = [
            await controller.handle_buffered_request(request(request_id=f"r{number}")) for number in range(20)
        ]
        assert {response.worker_id for response in answered} == {"b"}
        [retried] = [response.request_id for response in answered if response.metadata.retry_count]
        passing = [{"worker_id": "a", "reason": "circuit_open"}]
        passed = [one for one in answered if one.metadata.attempts[0]["left_out"] == passing]
        b.fails = True
        failed = await failure(controller.handle_buffered_request(request(request_id="last")))
    retry = "attempt failed, another worker is tried"
    # For the last request nobody is left.
    await log.one(
        "dispatch.call",
        retry,
        "WARNING",
        request_id=retried,
        worker_id="a",
        code="WORKER_UNAVAILABLE",
        duration_ms=float,
        attempt=1,
    )
    await until(lambda: len(log.of("dispatch.events", "circuit breaker opened")) == 2, "both breakers")
    for record, worker_id in zip(log.of("dispatch.events", "circuit breaker opened"), "ab", strict=True):
        change = {"worker_id": worker_id, "from": "CLOSED", "to": "OPEN", "reason": "consecutive_failures"}
        assert (record.levelname, fields_of(record)) == ("WARNING", change)
    # Many requests pass it by, and it is told once.
    assert len(passed) > 15
    await log.one(
        "dispatch.left_out",
        "workers filtered out",
        "WARNING",
        request_id=passed[0].request_id,
        model_id="tiny",
        count=1,
        left_out="a: circuit_open",
    )
    assert failed.code == "NO_WORKERS_AVAILABLE"
    await log.one(
        "dispatch.call",
        "request failed: in the words of its worker, which the request's metadata has",
        "ERROR",
        request_id="last",
        worker_id="b",
        code="NO_WORKERS_AVAILABLE",
        duration_ms=float,
        attempts=1,
    )


async def test_a_breaker_that_recovers(log: Log) -> None:
    config = {
        "nats": {"mode": "none"},
        "requestRouting": {
            "retry": {"enabled": False},
            "circuitBreaker": {"failureThreshold": 1, "successThreshold": 1, "timeoutMs": 50},
        },
    }
    async with ControllerNode(config) as controller:
        worker = Worker(controller)
        worker.fails = True
        assert (await failure(controller.handle_buffered_request(request()))).code == "WORKER_UNAVAILABLE"
        worker.fails = False
        await served(lambda: controller.handle_buffered_request(request()), "NO_HEALTHY_WORKERS")
    message = "circuit breaker half-open or closed"
    await until(lambda: len(log.of("dispatch.events", message)) == 2, "its recovery")
    half_open, closed = log.of("dispatch.events", message)
    for record, change in (
        (half_open, ("OPEN", "HALF_OPEN", "timeout_passed")),
        (closed, ("HALF_OPEN", "CLOSED", "probes_succeeded")),
    ):
        named = dict(zip(("worker_id", "from", "to", "reason"), ("w", *change), strict=True))
        assert (record.levelname, fields_of(record)) == ("INFO", named)


async def test_a_worker_that_the_caller_names_leaves_nobody_out(log: Log) -> None:
    async with ControllerNode(LOCAL) as controller:
        for name in ("a", "b"):
            Worker(controller, name)
        controller.force_open_circuit_breaker("a")
        await controller.handle_buffered_request(request(), worker_id="b")
    await log.all_told()
    assert log.of("dispatch.left_out", "workers filtered out") == []


# === over NATS ===


@pytest.mark.nats
async def test_what_happens_to_a_fleet(log: Log, nats: NatsServer, nats_prefix: str) -> None:
    limits = {"controller": {"maxWorkers": 2, "workerOfflineTimeoutMs": 1000}}
    async with Cluster(nats.url, nats_prefix, workers=1, **limits) as cluster:
        worker = cluster.worker
        await worker.publish("worker.register", {"protocol": 1, "workerId": "nameless"})
        text = "a worker without incarnation registered, and is left out: each start has to have its own"
        await log.one("dispatch.membership", text, "WARNING", worker_id="nameless")

        await worker.publish("worker.heartbeat", ["no heartbeat"])
        subject = f"{nats_prefix}worker.heartbeat"
        await log.one(
            "dispatch.membership", "a membership message was dropped", "DEBUG", subject=subject, error=str
        )

        before, worker.incarnation = worker.incarnation, "another"
        await worker.register()
        text = "a new start of this worker, or another one of its name, took its place"
        await log.one(
            "dispatch.events", text, "WARNING", worker_id="w0", incarnation="another", previous=before
        )

        third = cluster.another(worker_id="third")
        third.beats = False  # with each heartbeat it would be asked to register again
        async with cluster.another(worker_id="second"), third:
            text = "no room for another worker: controller.maxWorkers"
            await log.one("dispatch.membership", text, "WARNING", worker_id="third", max_workers=2)

        worker.beats = False
        await log.one("dispatch.events", "worker offline: silent for too long", "WARNING", worker_id="w0")


async def test_a_local_worker_that_leaves(log: Log) -> None:
    async with ControllerNode(LOCAL) as controller:
        Worker(controller)
    await log.one("dispatch.events", "worker forgotten", "INFO", worker_id="w")


@pytest.mark.nats
async def test_what_a_worker_does_not_understand(log: Log, nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=1) as cluster:
        send = cluster.worker.publish
        config = cluster.controller.config
        async with WorkerNode(never_ends, config=config, worker_id="ours", models=["tiny"]):
            asked = {"requestId": "r", "modelId": "tiny", "prompt": "x"}
            await send("inference.ours", asked)
            await log.one("worker.intake", "a request without a subject for its answer is dropped", "DEBUG")
            await send("cancel.ours", [])
            await log.one("worker.intake", "a cancellation that cannot be read is dropped", "DEBUG")
            await send("controller.hello", [])
            subject = f"{nats_prefix}controller.hello"
            await log.one(
                "worker.membership", "a message that cannot be read is dropped", "DEBUG", subject=subject
            )
            client, inbox = cluster.worker.client, f"{nats_prefix}answers"
            for _ in range(2):
                headers = {"Request-Id": "r", "Attempt": "1", "Controller-Id": "c"}
                body = json.dumps(asked).encode()
                await client.publish(f"{nats_prefix}inference.ours", body, reply=inbox, headers=headers)
            await log.one(
                "worker.intake", "an attempt that is here already is ignored", "DEBUG", request_id="r"
            )
            async with cluster.another(worker_id="ours"):
                record = await log.one(
                    "worker.runtime", "the worker has stopped", "ERROR", worker="ours", error=str
                )
                assert "WORKER_OFFLINE" in vars(record)["error"]


async def never_ends(_request: InferenceRequest) -> AsyncIterator[str]:
    await asyncio.Event().wait()
    yield ""


@pytest.mark.nats
async def test_nats_goes_and_comes(log: Log, nats_prefix: str) -> None:
    with NatsServer(port=0) as server:
        controller = ControllerNode(settings(server.url, nats_prefix), controller_id="c")
        worker = WorkerNode(answer, config=controller.config, worker_id="w", models=["tiny"])
        async with controller:
            await worker.start()
            await controller.wait_for_workers(1, timeout=PATIENCE)
            await asyncio.to_thread(server.stop)
            await log.one(
                "dispatch.membership", "the connection to NATS is down", "WARNING", controller_id="c"
            )
            await until(lambda: log.of("worker.membership", "no heartbeat went out"), "a lost heartbeat")
            lost = log.of("worker.membership", "no heartbeat went out")[0]
            assert (lost.levelname, list(fields_of(lost))) == ("DEBUG", ["error"])
            await worker.stop(0)
            await log.one(
                "worker.membership",
                "not deregistered; controllers will notice the silence",
                "DEBUG",
                error=str,
            )
            with NatsServer(port=server.port):
                await log.one(
                    "dispatch.membership", "the connection to NATS is back", "INFO", controller_id="c"
                )
                await controller.stop(0)


# === what is not told ===


async def leaks(log: Log, caplog: pytest.LogCaptureFixture, *shown: object) -> list[str]:
    """Where the secret is found: among the records, or in what is given."""
    await log.all_told()
    formatter = logging.Formatter("%(name)s %(message)s")
    told = [f"{formatter.format(record)} {vars(record)}" for record in caplog.records]
    assert told
    told += [text for thing in shown for text in (repr(thing), str(thing))]
    return [text for text in told if SECRET in text]


def traces(error: BaseException) -> list[object]:
    """All that shows of an error: its words, its facts, its causes, its traceback."""
    shown: list[object] = ["".join(traceback.format_exception(error))]
    cause: BaseException | None = error
    while cause is not None:
        assert isinstance(cause, ControllerError)
        shown += [cause, cause.message, cause.context, cause.to_dict(), pickle.dumps(cause)]
        cause = cause.__cause__
    return shown


def secretive(**fields: Any) -> InferenceRequest:
    """A request with the secret wherever a caller may put words."""
    tool = {"type": "function", "function": {"name": SECRET, "description": SECRET}}
    return InferenceRequest(
        model_id="tiny",
        messages=[{"role": "user", "content": f"open {SECRET}"}],
        stop=[SECRET],
        tools=[tool],
        response_format={"type": SECRET},
        **fields,
    )


async def answer(request: InferenceRequest) -> AsyncIterator[TokenEvent | str]:
    assert SECRET in str(request.messages)
    yield f"{SECRET} "
    yield TokenEvent(SECRET)


async def raise_it(request: InferenceRequest) -> AsyncIterator[str]:
    raise KeyError(str(request.messages))
    yield ""


async def break_off(request: InferenceRequest) -> AsyncIterator[str]:
    yield SECRET
    raise KeyError(str(request.messages))


async def yield_nonsense(_request: InferenceRequest) -> AsyncIterator[Any]:
    yield [SECRET]


async def test_an_answer_leaves_no_trace_of_itself(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    async with ControllerNode(LOCAL) as controller:
        controller.add_local_worker(answer, worker_id="w", models=["tiny"])
        asked = secretive()
        response = await controller.handle_buffered_request(asked)
        stream = await controller.handle_streaming_request(secretive())
        async with stream:
            text = "".join([event.text async for event in stream])
        assert response.text == text == f"{SECRET} {SECRET}"
        shown = [
            asked,
            stream,
            controller,
            response.metadata,
            response.metadata.to_dict(),
            *controller.get_all_request_metrics(),
            *controller.workers(),
            controller.cluster_status(),
            controller.metrics_text(),
        ]
    assert await leaks(log, caplog, *shown) == []


@pytest.mark.parametrize("handler", [raise_it, break_off, yield_nonsense])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_failure_leaves_no_trace_of_a_request(
    log: Log,
    caplog: pytest.LogCaptureFixture,
    handler: Callable[[InferenceRequest], AsyncIterator[str]],
    streaming: bool,  # noqa: FBT001
) -> None:
    async with ControllerNode(LOCAL) as controller:
        for name in ("a", "b"):
            controller.add_local_worker(handler, worker_id=name, models=["tiny"])
        error = await failure(outcome(controller, secretive(), streaming=streaming))
        metadata = controller.get_all_request_metrics()
    assert await leaks(log, caplog, *traces(error), *metadata, *(one.to_dict() for one in metadata)) == []


async def outcome(controller: ControllerNode, asked: InferenceRequest, *, streaming: bool) -> None:
    if not streaming:
        await controller.handle_buffered_request(asked)
        return
    async with await controller.handle_streaming_request(asked) as stream:
        async for _event in stream:
            pass


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1.0},
        {"logprobs": 1000},
        {"max_tokens": 0},
        {"session_id": "a\nb"},
    ],
)
async def test_a_refusal_leaves_no_trace_of_a_request(
    log: Log, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    async with ControllerNode(LOCAL) as controller:
        controller.add_local_worker(answer, worker_id="w", models=["tiny"])
        error = await failure(controller.handle_buffered_request(secretive(**fields)))
    assert error.code in ("REQUEST_VALIDATION_FAILED", "INVALID_SESSION_ID")
    assert await leaks(log, caplog, *traces(error)) == []


@pytest.mark.nats
async def test_what_a_worker_writes_is_for_the_caller_alone(
    log: Log, caplog: pytest.LogCaptureFixture, nats: NatsServer, nats_prefix: str
) -> None:
    quotes: list[dict[str, Any] | str] = [{"type": "error", "error": f"too long: {SECRET}"}]
    async with Cluster(nats.url, nats_prefix, workers=2, plan=babbles(quotes)) as cluster:
        error = await failure(cluster.buffered())
    assert SECRET in str(error.__cause__)
    assert await leaks(log, caplog) == []
    await log.one(
        "dispatch.call",
        "request failed: in the words of its worker, which the request's metadata has",
        "ERROR",
        request_id=str,
        worker_id=str,
        code="NO_WORKERS_AVAILABLE",
        duration_ms=float,
        attempts=2,
    )


@pytest.mark.nats
async def test_nothing_is_told_over_nats_either(
    log: Log, caplog: pytest.LogCaptureFixture, nats: NatsServer, nats_prefix: str
) -> None:
    nonsense: list[dict[str, Any] | str] = [
        {"type": "accepted"},
        {"type": "token", "token": f"a {SECRET}", "index": 0},
        {"type": "token", "token": SECRET, "index": 0},
    ]
    garbage: list[dict[str, Any] | str] = [{"type": "token", "token": 5, "index": SECRET}]
    async with Cluster(nats.url, nats_prefix, workers=1, plan=babbles(nonsense)) as cluster:
        asked = secretive()
        async with await cluster.controller.handle_streaming_request(asked) as stream:
            with pytest.raises(ControllerError) as broken:
                async for _event in stream:
                    pass
        async with cluster.another(worker_id="other", plan=babbles(garbage)):
            await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
            garbled = await failure(
                cluster.controller.handle_buffered_request(secretive(), worker_id="other")
            )
        config = cluster.controller.config
        async with WorkerNode(raise_it, config=config, worker_id="ours", models=["tiny"]):
            await until(lambda: cluster.controller.worker("ours"), "the third worker")
            raised = await failure(cluster.controller.handle_buffered_request(secretive(), worker_id="ours"))
        assert (broken.value.code, garbled.code, raised.code) == (
            "STREAM_INTERRUPTED",
            "WORKER_UNAVAILABLE",
            "WORKER_UNAVAILABLE",
        )
        shown = [one for error in (broken.value, garbled, raised) for one in traces(error)] + list(
            cluster.controller.get_all_request_metrics()
        )
    assert await leaks(log, caplog, *shown) == []
