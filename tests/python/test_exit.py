"""How a process with a controller ends, forks, is interrupted, and changes its event loop: never a hang, never noise.

Each case is a program of its own, because it is about the end of one. Fault 40 of spec/reliability.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from cluster import PACKAGES, ROOT
from rawworker import RawWorker, answers

if TYPE_CHECKING:
    from mlx_serving_router.nats_server import NatsServer

#: Seconds after which a program hangs.
HANGS = 30
RUNS = 60

PRELUDE = """
import asyncio, contextlib, os, signal, sys, threading, time
import mlx_serving_router as msr

LOCAL = {"nats": {"mode": "none"}}

async def hello(request):
    yield "Hello"
    yield " there"

async def endless(request):
    while True:
        yield "x"
        await asyncio.sleep(0.001)

async def stuck(request):
    await asyncio.Event().wait()
    yield ""

def ask(**fields):
    return msr.InferenceRequest(model_id="tiny", prompt="Hello", **fields)

def made(*handlers, **settings):
    controller = msr.ControllerNode({**LOCAL, **settings})
    for number, handler in enumerate(handlers):
        controller.add_local_worker(handler, worker_id=f"local-{number}", models=["tiny"])
    return controller

async def all_in_flight(controller, count):
    while controller.cluster_status().to_dict()["requests"]["active"] < count:
        await asyncio.sleep(0.005)

async def read(controller, **options):
    async with await controller.handle_streaming_request(ask(), **options) as stream:
        return "".join([event.text async for event in stream])
"""

#: 200 calls in flight, half of them with tokens that arrive in this very moment.
IN_FLIGHT = """
async def main():
    controller = made(stuck, endless)
    await controller.start()
    for _ in range(100):
        asyncio.ensure_future(controller.handle_buffered_request(ask(), worker_id="local-0"))
        asyncio.ensure_future(read(controller, worker_id="local-1"))
    await all_in_flight(controller, 200)
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-B", "-c", PRELUDE + textwrap.dedent(body)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PACKAGES}


def run(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program(body), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
        env=environment(),
        cwd=ROOT,
    )


def says(body: str, *arguments: str) -> str:
    """The standard output of a program that ends well and without noise."""
    ended = run(body, *arguments)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return ended.stdout


# === the end of the interpreter ===


def many(body: str, *arguments: str, runs: int = RUNS) -> None:
    with ThreadPoolExecutor(max_workers=2) as pool:
        for stdout in pool.map(lambda _: says(body, *arguments), range(runs)):
            assert stdout == "leaving\n"


@pytest.mark.slow
def test_the_interpreter_exits_with_calls_in_flight() -> None:
    many(IN_FLIGHT + "    print('leaving')\nasyncio.run(main())")


@pytest.mark.slow
def test_the_interpreter_exits_from_within_the_loop() -> None:
    many(IN_FLIGHT + "    print('leaving')\n    sys.exit()\nasyncio.run(main())", runs=20)


@pytest.mark.slow
def test_the_interpreter_exits_with_threads_that_wait() -> None:
    body = """
    controller = made(stuck, endless).__enter__()

    def wait():
        with contextlib.suppress(msr.ControllerError):
            controller.generate(ask(), worker_id="local-0") if hash(threading.current_thread()) % 2 else list(
                controller.generate_stream(ask(), worker_id="local-1"))

    for _ in range(20):
        threading.Thread(target=wait, daemon=True).start()
    while controller.cluster_status().to_dict()["requests"]["active"] < 20:
        time.sleep(0.005)
    print("leaving")
    """
    many(textwrap.dedent(body), runs=20)


def test_threads_that_are_left_behind_say_nothing() -> None:
    body = """
    controller = made(stuck, endless).__enter__()
    ends = [
        lambda: controller.generate(ask(), worker_id="local-0"),
        lambda: list(controller.generate_stream(ask(), worker_id="local-0")),
        lambda: list(controller.generate_stream(ask(), worker_id="local-1")),
    ]
    for end in ends:
        threading.Thread(target=end, daemon=True).start()
    while controller.cluster_status().to_dict()["requests"]["active"] < len(ends):
        time.sleep(0.005)
    print("leaving")
    """
    many(textwrap.dedent(body), runs=4)


@pytest.mark.nats
@pytest.mark.slow
async def test_the_interpreter_exits_with_calls_over_nats(nats: NatsServer, nats_prefix: str) -> None:
    body = """
    async def main():
        controller = msr.ControllerNode(
            {"nats": {"mode": "external", "serverUrl": sys.argv[1], "subjectPrefix": sys.argv[2]}})
        await controller.start()
        await controller.wait_for_workers(1, timeout=10)
        for _ in range(100):
            asyncio.ensure_future(controller.handle_buffered_request(ask()))
            asyncio.ensure_future(read(controller))
        await all_in_flight(controller, 200)
        print("leaving")
    asyncio.run(main())
    """
    plan = answers(*["x"] * 20, pause=0.1, streamed=True)
    async with RawWorker(nats.url, prefix=nats_prefix, plan=plan, max_concurrent=100_000) as worker:
        await asyncio.to_thread(many, textwrap.dedent(body), nats.url, nats_prefix, runs=10)
        assert len(worker.jobs) > 10 * 150  # some were on their way when the program left


def test_a_controller_that_was_never_started_is_silent() -> None:
    assert says("controller = made(hello); print(controller.state)") == "idle\n"


def test_a_controller_that_was_never_stopped_is_silent() -> None:
    body = """
    async def main():
        controller = made(hello)
        await controller.start()
        print((await controller.handle_buffered_request(ask())).text)
    asyncio.run(main())
    """
    assert says(body) == "Hello there\n"


# === fork ===


def test_a_controller_from_before_a_fork_is_refused_in_the_child() -> None:
    body = """
    controller = made(hello).__enter__()
    assert controller.generate(ask()).text == "Hello there"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        uses = {
            "buffered": lambda: asyncio.run(controller.handle_buffered_request(ask())),
            "streaming": lambda: asyncio.run(controller.handle_streaming_request(ask())),
            "generate": lambda: controller.generate(ask()),
            "wait": lambda: asyncio.run(controller.wait_for_workers(1, timeout=5)),
        }
        for name, use in uses.items():
            begun = time.monotonic()
            try:
                use()
            except Exception as error:
                print(name, "fork" in str(error), time.monotonic() - begun < 1)
            else:
                print(name, "did not raise")
        with made(hello) as own:
            print(own.generate(ask()).text)
        print("done", flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("child", status)
    print(controller.generate(ask()).text)
    controller.__exit__(None, None, None)
    """
    lines = says("import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(body)).splitlines()
    assert lines == [
        "buffered True True",
        "streaming True True",
        "generate True True",
        "wait True True",
        "Hello there",
        "done",
        "child 0",
        "Hello there",
    ]


def test_a_child_that_only_exits_is_silent() -> None:
    body = """
    import warnings; warnings.simplefilter("ignore")
    controller = made(hello).__enter__()
    controller.generate(ask())
    child = os.fork()
    if child == 0:
        sys.exit(0)  # runs atexit, and drops the controller
    print(os.waitpid(child, 0)[1])
    controller.__exit__(None, None, None)
    """
    assert says(body) == "0\n"


# === event loops ===


def test_one_loop_after_another() -> None:
    body = """
    async def once():
        async with made(hello) as controller:
            return (await controller.handle_buffered_request(ask())).text, await read(controller)
    for _ in range(2):
        print(asyncio.run(once()))
    """
    assert says(body) == "('Hello there', 'Hello there')\n" * 2


def test_one_controller_in_one_loop_after_another() -> None:
    body = """
    controller = made(hello).__enter__()
    async def once():
        print((await controller.handle_buffered_request(ask())).text, await read(controller))
    asyncio.run(once())
    asyncio.run(once())
    asyncio.run(controller.stop(drain_timeout=1))
    print(controller.state)
    """
    assert says(body) == "Hello there Hello there\nHello there Hello there\nstopped\n"


def test_a_handler_ends_with_its_loop() -> None:
    body = """
    controller = made(hello)
    async def begin():
        await controller.start()
        print((await controller.handle_buffered_request(ask())).text)
    asyncio.run(begin())
    try:
        asyncio.run(controller.handle_buffered_request(ask()))
    except msr.ControllerError as error:
        print(error.code.value)
    asyncio.run(controller.stop(drain_timeout=1))
    """
    assert says(body) == "Hello there\nNO_WORKERS_AVAILABLE\n"


def test_a_loop_that_is_closed_with_calls_in_flight() -> None:
    body = """
    import gc
    controller = made(stuck, endless, hello).__enter__()

    def in_a_loop(work):
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(work)
        finally:
            for task in asyncio.all_tasks(loop):
                task._log_destroy_pending = False  # asyncio's own complaint, which is right
            loop.close()

    async def stream():
        # Not `async with`: a coroutine that is thrown away can await nothing in its `__aexit__`.
        async for _ in await controller.handle_streaming_request(ask(), worker_id="local-1"):
            pass

    async def leave():
        for _ in range(50):
            asyncio.ensure_future(controller.handle_buffered_request(ask(), worker_id="local-0"))
            asyncio.ensure_future(stream())
        await all_in_flight(controller, 100)

    async def go_on():
        text = (await controller.handle_buffered_request(ask(), worker_id="local-2")).text
        gc.collect()
        while controller.cluster_status().to_dict()["requests"]["active"]:
            await asyncio.sleep(0.01)
        return text

    in_a_loop(leave())
    print(in_a_loop(go_on()))
    controller.__exit__(None, None, None)
    """
    assert says(body) == "Hello there\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_it_works_in_every_loop(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    body = """
    async def main():
        async with made(hello) as controller:
            texts = await asyncio.gather(*(read(controller) for _ in range(200)))
            answers = await asyncio.gather(*(controller.handle_buffered_request(ask()) for _ in range(200)))
            assert {answer.text for answer in answers} == set(texts) == {"Hello there"}
            task = asyncio.ensure_future(controller.handle_buffered_request(ask(), timeout=0.05))
            print(type(asyncio.get_running_loop()).__module__.partition(".")[0], len(texts), (await task).text)
    if sys.argv[1] == "uvloop":
        import uvloop
        uvloop.run(main())
    else:
        asyncio.run(main())
    """
    assert says(body, loop) == f"{loop} 200 Hello there\n"


def test_controllers_in_the_loops_of_several_threads() -> None:
    body = """
    def work():
        async def main():
            async with made(hello) as controller:
                for _ in range(50):
                    assert await read(controller) == "Hello there"
        asyncio.run(main())
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("done")
    """
    assert says(body) == "done\n"


def test_one_controller_in_the_loops_of_several_threads() -> None:
    body = """
    with made(hello) as controller:
        async def main():
            for _ in range(25):
                assert await read(controller) == "Hello there"
                assert (await controller.handle_buffered_request(ask())).text == "Hello there"
        threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(controller.cluster_status().to_dict()["requests"])
    """
    assert says(body) == "{'active': 0, 'queued': 0, 'completed': 200}\n"


def test_two_controllers_in_one_process() -> None:
    body = """
    async def main():
        first, second = made(hello), made(hello)
        async with second:
            async with first:
                await asyncio.gather(*(c.handle_buffered_request(ask(request_id="same")) for c in (first, second)))
                ids = {c.cluster_status().to_dict()["controllerId"] for c in (first, second)}
                print(len(ids), first.state, second.state)
            print(first.state, second.state, (await second.handle_buffered_request(ask())).text)
            try:
                await first.handle_buffered_request(ask())
            except msr.ControllerError as error:
                print(error.code.value)
    asyncio.run(main())
    """
    assert says(body) == "2 ready ready\nstopped ready Hello there\nCONTROLLER_NOT_READY\n"


# === Ctrl-C ===


def interrupted(body: str) -> tuple[str, float]:
    """What a program says after SIGINT, which it gets once it has said "waiting"; and how long it took to end."""
    child = subprocess.Popen(
        program(body),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n", child.communicate()
        time.sleep(0.2)  # it says so right before it waits
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=HANGS)
        assert (child.returncode, errors) == (0, "")
        return output, time.monotonic() - sent
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "wait",
    [
        "controller.generate(ask())",
        "list(controller.generate_stream(ask()))",
        "asyncio.run(controller.handle_buffered_request(ask()))",
        "asyncio.run(controller.wait_for_workers(5, timeout=60))",
    ],
)
def test_ctrl_c_ends_a_wait(wait: str) -> None:
    body = f"""
    with made(stuck) as controller:
        try:
            print("waiting", flush=True)
            {wait}
        except KeyboardInterrupt:
            deadline = time.monotonic() + 1
            while controller.cluster_status().to_dict()["requests"]["active"] and time.monotonic() < deadline:
                time.sleep(0.01)
            print("interrupted", controller.cluster_status().to_dict()["requests"]["active"])
    """
    output, seconds = interrupted(body)
    assert output == "interrupted 0\n"
    assert seconds < 3


def test_ctrl_c_between_tokens() -> None:
    body = """
    with made(endless) as controller:
        try:
            print("waiting", flush=True)
            for _ in controller.generate_stream(ask()):
                pass
        except KeyboardInterrupt:
            print("interrupted")
    """
    output, seconds = interrupted(body)
    assert output == "interrupted\n"
    assert seconds < 3
