"""The life of a `TestCluster`: what starts, what is refused, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from cluster import PACKAGES, failure, until
from mlx_serving_router import ClusterConfig, ConfigError, ControllerError, ControllerNode, InferenceRequest
from mlx_serving_router.nats_server import NatsServer, NatsServerError
from mlx_serving_router.testing import (
    ANSWER,
    SHORT_LIMITS,
    ScriptedWorker,
    TestCluster,
    answer,
    fail,
    stall,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = InferenceRequest(model_id="tiny", prompt="Hello")


def listens(url: str) -> bool:
    host, port = url.rsplit("/", 1)[1].split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def own_threads() -> list[str]:
    """The threads of clusters; others of the package may live as long as the process."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name == "mlx_serving_router-front-end"]


def threads_of_the_package() -> set[str]:
    names = (thread.name for thread in threading.enumerate())
    return {name for name in names if name.startswith("mlx_serving_router")}


def children() -> set[int]:
    """The processes that this one has started and that run."""
    processes = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in processes.stdout.splitlines()]
    return {int(pid) for pid, parent, name in lines if int(parent) == os.getpid() and "nats-server" in name}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no process more than before."""
    before = children()
    yield
    assert own_threads() == []
    assert children() == before


# === a life ===


@pytest.mark.nats
async def test_a_cluster_is_a_controller_with_its_workers_and_leaves_nothing() -> None:
    tasks = asyncio.all_tasks()
    threads = threads_of_the_package()
    async with TestCluster() as cluster:
        assert [worker.worker_id for worker in cluster.workers] == ["worker-0", "worker-1", "worker-2"]
        assert [info.status for info in cluster.controller.workers()] == ["online"] * 3
        assert (await cluster.controller.handle_buffered_request(ASK)).text == ANSWER
        assert (cluster.controller.state, listens(cluster.nats_url)) == ("ready", True)
        nats_url = cluster.nats_url
    assert cluster.controller.state == "stopped"
    assert [worker.state for worker in cluster.workers] == ["stopped"] * 3
    assert not listens(nats_url)
    assert asyncio.all_tasks() == tasks
    assert threads_of_the_package() <= threads | {"mlx_serving_router-logs"}
    assert sum(worker.request_count for worker in cluster.workers) == 1
    await cluster.stop()


def test_it_works_without_an_event_loop(transport: Literal["nats", "local"]) -> None:
    with TestCluster(2, transport=transport) as cluster:
        response = cluster.controller.generate(ASK)
        worker = cluster.worker(response.worker_id)
        assert [received.request_id for received in worker.wait_for_requests_blocking(1)] == [ASK.request_id]
        worker.wait_until_idle_blocking()
        worker.restart()
        added = cluster.add_worker(fail(), models=["broken"])
        broken = InferenceRequest(model_id="broken", prompt="x")
        with pytest.raises(ControllerError):
            cluster.controller.generate(broken)
        assert added.request_count == 1
    assert (worker.state, added.state, cluster.controller.state) == ("stopped",) * 3


@pytest.fixture(params=["local", pytest.param("nats", marks=pytest.mark.nats)])
def transport(request: pytest.FixtureRequest) -> Literal["nats", "local"]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.nats
async def test_ten_clusters_one_after_the_other_and_three_at_once() -> None:
    async with TestCluster(1):
        pass
    files = open_files()  # with those that the process keeps
    for _ in range(10):
        async with TestCluster(2) as cluster:
            assert (await cluster.controller.handle_buffered_request(ASK)).text == ANSWER
    async with TestCluster(1) as one, TestCluster(1) as two, TestCluster(1) as three:
        assert len({cluster.nats_url for cluster in (one, two, three)}) == 3
        for cluster in (one, two, three):
            assert (await cluster.controller.handle_buffered_request(ASK)).text == ANSWER
    await until(lambda: open_files() <= files, "files to be closed")


def open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


async def test_leaving_does_not_wait_for_requests_that_stall(transport: Literal["nats", "local"]) -> None:
    patient = {"requestRouting": {"timeoutMs": 30000}}
    async with TestCluster(1, transport=transport, script=stall(), config=patient) as cluster:
        running = asyncio.create_task(cluster.controller.handle_buffered_request(ASK))
        await cluster.workers[0].wait_for_requests(1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert (await failure(running)).code == "CONTROLLER_NOT_READY"


async def test_an_error_in_the_block_comes_out_and_nothing_is_left() -> None:
    with pytest.raises(ZeroDivisionError):
        async with TestCluster(1, transport="local") as cluster:
            raise ZeroDivisionError
    assert cluster.controller.state == "stopped"


@pytest.mark.nats
def test_a_cluster_that_is_never_left_does_not_hold_up_the_end_of_the_process() -> None:
    program = """
        import asyncio
        from mlx_serving_router.testing import TestCluster

        async def main():
            cluster = TestCluster(2)
            await cluster.start()
            try:
                print(cluster.api_url)
            except RuntimeError:
                print("no front-end")

        asyncio.run(main())
        kept = TestCluster(1, transport="local").__enter__()
    """
    ended = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": PACKAGES},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    url = ended.stdout.strip()
    assert url == "no front-end" or not listens(url)


# === more workers, less NATS ===


async def test_workers_may_be_added_with_what_the_others_have(transport: Literal["nats", "local"]) -> None:
    async with TestCluster(
        1, transport=transport, models=["a"], max_concurrent=3, script=answer("x")
    ) as cluster:
        second = cluster.add_worker()
        third = cluster.add_worker(stall(), worker_id="mine", models=["b"], max_concurrent=0)
        assert [worker.worker_id for worker in cluster.workers] == ["worker-0", "worker-1", "mine"]
        assert (second.script, third.script) == (answer("x"), stall())
        infos = {info.worker_id: info for info in cluster.controller.workers()}
        assert (infos["worker-1"].models, infos["worker-1"].max_concurrent) == (["a"], 3)
        assert (infos["mine"].models, infos["mine"].max_concurrent) == (["b"], 0)
        assert cluster.worker("mine") is third
        with pytest.raises(ValueError, match=r"called 'mine' already; its restart\(\)"):
            cluster.add_worker(worker_id="mine")
        with pytest.raises(TypeError, match="script is stall, no script"):
            third.script = stall  # type: ignore[assignment]
        with pytest.raises(LookupError, match="'nobody'; there are worker-0, worker-1, mine"):
            cluster.worker("nobody")


@pytest.mark.nats
async def test_nats_may_go_and_come_back() -> None:
    async with TestCluster(2) as cluster:
        cluster.stop_nats()
        begun = time.monotonic()
        error = await failure(cluster.controller.handle_buffered_request(ASK))
        assert (error.code, time.monotonic() - begun < 1) == ("NATS_ERROR", True)
        with pytest.raises(ControllerError, match="NATS_ERROR"):
            cluster.workers[0].restart()
        cluster.start_nats()
        cluster.workers[0].restart()
        await cluster.controller.wait_for_workers(2, timeout=5)
        assert (await cluster.controller.handle_buffered_request(ASK)).text == ANSWER


async def test_a_local_cluster_has_no_nats() -> None:
    async with TestCluster(1, transport="local") as cluster:
        for ask in (lambda: cluster.nats_url, cluster.stop_nats, cluster.start_nats):
            with pytest.raises(RuntimeError, match="transport is 'local'"):
                ask()


# === what is set ===


async def test_a_dictionary_changes_the_short_limits_and_a_configuration_replaces_them(
    tmp_path: Path,
) -> None:
    def limits(cluster: TestCluster) -> tuple[Any, ...]:
        settings = cluster.controller.config.to_dict()
        routing = settings["requestRouting"]
        return (
            routing["timeoutMs"],
            routing["retry"]["maxRetries"],
            settings["discovery"]["heartbeatIntervalMs"],
        )

    changed = {"request_routing": {"retry": {"max_retries": 7}}}
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "cluster:\n  requestRouting: {timeoutMs: 1234}\n  nats: {mode: external, user: u, password: p}\n"
    )
    expected = [
        (None, (2000, 2, 100)),
        (changed, (2000, 7, 100)),
        ({"cluster": changed}, (2000, 7, 100)),
        (ClusterConfig.from_dict(changed), (30000, 7, 5000)),
        (file, (1234, 2, 5000)),
    ]
    for config, wanted in expected:
        async with TestCluster(0, transport="local", config=config) as cluster:
            assert limits(cluster) == wanted
            assert cluster.controller.config.to_dict()["nats"]["mode"] == "none"
    assert SHORT_LIMITS["requestRouting"]["timeoutMs"] == 2000


@pytest.mark.nats
async def test_the_configuration_of_a_fleet_elsewhere_is_used_here(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "nats: {mode: external, serverUrl: 'nats://192.0.2.1', user: u, password: p, subjectPrefix: 'team.'}\n"
    )
    async with TestCluster(1, config=file) as cluster:
        assert (await cluster.controller.handle_buffered_request(ASK)).text == ANSWER
        assert cluster.controller.config.to_dict()["nats"]["subjectPrefix"] == "team."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"worker_count": -1}, "worker_count is -1; 0 to 1000"),
        ({"worker_count": 10**9}, "worker_count is 1000000000; 0 to 1000"),
        ({"nats_port": -1}, "nats_port is -1; 0 to 65535"),
        ({"controller_port": 99_999}, "controller_port is 99999; 0 to 65535"),
        ({"transport": "carrier-pigeon"}, "'nats' or 'local'"),
        ({"models": []}, "name at least one model"),
        ({"models": "tiny"}, "a list of names"),
        ({"loading_ms": -1}, "loading_ms is -1"),
        pytest.param({"script": stall}, "script is stall, no script", id="script"),  # no address in its name
        ({"features": ["flying"]}, "features: .flying. is unknown"),
        ({"config": {"requestRoutin": {}}}, "did you mean requestRouting"),
        ({"config": 3}, "a configuration is"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_starts(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        TestCluster(**options)
    assert issubclass(ConfigError, ValueError)


# === starts that fail ===


async def fails_to_start(cluster: TestCluster, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        await cluster.start()
    assert own_threads() == []
    assert all(worker.state == "stopped" for worker in cluster.workers)
    with pytest.raises(RuntimeError, match="starts once"):
        await cluster.start()


@pytest.mark.nats
async def test_a_taken_nats_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        await fails_to_start(TestCluster(1, nats_port=port), NatsServerError, f"port {port} .* is taken")


@pytest.mark.nats
async def test_a_nats_server_of_others_is_left_alone() -> None:
    with NatsServer(port=0) as server:
        await fails_to_start(TestCluster(1, nats_port=server.port), RuntimeError, "runs on nats_port")
        assert server.poll() is None
        assert listens(server.url)


async def test_a_taken_controller_port_is_told(transport: Literal["nats", "local"]) -> None:
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = TestCluster(2, 0, port, transport=transport)
        await fails_to_start(cluster, RuntimeError, f"controller_port {port}: .*; 0 takes any free one")
        assert cluster.controller.state == "stopped"


async def test_a_start_that_is_cancelled_leaves_nothing(transport: Literal["nats", "local"]) -> None:
    for seconds in (0.0, 0.005, 0.02, 0.03, 0.05):
        cluster = TestCluster(3, transport=transport)
        starting = asyncio.create_task(cluster.start())
        await asyncio.sleep(seconds)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await cluster.stop()
        assert all(worker.state == "stopped" for worker in cluster.workers)


async def test_what_was_not_started_says_so() -> None:
    cluster = TestCluster(1)
    for ask in (
        lambda: cluster.controller,
        lambda: cluster.api_url,
        lambda: cluster.nats_url,
        cluster.add_worker,
    ):
        with pytest.raises(RuntimeError, match="does not run"):
            ask()
    assert repr(cluster) == "<TestCluster idle workers=0>"
    await cluster.stop()
    with pytest.raises(RuntimeError, match="starts once"):
        await cluster.start()
    with pytest.raises(RuntimeError, match="starts once"), cluster:
        pass


# === a scripted worker by itself ===


@pytest.mark.nats
async def test_a_scripted_worker_joins_a_fleet_over_nats(nats: NatsServer, nats_prefix: str) -> None:
    config = {"nats": {"mode": "external", "serverUrl": nats.url, "subjectPrefix": nats_prefix}}
    async with ControllerNode(config) as controller:
        async with ScriptedWorker(config=config, worker_id="mine", models=["m"]) as worker:
            await controller.wait_for_workers(1, timeout=5)
            request = InferenceRequest(model_id="m", prompt="x")
            assert (await controller.handle_buffered_request(request)).worker_id == "mine"
            with pytest.raises(ControllerError, match="runs already"):
                worker.start()
        await until(lambda: controller.cluster_status().workers["online"] == 0, "its goodbye")


async def test_a_scripted_worker_joins_a_controller_of_its_process() -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        with ScriptedWorker(answer("x"), controller=controller, worker_id="mine") as worker:
            assert (await controller.handle_buffered_request(ASK)).text == "x"
            with pytest.raises(ControllerError, match="REQUEST_VALIDATION_FAILED"):
                ScriptedWorker(controller=controller, worker_id="mine").start()
        assert (worker.state, controller.workers()) == ("stopped", [])
        worker.start()
        assert (await controller.handle_buffered_request(ASK)).text == "x"
    await until(lambda: worker.state == "stopped", "the end of a worker whose controller has gone")
    with pytest.raises(ControllerError, match="CONTROLLER_NOT_READY"):
        worker.start()


def test_a_scripted_worker_without_nats_says_what_to_do() -> None:
    with pytest.raises(ControllerError, match=r"nats\.mode is none"):
        ScriptedWorker(config={"nats": {"mode": "none"}}).start()
    unreachable = {"nats": {"mode": "external", "serverUrl": "nats://127.0.0.1:1", "connectTimeoutMs": 500}}
    worker = ScriptedWorker(config=unreachable)
    with pytest.raises(ControllerError, match="cannot connect to NATS"):
        worker.start()
    assert worker.state == "stopped"
    with pytest.raises(ValueError, match="not both"):
        ScriptedWorker(controller=ControllerNode({"nats": {"mode": "none"}}), config={})
