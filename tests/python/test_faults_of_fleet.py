"""Cases 24 to 37 of the fault catalogue, queues, NATS and the fleet, over a real nats-server; each bears its number.

After every case nothing is left: `Cluster` asserts it when it is left.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from cluster import (
    PATIENCE,
    Cluster,
    Process,
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
from mlx_serving_router import ControllerError, ControllerNode
from mlx_serving_router.nats_server import NatsServer
from rawworker import ANSWER, WORDS, answers, dies, fails, in_turn, refuses, stalls, waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


pytestmark = pytest.mark.nats


@pytest.fixture
def own_nats() -> Iterator[NatsServer]:
    """A nats-server that the test may kill."""
    with NatsServer(port=0) as server:
        yield server


# === 24 and 25: queues, and workers that want to be left alone ===


async def test_24_a_deadline_that_passes_in_the_queue(nats: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()
    async with Cluster(nats.url, nats_prefix, workers=0) as cluster:
        worker = cluster.another(worker_id="w0", max_concurrent=1, plan=waits(release, answers()))
        cluster.workers.append(worker)
        await worker.start()
        await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
        first = asyncio.create_task(cluster.buffered())
        await worker.asked()
        begun = time.monotonic()
        late = cluster.controller.handle_buffered_request(ask(request_id="late"), timeout=0.2)
        error = await failure(late)
        assert 0.19 < time.monotonic() - begun < 2
        assert error.code == "QUEUE_FULL"
        waiting = asyncio.create_task(cluster.buffered(request_id="waiting"))
        await until(
            lambda: cluster.controller.cluster_status().to_dict()["requests"]["queued"] == 1, "a queue"
        )
        release.set()
        assert (await first).text == (await waiting).text == ANSWER
        assert [job.request_id for job in worker.jobs[1:]] == ["waiting"]


async def test_25_a_worker_that_asks_for_time_gets_it(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(retry={"revisitFailedWorkers": True, "retryDelayMs": 10, "maxDelayMs": 50})
    plan = in_turn(refuses(retry_after_ms=2000), answers())
    async with Cluster(nats.url, nats_prefix, plan=plan, **changes) as cluster:
        assert (await cluster.buffered()).text == ANSWER
        first, second = cluster.worker.jobs
        assert 1.9 < second.arrived - first.arrived < 3


async def test_25_others_are_tried_meanwhile(nats: NatsServer, nats_prefix: str) -> None:
    plan = in_turn(refuses(retry_after_ms=2000), answers())
    async with Cluster(nats.url, nats_prefix, workers=2, plan=plan) as cluster:
        begun = time.monotonic()
        assert (await cluster.buffered()).text == ANSWER
        assert time.monotonic() - begun < 1
        assert cluster.asked == [1, 1]


async def test_25_other_requests_leave_it_alone_too(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=2) as cluster:
        busy, other = cluster.workers
        busy.plan = in_turn(refuses(retry_after_ms=1000), answers())
        while not busy.jobs:
            assert (await cluster.buffered()).worker_id == other.worker_id
        refused = busy.jobs[0].arrived
        while len(busy.jobs) < 2:
            assert (await cluster.buffered()).text == ANSWER
            assert time.monotonic() - refused < 3
        assert busy.jobs[1].arrived - refused > 0.9


async def test_25_a_worker_that_forbids_it_is_obeyed(nats: NatsServer, nats_prefix: str) -> None:
    plan = in_turn(fails("WORKER_UNAVAILABLE", retry_after_ms=-1), answers())
    async with Cluster(nats.url, nats_prefix, workers=2, plan=plan) as cluster:
        error = await failure(cluster.buffered())
        assert error.code == "WORKER_UNAVAILABLE"
        assert sum(cluster.asked) == 1


# === 26: NATS itself ===


async def test_26_nats_killed_and_restarted(own_nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(own_nats.url, nats_prefix, workers=2, plan=stalls()) as cluster:
        running = [
            asyncio.create_task(cluster.buffered(request_id=f"running-{number}")) for number in range(4)
        ]
        stream_job = asyncio.create_task(cluster.streaming(request_id="stream"))
        await until(lambda: sum(cluster.asked) == 5, "five requests")
        await asyncio.to_thread(own_nats.kill)

        for call in (*running, stream_job):
            error = await asyncio.wait_for(failure(call), 2)
            assert error.code == "NATS_ERROR"
        cluster.at_rest()
        durations: list[float] = []
        for number in range(5):
            begun = time.monotonic()
            error = await failure(cluster.buffered(request_id=f"meanwhile-{number}"))
            durations.append(time.monotonic() - begun)
            assert error.code == "NATS_ERROR"
            assert error.retryable
        assert sorted(durations)[2] < 0.1
        assert {info.breaker for info in cluster.controller.workers()} == {"CLOSED"}
        assert all(cluster.breaker(worker)["failure_count"] == 0 for worker in cluster.workers)

        for worker in cluster.workers:
            worker.plan = answers()
        await asyncio.to_thread(own_nats.start)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(
                *(until(lambda w=worker: w.client.is_connected, "a reconnect") for worker in cluster.workers)
            )
            await served(
                lambda: cluster.buffered(request_id="first-after"), "NATS_ERROR", "NO_WORKERS_AVAILABLE"
            )
        reached = time.monotonic()
        while {(await cluster.buffered()).worker_id for _ in range(4)} != {"w0", "w1"}:
            # Two heartbeats are 0.4 s.
            assert time.monotonic() - reached < 1, [one.to_dict() for one in cluster.controller.workers()]
        ids = [job.request_id for worker in cluster.workers for job in worker.jobs]
        assert len(ids) == len(set(ids))  # nothing ran twice
        assert not any(request_id.startswith("meanwhile") for request_id in ids)
        assert {info.breaker for info in cluster.controller.workers()} == {"CLOSED"}


async def test_26_a_worker_that_is_back_after_the_controller_is_told_to_stop(
    own_nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(own_nats.url, nats_prefix, workers=0, plan=stalls()) as cluster:
        worker = cluster.another(worker_id="w0", plan=stalls(), reconnect_wait=0.5)
        cluster.workers.append(worker)
        await worker.start()
        await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
        call = asyncio.create_task(cluster.buffered(request_id="running"))
        await worker.asked()
        await asyncio.to_thread(own_nats.kill)
        assert (await failure(call)).code == "NATS_ERROR"
        await asyncio.to_thread(own_nats.start)
        assert (await worker.told_to_stop())["requestId"] == "running"
        await worker.idle()


async def test_26_a_stream_is_interrupted(own_nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(own_nats.url, nats_prefix, plan=stalls(2)) as cluster:
        stream = await cluster.streaming()
        await asyncio.to_thread(own_nats.kill)
        got, error = await received(stream)
        assert got in {"Hel", "Hello"}
        assert error is not None
        assert error.code == "STREAM_INTERRUPTED"
        assert isinstance(error.__cause__, ControllerError)
        assert error.__cause__.code == "NATS_ERROR"
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


async def test_26_silence_while_the_connection_is_down_is_nobodys_fault(
    own_nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(own_nats.url, nats_prefix, controller={"workerOfflineTimeoutMs": 500}) as cluster:
        await asyncio.to_thread(own_nats.kill)
        await failure(cluster.buffered())
        await asyncio.sleep(0.8)
        assert cluster.controller.cluster_status().to_dict()["workers"]["offline"] == 0
        await asyncio.to_thread(own_nats.start)
        assert (await served(cluster.buffered, "NATS_ERROR", "NO_WORKERS_AVAILABLE")).text == ANSWER


async def test_26_where_nobody_was_known_the_lost_connection_is_named(
    own_nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(own_nats.url, nats_prefix, workers=0) as cluster:
        assert (await failure(cluster.buffered())).code == "NO_WORKERS_AVAILABLE"
        await asyncio.to_thread(own_nats.kill)
        with pytest.raises(ControllerError) as caught:
            await served(cluster.buffered, "NO_WORKERS_AVAILABLE")  # the kill is noticed a moment later
        assert caught.value.code == "NATS_ERROR"


# === 31 to 33: clocks and names ===


@pytest.mark.parametrize("hours", [-1, 1])
async def test_31_a_wrong_clock_changes_nothing(nats: NatsServer, nats_prefix: str, hours: int) -> None:
    async with Cluster(
        nats.url, nats_prefix, workers=0, controller={"workerOfflineTimeoutMs": 600}
    ) as cluster:
        worker = cluster.another(worker_id="w0", clock_offset_ms=hours * 3_600_000, heartbeat_ms=100)
        cluster.workers.append(worker)
        await worker.start()
        await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            info = cluster.info(worker)
            assert info.status == "online"
            assert info.last_seen_ms < 600
            await asyncio.sleep(0.05)
        worker.beats = False
        silent = time.monotonic()
        await until(lambda: cluster.info(worker).status == "offline", "its silence to be noticed")
        assert 0.4 < time.monotonic() - silent < 3
        assert (await failure(cluster.buffered())).code == "NO_WORKERS_AVAILABLE"
        worker.beats = True
        await until(lambda: cluster.info(worker).status == "online", "it to be heard again")
        assert (await cluster.buffered()).text == ANSWER


async def test_32_a_new_start_takes_the_name(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, workers=2, plan=in_turn(dies(), answers())) as cluster:
        call = asyncio.create_task(cluster.buffered(request_id="r-1"))
        await until(lambda: any(worker.jobs for worker in cluster.workers), "the first attempt")
        dead = next(worker for worker in cluster.workers if worker.jobs)
        begun = time.monotonic()
        async with cluster.another(worker_id=dead.worker_id) as heir:
            response = await call
            assert time.monotonic() - begun < 2.5  # no limit on time had to pass
            assert response.text == ANSWER
            assert [attempt["code"] for attempt in cluster.metadata("r-1").to_dict()["attempts"]] == [
                "WORKER_OFFLINE",
                None,
            ]
            info = cluster.info(heir)
            assert (info.incarnation, info.status) == (heir.incarnation, "online")
            for _ in range(4):
                await cluster.buffered()
            assert len(heir.jobs) >= 1


async def test_33_two_hosts_with_one_name(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        (older,) = cluster.workers
        events = cluster.controller.events()
        async with cluster.another(worker_id="w0", heartbeat_ms=50) as newer:
            async with asyncio.timeout(PATIENCE):
                async for event in events:
                    if event.kind == "worker_replaced":
                        break
            assert event.worker_id == "w0"
            assert event.details["incarnation"] == newer.incarnation
            assert event.details["previous"] == older.incarnation
            for _ in range(3):
                await older.beat()
                await older.register()
                await older.client.flush()
            await newer.beat()
            await newer.client.flush()
            await cluster.buffered()
            assert cluster.info(newer).incarnation == newer.incarnation
            assert (older.reregistered, newer.reregistered) == (0, 0)


# === 36 and 37: those who leave, and those who are gone ===


async def test_36_deregistered_in_mid_stream(nats: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()

    async def plan(job: Any) -> None:
        await job.accept()
        await job.token(WORDS[0])
        await release.wait()
        for word in WORDS[1:]:
            await job.token(word)
        await job.done()

    async with Cluster(nats.url, nats_prefix, plan=plan) as cluster:
        stream = await cluster.streaming()
        await cluster.worker.deregister()
        await until(
            lambda: cluster.controller.cluster_status().to_dict()["workers"]["online"] == 0,
            "the deregistration",
        )
        cluster.worker.beats = False
        assert (await failure(cluster.buffered())).code == "NO_WORKERS_AVAILABLE"
        release.set()
        assert text(await read(stream)) == ANSWER
        assert cluster.asked == [1]


CONTROLLER = """
import asyncio, json, sys
import mlx_serving_router as msr

async def main():
    async with msr.ControllerNode(json.loads(sys.argv[1])) as controller:
        await controller.wait_for_workers(1, timeout=10)
        request = msr.InferenceRequest(model_id="slow", prompt="Hello")
        async with await controller.handle_streaming_request(request) as stream:
            print("streaming", flush=True)
            async for _ in stream:
                pass

asyncio.run(main())
"""


class Slow:
    """An engine that goes on until it is told to stop."""

    models = ("slow",)

    def __init__(self) -> None:
        self.cancelled_at: list[float] = []

    def run(self, jobs: Any) -> None:
        jobs.report("ready", loaded_models=self.models)
        while (job := jobs.get()) is not None:
            if job.request.prompt == "short":
                job.token("short", [1])
                job.done()
                continue
            number = 0
            while not job.cancelled:
                job.token("x", [number])
                number += 1
                time.sleep(0.005)
            self.cancelled_at.append(time.monotonic())


@pytest.fixture
async def slow_worker(nats: NatsServer, nats_prefix: str) -> AsyncIterator[Slow]:
    from mlx_serving_router import WorkerNode

    engine = Slow()
    node = WorkerNode(engine, config=settings(nats.url, nats_prefix), worker_id="slow")
    await node.start()
    yield engine
    await node.stop(1)


async def test_37_a_controller_is_killed(nats: NatsServer, nats_prefix: str, slow_worker: Slow) -> None:
    config = settings(nats.url, nats_prefix)
    with Process("-c", CONTROLLER, json.dumps(config)) as controller:
        assert controller.process.stdout is not None
        line = await asyncio.to_thread(controller.process.stdout.readline)
        assert line == b"streaming\n", controller.errors()
        controller.kill()
        killed = time.monotonic()
        begun = time.monotonic()
        async with ControllerNode(config) as successor:
            await successor.wait_for_workers(1, timeout=PATIENCE)
            assert time.monotonic() - begun < 1
            await until(lambda: bool(slow_worker.cancelled_at), "the worker to notice")
            assert slow_worker.cancelled_at[0] - killed < 1.5  # three heartbeats are 0.6 s
            response = await successor.handle_buffered_request(
                ask(model_id="slow", messages=None, prompt="short")
            )
            assert response.text == "short"
