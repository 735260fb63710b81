"""Cases 13, 16, 35 and 38 of the fault catalogue, which take many requests, over a real nats-server.

Each bears its number. The workers are the product's own, with handlers that the test holds in its hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from cluster import PATIENCE, ask, routing, served, settings, text, until
from mlx_serving_router import ControllerError, ControllerNode, WorkerNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from mlx_serving_router import InferenceRequest, TokenStream
    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats

WORDS = ("one ", "two ", "three")


class Handler:
    """A worker's code that counts what it does at a time.

    Attributes:
        running: Requests that it works on.
        most: The most that there were at a time.
        begun: All that there ever were.
        gate: What the last word waits for.
    """

    def __init__(self, *, pause: float = 0.0, gate: asyncio.Event | None = None) -> None:
        """`pause`: seconds before each word."""
        self._pause = pause
        self.gate = gate
        self.running = self.most = self.begun = 0

    async def __call__(self, _request: InferenceRequest) -> AsyncIterator[str]:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for number, word in enumerate(WORDS):
                await asyncio.sleep(self._pause)
                if self.gate is not None and number == len(WORDS) - 1:
                    await self.gate.wait()
                yield word
        finally:
            self.running -= 1


def at_rest(controller: ControllerNode) -> bool:
    requests = controller.cluster_status().to_dict()["requests"]
    idle = all(worker.in_flight == 0 for worker in controller.workers())
    stores = dict(re.findall(r'mlx_router_store_entries\{store="(\w+)"\} (\d+)', controller.metrics_text()))
    return idle and (requests["active"], requests["queued"], int(stores["inbox"])) == (0, 0, 0)


async def comes_to_rest(controllers: Sequence[ControllerNode], handlers: Sequence[Handler]) -> None:
    """Nothing is left of abandoned work within a second."""
    await until(
        lambda: all(map(at_rest, controllers)) and not any(handler.running for handler in handlers),
        "the end of all that was abandoned",
        seconds=1,
    )


async def test_13_a_worker_that_fails_at_once_attracts_nothing(nats: NatsServer, nats_prefix: str) -> None:
    async def fails(_request: InferenceRequest) -> AsyncIterator[str]:
        bad.begun += 1
        raise ControllerError("WORKER_UNAVAILABLE", "it fails at once")
        yield ""

    bad, good = Handler(), [Handler(pause=0.005), Handler(pause=0.005)]
    config = settings(nats.url, nats_prefix)
    async with contextlib.AsyncExitStack() as stack:
        for name, handler in (("bad", fails), ("good-1", good[0]), ("good-2", good[1])):
            node = WorkerNode(handler, config=config, worker_id=name, models=["tiny"])
            await stack.enter_async_context(node)
        controller = await stack.enter_async_context(ControllerNode(config))
        await controller.wait_for_workers(3, timeout=PATIENCE)
        places = asyncio.Semaphore(16)

        async def one() -> None:
            async with places:
                await controller.handle_buffered_request(ask())

        await asyncio.gather(*(one() for _ in range(1_000)))
        # The threshold is five, and sixteen are on their way when it is reached.
        assert bad.begun <= 5 + 16
        assert controller.get_circuit_breaker_stats()["bad"]["state"] == "OPEN"
        await comes_to_rest([controller], good)


async def test_16_ten_thousand_cancellations_at_random_points(nats: NatsServer, nats_prefix: str) -> None:
    dice = random.Random(16)
    handlers = [Handler(pause=0.004), Handler(pause=0.004)]
    # Room for fewer than come: some are cancelled while they wait for a place.
    changes = routing(
        admission={"maxQueue": 1024, "maxWaitMs": 60_000}, timeoutMs=60_000, acceptTimeoutMs=60_000
    )
    config = settings(nats.url, nats_prefix, **changes)
    ends: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        for number, handler in enumerate(handlers):
            node = WorkerNode(
                handler, config=config, worker_id=f"w{number}", models=["tiny"], max_concurrent=16
            )
            await stack.enter_async_context(node)
        controller = await stack.enter_async_context(ControllerNode(config))
        await controller.wait_for_workers(2, timeout=PATIENCE)
        places = asyncio.Semaphore(128)

        async def buffered() -> str:
            return (await controller.handle_buffered_request(ask())).text

        async def streamed() -> str:
            async with await controller.handle_streaming_request(ask()) as stream:
                return text([event async for event in stream])

        async def one() -> None:
            async with places:
                call = asyncio.ensure_future(dice.choice((buffered, streamed))())
                # Zero: before it has run at all. An answer takes some twelve milliseconds, and longer in the queue.
                patience = dice.choice(
                    (0, dice.uniform(0, 0.015), dice.uniform(0, 0.2), dice.uniform(0, 0.5))
                )
                await asyncio.wait([call], timeout=patience)
                call.cancel()
                try:
                    assert await call == "".join(WORDS)
                    ends["answered"] += 1
                except asyncio.CancelledError:
                    ends["cancelled"] += 1

        while ends["cancelled"] < 10_000:
            await asyncio.gather(*(one() for _ in range(1_000)))
        await comes_to_rest([controller], handlers)
        for breaker in controller.get_circuit_breaker_stats().values():
            assert (breaker["state"], breaker["failure_count"]) == ("CLOSED", 0)
        assert {one.status for one in controller.get_all_request_metrics()} <= {"succeeded", "cancelled"}
        # Every place is there, and no more.
        for handler in handlers:
            handler.gate = asyncio.Event()
        calls = [asyncio.ensure_future(buffered()) for _ in range(40)]
        await until(lambda: [handler.running for handler in handlers] == [16, 16], "both at their limits")
        for handler in handlers:
            assert handler.gate is not None
            handler.gate.set()
        assert set(await asyncio.gather(*calls)) == {"".join(WORDS)}
        assert [handler.most for handler in handlers] == [16, 16]
    assert ends["answered"] > 100  # the points are all over a request's life


@pytest.mark.parametrize("by", ["worker", "controller"])
async def test_35_a_drain_with_a_hundred_streams(nats: NatsServer, nats_prefix: str, by: str) -> None:
    gate = asyncio.Event()
    leaving, staying = Handler(gate=gate), Handler()
    config = settings(nats.url, nats_prefix)
    async with (
        WorkerNode(staying, config=config, worker_id="staying", models=["tiny"]),
        ControllerNode(config) as controller,
    ):
        node = WorkerNode(leaving, config=config, worker_id="leaving", models=["tiny"])
        await node.start()
        await controller.wait_for_workers(2, timeout=PATIENCE)

        async def begin() -> TokenStream:
            return await controller.handle_streaming_request(ask(), worker_id="leaving")

        streams = await asyncio.gather(*(begin() for _ in range(100)))
        assert leaving.running == 100
        if by == "worker":
            stopping = asyncio.ensure_future(node.stop(PATIENCE))
            await until(lambda: controller.workers()[0].status == "draining", "its word that it leaves")
        else:
            controller.drain_worker("leaving")
        for _ in range(50):
            assert (await controller.handle_buffered_request(ask())).worker_id == "staying"
        with pytest.raises(ControllerError) as refused:
            await begin()
        assert refused.value.code == "WORKER_OFFLINE"
        assert (leaving.begun, leaving.running) == (100, 100)
        gate.set()
        for stream in streams:
            async with stream:
                assert text([event async for event in stream]) == "".join(WORDS)
        if by == "worker":
            await stopping
        else:
            await node.stop(PATIENCE)
        await comes_to_rest([controller], [leaving, staying])


async def test_38_three_controllers_and_one_worker(nats: NatsServer, nats_prefix: str) -> None:
    handler = Handler(pause=0.01)
    # A long queue of the controllers' own: what the worker refuses is tried again.
    changes = routing(
        retry={"maxRetries": 0, "enabled": False}, timeoutMs=30_000, admission={"maxWaitMs": 30_000}
    )
    config = settings(nats.url, nats_prefix, **changes)
    async with contextlib.AsyncExitStack() as stack:
        node = WorkerNode(
            handler, config=config, worker_id="w", models=["tiny"], max_concurrent=4, max_queue=4
        )
        await stack.enter_async_context(node)
        controllers = [await stack.enter_async_context(ControllerNode(config)) for _ in range(3)]
        for controller in controllers:
            await controller.wait_for_workers(1, timeout=PATIENCE)

        async def one(controller: ControllerNode) -> str:
            response = await served(
                lambda: controller.handle_buffered_request(ask()), "WORKER_OVERLOADED", "NO_HEALTHY_WORKERS"
            )
            return response.text

        answers = await asyncio.gather(*(one(controller) for controller in controllers for _ in range(40)))
        assert set(answers) == {"".join(WORDS)}
        assert handler.most == 4
        await comes_to_rest(controllers, [handler])
