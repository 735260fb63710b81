"""How it begins and ends: starts that fail, forks, and the exit of the interpreter."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving_router import ControllerError, ControllerNode, ControllerState, InferenceRequest, nats_server
from programs import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCAL: dict[str, Any] = {"nats": {"mode": "none"}}
EMBEDDED: dict[str, Any] = {"nats": {"mode": "embedded", "embedded": {"port": 0}}}

PRELUDE = """
import asyncio, os, sys, threading, time
import mlx_serving_router as msr
LOCAL = {"nats": {"mode": "none"}}
request = msr.InferenceRequest(model_id="tiny", prompt="Hello")
"""


def script(body: str, *arguments: str) -> tuple[int, str, str, float]:
    """Exit status, output, errors and seconds of a program of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments, "-c", PRELUDE + body],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


# === starts and stops ===


async def test_a_controller_lives_once() -> None:
    controller = ControllerNode(LOCAL, controller_id="mine")
    assert (controller.state, controller.controller_id) == (ControllerState.IDLE, "mine")
    assert repr(controller) == "<ControllerNode 'mine' idle>"
    with pytest.raises(ControllerError) as caught:
        await controller.handle_buffered_request(InferenceRequest(model_id="tiny", prompt="Hello"))
    assert caught.value.code == "CONTROLLER_NOT_READY"
    async with controller as entered:
        assert entered is controller
        assert controller.state is ControllerState.READY
    assert controller.state is ControllerState.STOPPED
    await controller.stop()
    with pytest.raises(ControllerError, match="starts once") as caught:
        await controller.start()
    assert caught.value.code == "CONTROLLER_NOT_READY"
    with pytest.raises(ControllerError, match="starts once"), controller:
        pass


def test_many_live_in_one_process() -> None:
    with ControllerNode(LOCAL) as one, ControllerNode(LOCAL) as other:
        assert one.controller_id != other.controller_id
        assert (one.state, other.state) == ("ready", "ready")
    assert (one.state, other.state) == ("stopped", "stopped")


def test_one_that_never_started_can_be_stopped() -> None:
    controller = ControllerNode(LOCAL)
    asyncio.run(controller.stop())
    assert controller.state is ControllerState.STOPPED


def test_calls_raise_when_they_are_awaited() -> None:
    controller = ControllerNode(LOCAL)
    call = controller.handle_buffered_request("no request")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        asyncio.run(call)


async def test_what_is_no_priority_is_refused_when_it_is_awaited() -> None:
    request = InferenceRequest(model_id="tiny", prompt="Hello", priority="urgent")  # type: ignore[arg-type]
    assert InferenceRequest.from_dict(request.to_dict()) == request
    async with ControllerNode(LOCAL) as controller:
        with pytest.raises(
            ControllerError, match=r'priority: is "urgent"; high, normal or low is right'
        ) as caught:
            await controller.handle_buffered_request(request)
    assert caught.value.code == "REQUEST_VALIDATION_FAILED"


async def test_nobody_waits_for_fewer_workers_than_none() -> None:
    async with ControllerNode(LOCAL) as controller:
        await controller.wait_for_workers(0, timeout=1)
        with pytest.raises(ValueError, match="n is -1; 0 or more"):
            await controller.wait_for_workers(-1, timeout=1)


async def test_a_file_for_tls_that_is_missing_is_named() -> None:
    config = {"nats": {"mode": "external", "tls": {"caFile": "/nowhere/ca.pem"}}}
    with pytest.raises(ControllerError, match=r"nats\.tls\.caFile /nowhere/ca\.pem: No such file"):
        await ControllerNode(config).start()


@pytest.mark.nats
@pytest.mark.parametrize(
    ("authorization", "login"),
    [
        (["--user", "fleet", "--pass", "p@ss/word"], "fleet:p%40ss%2Fword@"),
        (["--auth", "a token"], "a%20token@"),
    ],
)
async def test_urls_may_bring_credentials(authorization: list[str], login: str) -> None:
    port = free_port()
    command = [nats_server.find_program(), "-a", "127.0.0.1", "-p", str(port), *authorization]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:  # noqa: ASYNC220 nothing waits
        try:
            assert server.stderr is not None
            while "Server is ready" not in server.stderr.readline():
                assert server.poll() is None
            url = f"127.0.0.1:{port}"
            async with ControllerNode({"nats": {"mode": "external", "serverUrl": f"nats://{login}{url}"}}):
                pass
            with pytest.raises(ControllerError, match=r"authorization violation; .* nats\.user"):
                await ControllerNode({"nats": {"mode": "external", "serverUrl": f"nats://{url}"}}).start()
        finally:
            server.terminate()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something listens that is no NATS server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_start_that_fails_leaves_it_stopped(taken: int) -> None:
    controller = ControllerNode({"nats": {"mode": "embedded", "embedded": {"port": taken}}})
    with pytest.raises(ControllerError, match="not a NATS server") as caught:
        await controller.start()
    assert caught.value.code == "NATS_ERROR"
    assert controller.state is ControllerState.STOPPED


async def test_without_its_nats_server_a_start_fails(closed: int) -> None:
    controller = ControllerNode(
        {"nats": {"mode": "external", "serverUrl": f"nats://127.0.0.1:{closed}", "connectTimeoutMs": 500}}
    )
    with pytest.raises(ControllerError) as caught:
        await controller.start()
    assert caught.value.code == "NATS_ERROR"
    assert controller.state is ControllerState.STOPPED


@pytest.mark.nats
async def test_the_embedded_server_lives_as_long_as_its_controller() -> None:
    controller = ControllerNode(EMBEDDED)
    async with controller:
        assert controller._nats is not None
        port = controller._nats.port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.nats
async def test_a_start_that_is_cancelled_leaves_no_server() -> None:
    controller = ControllerNode(EMBEDDED)
    task = asyncio.create_task(controller.start())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert controller.state is ControllerState.STOPPED
    assert controller._nats is not None
    assert controller._nats.pid is None


# === forks ===


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_a_controller_of_its_own() -> None:
    status, out, err, seconds = script("""
async def serve(controller):
    async with controller:
        await controller.wait_for_workers(0, timeout=10)
        return str(controller.state)

with msr.ControllerNode(LOCAL) as parent:
    parent.wait_for_workers_blocking(0, timeout=10)
    child = os.fork()
    if child == 0:
        uses = [
            lambda: parent.state,
            lambda: parent.workers(),
            lambda: parent.generate(request),
            lambda: asyncio.run(parent.handle_buffered_request(request)),
            lambda: asyncio.run(parent.stop()),
            lambda: msr._native.Controller(msr.ClusterConfig()) and parent.events(),
        ]
        refused = 0
        for use in uses:
            try:
                use()
            except RuntimeError as error:
                refused += "forked" in str(error)
        states = [asyncio.run(serve(msr.ControllerNode(LOCAL))) for _ in range(2)]
        with msr.ControllerNode(LOCAL) as controller:
            states.append(str(controller.state))
        del parent, controller
        print(refused, len(uses), states, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(status, parent.state)
    parent.wait_for_workers_blocking(0, timeout=10)
""")
    assert (status, err) == (0, "")
    assert out == "6 6 ['ready', 'ready', 'ready']\n0 ready\n"
    assert seconds < 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_exits_as_any_process() -> None:
    status, out, err, seconds = script("""
async def main():
    global calls, controller
    controller = msr.ControllerNode(LOCAL)
    await controller.start()
    calls = [controller._native.wait_for_workers(1, None) for _ in range(20)]
asyncio.run(main())
child = os.fork()
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert (status, out, err) == (0, "7\n", "")
    assert seconds < 30


# === the exit of the interpreter ===

EXITS = {
    "calls in flight": """
async def main():
    global calls, controller
    controller = msr.ControllerNode(LOCAL)
    await controller.start()
    calls = [controller._native.wait_for_workers(1, None) for _ in range(200)]
asyncio.run(main())
""",
    "tasks in flight": """
async def main():
    global tasks, controller
    controller = msr.ControllerNode(LOCAL)
    await controller.start()
    tasks = [asyncio.create_task(controller.wait_for_workers(1, timeout=None)) for _ in range(200)]
    await asyncio.sleep(0.05)
asyncio.run(main())
""",
    "threads that wait": """
controller = msr.ControllerNode(LOCAL).__enter__()
for _ in range(20):
    threading.Thread(target=lambda: controller.wait_for_workers_blocking(1, timeout=None), daemon=True).start()
time.sleep(0.1)
""",
    "completions on their way": """
async def main():
    global calls, controller
    controller = msr.ControllerNode(LOCAL)
    await controller.start()
    calls = [controller._native.wait_for_workers(0, None) for _ in range(200)]
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
""",
    "sys.exit in a coroutine": """
async def main():
    async with msr.ControllerNode(LOCAL) as controller:
        controller._native.wait_for_workers(1, None)
        sys.exit(0)
asyncio.run(main())
""",
    "nothing started": """
controller = msr.ControllerNode(LOCAL)
""",
}


@pytest.mark.parametrize("body", EXITS.values(), ids=EXITS.keys())
def test_the_interpreter_exits_fast_and_silently(body: str) -> None:
    for _ in range(3):
        status, out, err, seconds = script(body)
        assert (status, out, err) == (0, "", "")
        assert seconds < 10


def test_nothing_starts_once_the_interpreter_exits() -> None:
    status, out, err, _ = script("""
import atexit
def late():
    try:
        msr.ControllerNode(LOCAL)
    except RuntimeError as error:
        print(error)
controller = msr.ControllerNode(LOCAL)
msr._native.shutdown()
atexit.register(late)
""")
    assert (status, err) == (0, "")
    assert "exiting" in out
