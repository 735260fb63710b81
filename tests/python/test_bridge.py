"""Awaiting the core: event loops of every kind, threads, Ctrl-C, and what is left behind.

Without a worker, `wait_for_workers` is work that ends at once (for none), or never.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving_router import ControllerError, ControllerNode, InferenceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

LOCAL: dict[str, Any] = {"nats": {"mode": "none"}}
PATIENCE = 10.0


class WatchesNothing(asyncio.SelectorEventLoop):
    """An event loop that cannot watch file descriptors, as some of other libraries."""

    def add_reader(self, *_: Any) -> None:
        raise NotImplementedError


def uvloop() -> asyncio.AbstractEventLoop:
    return pytest.importorskip("uvloop").new_event_loop()


loops = pytest.mark.parametrize(
    "new_loop",
    [asyncio.SelectorEventLoop, WatchesNothing, uvloop],
    ids=["asyncio", "watches-nothing", "uvloop"],
)


@pytest.fixture
def controller() -> Iterator[ControllerNode]:
    with ControllerNode(LOCAL) as controller:
        yield controller


def run(new_loop: Callable[[], asyncio.AbstractEventLoop], work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


# === event loops ===


@loops
def test_a_thousand_awaits_at_a_time(
    controller: ControllerNode, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        await asyncio.gather(*(controller.wait_for_workers(0, timeout=PATIENCE) for _ in range(1000)))
        for _ in range(100):
            await controller.wait_for_workers(0, timeout=PATIENCE)

    run(new_loop, main())


@loops
def test_an_error_is_raised_in_the_task(
    controller: ControllerNode, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        request = InferenceRequest(model_id="tiny", prompt="Hello")
        with pytest.raises(ControllerError) as caught:
            await controller.handle_buffered_request(request)
        assert caught.value.code == "NO_WORKERS_AVAILABLE"
        assert caught.value.context["request_id"] == request.request_id

    run(new_loop, main())


@loops
def test_a_cancelled_task_leaves_nothing_behind(
    controller: ControllerNode, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(controller.wait_for_workers(1, timeout=None)) for _ in range(100)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await controller.wait_for_workers(0, timeout=PATIENCE)

    run(new_loop, main())


@loops
def test_loops_follow_each_other_and_leave_no_descriptor(
    controller: ControllerNode, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    def once() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = new_loop()
        loop.run_until_complete(controller.wait_for_workers(0, timeout=PATIENCE))
        loop.close()
        return weakref.ref(loop)

    once()
    gc.collect()
    before = descriptors()
    for _ in range(5):
        gone = once()
        gc.collect()
        assert gone() is None
    assert descriptors() == before


@loops
def test_a_loop_that_closes_early_harms_nobody(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with ControllerNode(LOCAL) as controller:
        loop = new_loop()

        async def begin() -> list[Any]:
            return [controller._native.wait_for_workers(1, None) for _ in range(50)]

        pending = loop.run_until_complete(begin())
        loop.close()
        # Their end comes now, to a loop that is closed.
    assert len(pending) == 50
    run(new_loop, ControllerNode(LOCAL).stop())


def test_loops_in_many_threads(controller: ControllerNode) -> None:
    async def main() -> int:
        for _ in range(50):
            await asyncio.gather(*(controller.wait_for_workers(0, timeout=PATIENCE) for _ in range(10)))
        return 1

    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(asyncio.run(main()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert done == [1] * 8


def test_a_call_needs_a_running_loop(controller: ControllerNode) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        controller._native.wait_for_workers(0, None)


async def test_a_task_that_nobody_holds_goes_on(controller: ControllerNode) -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        with contextlib.suppress(TimeoutError):
            await controller.wait_for_workers(1, timeout=0.05)
        ended.set()

    # The event loop holds its tasks weakly, and what this one waits for is no Python object.
    asyncio.get_running_loop().create_task(wait())
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.wait_for(ended.wait(), PATIENCE)


def test_a_task_of_a_closed_loop_is_let_go_of(controller: ControllerNode) -> None:
    def abandon() -> weakref.ref[Any]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # the task is destroyed while it is pending
        task = loop.create_task(controller.wait_for_workers(1, timeout=None))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        return weakref.ref(task)

    gone = abandon()
    # The next loop notices that the other one is closed.
    asyncio.run(controller.wait_for_workers(0, timeout=PATIENCE))
    gc.collect()
    assert gone() is None


async def test_a_reader_of_events_ends_with_its_controller() -> None:
    async with ControllerNode(LOCAL) as controller:
        events = controller.events()
        waiting = asyncio.create_task(_all(events))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(waiting, PATIENCE) == []


async def _all(events: Any) -> list[Any]:
    return [event async for event in events]


# === threads ===


def test_a_thread_that_waits_lets_others_run(controller: ControllerNode) -> None:
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    other = threading.Thread(target=count)
    other.start()
    try:
        before = counted
        with pytest.raises(TimeoutError, match=r"0 of 1 workers are online after 0\.2 s"):
            controller.wait_for_workers_blocking(1, timeout=0.2)
        assert counted > before
    finally:
        stop.set()
        other.join()


async def test_a_notebook_waits_in_the_thread_of_its_loop(controller: ControllerNode) -> None:
    controller.wait_for_workers_blocking(0, timeout=PATIENCE)
    with pytest.raises(ControllerError, match="NO_WORKERS_AVAILABLE"):
        controller.generate(InferenceRequest(model_id="tiny", prompt="Hello"))
    await controller.wait_for_workers(0, timeout=PATIENCE)


def test_ctrl_c_interrupts_a_thread_that_waits(controller: ControllerNode) -> None:
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        controller.wait_for_workers_blocking(1, timeout=PATIENCE)
    assert time.monotonic() - started < PATIENCE / 2
    timer.join()


# === logs ===


class Collector(logging.Handler):
    """Keeps records until the one comes that is waited for."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self.wanted = wanted
        self.found: logging.LogRecord | None = None
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.wanted in record.getMessage():
            self.found = record
            self.came.set()


def test_the_core_logs_with_its_fields(controller: ControllerNode) -> None:
    collector = Collector("request failed")
    logger = logging.getLogger("mlx_serving_router")
    logger.addHandler(collector)
    try:
        request = InferenceRequest(model_id="tiny", prompt="a secret")
        with pytest.raises(ControllerError):
            controller.generate(request)
        assert collector.came.wait(PATIENCE)
    finally:
        logger.removeHandler(collector)
    record = collector.found
    assert record is not None
    assert record.name.startswith("mlx_serving_router.dispatch")
    assert record.levelno >= logging.WARNING
    assert record.__dict__["request_id"] == request.request_id
    assert abs(record.created - time.time()) < PATIENCE
    assert "secret" not in str(record.__dict__)
