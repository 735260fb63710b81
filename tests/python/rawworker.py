"""A worker on plain nats-py: a second implementation of the protocol, which shares no code with the product.

It registers, heartbeats, accepts, streams, obeys cancels and deadlines, and does with each request what its plan says:
answer, stall, fail, refuse, die, babble or keep silent. It remembers everything that reached it.

Runs inside a test, or as a process of its own that can be killed and stopped::

    python rawworker.py URL '{"worker_id": "w", "plan": "stall 3"}'

which writes a line of JSON for each event: `{"event": "ready" | "asked" | "cancel", ...}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import nats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    #: What a worker does with one request.
    Plan: TypeAlias = Callable[["Job"], Awaitable[None]]

_LATE = 1.0  # seconds
WORDS = ("Hel", "lo", ", wor", "ld")
ANSWER = "".join(WORDS)


class Job:
    """One attempt, as it reached the worker.

    Attributes:
        worker: Who got it.
        request: The body.
        headers: As they came.
        subject: Where it came in.
        reply: Where the answer goes.
        arrived: On the clock of `time.monotonic`.
        cancelled: The controller has told the worker to stop.
        ended: The plan has run to its end, or was stopped.
    """

    def __init__(self, worker: RawWorker, message: Msg) -> None:
        self.worker = worker
        self.request: dict[str, Any] = json.loads(message.data)
        self.headers: dict[str, str] = dict(message.headers or {})
        self.subject = message.subject
        self.reply = message.reply
        self.arrived = time.monotonic()
        self.cancelled = asyncio.Event()
        self.ended = asyncio.Event()
        self._index = 0

    @property
    def request_id(self) -> str:
        return str(self.request["requestId"])

    @property
    def attempt(self) -> int:
        return int(self.headers.get("Attempt", "1"))

    async def send(self, data: bytes) -> None:
        await self.worker.client.publish(self.reply, data)

    async def say(self, kind: str, **fields: Any) -> None:
        await self.send(json.dumps({"requestId": self.request_id, "type": kind, **fields}).encode())

    async def accept(self, position: int = 0) -> None:
        await self.say("accepted", queuePosition=position)

    async def token(self, text: str, ids: Iterable[int] | None = None, **fields: Any) -> None:
        tokens = [1000 + self._index] if ids is None else list(ids)
        index, self._index = self._index, self._index + max(len(tokens), 1)
        await self.say("token", token=text, index=index, tokenIds=tokens, **fields)

    async def done(self, **fields: Any) -> None:
        await self.say("done", **self._end(fields))

    async def response(self, text: str, **fields: Any) -> None:
        await self.say("response", text=text, **self._end(fields))

    async def error(
        self, code: str | None, message: str = "as planned", retry_after_ms: int | None = None
    ) -> None:
        fields: dict[str, Any] = {"error": message}
        if code is not None:
            fields["code"] = code
        if retry_after_ms is not None:
            fields["retryAfterMs"] = retry_after_ms
        await self.say("error", **fields)

    def _end(self, fields: dict[str, Any]) -> dict[str, Any]:
        total = fields.get("totalTokens", self._index)
        usage = {"promptTokens": 4, "completionTokens": total, "cachedTokens": 0}
        return {"totalTokens": total, "latencyMs": 1.5, "finishReason": "stop", "usage": usage, **fields}


# === plans ===


def answers(*words: str, pause: float = 0.0, streamed: bool = False) -> Plan:
    """The words, `ANSWER` without any: as tokens, or as one response where no stream is wanted.

    `streamed`: as tokens in any case. `pause`: seconds before each token, or before the response.
    """
    text = words or WORDS

    async def plan(job: Job) -> None:
        await job.accept()
        if job.request.get("stream") or streamed:
            for word in text:
                await asyncio.sleep(pause)
                await job.token(word)
            await job.done()
        else:
            await asyncio.sleep(pause)
            await job.response("".join(text), totalTokens=len(text))

    return plan


def stalls(after: int = 0, *, accept: bool = True) -> Plan:
    """So many tokens, then nothing."""

    async def plan(job: Job) -> None:
        if accept:
            await job.accept()
        for word in WORDS[:after]:
            await job.token(word)
        await asyncio.Event().wait()

    return plan


def fails(
    code: str | None = "WORKER_UNAVAILABLE",
    after: int = 0,
    *,
    retry_after_ms: int | None = None,
    accept: bool = True,
) -> Plan:
    """So many tokens, then an error."""

    async def plan(job: Job) -> None:
        if accept:
            await job.accept()
        for word in WORDS[:after]:
            await job.token(word)
        await job.error(code, retry_after_ms=retry_after_ms)

    return plan


def refuses(retry_after_ms: int | None = None) -> Plan:
    """There is no room."""
    return fails("WORKER_OVERLOADED", retry_after_ms=retry_after_ms, accept=False)


def dies(after: int = 0) -> Plan:
    """So many tokens, then the connection is gone without a word."""

    async def plan(job: Job) -> None:
        await job.accept()
        for word in WORDS[:after]:
            await job.token(word)
        await job.worker.client.flush()
        job.worker.die()
        await asyncio.Event().wait()

    return plan


def babbles(messages: Iterable[dict[str, Any] | str]) -> Plan:
    """These messages as they are; an object gets the request's id, a text is sent as it stands."""
    said = list(messages)

    async def plan(job: Job) -> None:
        for message in said:
            if isinstance(message, str):
                await job.send(message.encode())
            else:
                await job.send(json.dumps({"requestId": job.request_id, **message}).encode())

    return plan


def waits(for_: asyncio.Event, then: Plan, *, accept: bool = True) -> Plan:
    """Nothing until the event, then what another plan does."""

    async def plan(job: Job) -> None:
        if accept:
            await job.accept()
        await for_.wait()
        await then(job)

    return plan


def in_turn(*plans: Plan) -> Plan:
    """The first request gets the first plan, the next the next, and so on; the last plan stays.

    Shared between workers it counts the requests of all of them.
    """
    turn = itertools.count()

    async def plan(job: Job) -> None:
        await plans[min(next(turn), len(plans) - 1)](job)

    return plan


def parse(words: str) -> Plan:
    """A plan in words: `answer [PAUSE]`, `stall [AFTER]`, `fail CODE [AFTER]`, `die [AFTER]`, `silent`."""
    name, *rest = words.split()
    if name == "answer":
        return answers(pause=float(rest[0]) if rest else 0.0)
    if name == "stall":
        return stalls(int(rest[0]) if rest else 0)
    if name == "fail":
        return fails(rest[0], int(rest[1]) if len(rest) > 1 else 0)
    if name == "die":
        return dies(int(rest[0]) if rest else 0)
    if name == "silent":
        return stalls(accept=False)
    raise ValueError(words)


# === the worker ===


class RawWorker:
    """A worker that does as it is told.

    Attributes:
        plan: What it does with the next request.
        obeys: Whether a cancel ends what it does.
        beats: Whether it gives signs of life.
        clock_offset_ms: How wrong its clock is.
        listens: Whether it takes requests at all, or only says that it is there.
        jobs: All requests that reached it, in order.
        cancels: All cancels that reached it.
        reregistered: How often a controller has asked for its registration alone.
        hellos: What controllers have said when they came.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        worker_id: str | None = None,
        models: Iterable[str] = ("tiny",),
        plan: Plan | None = None,
        heartbeat_ms: int = 200,
        max_concurrent: int = 64,
        features: Iterable[str] = ("cancel",),
        incarnation: str | None = None,
        clock_offset_ms: int = 0,
        listens: bool = True,
        reconnect_wait: float = 0.02,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.url = url
        self.prefix = prefix
        self.worker_id = worker_id or f"raw-{uuid.uuid4().hex[:8]}"
        self.incarnation = incarnation or uuid.uuid4().hex
        self.models = list(models)
        self.plan = plan or answers()
        self.heartbeat_ms = heartbeat_ms
        self.max_concurrent = max_concurrent
        self.features = list(features)
        self.clock_offset_ms = clock_offset_ms
        self.listens = listens
        self.reconnect_wait = reconnect_wait
        self.obeys = True
        self.beats = True
        self.phase = "ready"
        self.loading: list[str] = []
        self.jobs: list[Job] = []
        self.cancels: list[dict[str, Any]] = []
        # nats-py reads each subscription by itself: a cancel may be seen before its request.
        self._early: set[tuple[str, int]] = set()
        self.hellos: list[dict[str, Any]] = []
        self.reregistered = 0
        self.client: Client
        self._on_event = on_event or (lambda _: None)
        self._sequence = 0
        self._changed = asyncio.Condition()
        self._running: dict[Job, asyncio.Task[None]] = {}
        self._heart: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<RawWorker {self.worker_id} asked={len(self.jobs)}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def running(self) -> int:
        """How many requests it works on."""
        return len(self._running)

    async def start(self) -> None:
        """Connect, listen, register, beat."""
        self.client = await nats.connect(
            self.url,
            name=self.worker_id,
            reconnect_time_wait=self.reconnect_wait,  # type: ignore[arg-type]
            max_reconnect_attempts=-1,
            error_cb=self._ignore,
        )
        for subject, handler in self.subjects():
            if self.listens or handler != self._on_request:
                await self.client.subscribe(subject, cb=handler)
        await self.client.flush()
        await self.register()
        await self.client.flush()
        self._heart = asyncio.create_task(self._beat())
        self._on_event({"event": "ready", "workerId": self.worker_id, "incarnation": self.incarnation})

    async def stop(self, *, deregister: bool = True) -> None:
        """Say goodbye, unless told not to, and close the connection."""
        self._let_go()
        if self.client.is_connected:
            if deregister:
                await self.deregister()
            with contextlib.suppress(Exception):
                await self.client.flush()
        await self.client.close()

    def die(self) -> None:
        """Close the connection as a killed process does: no deregistration, not even a flush."""
        self.client.options["allow_reconnect"] = False
        transport = self.client._transport
        assert transport is not None
        transport._io_writer.transport.abort()  # type: ignore[attr-defined]
        self._let_go(but=asyncio.current_task())

    def subjects(self) -> list[tuple[str, Callable[[Msg], Awaitable[None]]]]:
        """Where it listens, and what it does there."""
        return [
            (f"{self.prefix}inference.{self.worker_id}", self._on_request),
            (f"{self.prefix}cancel.{self.worker_id}", self._on_cancel),
            (f"{self.prefix}worker.{self.worker_id}.reregister", self._on_reregister),
            (f"{self.prefix}controller.hello", self._on_hello),
        ]

    def job(self, message: Msg) -> Job:
        """An attempt, as it reached it."""
        return Job(self, message)

    def registration(self) -> dict[str, Any]:
        return {
            "protocol": 1,
            "workerId": self.worker_id,
            "incarnation": self.incarnation,
            "hostname": "test",
            "ip": "127.0.0.1",
            "port": 0,
            "skills": {
                "availableModels": self.models,
                "modelPaths": {},
                "totalModelSize": 0,
                "lastScanned": self._now(),
            },
            "capacity": {"maxConcurrent": self.max_concurrent, "maxQueue": 0, "memoryGB": 1},
            "features": self.features,
            "status": "online",
            "timestamp": self._now(),
        }

    def heartbeat(self) -> dict[str, Any]:
        self._sequence += 1
        return {
            "workerId": self.worker_id,
            "incarnation": self.incarnation,
            "sequence": self._sequence,
            "status": "online",
            "timestamp": self._now(),
            "metrics": {
                "cpuUsagePercent": 1.0,
                "memoryUsedGB": 0.1,
                "gpuUtilizationPercent": 0,
                "activeRequests": self.running,
                "totalRequestsHandled": len(self.jobs) - self.running,
                "avgLatencyMs": 1.0,
                "modelsLoaded": self.models,
            },
            "queueDepth": 0,
            "activeRequestIds": [job.request_id for job in self._running],
            "tokensGenerated": 0,
            "phase": self.phase,
            "loadingModels": self.loading,
            "cachedPrefixes": [],
        }

    async def register(self) -> None:
        await self.publish("worker.register", self.registration())

    async def beat(self) -> None:
        await self.publish("worker.heartbeat", self.heartbeat())

    async def deregister(self) -> None:
        await self.publish("worker.deregister", {"workerId": self.worker_id, "timestamp": self._now()})

    async def publish(self, subject: str, body: Any) -> None:
        await self.client.publish(f"{self.prefix}{subject}", json.dumps(body).encode())

    async def asked(self, count: int = 1, seconds: float = 5.0) -> Job:
        """Wait until so many requests have come; gives the last of them."""
        await self._until(lambda: len(self.jobs) >= count, f"{count} requests", seconds)
        return self.jobs[count - 1]

    async def told_to_stop(self, count: int = 1, seconds: float = 5.0) -> dict[str, Any]:
        """Wait until so many cancels have come; gives the last of them."""
        await self._until(lambda: len(self.cancels) >= count, f"{count} cancels", seconds)
        return self.cancels[count - 1]

    async def idle(self, seconds: float = 5.0) -> None:
        """Wait until it works on nothing."""
        await self._until(lambda: not self._running, "the end of its work", seconds)

    async def _until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), seconds)
            except TimeoutError:
                raise AssertionError(
                    f"{self!r} waited {seconds} s in vain for {what}; last cancels: {self.cancels[-3:]}"
                ) from None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_ms / 1000)
            if self.beats and self.client.is_connected:
                with contextlib.suppress(nats.errors.Error):
                    await self.beat()

    async def _on_request(self, message: Msg) -> None:
        job = self.job(message)
        if (key := (job.request_id, job.attempt)) in self._early:
            self._early.remove(key)
            job.cancelled.set()
        self.jobs.append(job)
        self._on_event({"event": "asked", "requestId": job.request_id, "attempt": job.attempt})
        self._running[job] = asyncio.create_task(self._run(job))
        await self._notify()

    async def _run(self, job: Job) -> None:
        # A worker drops by itself what is past its time; this one so late that tests meet the controller's own limits.
        limit = float(job.headers.get("Timeout-Ms", "600000")) / 1000 + _LATE
        try:
            if job.cancelled.is_set() and self.obeys:
                raise asyncio.CancelledError
            async with asyncio.timeout(limit):
                await self.plan(job)
        except TimeoutError:
            await job.error("WORKER_TIMEOUT")
        except asyncio.CancelledError:
            if not job.cancelled.is_set():
                raise
            await job.error("CANCELLED")
        except nats.errors.Error:
            if self.client.is_connected:
                raise
        finally:
            self._running.pop(job, None)
            job.ended.set()
            await self._notify()

    async def _on_cancel(self, message: Msg) -> None:
        cancel = json.loads(message.data)
        self.cancels.append(cancel)
        self._on_event({"event": "cancel", **cancel})
        key = (cancel["requestId"], cancel["attempt"])
        meant = [
            running for running in self._running.items() if (running[0].request_id, running[0].attempt) == key
        ]
        for job, task in meant:
            job.cancelled.set()
            if self.obeys:
                task.cancel()
        if not any((job.request_id, job.attempt) == key for job in self.jobs):
            self._early.add(key)
        await self._notify()

    async def _on_reregister(self, message: Msg) -> None:
        assert message.data == b""
        self.reregistered += 1
        await self.register()

    async def _on_hello(self, message: Msg) -> None:
        self.hellos.append(json.loads(message.data))
        await self.register()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _let_go(self, but: asyncio.Task[Any] | None = None) -> None:
        if self._heart is not None:
            self._heart.cancel()
        for task in list(self._running.values()):
            if task is not but:
                task.cancel()

    def _now(self) -> int:
        return int(time.time() * 1000) + self.clock_offset_ms

    async def _ignore(self, _: Exception) -> None:
        """A server that goes away is part of the plan."""


async def _serve(url: str, options: dict[str, Any]) -> None:
    plan = parse(options.pop("plan", "answer"))
    write = lambda event: print(json.dumps(event), flush=True)  # noqa: E731
    async with RawWorker(url, plan=plan, on_event=write, **options):
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(sys.argv[1], json.loads(sys.argv[2])))
