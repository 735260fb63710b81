"""Cases 1 to 18 of the fault catalogue, one request and its worker, over a real nats-server; each bears its number.

After every case nothing is left: `Cluster` asserts it when it is left.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster import (
    PATIENCE,
    Cluster,
    RawProcess,
    ask,
    failure,
    read,
    received,
    routing,
    text,
    until,
)
from mlx_serving_router import ControllerError, ControllerNode
from rawworker import ANSWER, WORDS, answers, babbles, fails, in_turn, stalls, waits

if TYPE_CHECKING:
    from mlx_serving_router.nats_server import NatsServer

pytestmark = pytest.mark.nats

SEQUENCES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "wire" / "answers.json").read_text(encoding="utf-8")
)["cases"]


def late_replies(controller: ControllerNode) -> float:
    for line in controller.metrics_text().splitlines():
        if line.startswith("mlx_router_late_replies_total "):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError("no mlx_router_late_replies_total")


# === 1 to 5: processes that are killed, stopped and continued ===


async def test_01_killed_before_the_first_token(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(streamingTimeoutMs=500)
    with RawProcess(nats.url, nats_prefix, "victim", "stall") as victim:
        async with Cluster(nats.url, nats_prefix, workers=0, **changes) as cluster:
            await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
            call = asyncio.create_task(cluster.streaming(request_id="r-1"))
            await until(lambda: victim.count("asked"), "the victim to be asked")
            async with cluster.another(worker_id="sound") as sound:
                await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
                victim.kill()
                stream = await call
                assert text(await read(stream)) == ANSWER
                metadata = cluster.metadata("r-1")
                assert (metadata.failed_workers, metadata.selected_worker) == (["victim"], "sound")
                assert [job.attempt for job in sound.jobs] == [2]
                # From now on the server itself says that nobody listens.
                for number in range(4):
                    await cluster.buffered(request_id=f"after-{number}")
                    assert cluster.metadata(f"after-{number}").timeouts == 0


async def test_02_killed_in_mid_stream(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(streamIdleTimeoutMs=500, streamFailover="off")
    with RawProcess(nats.url, nats_prefix, "victim", "stall 2") as victim:
        async with Cluster(nats.url, nats_prefix, workers=0, **changes) as cluster:
            await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
            stream = await cluster.streaming(request_id="r-1")
            async with cluster.another(worker_id="sound") as sound:
                await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
                victim.kill()
                killed = time.monotonic()
                got, error = await received(stream)
                assert time.monotonic() - killed < 1.5
                cluster.at_rest()
                assert got == "".join(WORDS[:2])
                assert error is not None
                assert error.code == "STREAM_INTERRUPTED"
                assert sound.jobs == []
                assert cluster.metadata("r-1").status == "failed"


async def test_04_stopped(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(
        acceptTimeoutMs=600,
        streamingTimeoutMs=1000,
        retry={"enabled": False},
        breaker={"failureThreshold": 2},
    )
    with RawProcess(nats.url, nats_prefix, "victim", "stall") as victim:
        async with Cluster(nats.url, nats_prefix, workers=0, **changes) as cluster:
            await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
            error = await failure(cluster.streaming())
            assert (error.code, error.context["limit"]) == ("WORKER_TIMEOUT", "first_token")
            victim.signal(signal.SIGSTOP)
            error = await failure(cluster.streaming())
            assert (error.code, error.context["limit"]) == ("WORKER_TIMEOUT", "accept")
            assert cluster.controller.get_circuit_breaker_stats()["victim"]["state"] == "OPEN"
            assert (await failure(cluster.streaming())).code == "NO_HEALTHY_WORKERS"
            victim.signal(signal.SIGCONT)
            await until(lambda: victim.count("cancel") == 2, "both cancels")
            assert victim.count("asked") == 2


async def test_05_continued_after_the_retry(nats: NatsServer, nats_prefix: str) -> None:
    changes = routing(acceptTimeoutMs=300, streamingTimeoutMs=300)
    with RawProcess(nats.url, nats_prefix, "victim", "answer 0.1") as victim:
        async with Cluster(nats.url, nats_prefix, workers=0, **changes) as cluster:
            await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
            call = asyncio.create_task(cluster.streaming())
            await until(lambda: victim.count("asked"), "the victim to be asked")
            victim.signal(signal.SIGSTOP)
            async with cluster.another(worker_id="sound", plan=answers("so", "und")):
                await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
                stream = await call
                before = late_replies(cluster.controller)
                victim.signal(signal.SIGCONT)
                await until(lambda: late_replies(cluster.controller) > before, "the late token")
                assert text(await read(stream)) == "sound"


# === 6: nobody listens ===


async def test_06_no_subscriber_costs_no_time(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix) as cluster,
        cluster.another(worker_id="ghost", listens=False),
    ):
        await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
        durations = []
        while cluster.controller.get_circuit_breaker_stats()["ghost"]["state"] == "CLOSED":
            response = await cluster.buffered()
            assert (response.text, response.worker_id) == (ANSWER, "w0")
            if response.metadata.failed_workers == ["ghost"]:
                assert response.metadata.duration_ms is not None
                durations.append(response.metadata.duration_ms)
        assert len(durations) == 5  # failureThreshold
        assert sorted(durations)[2] < 50


async def test_06_a_named_worker_without_subscriber(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix) as cluster,
        cluster.another(worker_id="ghost", listens=False),
    ):
        await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
        begun = time.monotonic()
        error = await failure(cluster.controller.handle_buffered_request(ask(), worker_id="ghost"))
        assert time.monotonic() - begun < 0.5
        assert (error.code, error.context["worker_id"]) == ("WORKER_UNAVAILABLE", "ghost")
        assert cluster.asked == [0]


# === 7 and 8: slow callers, slow workers ===


async def test_07_what_comes_before_the_caller_looks_is_not_lost(nats: NatsServer, nats_prefix: str) -> None:
    words = [f"{number} " for number in range(200)]
    async with Cluster(nats.url, nats_prefix, plan=answers(*words)) as cluster:
        stream = await cluster.streaming(request_id="r-1")
        job = await cluster.worker.asked()
        await asyncio.wait_for(job.ended.wait(), PATIENCE)
        await cluster.worker.client.flush()
        events = await read(stream)
        assert [event.text for event in events] == words
        assert [event.index for event in events] == list(range(200))


async def test_07_all_that_is_there_comes_in_batches(nats: NatsServer, nats_prefix: str) -> None:
    words = [f"{number} " for number in range(200)]
    async with Cluster(nats.url, nats_prefix, plan=answers(*words)) as cluster:
        stream = await cluster.streaming()
        await (await cluster.worker.asked()).ended.wait()
        batches = []
        async with stream:
            async for batch in stream.batches():
                assert batch
                batches.append(batch)
        assert [event.text for batch in batches for event in batch] == words


@pytest.mark.parametrize("after", [1, 3])
async def test_08_hang_after_some_tokens(nats: NatsServer, nats_prefix: str, after: int) -> None:
    changes = routing(streamIdleTimeoutMs=300, streamFailover="off")
    async with Cluster(nats.url, nats_prefix, plan=stalls(after), **changes) as cluster:
        begun = time.monotonic()
        got, error = await received(await cluster.streaming(request_id="r-1"))
        assert 0.29 < time.monotonic() - begun < 2
        assert got == "".join(WORDS[:after])
        assert error is not None
        assert error.code == "STREAM_INTERRUPTED"
        assert await cluster.worker.told_to_stop() == {"requestId": "r-1", "attempt": 1}


async def test_08_leaving_a_stream_early_stops_the_worker(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, plan=answers(*["x"] * 500, pause=0.01)) as cluster:
        async with await cluster.streaming(request_id="r-1") as stream:
            async for _ in stream:
                break
        assert await cluster.worker.told_to_stop() == {"requestId": "r-1", "attempt": 1}
        await cluster.worker.idle()
        await cluster.settle()
        assert cluster.metadata("r-1").status == "cancelled"


async def test_08_a_cancelled_task_stops_the_worker(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, plan=stalls()) as cluster:
        for number, call in enumerate((cluster.buffered, cluster.streaming), 1):
            task = asyncio.create_task(call(request_id=f"r-{number}"))
            await cluster.worker.asked(number)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await cluster.worker.told_to_stop(number) == {"requestId": f"r-{number}", "attempt": 1}
            await cluster.settle()
            assert cluster.metadata(f"r-{number}").status == "cancelled"
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


# === 9 to 12: answers in order and out of it ===


@pytest.mark.parametrize("case", SEQUENCES, ids=[case["name"] for case in SEQUENCES])
async def test_09_to_12_an_answer_leads_to_its_end(
    nats: NatsServer, nats_prefix: str, case: dict[str, Any]
) -> None:
    release = asyncio.Event()
    plan = in_turn(waits(release, answers()), babbles(case["messages"]), answers())
    changes = routing(retry={"enabled": False}, streamFailover="off")
    async with Cluster(nats.url, nats_prefix, plan=plan, **changes) as cluster:
        other = asyncio.create_task(cluster.buffered())  # the connection lives, and others live with it
        await cluster.worker.asked()
        end = case["end"]
        got, error, stream = "", None, None
        try:
            stream = await cluster.streaming(request_id="r-1")
        except ControllerError as raised:
            error = raised
        else:
            got, error = await received(stream)
        assert got == end["text"]
        if "code" in end:
            assert error is not None
            assert error.code == end["code"]
            # What the worker did is the cause of a stream that breaks.
            met = error.__cause__ if isinstance(error.__cause__, ControllerError) else error
            assert bool(met.context.get("protocol_error")) == end.get("protocolError", False)
        else:
            assert error is None
            assert stream is not None
            assert stream.response is not None
            assert stream.response.finish_reason == end["finishReason"]
            assert stream.response.usage.completion_tokens == end["completionTokens"]
        release.set()
        assert (await other).text == ANSWER
        assert (await cluster.buffered()).text == ANSWER
        if error is None:
            assert cluster.worker.cancels == []


async def test_10_a_large_frame_is_carried(nats: NatsServer, nats_prefix: str) -> None:
    large = "x" * 900_000
    async with Cluster(nats.url, nats_prefix, plan=answers(large, "y")) as cluster:
        assert text(await read(await cluster.streaming())) == large + "y"
        assert (await cluster.buffered()).text == large + "y"


@pytest.mark.parametrize("kind", ["response", "tokens"])
async def test_12_a_buffered_answer_without_tokens(nats: NatsServer, nats_prefix: str, kind: str) -> None:
    end = (
        [{"type": "done", "totalTokens": 0}]
        if kind == "tokens"
        else [{"type": "response", "text": "", "totalTokens": 0}]
    )
    async with Cluster(nats.url, nats_prefix, plan=babbles([{"type": "accepted"}, *end])) as cluster:
        response = await cluster.buffered()
        assert (response.text, response.finish_reason, response.usage.completion_tokens) == ("", "stop", 0)
        assert cluster.breaker(cluster.worker)["failure_count"] == 0


# === 17 and 18: half-open ===


async def half_open(cluster: Cluster) -> None:
    """Opens the breaker of the only worker, and waits until it would admit a probe."""
    assert (await failure(cluster.buffered())).code == "WORKER_UNAVAILABLE"
    assert cluster.breaker(cluster.worker)["state"] == "OPEN"
    await asyncio.sleep(0.13)  # timeoutMs 100, and 20 % of jitter: reading never changes the state


HALF_OPEN = routing(
    retry={"enabled": False}, breaker={"failureThreshold": 1, "successThreshold": 2, "timeoutMs": 100}
)


async def test_17_a_cancelled_probe_gives_its_permit_back(nats: NatsServer, nats_prefix: str) -> None:
    plan = in_turn(fails(), stalls(), answers())
    async with Cluster(nats.url, nats_prefix, plan=plan, **HALF_OPEN) as cluster:
        await half_open(cluster)
        probe = asyncio.create_task(cluster.buffered())
        await cluster.worker.asked(2)
        assert (await failure(cluster.buffered())).code == "NO_HEALTHY_WORKERS"
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        await cluster.settle()
        for state in ("HALF_OPEN", "CLOSED"):
            assert (await cluster.buffered()).text == ANSWER
            assert cluster.breaker(cluster.worker)["state"] == state


async def test_18_a_thousand_callers_and_one_probe(nats: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()
    plan = in_turn(fails(), waits(release, answers()))
    async with Cluster(nats.url, nats_prefix, plan=plan, **HALF_OPEN) as cluster:
        await half_open(cluster)
        calls = [asyncio.create_task(cluster.buffered()) for _ in range(1000)]
        refused = asyncio.gather(*(failure(call) for call in calls[1:]))
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        while sum(not call.done() for call in calls) > 1:
            await asyncio.wait(
                [call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED
            )
        release.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused.cancel()
        errors = [result for result in results if isinstance(result, ControllerError)]
        assert len(errors) == 999
        assert {error.code for error in errors} == {"NO_HEALTHY_WORKERS"}
        assert len(cluster.worker.jobs) == 2  # the failure, and one probe
