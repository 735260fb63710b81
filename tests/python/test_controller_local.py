"""A whole controller with workers of its own process: answers, streams, cancellation, and what is told of them."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_serving_router import (
    CircuitState,
    ControllerError,
    ControllerNode,
    InferenceRequest,
    InferenceResponse,
    TokenEvent,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PATIENCE = 10.0


def config(**routing: Any) -> dict[str, Any]:
    return {"nats": {"mode": "none"}, "requestRouting": routing}


def asked(model: str = "tiny", **fields: Any) -> InferenceRequest:
    return InferenceRequest(model_id=model, messages=[{"role": "user", "content": "Hello"}], **fields)


async def tiny(_request: InferenceRequest) -> AsyncIterator[str]:
    for token in ("Hello", ", ", "world"):
        yield token


async def broken(_request: InferenceRequest) -> AsyncIterator[str]:
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")
    yield ""


async def breaks(_request: InferenceRequest) -> AsyncIterator[str]:
    yield "Hel"
    raise ControllerError("WORKER_UNAVAILABLE", "it broke")


class Endless:
    """A worker that goes on until it is told to stop."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.stopped = threading.Event()

    async def handler(self, _request: InferenceRequest) -> AsyncIterator[str]:
        try:
            while True:
                yield "on "
                self.begun.set()
                await asyncio.sleep(0.005)
        finally:
            self.stopped.set()

    async def silent(self, _request: InferenceRequest) -> AsyncIterator[str]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
            yield ""
        finally:
            self.stopped.set()


async def happened(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE)


def in_flight(controller: ControllerNode) -> int:
    return sum(worker.in_flight for worker in controller.workers())


# === answers ===


async def test_an_answer_in_one_piece() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        await controller.wait_for_workers(1, timeout=PATIENCE)
        request = asked(session_id="s")
        response = await controller.handle_buffered_request(request)
        assert isinstance(response, InferenceResponse)
        assert (response.text, response.finish_reason) == ("Hello, world", "stop")
        assert (response.worker_id, response.model_id) == ("w", "tiny")
        assert response.request_id == request.request_id
        assert response.metadata.status == "succeeded"
        assert [attempt["worker_id"] for attempt in response.metadata.attempts] == ["w"]
        assert controller.get_request_metrics(request.request_id) == response.metadata
        assert controller.get_all_request_metrics() == [response.metadata]
        assert controller.get_request_metrics("none") is None
        assert in_flight(controller) == 0
        assert pickle.loads(pickle.dumps(response)) == response


async def test_the_methods_agree_on_a_failure_and_name_its_cause() -> None:
    async with ControllerNode(config(retry={"maxRetries": 1, "retryDelayMs": 1})) as controller:
        for name in ("a", "b"):
            controller.add_local_worker(broken, worker_id=name, models=["tiny"])
        for call in (controller.handle_buffered_request, controller.handle_streaming_request):
            with pytest.raises(ControllerError) as caught:
                await call(asked())
            error = caught.value
            assert error.code == "ALL_RETRIES_EXHAUSTED"
            assert isinstance(error.__cause__, ControllerError)
            assert error.__cause__.code == "WORKER_UNAVAILABLE"
            assert {attempt["worker_id"] for attempt in error.context["attempts"]} == {"a", "b"}
        assert in_flight(controller) == 0


async def test_a_call_is_bounded_by_its_timeout() -> None:
    endless = Endless()
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(endless.silent, models=["tiny"])
        with pytest.raises(TimeoutError) as caught:
            await controller.handle_buffered_request(asked(), timeout=0.05)
        assert caught.value.code == "WORKER_TIMEOUT"  # type: ignore[attr-defined]
        await happened(endless.stopped)
        with pytest.raises(ValueError, match="timeout: is -1"):
            await controller.handle_buffered_request(asked(), timeout=-1)


async def test_a_worker_can_be_named() -> None:
    async with ControllerNode(config()) as controller:
        for name in ("a", "b"):
            controller.add_local_worker(tiny, worker_id=name, models=["tiny"])
        answers = [await controller.handle_buffered_request(asked(), worker_id="b") for _ in range(3)]
        assert {answer.worker_id for answer in answers} == {"b"}
        with pytest.raises(ControllerError) as caught:
            await controller.handle_buffered_request(asked(), worker_id="c")
        assert caught.value.code == "WORKER_OFFLINE"


async def test_a_bad_request_is_a_value_error() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        with pytest.raises(ValueError, match="max_tokens: is -1") as caught:
            await controller.handle_buffered_request(asked(max_tokens=-1))
        assert caught.value.context["field"] == "max_tokens"  # type: ignore[attr-defined]


async def test_a_hundred_at_a_time() -> None:
    async with ControllerNode(config()) as controller:
        for name in ("a", "b"):
            controller.add_local_worker(tiny, worker_id=name, models=["tiny"])
        answers = await asyncio.gather(*(controller.handle_buffered_request(asked()) for _ in range(100)))
        assert {answer.text for answer in answers} == {"Hello, world"}
        assert {answer.worker_id for answer in answers} == {"a", "b"}
        status = controller.cluster_status()
        assert status.requests == {"active": 0, "queued": 0, "completed": 100}
        assert status.to_dict()["workers"] == {"total": 2, "online": 2, "draining": 0, "offline": 0}
        assert status.models == ["tiny"]


# === streams ===


async def test_an_answer_as_it_comes() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        assert (stream.worker_id, bool(stream.request_id)) == ("w", True)
        async with stream:
            events = [event async for event in stream]
        assert all(isinstance(event, TokenEvent) for event in events)
        assert [(event.text, event.index) for event in events] == [("Hello", 0), (", ", 1), ("world", 2)]
        assert stream.response is not None
        assert stream.response.text == "Hello, world"
        assert stream.response.metadata.status == "succeeded"
        assert [event async for event in stream] == []


async def test_batches_give_what_is_ready() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        batches = [batch async for batch in stream.batches()]
        assert all(batches)
        assert "".join(event.text for batch in batches for event in batch) == "Hello, world"


async def test_a_stream_that_breaks_says_so_after_its_tokens() -> None:
    async with ControllerNode(config(streamFailover="off")) as controller:
        controller.add_local_worker(breaks, models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        text = ""
        with pytest.raises(ControllerError) as caught:  # noqa: PT012 what came before is looked at
            async for event in stream:
                text += event.text
        assert (text, caught.value.code, stream.response) == ("Hel", "STREAM_INTERRUPTED", None)
        with pytest.raises(ControllerError, match="STREAM_INTERRUPTED"):
            await anext(stream)


@pytest.mark.parametrize("leave", ["break", "aclose", "drop", "cancel"])
async def test_a_stream_that_is_left_stops_the_work(leave: str) -> None:
    endless = Endless()
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(endless.handler, models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        request_id = stream.request_id
        assert (await anext(stream)).index == 0
        match leave:
            case "break":
                async with stream:
                    async for _ in stream:
                        break
            case "aclose":
                await stream.aclose()
            case "drop":
                del stream
                gc.collect()
            case "cancel":
                reader = asyncio.create_task(_read(stream))
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
        await happened(endless.stopped)
        if leave != "drop":
            assert in_flight(controller) == 0
        metadata = controller.get_request_metrics(request_id)
        assert metadata is not None
        assert metadata.status == "cancelled"


async def _read(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            pass


async def test_an_await_that_times_out_loses_no_token() -> None:
    async def slow(_request: InferenceRequest) -> AsyncIterator[str]:
        for _ in range(20):
            yield "on "
            await asyncio.sleep(0.003)

    async with ControllerNode(config()) as controller:
        controller.add_local_worker(slow, models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        found = []
        while True:
            try:
                found.append((await asyncio.wait_for(anext(stream), 0.001)).index)
            except TimeoutError:
                continue
            except StopAsyncIteration:
                break
        assert found == list(range(20))


async def test_two_tasks_cannot_read_one_stream() -> None:
    endless = Endless()
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(endless.handler, models=["tiny"])
        async with await controller.handle_streaming_request(asked()) as stream:
            readers = [asyncio.ensure_future(_some(stream)) for _ in range(2)]
            results = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(result) for result in results].count(RuntimeError) == 1


async def _some(stream: Any) -> None:
    for _ in range(100):
        await anext(stream)


async def test_a_stream_that_nobody_reads_is_ended() -> None:
    async def babbles(_request: InferenceRequest) -> AsyncIterator[str]:
        for _ in range(100_000):
            yield "on "

    # The idle limit is that of the reader, too. Making 100,000 events stops the reader for the collector now and then.
    async with ControllerNode(config(streamIdleTimeoutMs=3000)) as controller:
        controller.add_local_worker(babbles, models=["tiny"])
        stream = await controller.handle_streaming_request(asked())
        other = await controller.handle_streaming_request(asked())
        assert len([event async for event in other]) == 100_000

        def status() -> str | None:
            metadata = controller.get_request_metrics(stream.request_id)
            return metadata and metadata.status

        while status() == "running":  # noqa: ASYNC110 nothing tells of it but its metadata
            await asyncio.sleep(0.02)
        assert status() == "failed"
        read = 0
        with pytest.raises(ControllerError) as caught:  # noqa: PT012 what came before is counted
            async for _ in stream:
                read += 1
        assert caught.value.code == "STREAM_INTERRUPTED"
        assert 0 < read < 20_000


# === cancellation and the end ===


@pytest.mark.parametrize("method", ["handle_buffered_request", "handle_streaming_request"])
async def test_a_task_that_is_cancelled_cancels_the_work(method: str) -> None:
    endless = Endless()
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(endless.silent, models=["tiny"])
        request = asked()
        task = asyncio.create_task(getattr(controller, method)(request))
        await happened(endless.begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await happened(endless.stopped)
        assert in_flight(controller) == 0
        metadata = controller.get_request_metrics(request.request_id)
        assert metadata is not None
        assert metadata.status == "cancelled"
        assert metadata.final_error is not None
        assert metadata.final_error["code"] == "CANCELLED"


async def test_what_runs_when_the_controller_stops_is_told() -> None:
    endless = Endless()
    controller = ControllerNode(config())
    async with controller:
        controller.add_local_worker(endless.silent, models=["tiny"])
        task = asyncio.create_task(controller.handle_buffered_request(asked()))
        await happened(endless.begun)
        await controller.stop(0.05)
        with pytest.raises(ControllerError) as caught:
            await task
        assert caught.value.code == "CONTROLLER_NOT_READY"
        await happened(endless.stopped)


# === blocking ===


def test_the_blocking_twins() -> None:
    endless = Endless()
    with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        controller.add_local_worker(endless.handler, models=["endless"])
        controller.wait_for_workers_blocking(2, timeout=PATIENCE)
        assert controller.generate(asked()).text == "Hello, world"
        with controller.generate_stream(asked()) as stream:
            assert [event.text for event in stream] == ["Hello", ", ", "world"]
        assert stream.response is not None
        assert stream.response.text == "Hello, world"
        with controller.generate_stream(asked("endless")) as stream:
            assert next(iter(stream)).text == "on "
        assert endless.stopped.wait(PATIENCE)
        assert in_flight(controller) == 0
        with pytest.raises(ControllerError, match="MODEL_NOT_FOUND"):
            controller.generate(asked("none"))


async def test_a_notebook_generates_in_the_thread_of_its_loop() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        answer = await asyncio.to_thread(controller.generate, asked())
        assert answer.text == "Hello, world"


# === the operator ===


async def test_the_operators_hand() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        controller.force_open_circuit_breaker("w")
        worker = controller.worker("w")
        assert worker is not None
        assert worker.breaker is CircuitState.FORCED_OPEN
        assert controller.get_circuit_breaker_stats()["w"]["state"] == "FORCED_OPEN"
        with pytest.raises(ControllerError, match="NO_HEALTHY_WORKERS"):
            await controller.handle_buffered_request(asked())
        controller.reset_circuit_breaker("w")
        assert (await controller.handle_buffered_request(asked())).text == "Hello, world"
        assert controller.get_circuit_breaker_stats()["w"]["success_count"] == 1
        controller.drain_worker("w")
        with pytest.raises(ControllerError, match="NO_WORKERS_AVAILABLE"):
            await controller.handle_buffered_request(asked())
        assert controller.worker("nobody") is None
        operations: list[Callable[[str], None]] = [
            controller.force_open_circuit_breaker,
            controller.reset_circuit_breaker,
            controller.drain_worker,
        ]
        for operation in operations:
            with pytest.raises(ValueError, match="no worker 'nobody' is known"):
                operation("nobody")


async def test_without_breakers_there_is_nothing_to_reset() -> None:
    async with ControllerNode(config(circuitBreaker={"enabled": False})) as controller:
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        assert controller.get_circuit_breaker_stats() == {}
        assert controller.workers()[0].breaker is CircuitState.DISABLED
        with pytest.raises(ValueError, match="breakers are disabled"):
            controller.reset_circuit_breaker("w")


async def test_what_happens_is_told() -> None:
    async with ControllerNode(config()) as controller:
        events = controller.events()
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        event = await asyncio.wait_for(anext(events), PATIENCE)
        assert (event.kind, event.worker_id, event.lost) == ("worker_registered", "w", 0)
        controller.force_open_circuit_breaker("w")
        event = await asyncio.wait_for(anext(events), PATIENCE)
        assert (event.kind, event.worker_id) == ("breaker_changed", "w")
        assert set(event.to_dict()) == {"kind", "workerId", "timestamp", "details", "lost"}


async def test_a_reader_that_is_cancelled_loses_no_event() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, worker_id="w", models=["tiny"])
        events = controller.events()
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        controller.force_open_circuit_breaker("w")
        time.sleep(0.05)  # noqa: ASYNC251 the event comes while the loop does not look
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        controller.reset_circuit_breaker("w")
        changes = [(await asyncio.wait_for(anext(events), PATIENCE)).details["to"] for _ in range(2)]
        assert changes == ["FORCED_OPEN", "CLOSED"]


async def test_numbers_for_prometheus() -> None:
    async with ControllerNode(config()) as controller:
        controller.add_local_worker(tiny, models=["tiny"])
        await controller.handle_buffered_request(asked())
        families = {
            family.name: family for family in text_string_to_metric_families(controller.metrics_text())
        }
        requests = families["mlx_router_requests"]
        assert requests.type == "counter"
        assert [sample.value for sample in requests.samples] == [1]
        assert controller.metrics_text(openmetrics=True).endswith("# EOF\n")
