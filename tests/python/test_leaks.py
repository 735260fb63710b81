"""Requests leave nothing behind: no count, no task, no memory. Local workers and workers over NATS."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster import Cluster, ask, failure, read, text, until
from mlx_serving_router import ControllerNode
from rawworker import answers, fails, stalls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from mlx_serving_router import InferenceRequest
    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats

SEQUENTIAL = 1000
CONCURRENT = 100
#: Bytes that the resident memory may grow in one further round, once the first rounds have warmed everything up. A
#: round keeps at most `maxEntries` = 50 ended requests; one leaked kilobyte for each request would be a megabyte.
GROWTH = 1_000_000
#: Few enough that the stores are full after the warm-up.
BOUNDED: dict[str, Any] = {"requestMetrics": {"maxEntries": 50}}


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def at_rest(controller: ControllerNode) -> None:
    assert sum(info.in_flight for info in controller.workers()) == 0
    requests = controller.cluster_status().to_dict()["requests"]
    assert (requests["active"], requests["queued"]) == (0, 0)


async def quiet(controller: ControllerNode, tasks: int) -> None:
    """Within a second everything is back, tasks included."""

    def over() -> bool:
        return not any(info.in_flight for info in controller.workers()) and len(asyncio.all_tasks()) <= tasks

    await until(over, "the end of all work", 1)
    at_rest(controller)


async def handler(request: InferenceRequest) -> AsyncIterator[str]:
    if request.prompt == "stall":
        await asyncio.Event().wait()
    for word in ("Hel", "lo"):
        yield word


@asynccontextmanager
async def local() -> AsyncIterator[ControllerNode]:
    controller = ControllerNode({"nats": {"mode": "none"}, **BOUNDED})
    controller.add_local_worker(handler, models=["tiny"])
    async with controller:
        yield controller


@asynccontextmanager
async def over_nats(nats: NatsServer, prefix: str) -> AsyncIterator[ControllerNode]:
    async def plan(job: Any) -> None:
        await (stalls() if job.request.get("prompt") == "stall" else answers("Hel", "lo"))(job)

    async with Cluster(nats.url, prefix, plan=plan, **BOUNDED) as cluster:
        cluster.worker.jobs = Forgetful()  # type: ignore[assignment]
        cluster.worker.cancels = Forgetful()  # type: ignore[assignment]
        yield cluster.controller


class Forgetful(list[Any]):
    """The test's own worker must not remember a thousand requests."""

    def append(self, _: Any) -> None:
        return


@pytest.fixture(params=["local", "nats"])
async def controller(
    request: pytest.FixtureRequest, nats: NatsServer, nats_prefix: str
) -> AsyncIterator[ControllerNode]:
    async with local() if request.param == "local" else over_nats(nats, nats_prefix) as controller:
        yield controller


def plain(words: str = "Hello") -> InferenceRequest:
    return ask(messages=None, prompt=words)


async def flat(round_: Callable[[], Awaitable[None]], controller: ControllerNode) -> None:
    """A round leaves nothing; memory is compared after two rounds of warm-up."""
    tasks = len(asyncio.all_tasks())
    await round_()
    await quiet(controller, tasks)
    await round_()
    await quiet(controller, tasks)
    before = resident()
    await round_()
    await quiet(controller, tasks)
    grown = resident() - before
    if grown > GROWTH and sys.platform == "linux":  # the allocator may have taken more for itself once
        before = resident()
        await round_()
        await quiet(controller, tasks)
        grown = resident() - before
    assert grown <= GROWTH


async def test_a_task_that_nobody_holds_is_not_collected(nats: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()
    ended: list[str] = []

    async def call(kind: str) -> None:
        try:
            if kind == "buffered":
                ended.append((await cluster.buffered()).text)
            else:
                ended.append(text(await read(await cluster.streaming())))
        except BaseException as error:
            ended.append(repr(error))
            raise

    async def plan(job: Any) -> None:
        await job.accept()
        await job.token("Hel")
        await release.wait()
        await job.token("lo")
        await job.done()

    # The collector may take long where much was imported, and nothing is delivered meanwhile.
    patient = {"requestRouting": {"streamIdleTimeoutMs": 60_000, "timeoutMs": 60_000}}
    async with Cluster(nats.url, nats_prefix, plan=plan, **patient) as cluster:
        for _ in range(5):
            asyncio.ensure_future(call("buffered"))  # noqa: RUF006 that nobody holds it is the point
            asyncio.ensure_future(call("streaming"))  # noqa: RUF006
        await cluster.worker.asked(10)
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0)
        release.set()
        await until(lambda: len(ended) == 10, "all to end")
        assert ended == ["Hello"] * 10


@pytest.mark.slow
async def test_sequential_requests_leave_nothing(controller: ControllerNode) -> None:
    async def round_() -> None:
        for _ in range(SEQUENTIAL // 2):
            await controller.handle_buffered_request(plain())
            at_rest(controller)
            await read(await controller.handle_streaming_request(plain()))
            at_rest(controller)

    await flat(round_, controller)


async def test_concurrent_requests_leave_nothing(controller: ControllerNode) -> None:
    async def streaming() -> None:
        await read(await controller.handle_streaming_request(plain()))

    async def round_() -> None:
        half = CONCURRENT // 2
        await asyncio.gather(
            *(controller.handle_buffered_request(plain()) for _ in range(half)),
            *(streaming() for _ in range(half)),
        )
        at_rest(controller)

    await flat(round_, controller)


async def test_cancelled_requests_leave_nothing(controller: ControllerNode) -> None:
    async def round_() -> None:
        calls = [controller.handle_buffered_request, controller.handle_streaming_request]
        tasks = [asyncio.ensure_future(calls[number % 2](plain("stall"))) for number in range(CONCURRENT)]
        await until(
            lambda: controller.cluster_status().to_dict()["requests"]["active"] == CONCURRENT,
            "all to be in flight",
        )
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}

    await flat(round_, controller)


async def test_abandoned_streams_leave_nothing(controller: ControllerNode) -> None:
    async def round_() -> None:
        for number in range(CONCURRENT):
            stream = await controller.handle_streaming_request(plain())
            async for _ in stream:
                break
            if number % 2:
                await stream.aclose()
            del stream

    await flat(round_, controller)


async def test_failed_requests_leave_nothing(nats: NatsServer, nats_prefix: str) -> None:
    changes: dict[str, Any] = {**BOUNDED, "requestRouting": {"circuitBreaker": {"enabled": False}}}
    async with Cluster(nats.url, nats_prefix, workers=2, plan=fails(), **changes) as cluster:
        for worker in cluster.workers:
            worker.jobs = Forgetful()

        async def round_() -> None:
            for _ in range(CONCURRENT):
                await failure(cluster.controller.handle_buffered_request(plain()))
                cluster.at_rest()

        await flat(round_, cluster.controller)
