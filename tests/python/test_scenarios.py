"""The twelve scenarios that must hold end to end: the public API, a real nats-server, workers on the other side of it.

Workers that fail as planned are scripted (rawworker.py); those that answer for real are processes with the tiny model.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from cluster import (
    PATIENCE,
    Cluster,
    WorkerProcess,
    all_online,
    ask,
    failure,
    read,
    received,
    routing,
    served,
    settings,
    text,
    until,
)
from mlx_serving_router import CircuitState, ControllerErrorCode, ControllerNode
from rawworker import ANSWER, WORDS, answers, dies, fails, in_turn, refuses, stalls

if TYPE_CHECKING:
    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats

PARIS = ("What is the capital of France?", "The capital of France is Paris.")
STORY = "Tell me a story."


# === 1: success on first try ===


async def test_01_a_buffered_request_succeeds_on_first_try(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        response = await cluster.buffered("Hello", request_id="r-1", max_tokens=16)
        cluster.at_rest()
        assert (response.text, response.finish_reason) == (ANSWER, "stop")
        assert (response.worker_id, response.model_id, response.request_id) == ("w0", "tiny", "r-1")
        usage = response.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 4, 8)
        metadata = cluster.metadata("r-1")
        assert metadata == response.metadata
        assert (metadata.status, metadata.retry_count, metadata.selected_worker) == ("succeeded", 0, "w0")
        assert (metadata.failed_workers, metadata.final_error) == ([], None)
        assert (metadata.circuit_breaker_trips, metadata.timeouts, metadata.tokens) == (0, 0, 4)
        assert cluster.asked == [1]
        assert cluster.worker.cancels == []


async def test_01_a_stream_succeeds_on_first_try(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        stream = await cluster.streaming("Hello", request_id="r-1")
        events = await read(stream)
        cluster.at_rest()
        assert [event.text for event in events] == list(WORDS)
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert [list(event.token_ids) for event in events] == [[1000], [1001], [1002], [1003]]
        assert stream.response is not None
        assert (stream.response.text, stream.response.worker_id) == (ANSWER, "w0")
        metadata = cluster.metadata("r-1")
        assert (metadata.status, metadata.retry_count, metadata.tokens) == ("succeeded", 0, 4)
        assert metadata.time_to_first_token_ms is not None
        assert metadata.duration_ms is not None
        assert 0 < metadata.time_to_first_token_ms <= metadata.duration_ms
        assert cluster.asked == [1]


@pytest.mark.model
async def test_01_the_tiny_model_answers(
    tiny_workers: list[WorkerProcess], nats: NatsServer, tiny_prefix: str
) -> None:
    async with ControllerNode(settings(nats.url, tiny_prefix)) as controller:
        await all_online(controller, tiny_workers)
        question, answer = PARIS
        buffered = await controller.handle_buffered_request(ask(question, temperature=0, max_tokens=32))
        stream = await controller.handle_streaming_request(ask(question, temperature=0, max_tokens=32))
        events = await read(stream)
        assert buffered.text == text(events) == answer
        assert buffered.finish_reason == "stop"
        assert buffered.usage.completion_tokens == sum(len(event.token_ids) for event in events)
        assert stream.response is not None
        assert stream.response.usage.completion_tokens == buffered.usage.completion_tokens
        assert buffered.worker_id in {worker.worker_id for worker in tiny_workers}


# === 2: retry on worker failure ===


@pytest.mark.parametrize(
    "code", ["WORKER_UNAVAILABLE", "QUEUE_FULL", "MODEL_LOAD_FAILED", "WORKER_TIMEOUT", "FLUX", None]
)
async def test_02_a_failed_attempt_is_repeated_on_another_worker(
    nats: NatsServer, nats_prefix: str, code: str | None
) -> None:
    async with Cluster(nats.url, nats_prefix, workers=2, plan=in_turn(fails(code), answers())) as cluster:
        response = await cluster.buffered(request_id="r-1")
        cluster.at_rest()
        assert response.text == ANSWER
        assert cluster.asked == [1, 1]
        metadata = cluster.metadata("r-1")
        (failed,) = metadata.failed_workers
        assert {failed, response.worker_id} == {"w0", "w1"}
        assert (metadata.retry_count, metadata.status, metadata.selected_worker) == (
            1,
            "succeeded",
            response.worker_id,
        )
        assert metadata.final_error is None
        first, second = cluster.by_id(failed).jobs[0], cluster.by_id(response.worker_id).jobs[0]
        assert (first.attempt, second.attempt) == (1, 2)
        assert first.request == second.request
        assert first.reply != second.reply


@pytest.mark.parametrize("code", ["REQUEST_VALIDATION_FAILED"])
async def test_02_the_requests_own_fault_is_not_repeated(
    nats: NatsServer, nats_prefix: str, code: str
) -> None:
    async with Cluster(nats.url, nats_prefix, workers=2, plan=fails(code)) as cluster:
        error = await failure(cluster.buffered())
        assert error.code == code
        assert sum(cluster.asked) == 1


async def test_02_a_worker_that_loses_its_connection_costs_no_request(
    nats: NatsServer, nats_prefix: str
) -> None:
    plan = in_turn(dies(), answers())
    changes = routing(timeoutMs=500)
    async with Cluster(nats.url, nats_prefix, workers=2, plan=plan, **changes) as cluster:
        response = await cluster.buffered(request_id="r-1")
        assert response.text == ANSWER
        assert cluster.asked == [1, 1]
        assert cluster.metadata("r-1").retry_count == 1


# === 3: all retries exhausted ===


async def test_03_all_retries_are_exhausted(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=4, plan=fails()) as cluster:
        error = await failure(cluster.buffered(request_id="r-1"))
        cluster.at_rest()
        assert error.code == ControllerErrorCode.ALL_RETRIES_EXHAUSTED
        assert error.retryable
        assert error.context["request_id"] == "r-1"
        assert [attempt["code"] for attempt in error.context["attempts"]] == ["WORKER_UNAVAILABLE"] * 3
        tried = [attempt["worker_id"] for attempt in error.context["attempts"]]
        assert len(set(tried)) == 3
        assert error.__cause__ is not None
        assert error.__cause__.code == "WORKER_UNAVAILABLE"  # type: ignore[attr-defined]
        assert sorted(cluster.asked) == [0, 1, 1, 1]
        metadata = cluster.metadata("r-1")
        assert (metadata.status, metadata.retry_count, metadata.failed_workers) == ("failed", 2, tried)
        assert metadata.final_error is not None
        assert metadata.final_error["code"] == "ALL_RETRIES_EXHAUSTED"


async def test_03_everybody_was_tried_before_the_retries_are_used_up(
    nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(nats.url, nats_prefix, workers=2, plan=fails()) as cluster:
        error = await failure(cluster.buffered(request_id="r-1"))
        assert error.code == ControllerErrorCode.NO_WORKERS_AVAILABLE
        assert error.context["total_workers"] == 2
        assert error.context["healthy_workers"] == 2
        assert error.context["excluded_workers"] == 2
        assert cluster.asked == [1, 1]
        assert cluster.metadata("r-1").retry_count == 1


async def test_03_without_retries_the_attempts_own_error_surfaces(nats: NatsServer, nats_prefix: str) -> None:
    for retry in ({"enabled": False}, {"maxRetries": 0}, {"retryOnErrors": ["WORKER_TIMEOUT"]}):
        async with Cluster(nats.url, nats_prefix, workers=2, plan=fails(), **routing(retry=retry)) as cluster:
            error = await failure(cluster.buffered())
            assert error.code == ControllerErrorCode.WORKER_UNAVAILABLE
            assert sum(cluster.asked) == 1


# === 4: breaker opens after failures ===


async def test_04_the_breaker_opens_after_failures(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(retry={"enabled": False}, breaker={"failureThreshold": 3})
    async with Cluster(nats.url, nats_prefix, plan=fails(), **changes) as cluster:
        for number in range(3):
            assert cluster.breaker(cluster.worker)["state"] == CircuitState.CLOSED
            error = await failure(cluster.buffered(request_id=f"r-{number}"))
            assert error.code == "WORKER_UNAVAILABLE"
        breaker = cluster.breaker(cluster.worker)
        assert (breaker["state"], breaker["failure_count"]) == (CircuitState.OPEN, 3)
        assert breaker["opened_at"] is not None
        assert cluster.info(cluster.worker).breaker == "OPEN"
        assert [cluster.metadata(f"r-{number}").circuit_breaker_trips for number in range(3)] == [0, 0, 1]

        error = await failure(cluster.buffered())
        assert error.code == ControllerErrorCode.NO_HEALTHY_WORKERS
        named = cluster.controller.handle_buffered_request(ask(), worker_id="w0")
        error = await failure(named)
        assert error.code == ControllerErrorCode.CIRCUIT_BREAKER_OPEN
        assert cluster.asked == [3]


async def test_04_an_open_breaker_keeps_requests_from_one_worker_alone(
    nats: NatsServer, nats_prefix: str
) -> None:
    changes = routing(breaker={"failureThreshold": 2})
    async with Cluster(nats.url, nats_prefix, workers=2, **changes) as cluster:
        broken, sound = cluster.workers
        broken.plan = fails()
        while cluster.breaker(broken)["state"] == "CLOSED":
            assert (await cluster.buffered()).worker_id == sound.worker_id
        before = len(broken.jobs)
        for _ in range(10):
            assert (await cluster.buffered()).metadata.retry_count == 0
        assert len(broken.jobs) == before == 2


# === 5: breaker recovers ===


async def test_05_the_breaker_recovers_by_way_of_half_open(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(
        retry={"enabled": False}, breaker={"failureThreshold": 1, "successThreshold": 2, "timeoutMs": 200}
    )
    async with Cluster(nats.url, nats_prefix, plan=in_turn(fails(), answers()), **changes) as cluster:
        assert (await failure(cluster.buffered())).code == "WORKER_UNAVAILABLE"
        opened = time.monotonic()
        assert (await failure(cluster.buffered())).code == "NO_HEALTHY_WORKERS"

        await served(cluster.buffered, "NO_HEALTHY_WORKERS")
        assert 0.15 < time.monotonic() - opened < 2  # 200 ms, and 20 % of jitter
        assert cluster.breaker(cluster.worker)["state"] == CircuitState.HALF_OPEN
        await cluster.buffered()
        assert cluster.breaker(cluster.worker)["state"] == CircuitState.CLOSED
        assert cluster.asked == [3]


async def test_05_a_failed_probe_opens_it_again(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(retry={"enabled": False}, breaker={"failureThreshold": 1, "timeoutMs": 100})
    async with Cluster(nats.url, nats_prefix, plan=fails(), **changes) as cluster:
        await failure(cluster.buffered())
        error = await failure(served(lambda: cluster.buffered(request_id="probe"), "NO_HEALTHY_WORKERS"))
        assert error.code == "WORKER_UNAVAILABLE"
        assert cluster.breaker(cluster.worker)["state"] == CircuitState.OPEN
        assert cluster.metadata("probe").circuit_breaker_trips == 1
        assert cluster.asked == [2]


async def test_05_an_operator_opens_and_resets_it(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        cluster.controller.force_open_circuit_breaker("w0")
        assert cluster.breaker(cluster.worker)["state"] == CircuitState.FORCED_OPEN
        assert (await failure(cluster.buffered())).code == "NO_HEALTHY_WORKERS"
        cluster.controller.reset_circuit_breaker("w0")
        assert cluster.breaker(cluster.worker)["state"] == CircuitState.CLOSED
        assert (await cluster.buffered()).text == ANSWER


# === 6: timeout enforced, buffered and streaming ===


@pytest.mark.parametrize(
    ("plan", "changes", "limit", "code"),
    [
        (stalls(accept=False), {"acceptTimeoutMs": 200}, "accept", "WORKER_TIMEOUT"),
        (stalls(), {"streamingTimeoutMs": 200}, "first_token", "WORKER_TIMEOUT"),
        (stalls(2), {"streamIdleTimeoutMs": 200}, "idle", "STREAM_INTERRUPTED"),
        (answers(*["x"] * 1000, pause=0.02), {"streamTotalTimeoutMs": 200}, "total", "STREAM_INTERRUPTED"),
    ],
    ids=["accept", "first_token", "idle", "total"],
)
async def test_06_each_limit_of_a_stream_is_enforced(
    nats: NatsServer, nats_prefix: str, plan: Any, changes: dict[str, Any], limit: str, code: str
) -> None:
    changes = routing(**changes, retry={"enabled": False}, streamFailover="off")
    async with Cluster(nats.url, nats_prefix, plan=plan, **changes) as cluster:
        begun = time.monotonic()

        async def call() -> None:
            await read(await cluster.streaming(request_id="r-1"))

        error = await failure(call())
        assert 0.19 < time.monotonic() - begun < 2
        cluster.at_rest()
        assert error.code == code
        timeout = error if code == "WORKER_TIMEOUT" else error.__cause__ or error
        assert timeout.context["limit"] == limit  # type: ignore[attr-defined]
        assert timeout.context["timeout_ms"] == 200  # type: ignore[attr-defined]
        assert isinstance(error, TimeoutError) == (code == "WORKER_TIMEOUT")
        assert await cluster.worker.told_to_stop() == {"requestId": "r-1", "attempt": 1}
        await cluster.worker.idle()
        assert cluster.metadata("r-1").timeouts == 1
        assert cluster.asked == [1]


async def test_06_a_buffered_attempt_is_limited(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(timeoutMs=200, retry={"enabled": False})
    async with Cluster(nats.url, nats_prefix, plan=stalls(), **changes) as cluster:
        begun = time.monotonic()
        error = await failure(cluster.buffered(request_id="r-1"))
        assert 0.19 < time.monotonic() - begun < 2
        cluster.at_rest()
        assert isinstance(error, TimeoutError)
        assert (error.code, error.context["limit"], error.context["timeout_ms"]) == (
            "WORKER_TIMEOUT",
            "total",
            200,
        )
        await cluster.worker.told_to_stop()
        assert cluster.metadata("r-1").timeouts == 1
        assert int(cluster.worker.jobs[0].headers["Timeout-Ms"]) <= 200


async def test_06_the_callers_timeout_bounds_the_whole_call(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=3, plan=stalls()) as cluster:
        for handle in (
            cluster.controller.handle_buffered_request,
            cluster.controller.handle_streaming_request,
        ):
            begun = time.monotonic()
            error = await failure(handle(ask(), timeout=0.2))
            assert 0.19 < time.monotonic() - begun < 2
            assert (error.code, error.context["limit"]) == ("WORKER_TIMEOUT", "total")
        assert sum(cluster.asked) == 2
        assert {info.breaker for info in cluster.controller.workers()} == {"CLOSED"}
        assert all(cluster.breaker(worker)["failure_count"] == 0 for worker in cluster.workers)


# === 7: no workers ===


async def test_07_nobody_is_online(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=0) as cluster:
        begun = time.monotonic()
        error = await failure(cluster.buffered(request_id="r-1"))
        assert time.monotonic() - begun < 0.5
        assert error.code == ControllerErrorCode.NO_WORKERS_AVAILABLE
        assert error.retryable
        assert (await failure(cluster.streaming())).code == "NO_WORKERS_AVAILABLE"
        metadata = cluster.metadata("r-1")
        assert (metadata.status, metadata.selected_worker, metadata.attempts) == ("failed", None, [])


async def test_07_nobody_serves_the_model(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        error = await failure(cluster.buffered(model_id="huge"))
        assert error.code == ControllerErrorCode.MODEL_NOT_FOUND
        assert not error.retryable
        assert cluster.asked == [0]


async def test_07_waiting_for_workers_that_do_not_come_ends(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        with pytest.raises(TimeoutError):
            await cluster.controller.wait_for_workers(2, timeout=0.1)


# === 8: session affinity, and its move on failover ===


async def test_08_a_session_stays_with_its_worker(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=3) as cluster:
        chosen = {}
        for number in range(24):
            session = f"s-{number}"
            chosen[session] = {(await cluster.buffered(session_id=session)).worker_id for _ in range(3)}
        assert all(len(workers) == 1 for workers in chosen.values())
        assert set().union(*chosen.values()) == {"w0", "w1", "w2"}


async def test_08_two_controllers_choose_the_same_worker(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix, workers=3) as cluster,
        ControllerNode(settings(nats.url, nats_prefix)) as other,
    ):
        await other.wait_for_workers(3, timeout=PATIENCE)
        for number in range(12):
            mine = await cluster.buffered(session_id=f"s-{number}")
            theirs = await other.handle_buffered_request(ask(session_id=f"s-{number}"))
            assert mine.worker_id == theirs.worker_id


async def test_08_a_session_moves_when_its_worker_fails(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=3) as cluster:
        first = (await cluster.buffered(session_id="s")).worker_id
        home = cluster.by_id(first)
        home.plan = fails()
        moved = await cluster.buffered(session_id="s")
        assert moved.worker_id != first
        assert moved.metadata.failed_workers == [first]
        home.plan = answers()
        for _ in range(5):
            assert (await cluster.buffered(session_id="s")).worker_id == moved.worker_id
        assert len(home.jobs) == 2


async def test_08_a_session_comes_back_to_a_worker_that_was_only_skipped(
    nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(nats.url, nats_prefix, workers=3) as cluster:
        home = (await cluster.buffered(session_id="s")).worker_id
        cluster.controller.force_open_circuit_breaker(home)
        assert (await cluster.buffered(session_id="s")).worker_id != home
        cluster.controller.reset_circuit_breaker(home)
        assert (await cluster.buffered(session_id="s")).worker_id == home


# === 9: ten concurrent requests spread over workers ===


async def test_09_ten_concurrent_requests_are_spread(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=3, plan=answers(pause=0.2)) as cluster:
        responses = await asyncio.gather(
            *(cluster.buffered(request_id=f"r-{number}") for number in range(10))
        )
        cluster.at_rest()
        assert {response.text for response in responses} == {ANSWER}
        assert [response.request_id for response in responses] == [f"r-{number}" for number in range(10)]
        assert sorted(cluster.asked) == [3, 3, 4]


@pytest.mark.model
async def test_09_ten_concurrent_requests_of_the_tiny_model(
    tiny_workers: list[WorkerProcess], nats: NatsServer, tiny_prefix: str
) -> None:
    questions = {
        "What is the capital of Japan?": "The capital of Japan is Tokyo.",
        "What is two plus two?": "Two plus two is four.",
        "What color is the sky?": "The sky is blue.",
        "What do bees make?": "Bees make honey.",
        "Show me some Unicode.": "Grüße: 日本 🙂🚀 ok.",
    }
    async with ControllerNode(settings(nats.url, tiny_prefix)) as controller:
        await all_online(controller, tiny_workers)
        asked = list(itertools.islice(itertools.cycle(questions), 10))
        calls = (controller.handle_streaming_request(ask(question, temperature=0)) for question in asked)
        streams = await asyncio.gather(*calls)
        answered = await asyncio.gather(*(read(stream) for stream in streams))
        assert [text(events) for events in answered] == [questions[question] for question in asked]
        workers = {stream.response.worker_id for stream in streams if stream.response is not None}
        assert workers == {worker.worker_id for worker in tiny_workers}


# === 10 and 11: streaming and buffered with retry ===


@pytest.mark.parametrize(
    "failing", [fails(), refuses(), stalls(accept=False)], ids=["fails", "refuses", "is silent"]
)
async def test_10_a_stream_is_retried_before_its_first_token(
    nats: NatsServer, nats_prefix: str, failing: Any
) -> None:
    changes = routing(acceptTimeoutMs=200)
    async with Cluster(
        nats.url, nats_prefix, workers=2, plan=in_turn(failing, answers()), **changes
    ) as cluster:
        events = await read(await cluster.streaming(request_id="r-1"))
        cluster.at_rest()
        assert [event.text for event in events] == list(WORDS)
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert cluster.asked == [1, 1]
        metadata = cluster.metadata("r-1")
        assert (metadata.retry_count, len(metadata.failed_workers), metadata.status) == (1, 1, "succeeded")


async def test_10_a_stream_is_not_retried_after_its_first_token(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(streamFailover="off")
    async with Cluster(
        nats.url, nats_prefix, workers=2, plan=in_turn(fails(after=2), answers()), **changes
    ) as cluster:
        stream = await cluster.streaming(request_id="r-1")
        got, error = await received(stream)
        assert error is not None
        assert error.code == "STREAM_INTERRUPTED"
        assert got == "".join(WORDS[:2])
        assert stream.response is None
        assert sum(cluster.asked) == 1
        assert cluster.metadata("r-1").status == "failed"


async def test_11_a_buffered_request_is_retried_although_tokens_had_come(
    nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(
        nats.url, nats_prefix, workers=2, plan=in_turn(fails(after=2), answers(streamed=True))
    ) as cluster:
        response = await cluster.buffered(request_id="r-1")
        cluster.at_rest()
        assert response.text == ANSWER
        assert cluster.asked == [1, 1]
        assert cluster.metadata("r-1").retry_count == 1


async def test_11_a_buffered_request_is_retried_after_a_timeout(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(timeoutMs=200)
    async with Cluster(
        nats.url, nats_prefix, workers=2, plan=in_turn(stalls(), answers()), **changes
    ) as cluster:
        response = await cluster.buffered(request_id="r-1")
        assert response.text == ANSWER
        metadata = cluster.metadata("r-1")
        assert (metadata.timeouts, metadata.retry_count) == (1, 1)
        stalled = cluster.by_id(metadata.failed_workers[0])
        await stalled.told_to_stop()
        await stalled.idle()


@pytest.mark.model
@pytest.mark.slow
async def test_11_a_killed_worker_costs_no_request(nats: NatsServer, nats_prefix: str) -> None:
    fleet = [WorkerProcess(nats.url, nats_prefix, f"tiny-{number}") for number in range(2)]
    try:
        changes = routing(streamingTimeoutMs=2000, timeoutMs=2000)
        async with ControllerNode(settings(nats.url, nats_prefix, **changes)) as controller:
            await all_online(controller, fleet)
            fleet[0].signal(signal.SIGKILL)
            await fleet[0].ended()
            question, answer = PARIS
            for _ in range(4):
                response = await controller.handle_buffered_request(ask(question, temperature=0))
                assert (response.text, response.worker_id) == (answer, "tiny-1")
            await until(
                lambda: controller.cluster_status().to_dict()["workers"]["online"] == 1,
                "the silence to be noticed",
            )
    finally:
        for worker in fleet:
            worker.close()


# === 12: metrics collected ===


async def test_12_metrics_are_collected(nats: NatsServer, nats_prefix: str) -> None:
    plan = in_turn(fails(), answers(), fails("REQUEST_VALIDATION_FAILED"), answers())
    async with Cluster(nats.url, nats_prefix, workers=2, plan=plan) as cluster:
        before = time.time() * 1000
        await cluster.buffered(request_id="retried", session_id="s")
        await failure(cluster.buffered(request_id="refused"))
        await read(await cluster.streaming(request_id="streamed"))

        requests = {
            metadata.request_id: metadata for metadata in cluster.controller.get_all_request_metrics()
        }
        assert set(requests) == {"retried", "refused", "streamed"}
        assert cluster.controller.get_request_metrics("unknown") is None

        retried = requests["retried"]
        assert (retried.model_id, retried.session_id, retried.status) == ("tiny", "s", "succeeded")
        assert retried.end_time is not None
        assert before - 1 <= retried.start_time <= retried.end_time
        assert [attempt["code"] for attempt in retried.to_dict()["attempts"]] == ["WORKER_UNAVAILABLE", None]
        refused = requests["refused"]
        assert (refused.status, refused.retry_count) == ("failed", 0)
        assert refused.final_error is not None
        assert refused.final_error["code"] == "REQUEST_VALIDATION_FAILED"

        status = cluster.controller.cluster_status().to_dict()
        assert status["requests"] == {"active": 0, "queued": 0, "completed": 3}
        assert status["workers"] == {"total": 2, "online": 2, "draining": 0, "offline": 0}
        assert (status["state"], status["models"]) == ("ready", ["tiny"])

        metrics = cluster.controller.metrics_text()
        samples = dict(
            line.rsplit(" ", 1) for line in metrics.splitlines() if line and not line.startswith("#")
        )
        attempts = {name: float(value) for name, value in samples.items() if "attempts_total" in name}
        assert sum(attempts.values()) == 4
        assert any('code="REQUEST_VALIDATION_FAILED"' in name for name in samples)
        assert not any("retried" in name or '"s"' in name for name in samples)


async def test_12_events_tell_what_happened(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(breaker={"failureThreshold": 1})
    async with Cluster(nats.url, nats_prefix, **changes) as cluster:
        events = cluster.controller.events()
        async with cluster.another(worker_id="late") as late:
            kinds = []

            async def listen() -> None:
                async for event in events:
                    kinds.append((event.kind, event.worker_id))
                    if event.kind == "worker_draining":
                        return

            listening = asyncio.create_task(listen())
            await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
            late.plan = fails()
            await failure(cluster.controller.handle_buffered_request(ask(), worker_id="late"))
            await late.deregister()
            await asyncio.wait_for(listening, PATIENCE)
        assert [kind for kind in kinds if kind[1] == "late"][:3] == [
            ("worker_registered", "late"),
            ("breaker_changed", "late"),
            ("worker_draining", "late"),
        ]
