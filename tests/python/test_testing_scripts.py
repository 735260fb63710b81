"""Every script before a real controller, over NATS and in one process: its caller meets what the contract says."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest

from cluster import failure, merged, received, until
from mlx_serving_router import CircuitState, ControllerError, InferenceRequest, Usage, testing
from mlx_serving_router.testing import (
    ANSWER,
    TestCluster,
    answer,
    babble,
    die,
    every,
    fail,
    refuse,
    say,
    stall,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving_router import InferenceResponse, TokenStream

Transport: TypeAlias = Literal["nats", "local"]

#: One attempt, so that each test meets the error of its worker itself, after limits that a test can wait for.
ONCE: dict[str, Any] = {
    "requestRouting": {
        "acceptTimeoutMs": 600,
        "timeoutMs": 1200,
        "streamingTimeoutMs": 900,
        "streamIdleTimeoutMs": 500,
        "retry": {"enabled": False},
        "circuitBreaker": {"enabled": False},
    }
}
#: The same with attempts elsewhere.
RETRY: dict[str, Any] = merged(ONCE, {"requestRouting": {"retry": {"enabled": True}}})


@pytest.fixture(params=["local", pytest.param("nats", marks=pytest.mark.nats)])
def transport(request: pytest.FixtureRequest) -> Transport:
    return request.param  # type: ignore[no-any-return]


def ask(**fields: Any) -> InferenceRequest:
    return InferenceRequest(model_id="tiny", prompt="a secret", **fields)


async def buffered(cluster: TestCluster, **fields: Any) -> InferenceResponse:
    return await cluster.controller.handle_buffered_request(ask(**fields))


async def streaming(cluster: TestCluster, **fields: Any) -> TokenStream:
    return await cluster.controller.handle_streaming_request(ask(**fields))


async def streamed(cluster: TestCluster) -> tuple[str, ControllerError | None]:
    """What a stream gave, and the error that it ended with, be it before its first token."""
    try:
        stream = await streaming(cluster)
    except ControllerError as error:
        return "", error
    return await received(stream)


# === one request ===


async def test_an_answer_comes_in_tokens_or_in_one_piece(transport: Transport) -> None:
    async with TestCluster(1, transport=transport) as cluster:
        assert await streamed(cluster) == (ANSWER, None)
        response = await buffered(cluster)
        assert (response.text, response.finish_reason, response.worker_id) == (ANSWER, "stop", "worker-0")
        assert response.usage == Usage(prompt_tokens=4, completion_tokens=4, cached_tokens=0)
        cluster.workers[0].script = answer(
            "one", " two", finish_reason="length", prompt_tokens=9, cached_tokens=3
        )
        response = await buffered(cluster)
        assert (response.text, response.finish_reason) == ("one two", "length")
        assert response.usage == Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=3)
        cluster.workers[0].script = answer("one", " two", streamed=True)
        assert (await buffered(cluster)).text == "one two"


async def test_an_answer_may_call_tools(transport: Transport) -> None:
    calls = [{"id": "c-1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    async with TestCluster(
        1, transport=transport, script=answer("", finish_reason="tool_calls", tool_calls=calls)
    ) as cluster:
        response = await buffered(cluster)
        assert (response.finish_reason, response.tool_calls) == ("tool_calls", calls)


async def test_a_slow_answer_takes_its_time_however_it_comes(transport: Transport) -> None:
    slow = answer("a", "b", "c", delay_ms=100, token_delay_ms=50)
    async with TestCluster(1, transport=transport, script=slow) as cluster:
        begun = time.monotonic()
        stream = await streaming(cluster)
        first = time.monotonic() - begun
        assert await received(stream) == ("abc", None)
        assert first >= 0.1
        assert time.monotonic() - begun >= 0.2
        begun = time.monotonic()
        assert (await buffered(cluster)).text == "abc"
        assert time.monotonic() - begun >= 0.2


@pytest.mark.parametrize(
    ("script", "text", "code", "limit"),
    [
        (stall(), "", "WORKER_TIMEOUT", "first_token"),
        (stall(accept=False), "", "WORKER_TIMEOUT", "accept"),
        (stall(after_tokens=3), "Hello, wor", "STREAM_INTERRUPTED", "idle"),
    ],
    ids=repr,
)
async def test_a_stall_meets_the_limit_of_its_place_and_is_cancelled(
    transport: Transport, script: testing.Script, text: str, code: str, limit: str
) -> None:
    async with TestCluster(1, transport=transport, script=script, config=ONCE) as cluster:
        got, error = await streamed(cluster)
        assert error is not None
        assert (got, error.code, error.context["limit"]) == (text, code, limit)
        [worker] = cluster.workers
        [cancel] = await worker.wait_for_cancels(1)
        assert (cancel.request_id, cancel.attempt) == (worker.requests[0].request_id, 1)
        await worker.wait_until_idle()
        assert worker.in_flight == 0


async def test_a_buffered_stall_meets_its_limit(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, script=stall(after_tokens=2), config=ONCE) as cluster:
        error = await failure(buffered(cluster))
        assert (error.code, isinstance(error, TimeoutError)) == ("WORKER_TIMEOUT", True)
        await cluster.workers[0].wait_for_cancels(1)


@pytest.mark.parametrize(
    ("script", "text", "code"),
    [
        (fail(), "", "WORKER_UNAVAILABLE"),
        (fail(None), "", "WORKER_UNAVAILABLE"),
        (fail("NEVER_HEARD_OF"), "", "WORKER_UNAVAILABLE"),
        (fail("MODEL_LOAD_FAILED", accept=False), "", "MODEL_LOAD_FAILED"),
        (fail("REQUEST_VALIDATION_FAILED", "too long"), "", "REQUEST_VALIDATION_FAILED"),
        (fail("QUEUE_FULL"), "", "WORKER_OVERLOADED"),
        (fail(after_tokens=2), "Hello", "STREAM_INTERRUPTED"),
        (refuse(), "", "WORKER_OVERLOADED"),
    ],
    ids=repr,
)
async def test_a_failure_has_its_code(
    transport: Transport, script: testing.Script, text: str, code: str
) -> None:
    async with TestCluster(1, transport=transport, script=script, config=ONCE) as cluster:
        got, error = await streamed(cluster)
        assert error is not None
        assert (got, error.code) == (text, code)
        assert cluster.workers[0].cancel_count == 0


@pytest.mark.parametrize("how", ["malformed", "duplicate", "reordered", "missing"])
async def test_babble_breaks_the_protocol(
    transport: Transport, how: Literal["malformed", "duplicate", "reordered", "missing"]
) -> None:
    async with TestCluster(1, transport=transport, config=ONCE) as cluster:
        [worker] = cluster.workers
        if how != "duplicate":
            worker.script = babble(how, after_tokens=0)
            got, error = await streamed(cluster)
            assert error is not None
            assert (got, error.code) == ("", "WORKER_UNAVAILABLE")
            assert "protocol_error" in error.context
        worker.script = babble(how, after_tokens=2)
        got, error = await streamed(cluster)
        assert error is not None
        assert (got, error.code) == ("Hello", "STREAM_INTERRUPTED")


async def test_messages_of_ones_own_are_said_as_they_are(transport: Transport) -> None:
    token = {"type": "token", "token": "a", "index": 0}
    done = {"type": "done", "finishReason": "stop"}
    async with TestCluster(1, transport=transport, config=ONCE) as cluster:
        [worker] = cluster.workers
        worker.script = say(token, done, done, token)
        assert await streamed(cluster) == ("a", None)
        for nonsense in ("nonsense", b"\xff\x00", {"type": "song"}, {**token, "index": "zero"}):
            worker.script = say(nonsense)
            error = await failure(buffered(cluster))
            assert (error.code, "protocol_error" in error.context) == ("WORKER_UNAVAILABLE", True), nonsense


# === one after the other ===


async def test_each_nth_request_fails(transport: Transport) -> None:
    script = every(3, fail("MODEL_LOAD_FAILED"))
    async with TestCluster(1, transport=transport, script=script, config=ONCE) as cluster:
        codes = [await outcome(cluster) for _ in range(6)]
        assert codes == ["ok", "ok", "MODEL_LOAD_FAILED"] * 2


async def test_scripts_follow_each_other(transport: Transport) -> None:
    script = refuse().times(2).then(fail()).then(answer())
    async with TestCluster(1, transport=transport, script=script, config=ONCE) as cluster:
        codes = [await outcome(cluster) for _ in range(5)]
        assert codes == ["WORKER_OVERLOADED"] * 2 + ["WORKER_UNAVAILABLE", "ok", "ok"]
        [worker] = cluster.workers
        worker.script = script  # from its beginning
        assert await outcome(cluster) == "WORKER_OVERLOADED"
        assert worker.script == refuse().times(2).then(fail()).then(answer())


async def outcome(cluster: TestCluster) -> str:
    try:
        await buffered(cluster)
    except ControllerError as error:
        return str(error.code)
    return "ok"


async def test_each_worker_counts_its_own_requests(transport: Transport) -> None:
    routing = {"loadBalancing": {"strategy": "round_robin"}}
    script = fail().then(answer())
    async with TestCluster(2, transport=transport, script=script, config={**ONCE, **routing}) as cluster:
        assert [await outcome(cluster) for _ in range(4)] == ["WORKER_UNAVAILABLE"] * 2 + ["ok"] * 2


async def test_retry_after_holds_one_worker_back(transport: Transport) -> None:
    async with TestCluster(2, transport=transport, config=RETRY) as cluster:
        for worker in cluster.workers:
            worker.script = refuse(retry_after_ms=500).then(answer())
        cluster.workers[1].script = answer()
        for _ in range(6):
            assert (await buffered(cluster)).worker_id == "worker-1"
        assert cluster.workers[0].request_count == 1
        cluster.workers[1].script = refuse(retry_after_ms=-1)
        cluster.workers[0].script = refuse(retry_after_ms=-1)
        error = await failure(buffered(cluster))
        assert (error.code, error.context["retry_after_ms"], len(error.context["attempts"])) == (
            "WORKER_OVERLOADED",
            -1,
            1,
        )


async def test_breakers_open_for_a_worker_that_fails_and_close_again(transport: Transport) -> None:
    breaker = {"failureThreshold": 2, "successThreshold": 1, "timeoutMs": 100}
    config = {"requestRouting": {"circuitBreaker": breaker, "retry": {"enabled": False}}}
    async with TestCluster(1, transport=transport, config=config, script=fail()) as cluster:
        for _ in range(2):
            await failure(buffered(cluster))
        assert breaker_of(cluster) is CircuitState.OPEN
        assert (await failure(buffered(cluster))).code == "NO_HEALTHY_WORKERS"
        cluster.workers[0].script = answer()
        await until(lambda: breaker_of(cluster) is CircuitState.HALF_OPEN, "half-open")
        assert (await buffered(cluster)).text == ANSWER
        assert breaker_of(cluster) is CircuitState.CLOSED


def breaker_of(cluster: TestCluster) -> CircuitState:
    [worker] = cluster.controller.workers()
    return worker.breaker


# === the worker itself ===


@pytest.mark.parametrize("after_tokens", [0, 2])
async def test_who_dies_is_replaced_or_missed(transport: Transport, after_tokens: int) -> None:
    patient = merged(RETRY, {"requestRouting": {"acceptTimeoutMs": 5000, "timeoutMs": 5000}})
    async with TestCluster(2, transport=transport, config=patient) as cluster:
        for worker in cluster.workers:
            worker.script = die(after_tokens=after_tokens)
        cluster.workers[1].script = answer()
        results = [await streamed(cluster) for _ in range(2)]
        dead = cluster.workers[0]
        assert (dead.state, dead.request_count, dead.in_flight) == ("dead", 1, 0)
        ends = sorted(str(error.code) if error else text for text, error in results)
        assert ends == ([ANSWER, ANSWER] if after_tokens == 0 else [ANSWER, "STREAM_INTERRUPTED"])
        # Nobody listens: no time is lost with it.
        begun = time.monotonic()
        for _ in range(4):
            assert (await buffered(cluster)).worker_id == "worker-1"
        assert time.monotonic() - begun < 3


async def test_who_dies_leaves_its_requests_unanswered(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, config=ONCE, script=die()) as cluster:
        got, error = await streamed(cluster)
        assert error is not None
        assert (got, error.code) == ("", "WORKER_TIMEOUT" if transport == "nats" else "WORKER_OFFLINE")


async def test_an_answer_that_ends_without_an_end_is_silence(transport: Transport) -> None:
    accepted = say({"type": "accepted"})
    async with TestCluster(1, transport=transport, config=ONCE, script=accepted) as cluster:
        _, error = await streamed(cluster)
        assert error is not None
        assert (error.code, error.context["limit"]) == ("WORKER_TIMEOUT", "first_token")
        assert cluster.workers[0].in_flight == 0


async def test_who_restarts_is_another_incarnation_with_the_same_script(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, config=ONCE, script=fail().then(answer())) as cluster:
        [worker] = cluster.workers
        before = worker.incarnation
        assert await outcome(cluster) == "WORKER_UNAVAILABLE"
        worker.die()
        assert worker.state == "dead"
        error = await failure(buffered(cluster))
        assert error.code == ("WORKER_UNAVAILABLE" if transport == "nats" else "NO_WORKERS_AVAILABLE")
        worker.restart()
        info = cluster.controller.worker("worker-0")
        assert info is not None
        assert (info.status, info.incarnation) == ("online", worker.incarnation)
        assert (worker.state, worker.incarnation == before) == ("running", False)
        assert await outcome(cluster) == "ok"


async def test_who_is_frozen_keeps_what_reaches_it_until_it_thaws(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, config=ONCE) as cluster:
        [worker] = cluster.workers
        worker.freeze()
        assert worker.state == "frozen"
        error = await failure(buffered(cluster))
        assert (error.code, error.context["limit"], worker.request_count) == ("WORKER_TIMEOUT", "accept", 0)
        worker.thaw()
        await worker.wait_for_requests(1)
        await worker.wait_for_cancels(1)
        assert (await buffered(cluster)).text == ANSWER


@pytest.mark.nats
async def test_silence_takes_a_worker_offline() -> None:
    quick = {"controller": {"workerOfflineTimeoutMs": 400}}
    async with TestCluster(2, config=quick) as cluster:
        silent: list[Callable[[], None]] = [
            cluster.workers[0].freeze,
            lambda: setattr(cluster.workers[1], "heartbeats", False),
        ]
        for be_silent in silent:
            be_silent()
        await until(lambda: cluster.controller.cluster_status().workers["offline"] == 2, "silence")
        cluster.workers[0].thaw()
        cluster.workers[1].heartbeats = True
        await cluster.controller.wait_for_workers(2, timeout=5)


async def test_a_model_that_loads_slowly_has_its_time(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, config=ONCE, loading_ms=2000) as cluster:
        info = cluster.controller.worker("worker-0")
        assert info is not None
        assert (info.status, info.phase, info.loading_models) == ("online", "loading", ["tiny"])
        begun = time.monotonic()
        assert (await buffered(cluster)).text == ANSWER
        assert time.monotonic() - begun > ONCE["requestRouting"]["timeoutMs"] / 1000
        info = cluster.controller.worker("worker-0")
        assert info is not None
        assert (info.phase, info.loaded_models) == ("ready", ["tiny"])
        cluster.workers[0].restart(loading_ms=5000)
        info = cluster.controller.worker("worker-0")
        assert info is not None
        assert info.phase == "loading"


async def test_who_drains_finishes_what_it_has(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, script=answer(delay_ms=300)) as cluster:
        [worker] = cluster.workers
        running = asyncio.create_task(buffered(cluster))
        await worker.wait_for_requests(1)
        worker.drain()
        assert worker.state == "draining"
        await until(lambda: cluster.controller.cluster_status().workers["online"] == 0, "draining")
        assert (await failure(buffered(cluster))).code == "NO_WORKERS_AVAILABLE"
        assert (await running).text == ANSWER


async def test_where_nobody_listens_another_worker_is_asked_at_once(transport: Transport) -> None:
    patient = merged(RETRY, {"requestRouting": {"retry": {"retryDelayMs": 5000, "maxDelayMs": 5000}}})
    async with TestCluster(2, transport=transport, config=patient) as cluster:
        deaf, other = cluster.workers
        deaf.stop_listening()
        begun = time.monotonic()
        for _ in range(4):
            assert (await buffered(cluster)).worker_id == other.worker_id
        assert (time.monotonic() - begun < 4, deaf.request_count) == (True, 0)
        deaf.listen()
        other.script = fail()
        assert (await buffered(cluster)).worker_id == deaf.worker_id


async def test_who_ignores_cancels_works_on(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, script=stall(), config=ONCE) as cluster:
        [worker] = cluster.workers
        worker.obeys_cancels = False
        await failure(buffered(cluster))
        await worker.wait_for_cancels(1)
        assert (worker.in_flight, worker.obeys_cancels) == (1, False)


async def test_a_stopped_worker_says_goodbye(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, script=stall(), config=ONCE) as cluster:
        [worker] = cluster.workers
        running = asyncio.create_task(buffered(cluster))
        await worker.wait_for_requests(1)
        worker.stop()
        assert worker.state == "stopped"
        error = await failure(running)
        assert error.code == "WORKER_UNAVAILABLE"
        worker.stop()


async def test_the_told_capacity_is_kept(transport: Transport) -> None:
    async with TestCluster(1, transport=transport, max_concurrent=1, script=answer(delay_ms=100)) as cluster:
        info = cluster.controller.worker("worker-0")
        assert info is not None
        assert info.max_concurrent == 1
        begun = time.monotonic()
        answers = await asyncio.gather(*(buffered(cluster) for _ in range(3)))
        assert [response.text for response in answers] == [ANSWER] * 3
        assert time.monotonic() - begun >= 0.3  # one after the other


# === what it remembers ===


async def test_a_worker_remembers_what_it_was_asked_and_prints_no_prompt(transport: Transport) -> None:
    async with TestCluster(1, transport=transport) as cluster:
        await buffered(cluster, request_id="r-1", session_id="s-1")
        await streamed(cluster)
        [worker] = cluster.workers
        first, second = await worker.wait_for_requests(2)
        assert (first.request_id, first.attempt, first.model_id, first.session_id, first.stream) == (
            "r-1",
            1,
            "tiny",
            "s-1",
            False,
        )
        assert (second.stream, second.session_id) == (True, None)
        assert first.controller_id == cluster.controller.controller_id
        limits = testing.SHORT_LIMITS["requestRouting"]
        assert 0 < first.timeout <= limits["timeoutMs"] / 1000 < second.timeout
        assert first.request.prompt == "a secret"
        assert "secret" not in f"{worker} {worker.requests} {cluster}"


async def test_a_retry_is_another_attempt(transport: Transport) -> None:
    async with TestCluster(2, transport=transport, script=fail(), config=RETRY) as cluster:
        await failure(buffered(cluster))
        assert sorted(worker.requests[0].attempt for worker in cluster.workers) == [1, 2]


async def test_waiting_in_vain_says_what_for() -> None:
    async with TestCluster(1, transport="local", script=stall()) as cluster:
        [worker] = cluster.workers
        with pytest.raises(TimeoutError, match=r"0\.01 s in vain for 2 requests: <ScriptedWorker 'worker-0'"):
            await worker.wait_for_requests(2, timeout=0.01)
        with pytest.raises(TimeoutError, match="for 1 cancels"):
            worker.wait_for_cancels_blocking(1, timeout=0.01)
        running = asyncio.create_task(buffered(cluster))
        await worker.wait_for_requests(1)
        with pytest.raises(TimeoutError, match="the end of its work"):
            await worker.wait_until_idle(timeout=0.01)
        running.cancel()
        await worker.wait_until_idle()
        with pytest.raises(ValueError, match="timeout"):
            await worker.wait_for_requests(1, timeout=-1)


async def test_the_last_thousand_requests_are_remembered_and_all_are_counted() -> None:
    async with TestCluster(1, transport="local") as cluster:
        for number in range(1001):
            await buffered(cluster, request_id=f"r-{number}")
        [worker] = cluster.workers
        assert (worker.request_count, len(worker.requests)) == (1001, 1000)
        assert worker.requests[0].request_id == "r-1"


# === scripts as values ===


def test_scripts_are_shown_as_they_are_written_and_compared() -> None:
    scripts = [
        answer(),
        answer("a", 'b"', delay_ms=1, token_delay_ms=2, finish_reason="length", streamed=True),
        stall(),
        stall(after_tokens=3, accept=False),
        fail("MODEL_LOAD_FAILED"),
        fail(None, message="why", retry_after_ms=-1, after_tokens=1, delay_ms=5, accept=False),
        refuse(),
        refuse(retry_after_ms=200),
        die(after_tokens=1),
        babble("missing", after_tokens=0),
        say({"type": "song"}, "x", b"y"),
        every(3, fail("MODEL_LOAD_FAILED"), otherwise=stall()),
        refuse().times(2).then(answer()),
    ]
    for script in scripts:
        again = eval(repr(script))
        assert again == script
        assert hash(again) == hash(script)
    assert len(set(scripts)) == len(scripts)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: answer(1), "a piece of an answer is a str"),  # type: ignore[arg-type]
        (lambda: answer(delay_ms=-1), "delay_ms is -1"),
        (lambda: answer(prompt_tokens=-1), "prompt_tokens is -1"),
        (lambda: answer(finish_reason="end"), "finish_reason is .end.; 'stop'"),  # type: ignore[arg-type]
        (lambda: stall(-1), "after_tokens is -1"),
        (lambda: stall(10**6), "at most 100000"),
        (lambda: fail(""), "code is empty"),
        (lambda: fail(retry_after_ms=-2), "retry_after_ms is -2"),
        (lambda: babble("nonsense"), "how is .nonsense.; 'malformed'"),  # type: ignore[arg-type]
        (lambda: babble("duplicate", after_tokens=0), "at least 1"),
        (say, "says nothing"),
        (lambda: say(1), "of type int; dict, str and bytes"),  # type: ignore[arg-type]
        (lambda: say({"x": float("nan")}), "JSON has no word"),
        (lambda: every(0, answer()), "n is 0"),
        (lambda: every(2, fail(), otherwise="x"), "otherwise is .x., no script"),  # type: ignore[arg-type]
        (lambda: answer().times(0), "n is 0"),
        (lambda: answer().then("x"), "Script"),  # type: ignore[arg-type]
        (lambda: every(2, fail), "script is fail, no script; a call such as"),  # type: ignore[arg-type]
    ],
)
def test_a_script_that_cannot_be_is_refused_when_it_is_written(write: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        write()
