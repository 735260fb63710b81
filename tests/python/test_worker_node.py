"""`WorkerNode` over a real nats-server, with nats-py in the place of the controller; local workers of a controller."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import nats as nats_py
import pytest

from mlx_serving_router import (
    ControllerError,
    ControllerNode,
    Finish,
    InferenceRequest,
    TokenEvent,
    Usage,
    WorkerNode,
)
from rawcontroller import PATIENCE, Fleet, heard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from mlx_serving_router.engine import JobQueue
    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats


@pytest.fixture
async def fleet(nats: NatsServer, nats_prefix: str) -> AsyncIterator[Fleet]:
    client = await nats_py.connect(nats.url)
    yield Fleet(client, nats.url, nats_prefix)
    await client.close()


class Echo:
    """An engine that says the prompt's words; `slow` says one word again and again until it is stopped."""

    models = ("echo",)

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.let_go = threading.Event()
        self.failure: BaseException | None = None

    def run(self, jobs: JobQueue) -> None:
        self.threads.append(threading.get_ident())
        if self.failure is not None:
            raise self.failure
        jobs.report("ready", loaded_models=self.models)
        while (job := jobs.get()) is not None:
            words = (job.request.prompt or "").split()
            if words == ["slow"]:
                while not job.cancelled:
                    job.token("slow ", [0])
                    time.sleep(0.002)
                self.let_go.set()
                continue
            if words == ["fail"]:
                raise RuntimeError("out of memory")
            for number, word in enumerate(words):
                job.token(word + " ", [number])
            job.done("length", prompt_tokens=len(words), cached_tokens=1)


class Terse:
    """An engine that reports nothing."""

    models = ("terse",)

    def run(self, jobs: JobQueue) -> None:
        while (job := jobs.get()) is not None:
            job.token("so")
            job.done("stop")


async def echo(request: InferenceRequest) -> AsyncIterator[str | TokenEvent]:
    for number, word in enumerate((request.prompt or "").split()):
        yield TokenEvent(word, token_ids=[number])
        yield " "


# === engines ===


async def test_an_engine_that_waits_for_work_is_ready() -> None:
    async with ControllerNode({"nats": {"mode": "none"}}) as controller:
        controller.add_local_worker(Terse(), models=["terse"])
        request = InferenceRequest(model_id="terse", prompt="x")
        assert (await controller.handle_buffered_request(request)).text == "so"


async def test_an_engine_answers_in_the_order_of_the_wire(fleet: Fleet) -> None:
    engine = Echo()
    registrations = await fleet.listen("worker.register")
    async with WorkerNode(engine, config=fleet.config(), worker_id="w") as worker:
        assert (worker.state, worker.worker_id, worker.models) == ("ready", "w", ["echo"])
        registration = await heard(registrations)
        assert registration["incarnation"] == worker.incarnation
        assert registration["capacity"]["maxConcurrent"] == 1
        messages = await (await fleet.ask("w")).rest()
        assert messages[0] == {"requestId": "r-1", "type": "accepted", "queuePosition": 0}
        tokens = [message for message in messages if message["type"] == "token"]
        assert "".join(token["token"] for token in tokens) == "a b c "
        assert [token_id for token in tokens for token_id in token["tokenIds"]] == [0, 1, 2]
        index = 0
        for token in tokens:
            assert token["index"] == index
            index += len(token["tokenIds"])
        done = messages[-1]
        assert (done["type"], done["finishReason"], done["totalTokens"]) == ("done", "length", 3)
        assert done["usage"] == {"promptTokens": 3, "completionTokens": 3, "cachedTokens": 1}
        assert done["latencyMs"] > 0

        buffered = await (await fleet.ask("w", stream=False)).rest()
        assert [message["type"] for message in buffered] == ["accepted", "response"]
        assert (buffered[1]["text"], buffered[1]["usage"]["completionTokens"]) == ("a b c ", 3)
    assert worker.state == "stopped"
    assert engine.threads[0] != threading.get_ident()


async def test_an_engine_says_what_it_can_do_and_how_much_at_a_time(fleet: Fleet) -> None:
    class Several(Echo):
        max_concurrent = 3
        features = ("resume", "batch")

    registrations = await fleet.listen("worker.register")
    async with WorkerNode(Several(), config=fleet.config(), worker_id="w"):
        registration = await heard(registrations)
        assert registration["capacity"]["maxConcurrent"] == 3
        assert set(registration["features"]) == {"resume", "batch", "cancel"}
    async with WorkerNode(Several(), config=fleet.config(), worker_id="w", max_concurrent=2):
        assert (await heard(registrations))["capacity"]["maxConcurrent"] == 2


async def test_an_engine_delivers_pieces_of_several_jobs_together(fleet: Fleet) -> None:
    class Together(Echo):
        max_concurrent = 3

        def run(self, jobs: JobQueue) -> None:
            jobs.report("ready", loaded_models=self.models)
            taken = [jobs.get() for _ in range(3)]
            entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
            for number in range(3):
                jobs.deliver([(job, f"{number} ", [number], {"content": [entry]}) for job in taken])
            for job in taken:
                assert job is not None
                job.done()
            jobs.deliver([(job, "late", [4], None) for job in taken])
            jobs.deliver([])
            assert jobs.get() is None

    async with WorkerNode(Together(), config=fleet.config(), worker_id="w"):
        asked = [await fleet.ask("w") for _ in range(3)]
        for answers in asked:
            _, *tokens, done = await answers.rest()
            assert "".join(token["token"] for token in tokens) == "0 1 2 "
            assert [token["index"] for token in tokens] == [0, 1, 2]
            assert tokens[0]["logprobs"]["content"][0]["token"] == "a"
            assert done["totalTokens"] == 3


async def test_an_engine_tells_log_probabilities_and_what_it_holds(fleet: Fleet) -> None:
    class Telling(Echo):
        def run(self, jobs: JobQueue) -> None:
            jobs.report("ready", loaded_models=self.models)
            with pytest.raises(ValueError, match="sixteen"):
                jobs.report("ready", cached_prefixes=["short"])
            while (job := jobs.get()) is not None:
                entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
                job.token("a", [1], logprobs={"content": [entry]})
                jobs.report("ready", loaded_models=self.models, cached_prefixes=["0123456789abcdef"])
                job.done()
                jobs.report("ready", loaded_models=self.models)

    heartbeats = await fleet.listen("worker.heartbeat")
    async with WorkerNode(Telling(), config=fleet.config(heartbeat_interval_ms=100), worker_id="w"):
        assert (await heard(heartbeats))["cachedPrefixes"] == []
        _, token, _ = await (await fleet.ask("w")).rest()
        assert token["logprobs"]["content"][0]["logprob"] == -0.5
        buffered = (await (await fleet.ask("w", stream=False)).rest())[-1]
        assert buffered["logprobs"] == token["logprobs"]
        while (heartbeat := await heard(heartbeats))["cachedPrefixes"] == []:
            pass
        assert heartbeat["cachedPrefixes"] == ["0123456789abcdef"]


async def test_a_cancellation_stops_the_engine_and_frees_its_place(fleet: Fleet) -> None:
    engine = Echo()
    async with WorkerNode(engine, config=fleet.config(), worker_id="w", max_queue=1):
        slow = await fleet.ask("w", prompt="slow")
        assert (await slow.next())["type"] == "accepted"
        assert (await slow.next())["type"] == "token"
        waiting = await fleet.ask("w")
        assert (await waiting.next())["type"] == "accepted"
        refused = (await (await fleet.ask("w")).rest())[-1]
        assert (refused["type"], refused["code"]) == ("error", "WORKER_OVERLOADED")
        assert refused["retryAfterMs"] > 0
        await fleet.say("cancel.w", {"requestId": slow.request_id, "attempt": 1})
        assert (await slow.rest())[-1]["code"] == "CANCELLED"
        assert (await waiting.rest())[-1]["type"] == "done"
        assert engine.let_go.wait(PATIENCE)


async def test_a_deadline_stops_the_engine(fleet: Fleet) -> None:
    async with WorkerNode(Echo(), config=fleet.config(), worker_id="w"):
        late = (await (await fleet.ask("w", prompt="slow", timeout_ms=50)).rest())[-1]
        assert late["code"] == "WORKER_TIMEOUT"
        assert (await (await fleet.ask("w")).rest())[-1]["type"] == "done"


async def test_an_unknown_model_and_a_bad_body_are_answered(fleet: Fleet) -> None:
    async with WorkerNode(Echo(), config=fleet.config(), worker_id="w"):
        assert (await (await fleet.ask("w", modelId="huge")).rest())[-1]["code"] == "MODEL_NOT_FOUND"
        answer = await fleet.client.request(f"{fleet.prefix}inference.w", b"nonsense", timeout=PATIENCE)
        assert json.loads(answer.data)["code"] == "REQUEST_VALIDATION_FAILED"


async def test_a_drain_lets_running_requests_finish(fleet: Fleet) -> None:
    deregistrations = await fleet.listen("worker.deregister")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(_: InferenceRequest) -> AsyncIterator[str]:
        begun.set()
        await go_on.wait()
        yield "done"

    worker = WorkerNode(handler, config=fleet.config(), worker_id="w", models=["echo"])
    await worker.start()
    running = await fleet.ask("w")
    await begun.wait()
    stopping = asyncio.create_task(worker.stop())
    assert (await heard(deregistrations))["workerId"] == "w"
    late = (await (await fleet.ask("w")).rest())[-1]
    assert late["code"] == "WORKER_OVERLOADED"
    go_on.set()
    assert [message["type"] for message in await running.rest()] == ["accepted", "token", "done"]
    await stopping
    await worker.wait()
    await worker.stop()


async def test_the_engines_failure_before_it_is_ready_is_what_start_raises(fleet: Fleet) -> None:
    engine = Echo()
    engine.failure = FileNotFoundError("no such model")
    worker = WorkerNode(engine, config=fleet.config())
    with pytest.raises(FileNotFoundError, match="no such model"):
        await worker.start()
    assert worker.state == "stopped"
    with pytest.raises(ControllerError, match="starts once"):
        await worker.start()


async def test_the_engines_failure_afterwards_ends_the_worker(fleet: Fleet) -> None:
    worker = WorkerNode(Echo(), config=fleet.config(), worker_id="w")
    await worker.start()
    assert (await (await fleet.ask("w", prompt="fail")).rest())[-1]["code"] == "WORKER_UNAVAILABLE"
    with pytest.raises(ControllerError, match="out of memory") as caught:
        await worker.wait()
    assert isinstance(caught.value.__cause__, RuntimeError)
    await worker.stop()


# === handlers ===


async def test_a_handler_answers_many_at_once_in_the_loop_that_started_it(fleet: Fleet) -> None:
    running = 0
    all_here = asyncio.Event()

    async def handler(request: InferenceRequest) -> AsyncIterator[str | TokenEvent]:
        nonlocal running
        running += 1
        if running == 20:
            all_here.set()
        await all_here.wait()
        async for piece in echo(request):
            yield piece

    async with WorkerNode(handler, config=fleet.config(), worker_id="w", models=["echo"]):
        asked = [await fleet.ask("w", stream=False) for _ in range(20)]
        for answers in asked:
            end = (await answers.rest())[-1]
            assert (end["text"], end["usage"]["completionTokens"]) == ("a b c ", 6)


async def test_what_a_handler_raises_ends_its_request_alone(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: InferenceRequest) -> AsyncIterator[str]:
        yield "x"
        if request.prompt == "refuse":
            raise ControllerError("WORKER_OVERLOADED", "busy", context={"retry_after_ms": 70})
        raise KeyError(request.prompt)

    async with WorkerNode(handler, config=fleet.config(), worker_id="w", models=["echo"]):
        refused = (await (await fleet.ask("w", prompt="refuse")).rest())[-1]
        assert (refused["code"], refused["error"], refused["retryAfterMs"]) == (
            "WORKER_OVERLOADED",
            "busy",
            70,
        )
        failed = (await (await fleet.ask("w", prompt="a secret")).rest())[-1]
        assert failed["code"] == "WORKER_UNAVAILABLE"
        assert "KeyError" in failed["error"]
        assert "secret" not in failed["error"]
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_handler_may_say_how_its_answer_ends(fleet: Fleet) -> None:
    closed = asyncio.Event()
    call = {"id": "c-1", "type": "function", "function": {"name": "time", "arguments": "{}"}}

    async def handler(request: InferenceRequest) -> AsyncIterator[str | Finish]:
        try:
            yield "x"
            if request.prompt == "counted":
                yield Finish(reason="length")
            yield Finish(reason="tool_calls", usage=Usage(7, 2, 3), tool_calls=[call])
            yield "never read"
        finally:
            closed.set()

    async with WorkerNode(handler, config=fleet.config(), worker_id="w", models=["echo"]):
        *pieces, done = await (await fleet.ask("w")).rest()
        assert [piece.get("token") for piece in pieces] == [None, "x"]
        assert (done["finishReason"], done["toolCalls"]) == ("tool_calls", [call])
        assert done["usage"] == {"promptTokens": 7, "completionTokens": 2, "cachedTokens": 3}
        assert closed.is_set()
        counted = (await (await fleet.ask("w", prompt="counted", stream=False)).rest())[-1]
        assert (counted["text"], counted["finishReason"]) == ("x", "length")
        assert counted["usage"] == {"promptTokens": 0, "completionTokens": 1, "cachedTokens": 0}


async def test_a_cancellation_cancels_the_handlers_task(fleet: Fleet) -> None:
    closed = asyncio.Event()

    async def handler(_: InferenceRequest) -> AsyncIterator[str]:
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with WorkerNode(handler, config=fleet.config(), worker_id="w", models=["echo"]):
        answers = await fleet.ask("w")
        assert [(await answers.next())["type"] for _ in range(2)] == ["accepted", "token"]
        await fleet.say("cancel.w", {"requestId": answers.request_id, "attempt": 1})
        assert (await answers.next())["code"] == "CANCELLED"
        await asyncio.wait_for(closed.wait(), PATIENCE)


# === the fleet ===


async def test_hello_and_reregister_are_answered(fleet: Fleet) -> None:
    registrations = await fleet.listen("worker.register")
    async with WorkerNode(echo, config=fleet.config(), worker_id="w", models=["echo"]) as worker:
        await heard(registrations)
        await fleet.say("worker.w.reregister")
        assert (await heard(registrations))["incarnation"] == worker.incarnation
        await fleet.say(
            "controller.hello", {"controllerId": "c", "heartbeatIntervalMs": 5000, "timestamp": 1}
        )
        assert (await heard(registrations))["incarnation"] == worker.incarnation
        assert worker.state == "ready"


def test_what_cannot_be_a_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        WorkerNode(echo, worker_id="a.b", models=["echo"])
    with pytest.raises(TypeError, match="models"):
        WorkerNode(echo)
    with pytest.raises(ValueError, match="models"):
        WorkerNode(echo, models=[])
    with pytest.raises(TypeError, match="async generator"):
        WorkerNode(object(), models=["echo"])  # type: ignore[arg-type]
    assert WorkerNode(echo, models=["echo"]).worker_id != WorkerNode(echo, models=["echo"]).worker_id


async def test_without_nats_there_is_no_worker_of_its_own_process() -> None:
    worker = WorkerNode(echo, config={"nats": {"mode": "none"}}, models=["echo"])
    with pytest.raises(ControllerError, match=r"nats\.mode is none"):
        await worker.start()
    worker = WorkerNode(echo, config={"nats": {"embedded": {"port": 0}}}, models=["echo"])
    with pytest.raises(ControllerError, match=r"nats\.embedded\.port"):
        await worker.start()
    assert repr(worker) == f"<WorkerNode '{worker.worker_id}' stopped>"


# === whole processes ===

PROCESS = """
import signal, sys, time
from mlx_serving_router import ClusterConfig, WorkerNode

class Engine:
    models = ("echo",)

    def run(self, jobs):
        jobs.report("ready", loaded_models=self.models)
        while (job := jobs.get()) is not None:
            if job.request.prompt == "hold":
                job.token("x", [1])
                sum(range(200_000_000))  # one call in C that keeps the interpreter
            while job.request.prompt == "wait" and not job.cancelled:
                job.token("x", [1])
                time.sleep(0.005)
            job.done()
        print("engine ended", flush=True)

config = ClusterConfig.from_dict({
    "nats": {"mode": "external", "serverUrl": sys.argv[1], "subjectPrefix": sys.argv[2]},
    "discovery": {"heartbeatIntervalMs": 200},
})
worker = WorkerNode(Engine(), config=config, worker_id="w")
"""


@pytest.fixture
def start_process(fleet: Fleet, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(rest: str) -> subprocess.Popen[str]:
        script = tmp_path / "worker.py"
        script.write_text(PROCESS + textwrap.dedent(rest))
        command = [sys.executable, "-X", "faulthandler", script, fleet.url, fleet.prefix]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=dict(os.environ)
        )
        started.append(process)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = await asyncio.to_thread(process.communicate, timeout=PATIENCE)
    return process.returncode, out, errors


async def test_heartbeats_go_on_while_the_engine_holds_the_interpreter(
    fleet: Fleet, start_process: Any
) -> None:
    heartbeats = await fleet.listen("worker.heartbeat")
    start_process("worker.run()")
    await heard(heartbeats)
    answers = await fleet.ask("w", prompt="hold")
    while (await answers.next())["type"] != "token":
        pass
    held = asyncio.create_task(answers.rest())
    meanwhile = 0
    while not held.done():
        heartbeat = await heard(heartbeats)
        if not held.done():
            assert heartbeat["activeRequestIds"] == [answers.request_id]
            meanwhile += 1
    # It is held for a second and more, which is five heartbeats: had they needed it, none would have come.
    assert meanwhile >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_a_worker_process(
    fleet: Fleet, start_process: Any, number: signal.Signals
) -> None:
    heartbeats = await fleet.listen("worker.heartbeat")
    deregistrations = await fleet.listen("worker.deregister")
    process = start_process("worker.run()\nprint('stopped', worker.state)")
    await heard(heartbeats)
    running = await fleet.ask("w", prompt="wait")
    assert (await running.next())["type"] == "accepted"
    process.send_signal(number)
    await heard(deregistrations)
    assert (await (await fleet.ask("w")).rest())[-1]["code"] == "WORKER_OVERLOADED"
    assert process.poll() is None
    process.send_signal(number)
    assert (await running.rest())[-1]["code"] == "WORKER_UNAVAILABLE"
    assert await ended(process) == (0, "engine ended\nstopped stopped\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_worker_process_at_once(
    fleet: Fleet, start_process: Any, number: signal.Signals
) -> None:
    heartbeats = await fleet.listen("worker.heartbeat")
    process = start_process("worker.run()")
    await heard(heartbeats)
    process.send_signal(number)
    assert await ended(process) == (0, "engine ended\n", "")


async def test_the_interpreter_exits_with_a_running_engine(fleet: Fleet, start_process: Any) -> None:
    heartbeats = await fleet.listen("worker.heartbeat")
    process = start_process("import asyncio\nasyncio.run(worker.start())\nsys.stdin.readline()")
    await heard(heartbeats)
    running = await fleet.ask("w", prompt="wait")
    assert (await running.next())["type"] == "accepted"
    assert (await running.next())["type"] == "token"
    process.stdin.write("\n")
    process.stdin.flush()
    assert (await running.rest())[-1]["code"] == "WORKER_UNAVAILABLE"
    assert await ended(process) == (0, "engine ended\n", "")


# === local workers ===


def local_controller() -> ControllerNode:
    return ControllerNode({"nats": {"mode": "none"}})


def ask(prompt: str = "a b c") -> InferenceRequest:
    return InferenceRequest(model_id="echo", prompt=prompt)


async def test_a_local_worker_added_before_the_start_runs_in_the_controllers_loop() -> None:
    loops = []

    async def handler(request: InferenceRequest) -> AsyncIterator[str | TokenEvent]:
        loops.append(asyncio.get_running_loop())
        async for piece in echo(request):
            yield piece

    controller = local_controller()
    name = controller.add_local_worker(handler, worker_id="local", models=["echo"])
    async with controller:
        response = await controller.handle_buffered_request(ask())
        assert (name, response.worker_id, response.text) == ("local", "local", "a b c ")
        stream = await controller.handle_streaming_request(ask())
        async with stream:
            assert [event.text async for event in stream] == ["a", " ", "b", " ", "c", " "]
        with pytest.raises(ValueError, match="local"):
            controller.add_local_worker(handler, worker_id="local", models=["echo"])
    assert set(loops) == {asyncio.get_running_loop()}


def test_a_local_worker_of_a_blocking_controller_has_a_loop_of_its_own() -> None:
    controller = local_controller()
    controller.add_local_worker(echo, models=["echo"])
    with controller:
        assert controller.generate(ask()).text == "a b c "
        controller.add_local_worker(echo, worker_id="later", models=["echo"])
        assert controller.generate(ask("d"), worker_id="later").text == "d "
        with controller.generate_stream(ask()) as stream:
            assert "".join(event.text for event in stream) == "a b c "


async def test_leaving_a_stream_cancels_the_local_handler() -> None:
    closed = asyncio.Event()

    async def endless(_: InferenceRequest) -> AsyncIterator[str]:
        try:
            while True:
                yield "x"
        finally:
            closed.set()

    async with local_controller() as controller:
        controller.add_local_worker(endless, models=["echo"])
        stream = await controller.handle_streaming_request(ask())
        async with stream:
            async for _ in stream:
                break
        await asyncio.wait_for(closed.wait(), PATIENCE)


def test_an_engine_can_be_a_local_worker() -> None:
    with local_controller() as controller:
        controller.add_local_worker(Echo(), models=["echo"])  # type: ignore[arg-type]
        assert controller.generate(ask()).usage.prompt_tokens == 3
