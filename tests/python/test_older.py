"""The older dialect of the protocol: workers of existing mlx-serving fleets, over a real nats-server.

The workers are scripted (olderworker.py) and know nothing of prefixes; most controllers here have one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats as nats_py
import pytest
from nats.errors import NoRespondersError

from cluster import PATIENCE, Cluster, ask, failure, read, received, routing, served, settings, text, until
from mlx_serving_router import ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer
from olderworker import OlderWorker
from rawworker import ANSWER, WORDS, RawWorker, answers, babbles, fails, in_turn, stalls, waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from rawworker import Plan

pytestmark = pytest.mark.nats

GOLDEN: dict[str, dict[str, Any]] = {
    case["name"]: case
    for case in json.loads(
        (Path(__file__).parents[1] / "fixtures" / "wire" / "older.json").read_text(encoding="utf-8")
    )["cases"]
}


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A nats-server of our own: these workers are heard by every controller of a server."""
    with NatsServer(port=0) as server:
        yield server


@pytest.fixture
async def client(server: NatsServer) -> AsyncIterator[Client]:
    client = await nats_py.connect(server.url)
    yield client
    await client.close()


def fleet(
    server: NatsServer,
    prefix: str,
    *,
    older: int = 1,
    newer: int = 0,
    plan: Plan | None = None,
    **changes: Any,
) -> Cluster:
    """A controller with so many workers of each kind: `o0`, `o1` … come before `w0`, `w1` …"""
    cluster = Cluster(server.url, prefix, workers=newer, plan=plan, **changes)
    shared = cluster.workers[0].plan if newer else plan
    cluster.workers[:0] = [
        OlderWorker(server.url, worker_id=f"o{number}", plan=shared) for number in range(older)
    ]
    return cluster


async def nobody_listens(client: Client, subject: str) -> None:
    """Returns when the server knows of nobody who does."""
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(NoRespondersError):
            while True:
                with contextlib.suppress(TimeoutError, nats_py.errors.TimeoutError):
                    await client.request(subject, b"", timeout=0.05)


async def tapped(client: Client) -> list[str]:
    """The subjects of everything that anybody publishes from now on, but for answers."""
    subjects: list[str] = []

    async def hear(message: Msg) -> None:
        subjects.append(message.subject)

    for kind in ("worker.>", "inference.*", "cancel.*"):
        await client.subscribe(kind, cb=hear)
        await client.subscribe(f"*.{kind}", cb=hear)
    await client.flush()
    return subjects


# === asked and answered ===


async def test_the_golden_messages_are_spoken(server: NatsServer, client: Client, nats_prefix: str) -> None:
    asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def answer(message: Msg) -> None:
        request = json.loads(message.data)
        asked.put_nowait(request)
        end = "error" if request["prompt"] == "fail" else "done"
        for name in ("token", end) if end == "done" else (end,):
            said = {**GOLDEN[name]["message"], "requestId": request["requestId"]}
            await client.publish(f"response.{request['requestId']}", json.dumps(said).encode())

    async def say(name: str) -> None:
        await client.publish(GOLDEN[name]["on"], json.dumps(GOLDEN[name]["message"]).encode())

    worker_id = GOLDEN["registration"]["message"]["workerId"]
    await client.subscribe(GOLDEN["request"]["on"], cb=answer)
    await client.flush()
    async with ControllerNode(
        settings(server.url, nats_prefix, **routing(retry={"enabled": False}))
    ) as controller:
        await say("registration")
        await controller.wait_for_workers(1, timeout=PATIENCE)
        await say("heartbeat")
        golden = GOLDEN["request"]
        request = InferenceRequest.from_dict(
            {"modelId": "tiny", "maxTokens": 16, "temperature": 0, "messages": golden["means"]["messages"]}
        )
        response = await controller.handle_buffered_request(request)
        assert (response.text, response.worker_id, response.usage.completion_tokens) == (
            "Hello",
            worker_id,
            8,
        )
        body = await asked.get()
        assert body == {**golden["message"], "requestId": body["requestId"]}
        assert uuid.UUID(body["requestId"]).version == 4
        assert body["requestId"] != request.request_id
        error = await failure(
            controller.handle_buffered_request(InferenceRequest(model_id="tiny", prompt="fail"))
        )
        assert error.code == "WORKER_OVERLOADED"
        assert GOLDEN["error"]["message"]["error"] in error.message
        await say("deregistration")
        await until(lambda: controller.cluster_status().to_dict()["workers"]["online"] == 0, "its leave")


@pytest.mark.parametrize("prefix", ["", "team-a."])
async def test_it_is_served_without_any_setting(server: NatsServer, client: Client, prefix: str) -> None:
    subjects = await tapped(client)
    async with fleet(server, prefix) as cluster:
        response = await cluster.buffered(request_id="r-1", session_id="s-1")
        cluster.at_rest()
        assert (response.text, response.worker_id, response.finish_reason) == (ANSWER, "o0", "stop")
        assert response.usage.completion_tokens == 4
        metadata = cluster.metadata("r-1")
        assert (metadata.status, metadata.retry_count, metadata.tokens) == ("succeeded", 0, 4)
        stream = await cluster.streaming(request_id="r-2")
        events = await read(stream)
        assert [(event.text, event.index) for event in events] == list(zip(WORDS, range(4), strict=True))
        assert stream.response is not None
        assert stream.response.text == ANSWER
        assert cluster.metadata("r-2").time_to_first_token_ms is not None
        assert cluster.info(cluster.worker).incarnation == ""
        for job in cluster.worker.jobs:
            await nobody_listens(client, job.reply)
        await (await cluster.streaming()).aclose()
    await client.flush()
    kinds = {subject.removeprefix(prefix) for subject in subjects} - {"worker.heartbeat"}
    assert kinds == {"worker.register", "worker.o0.inference"}


@pytest.mark.parametrize("priority", ["low", "normal", "high"])
async def test_priorities_are_those_that_it_knows(
    server: NatsServer, nats_prefix: str, priority: str
) -> None:
    async with fleet(server, nats_prefix) as cluster:
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        await cluster.buffered(messages=messages, priority=priority, top_p=0.5, stop=["END"])
        body = cluster.worker.jobs[0].request
        assert (body["prompt"], body["stream"], body["topP"], body["stop"]) == (
            "Be brief.\nHello",
            True,
            0.5,
            ["END"],
        )
        assert body.get("priority") == (None if priority == "normal" else priority)
        assert "messages" not in body


async def test_what_is_no_text_is_the_callers_fault(server: NatsServer, nats_prefix: str) -> None:
    async with fleet(server, nats_prefix) as cluster:
        image = [{"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]
        error = await failure(cluster.buffered(messages=[{"role": "user", "content": image}]))
        assert (error.code, error.context["field"]) == ("REQUEST_VALIDATION_FAILED", "messages[0].content")
        assert cluster.asked == [0]
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


async def test_tokens_may_come_without_an_index(server: NatsServer, nats_prefix: str) -> None:
    cluster = Cluster(server.url, nats_prefix, workers=0)
    cluster.workers.append(OlderWorker(server.url, worker_id="o0", counts=False))
    async with cluster:
        assert (await cluster.buffered()).text == ANSWER
        events = await read(await cluster.streaming())
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert text(events) == ANSWER


async def test_a_response_in_one_piece_is_understood(server: NatsServer, nats_prefix: str) -> None:
    plan = babbles([{"type": "response", "text": "all of it", "totalTokens": 3, "latencyMs": 1}])
    async with fleet(server, nats_prefix, plan=plan) as cluster:
        response = await cluster.buffered()
        assert (response.text, response.usage.completion_tokens) == ("all of it", 3)
        assert text(await read(await cluster.streaming())) == "all of it"


async def test_many_requests_at_a_time_are_kept_apart(
    server: NatsServer, client: Client, nats_prefix: str
) -> None:
    async def echo(job: Any) -> None:
        for word in job.request["prompt"].split("-"):
            await job.token(word)
            await asyncio.sleep(0)
        await job.done()

    async with fleet(server, nats_prefix, older=2, plan=echo) as cluster:
        words = [f"{number}-a-b-c" for number in range(50)]
        responses = await asyncio.gather(*(cluster.buffered(word) for word in words))
        assert [response.text for response in responses] == [word.replace("-", "") for word in words]
        assert all(asked > 0 for asked in cluster.asked)
        cluster.at_rest()
        replies = [job.reply for worker in cluster.workers for job in worker.jobs]
        assert len(set(replies)) == 50
        for reply in replies:
            await nobody_listens(client, reply)


# === failures ===


@pytest.mark.parametrize("code", ["WORKER_UNAVAILABLE", "QUEUE_FULL", "FLUX", None])
@pytest.mark.parametrize(("older", "newer"), [(2, 0), (1, 1)])
async def test_a_failed_attempt_is_repeated_on_another_worker(
    server: NatsServer, nats_prefix: str, older: int, newer: int, code: str | None
) -> None:
    plan = in_turn(fails(code), answers())
    async with fleet(server, nats_prefix, older=older, newer=newer, plan=plan) as cluster:
        response = await cluster.buffered(request_id="r-1")
        cluster.at_rest()
        assert response.text == ANSWER
        assert cluster.asked == [1, 1]
        metadata = cluster.metadata("r-1")
        assert (metadata.retry_count, metadata.selected_worker) == (1, response.worker_id)
        first, second = (worker.jobs[0].request_id for worker in cluster.workers)
        assert first != second


async def test_a_mixed_fleet_shares_the_work(server: NatsServer, nats_prefix: str) -> None:
    changes: dict[str, Any] = {"loadBalancing": {"strategy": "round_robin"}}
    async with fleet(server, nats_prefix, older=2, newer=2, **changes) as cluster:
        for number in range(8):
            call = cluster.buffered() if number % 2 else read(await cluster.streaming())
            await call
        assert cluster.asked == [2, 2, 2, 2]
        first = await cluster.buffered(session_id="s-1")
        for _ in range(3):
            assert (await cluster.buffered(session_id="s-1")).worker_id == first.worker_id


async def test_its_breaker_opens(server: NatsServer, nats_prefix: str) -> None:
    changes = routing(retry={"enabled": False}, breaker={"failureThreshold": 2})
    async with fleet(server, nats_prefix, plan=fails(), **changes) as cluster:
        for _ in range(2):
            assert (await failure(cluster.buffered())).code == "WORKER_UNAVAILABLE"
        assert cluster.breaker(cluster.worker)["state"] == "OPEN"
        assert (await failure(cluster.buffered())).code == "NO_HEALTHY_WORKERS"
        assert cluster.asked == [2]


@pytest.mark.parametrize(
    ("after", "changes", "limit", "code"),
    [
        (0, {"streamingTimeoutMs": 200}, "first_token", "WORKER_TIMEOUT"),
        (2, {"streamIdleTimeoutMs": 200}, "idle", "STREAM_INTERRUPTED"),
        (2, {"streamTotalTimeoutMs": 200}, "total", "STREAM_INTERRUPTED"),
    ],
)
async def test_a_late_worker_is_not_listened_to_any_more(
    server: NatsServer,
    client: Client,
    nats_prefix: str,
    after: int,
    changes: dict[str, Any],
    limit: str,
    code: str,
) -> None:
    changes = routing(**changes, acceptTimeoutMs=50, retry={"enabled": False}, streamFailover="off")
    subjects = await tapped(client)
    release = asyncio.Event()
    plan = in_turn(stalls(after), waits(release, answers()))
    async with fleet(server, nats_prefix, plan=plan, **changes) as cluster:

        async def call() -> None:
            await read(await cluster.streaming(request_id="r-1"))

        error = await failure(call())
        cluster.at_rest()
        assert (error.code, error.context["limit"]) == (code, limit)
        assert cluster.metadata("r-1").timeouts == 1
        await nobody_listens(client, cluster.worker.jobs[0].reply)
        late = asyncio.create_task(cluster.buffered())
        await cluster.worker.asked(2)
        job = cluster.worker.jobs[0]
        await job.token("late")
        await job.done()
        release.set()
        assert (await late).text == ANSWER
    await client.flush()
    assert not [subject for subject in subjects if "cancel" in subject]


async def test_the_accept_limit_does_not_hold_for_it(server: NatsServer, nats_prefix: str) -> None:
    changes = routing(acceptTimeoutMs=50)
    async with fleet(server, nats_prefix, plan=answers(pause=0.15), **changes) as cluster:
        assert (await cluster.buffered()).metadata.retry_count == 0


async def test_a_caller_that_leaves_is_not_listened_for(
    server: NatsServer, client: Client, nats_prefix: str
) -> None:
    async with fleet(server, nats_prefix, plan=stalls(1)) as cluster:
        stream = await cluster.streaming()
        await stream.aclose()
        await nobody_listens(client, cluster.worker.jobs[0].reply)
        task = asyncio.create_task(cluster.buffered())
        await cluster.worker.asked(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nobody_listens(client, cluster.worker.jobs[1].reply)
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "token", "token": "a", "index": 0}, {"type": "token", "token": "b", "index": 2}],
        [{"type": "token", "token": "a"}, {"type": "token", "token": "b", "index": 0}],
        ["no JSON"],
        [{"type": "token", "index": 0}],
    ],
    ids=["a gap", "a repeat", "no JSON", "no token"],
)
async def test_what_breaks_the_protocol_fails_the_attempt(
    server: NatsServer, client: Client, nats_prefix: str, messages: list[Any]
) -> None:
    async with fleet(server, nats_prefix, older=2, plan=in_turn(babbles(messages), answers())) as cluster:
        response = await cluster.buffered(request_id="r-1")
        assert (response.text, response.metadata.retry_count) == (ANSWER, 1)
        assert cluster.metadata("r-1").attempts[0]["code"] == "WORKER_UNAVAILABLE"
        for worker in cluster.workers:
            await nobody_listens(client, worker.jobs[0].reply)


async def test_an_answer_that_is_not_read_in_time_never_looks_complete(
    server: NatsServer, client: Client, nats_prefix: str
) -> None:
    async def floods(job: Any) -> None:
        for _ in range(20_000):
            await job.token("x")
        await job.done()

    cluster = Cluster(server.url, nats_prefix, workers=0, **routing(streamIdleTimeoutMs=5000))
    cluster.workers.append(OlderWorker(server.url, worker_id="o0", plan=floods, counts=False))
    async with cluster:
        stream = await cluster.streaming()
        await asyncio.wait_for(cluster.worker.jobs[0].ended.wait(), PATIENCE)
        await cluster.worker.client.flush()
        words, error = await received(stream)
        assert error is not None
        assert (error.code, error.context["limit"]) == ("STREAM_INTERRUPTED", "reader")
        assert words == "x" * len(words) != "x" * 20_000
        await nobody_listens(client, cluster.worker.jobs[0].reply)


async def test_a_lost_connection_to_nats_blames_no_worker(nats_prefix: str) -> None:
    changes = routing(retry={"enabled": False})
    with NatsServer(port=0) as own_nats:
        async with fleet(own_nats, nats_prefix, plan=in_turn(stalls(), answers()), **changes) as cluster:
            running = asyncio.create_task(failure(cluster.buffered()))
            await cluster.worker.asked()
            await asyncio.to_thread(own_nats.kill)
            assert (await asyncio.wait_for(running, PATIENCE)).code == "NATS_ERROR"
            assert (await failure(cluster.buffered())).code == "NATS_ERROR"
            await asyncio.to_thread(own_nats.start)
            response = await served(cluster.buffered, "NATS_ERROR", "NO_WORKERS_AVAILABLE")
            assert response.text == ANSWER
            assert cluster.breaker(cluster.worker)["failure_count"] == 0
            assert cluster.asked == [2]


# === who is there ===


async def test_a_controller_that_starts_later_hears_its_heartbeat(
    server: NatsServer, nats_prefix: str
) -> None:
    async with OlderWorker(server.url, worker_id="o0") as worker:
        async with ControllerNode(settings(server.url, nats_prefix)) as controller:
            await controller.wait_for_workers(1, timeout=PATIENCE)
            assert (await controller.handle_buffered_request(ask())).text == ANSWER
            (info,) = controller.workers()
            assert (info.worker_id, info.models, info.incarnation) == ("o0", ["tiny"], "")
        async with ControllerNode(settings(server.url, "")) as controller:
            await controller.wait_for_workers(1, timeout=PATIENCE)
            assert (await controller.handle_buffered_request(ask())).text == ANSWER
        assert worker.reregistered == 0


async def test_one_that_deregisters_finishes_what_it_has(server: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()
    async with fleet(server, nats_prefix, plan=waits(release, answers())) as cluster:
        running = asyncio.create_task(cluster.buffered())
        await cluster.worker.asked()
        await cluster.worker.deregister()
        await until(lambda: cluster.info(cluster.worker).status == "draining", "its leave")
        await cluster.worker.beat()
        assert (await failure(cluster.buffered())).code == "NO_WORKERS_AVAILABLE"
        release.set()
        assert (await running).text == ANSWER
        assert cluster.asked == [1]


async def test_one_that_falls_silent_is_offline(server: NatsServer, nats_prefix: str) -> None:
    changes: dict[str, Any] = {
        "controller": {"workerOfflineTimeoutMs": 600},
        **routing(retry={"enabled": False}),
    }
    async with fleet(server, nats_prefix, plan=stalls(1), **changes) as cluster:
        stream = await cluster.streaming(request_id="r-1")
        cluster.worker.beats = False
        words, error = await received(stream)
        assert words == WORDS[0]
        assert error is not None
        assert (error.code, error.context["cause"]) == ("STREAM_INTERRUPTED", "WORKER_OFFLINE")
        assert cluster.info(cluster.worker).status == "offline"
        assert (await failure(cluster.buffered())).code == "NO_WORKERS_AVAILABLE"
        cluster.worker.beats = True
        cluster.worker.plan = answers()
        assert (await served(cluster.buffered, "NO_WORKERS_AVAILABLE")).text == ANSWER


async def test_one_that_starts_again_is_another_life_of_it(server: NatsServer, nats_prefix: str) -> None:
    async with fleet(server, nats_prefix, plan=in_turn(stalls(), answers())) as cluster:
        running = asyncio.create_task(
            failure(cluster.controller.handle_buffered_request(ask(), worker_id="o0"))
        )
        await cluster.worker.asked()
        await cluster.worker.register()
        assert (await running).code == "WORKER_OFFLINE"
        assert (await cluster.buffered()).text == ANSWER


async def test_newer_workers_of_another_prefix_are_not_heard(server: NatsServer, nats_prefix: str) -> None:
    async with (
        fleet(server, nats_prefix) as cluster,
        RawWorker(server.url, worker_id="newer") as stranger,
        RawWorker(server.url, worker_id="o0") as namesake,
    ):
        await stranger.register()
        await stranger.beat()
        await stranger.client.flush()
        await namesake.beat()
        await namesake.client.flush()
        await cluster.worker.deregister()
        await until(lambda: cluster.info(cluster.worker).status == "draining", "what was said after it")
        assert [info.worker_id for info in cluster.controller.workers()] == ["o0"]
        assert (stranger.reregistered, namesake.reregistered) == (0, 0)


async def test_a_newer_worker_is_not_deregistered_from_outside_its_prefix(
    server: NatsServer, client: Client, nats_prefix: str
) -> None:
    async with fleet(server, nats_prefix, older=1, newer=1) as cluster:
        for worker in reversed(cluster.workers):
            said = {"workerId": worker.worker_id, "timestamp": 0}
            await client.publish("worker.deregister", json.dumps(said).encode())
        older, newer = cluster.workers
        await until(lambda: cluster.info(older).status == "draining", "the leave of the older one")
        assert cluster.info(newer).status == "online"
