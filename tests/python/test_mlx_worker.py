"""A worker with the tiny model meets what happens to workers: its NATS server dies, and it is told to end."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Any

import nats as nats_py
import pytest

from cluster import (
    CALM,
    ENDLESS,
    LOADING,
    WorkerProcess,
    ask,
    failure,
    received,
    routing,
    served,
    settings,
    until,
)
from enginejobs import MODEL, Steps
from mlx_serving_router import ControllerNode, WorkerNode
from mlx_serving_router.nats_server import NatsServer
from programs import program
from rawcontroller import Fleet, heard
from relay import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytest.importorskip("mlx_lm")

pytestmark = [pytest.mark.model, pytest.mark.nats]

#: 600 tokens are many.
LASTING: dict[str, Any] = {**ENDLESS, "max_tokens": 600}
LONG: list[dict[str, Any]] = [
    {**LASTING},
    {**LASTING, "temperature": 4.0, "seed": 1, "top_k": 200},
    {**LASTING, "temperature": 4.0, "seed": 2, "min_p": 0.001},
]
#: No limit but the test's own: a machine may be busy.
PATIENT = routing(
    timeoutMs=60_000, acceptTimeoutMs=30_000, streamingTimeoutMs=60_000, streamIdleTimeoutMs=60_000
)


@pytest.fixture
def own_nats() -> Iterator[NatsServer]:
    """A nats-server that the test may kill."""
    with NatsServer(port=0) as server:
        yield server


# === its NATS server dies, and another is there ===


def wire(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"max_tokens": "maxTokens", "logit_bias": "logitBias", "top_k": "topK", "min_p": "minP"}
    return {
        "modelId": "tiny",
        "prompt": "Once upon a time",
        **{names.get(name, name): value for name, value in fields.items()},
    }


def tokens_of(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["tokenIds"]) for message in messages if message["type"] == "token")


def joined(messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """The text and the tokens of an answer that came whole and in order."""
    tokens = [message for message in messages if message["type"] == "token"]
    index = 0
    for token in tokens:
        assert token["index"] == index
        index += len(token["tokenIds"])
    assert messages[-1]["type"] == "done", messages[-1]
    assert messages[-1]["totalTokens"] == index
    return "".join(token["token"] for token in tokens), [
        each for token in tokens for each in token["tokenIds"]
    ]


async def test_answers_go_on_while_nats_is_gone_and_go_out_when_it_is_back(
    own_nats: NatsServer, nats_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_serving_router.mlx import MlxEngine

    steps = Steps(monkeypatch)
    client = await nats_py.connect(own_nats.url, reconnect_time_wait=0.05, max_reconnect_attempts=-1)
    # The worker comes through a relay, so that it is not back before those who listen to it.
    async with Relay(own_nats.port) as relay:
        fleet = Fleet(client, f"nats://127.0.0.1:{relay.port}", nats_prefix)
        engine = MlxEngine({"tiny": MODEL}, prompt_cache_bytes=0)
        async with WorkerNode(engine, config=fleet.config(), worker_id="w") as worker:
            undisturbed = [joined(await (await fleet.ask("w", **wire(fields))).rest()) for fields in LONG]
            registrations = await fleet.listen("worker.register")

            running = [await fleet.ask("w", **wire(fields)) for fields in LONG]
            begun = [[await answers.next(), await answers.next()] for answers in running]
            # Whatever is on its way when a server is killed is lost: nothing is.
            await asyncio.to_thread(steps.hold)
            delivered = steps.delivered()
            for messages, answers in zip(begun, running, strict=True):
                while tokens_of(messages) < delivered[answers.request_id]:
                    messages.append(await answers.next())
            await asyncio.to_thread(own_nats.kill)
            await relay.cut()
            steps.go_on()
            at = steps.count
            await until(lambda: steps.count >= at + 50, "steps while nobody can be reached")

            await asyncio.to_thread(own_nats.start)
            await until(lambda: client.is_connected, "a reconnect")
            await client.flush()
            await relay.open()
            assert (await heard(registrations))["incarnation"] == worker.incarnation
            whole = [
                joined([*first, *await answers.rest()]) for first, answers in zip(begun, running, strict=True)
            ]
            assert whole == undisturbed
            assert joined(await (await fleet.ask("w", **wire(LONG[0]))).rest()) == undisturbed[0]
    await client.close()


async def test_a_fleet_is_whole_again_after_nats_was_killed(own_nats: NatsServer, nats_prefix: str) -> None:
    with WorkerProcess(own_nats.url, nats_prefix, "w") as worker:
        async with ControllerNode(settings(own_nats.url, nats_prefix, **CALM, **PATIENT)) as controller:
            await controller.wait_for_workers(1, timeout=LOADING)
            before = controller.workers()[0].incarnation
            streams = [await controller.handle_streaming_request(ask(**fields)) for fields in LONG]
            for stream in streams:
                await anext(stream)
            await asyncio.to_thread(own_nats.kill)
            for stream in streams:
                _, error = await received(stream)
                assert error is not None
                assert error.code == "STREAM_INTERRUPTED"
            await asyncio.to_thread(own_nats.start)

            response = await served(
                lambda: controller.handle_buffered_request(ask("What do bees make?")),
                "NATS_ERROR",
                "NO_WORKERS_AVAILABLE",
            )
            assert response.text == "Bees make honey."
            assert [info.incarnation for info in controller.workers()] == [before]
            assert controller.workers()[0].breaker == "CLOSED"
            assert worker.process.poll() is None


# === it is told to end ===


@pytest.fixture
async def controller(nats: NatsServer, nats_prefix: str) -> AsyncIterator[ControllerNode]:
    async with ControllerNode(settings(nats.url, nats_prefix, **CALM, **PATIENT)) as controller:
        yield controller


@pytest.fixture
async def worker(
    nats: NatsServer, nats_prefix: str, controller: ControllerNode
) -> AsyncIterator[WorkerProcess]:
    """`mlx-serving-router worker`, online."""
    with WorkerProcess(nats.url, nats_prefix, "w") as worker:
        await controller.wait_for_workers(1, timeout=LOADING)
        yield worker


def status(controller: ControllerNode) -> str | None:
    info = controller.worker("w")
    return None if info is None else info.status


async def test_a_signal_lets_streams_finish(controller: ControllerNode, worker: WorkerProcess) -> None:
    undisturbed = [
        (await controller.handle_buffered_request(ask("Tell me a story.", **fields))).text for fields in LONG
    ]
    streams = [
        await controller.handle_streaming_request(ask("Tell me a story.", **fields)) for fields in LONG
    ]
    firsts = [(await anext(stream)).text for stream in streams]
    worker.signal(signal.SIGTERM)
    await until(lambda: status(controller) == "draining", "the drain")
    assert sum(info.in_flight for info in controller.workers()) == len(LONG)
    late = await failure(controller.handle_buffered_request(ask(), timeout=0.5))
    assert late.code in {"NO_WORKERS_AVAILABLE", "QUEUE_FULL"}
    for first, stream, whole in zip(firsts, streams, undisturbed, strict=True):
        rest, error = await received(stream)
        assert error is None
        assert first + rest == whole
    assert await worker.ended() == 0
    assert "has ended" in worker.errors()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    controller: ControllerNode, worker: WorkerProcess, second: signal.Signals
) -> None:
    streams = [
        await controller.handle_streaming_request(ask("Tell me a story.", **fields)) for fields in LONG
    ]
    for stream in streams:
        await anext(stream)
    worker.signal(signal.SIGTERM)
    await until(lambda: status(controller) == "draining", "the drain")
    worker.signal(second)
    assert await worker.ended() == 128 + second
    assert "has ended" not in worker.errors()
    await controller.stop(drain_timeout=0)  # else its limits would have to pass: nobody says that it is gone
    for stream in streams:
        _, error = await received(stream)
        assert error is not None


# === a load that hangs ===

HUNG = """
import logging, sys, threading
from mlx_serving_router import ClusterConfig, WorkerNode
from mlx_serving_router.mlx import MlxEngine
from mlx_serving_router.mlx._models import LoadedModel

logging.basicConfig()
load = LoadedModel.load

def held(name, location):
    if name == "hung":
        threading.Event().wait()  # as a download that nobody answers
    return load(name, location)

LoadedModel.load = held
config = ClusterConfig.from_dict({
    "nats": {"mode": "external", "serverUrl": sys.argv[1], "subjectPrefix": sys.argv[2]},
    "discovery": {"heartbeatIntervalMs": 200},
})
models = dict.fromkeys(("warm", "cold", "hung"), sys.argv[3])
engine = MlxEngine(models, pre_warm=["warm"], load_timeout=float(sys.argv[4]))
WorkerNode(engine, config=config, worker_id="w").run(drain_timeout=float(sys.argv[5]))
print("stopped")
"""


@pytest.fixture
def hung(nats: NatsServer, nats_prefix: str, tmp_path: Path) -> Callable[..., Any]:
    """Starts a worker, one of whose models never comes."""
    script = tmp_path / "worker.py"
    script.write_text(HUNG)

    def start(*, load_timeout: float, drain_timeout: float) -> Any:
        numbers = (str(load_timeout), str(drain_timeout))
        return program(sys.executable, script, nats.url, nats_prefix, MODEL, *numbers, scratch=tmp_path)

    return start


async def test_a_load_that_hangs_is_told_of_and_leaves_the_worker_of_use(
    nats: NatsServer, nats_prefix: str, hung: Callable[..., Any]
) -> None:
    with hung(load_timeout=5.0, drain_timeout=30.0) as worker:
        async with ControllerNode(settings(nats.url, nats_prefix, **PATIENT)) as controller:
            await controller.wait_for_workers(1, timeout=LOADING)
            error = await failure(controller.handle_buffered_request(ask(model_id="hung"), worker_id="w"))
            assert (error.code, "not loaded after 5 s" in error.message) == ("MODEL_LOAD_FAILED", True)
            worker.line_with("'hung'", "not loaded after 5 s")
            for name in ("warm", "cold"):
                assert (await controller.handle_buffered_request(ask(model_id=name))).text.startswith(
                    "Hello!"
                )
            info = controller.worker("w")
            assert info is not None
            assert (info.phase, info.loaded_models, info.loading_models) == ("ready", ["warm", "cold"], [])
            running = await controller.handle_streaming_request(ask(model_id="warm", **LASTING))
            worker.send(signal.SIGTERM)
            got, interrupted = await received(running)
            assert (got != "", interrupted) == (True, None)
        assert worker.ends() == 0, worker.output
        assert "stopped" in worker.output
        worker.line_with("model hung", "nobody waits for it")


async def test_a_worker_ends_while_requests_wait_for_a_load_that_hangs(
    nats: NatsServer, nats_prefix: str, hung: Callable[..., Any]
) -> None:
    with hung(load_timeout=600.0, drain_timeout=0.5) as worker:
        async with ControllerNode(settings(nats.url, nats_prefix, **PATIENT)) as controller:
            await controller.wait_for_workers(1, timeout=LOADING)
            waiting = asyncio.create_task(
                failure(controller.handle_buffered_request(ask(model_id="hung"), worker_id="w"))
            )

            def loading() -> bool:
                info = controller.worker("w")
                return info is not None and info.loading_models == ["hung"]

            await until(loading, "it says that it loads")
            worker.send(signal.SIGTERM)
            assert (await waiting).code == "WORKER_UNAVAILABLE"
        assert worker.ends() == 0, worker.output
