"""The golden messages of tests/fixtures/wire: the Python classes, what a controller publishes, what a worker answers.

The other side is nats-py, which knows of this product only what the protocol says.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import nats as nats_py
import pytest

from cluster import PATIENCE, Cluster, ask, failure, read, settings, text, until
from mlx_serving_router import ControllerError, ControllerNode, InferenceRequest, TokenEvent, WorkerNode
from mlx_serving_router._native import prefix_hashes
from rawworker import ANSWER, RawWorker, answers, fails, in_turn, stalls, waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from mlx_serving_router.nats_server import NatsServer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "wire"


def cases(file: str) -> list[dict[str, Any]]:
    return list(json.loads((FIXTURES / file).read_text(encoding="utf-8"))["cases"])


def golden(file: str, name: str) -> dict[str, Any]:
    return next(case for case in cases(file) if case["name"] == name)


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [f"{case.get('on', '')} {case['name']}".strip() for case in found]


def payload(case: dict[str, Any]) -> bytes:
    return str(case["text"]).encode() if "text" in case else json.dumps(case["message"]).encode()


def rewritten(case: dict[str, Any]) -> dict[str, Any]:
    return dict(case.get("rewritten", case["message"]))


def shape(value: Any) -> Any:
    """The keys and the kinds of their values, all the way down: what two messages of one kind have in common."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    if isinstance(value, list):
        return "list"
    return (
        "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
    )


REQUESTS = cases("request.json")


# === the Python classes ===


@pytest.mark.parametrize("case", REQUESTS, ids=ids(REQUESTS))
def test_a_request_is_read_and_written(case: dict[str, Any]) -> None:
    request = InferenceRequest.from_dict(case["message"])
    assert without_defaults(request.to_dict()) == without_defaults(rewritten(case))
    assert InferenceRequest.from_dict(request.to_dict()) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert "Hello" not in repr(request)
    assert "Grüße" not in repr(request)


def without_defaults(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is the same as nothing: how much of it is written is the writer's business."""
    defaults: dict[str, Any] = {"stream": False, "priority": "normal"}
    return {
        key: value for key, value in message.items() if value is not None and value != defaults.get(key, ...)
    }


def test_a_request_has_the_wires_fields_in_snake_case() -> None:
    request = InferenceRequest.from_dict(golden("request.json", "every field")["message"])
    assert (request.request_id, request.model_id) == ("0b0e5a6c-1d7f-4d0e-9f6b-2f1a3c4d5e6f", "tiny")
    assert request.messages is not None
    assert request.messages[1] == {"role": "user", "content": "Grüße 🙂"}
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (16, 0.7, 0.95, 40)
    assert (request.min_p, request.seed, request.stop, request.logprobs) == (0.05, 7, ["\n\n", "END"], 2)
    penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
    assert penalties == (1.1, -0.5, 0.25)
    assert request.logit_bias == {"42": -100, "43": 1.5}
    assert (request.tool_choice, request.response_format) == ("auto", {"type": "json_object"})
    assert (request.session_id, request.stream, request.priority, request.prompt) == (
        "s-1",
        True,
        "high",
        None,
    )


def test_the_hashes_of_prefixes_are_those_that_the_page_for_workers_defines() -> None:
    page = (FIXTURES.parents[2] / "docs" / "prefix-hashes.md").read_text(encoding="utf-8")
    _, code, _ = page.replace("```python", "```").split("```")
    defined: dict[str, Any] = {}
    exec(code, defined)
    for case in cases("prefixes.json"):
        assert defined["prefix_hashes"](case["message"]) == case["means"]["hashes"], case["name"]
        assert len(defined["text"](case["message"])) == case["means"]["bytes"], case["name"]
        fields = {key: case["message"].get(key) for key in ("prompt", "messages")}
        assert prefix_hashes(case["message"]["modelId"], **fields) == case["means"]["hashes"], case["name"]


def test_a_request_without_an_id_gets_one() -> None:
    first, second = (InferenceRequest(model_id="tiny", prompt="Hello") for _ in range(2))
    assert first.request_id
    assert first.request_id != second.request_id
    assert first.to_dict()["requestId"] == first.request_id


def test_an_event_is_written_and_read() -> None:
    event = TokenEvent.from_dict({"text": "lo, world", "index": 1, "tokenIds": [385, 11, 1917]})
    assert (event.text, event.index, list(event.token_ids)) == ("lo, world", 1, [385, 11, 1917])
    written = event.to_dict()
    assert (written["text"], written["index"], written["tokenIds"]) == ("lo, world", 1, [385, 11, 1917])
    assert TokenEvent.from_dict(written) == event == pickle.loads(pickle.dumps(event))


# === what a controller publishes ===


@pytest.mark.nats
@pytest.mark.parametrize("kind", ["buffered", "streaming"])
async def test_a_controller_asks_as_it_is_written(nats: NatsServer, nats_prefix: str, kind: str) -> None:
    stream = kind == "streaming"
    async with Cluster(nats.url, nats_prefix) as cluster:
        replies = set()
        for number, case in enumerate(REQUESTS, 1):
            if "resume" in case["message"]:
                continue  # only a controller asks for that, by itself
            request = InferenceRequest.from_dict(case["message"])
            if stream:
                await read(await cluster.controller.handle_streaming_request(request))
            else:
                await cluster.controller.handle_buffered_request(request)
            job = cluster.worker.jobs[-1]
            assert job.request == {**rewritten(case), "stream": stream}
            assert job.subject == f"{nats_prefix}inference.w0"
            assert set(job.headers) == set(golden("headers.json", "without a trace")["message"])
            assert (job.headers["Request-Id"], job.headers["Attempt"]) == (request.request_id, "1")
            assert (
                job.headers["Controller-Id"] == cluster.controller.cluster_status().to_dict()["controllerId"]
            )
            limit = 600_000 if stream else 3000
            assert limit - 1000 < int(job.headers["Timeout-Ms"]) <= limit
            replies.add(job.reply)
            assert len(replies) == len(cluster.worker.jobs) <= number  # a fresh one for each attempt
        assert len({reply.rsplit(".", 1)[0] for reply in replies}) == 1  # in one inbox


@pytest.mark.nats
async def test_a_controllers_caller_gets_what_a_worker_says(nats: NatsServer, nats_prefix: str) -> None:
    tokens = [case for case in cases("replies.json") if case["message"]["type"] == "token"]
    ends = [case for case in cases("replies.json") if case["message"]["type"] == "done"]

    def plan(end: dict[str, Any]) -> Any:
        async def answer(job: Any) -> None:
            index = 0
            for case in tokens:
                message = {**case["message"], "index": index}
                await job.say(**{"kind": message.pop("type"), **without_id(message)})
                index += case["means"]["width"]
            message = without_id(end["message"])
            await job.say(**{"kind": message.pop("type"), **message})

        return answer

    async with Cluster(nats.url, nats_prefix, plan=in_turn(*(plan(end) for end in ends))) as cluster:
        for end in ends:
            stream = await cluster.streaming()
            events = await read(stream)
            assert [event.text for event in events] == [case["means"]["text"] for case in tokens]
            assert [list(event.token_ids) for event in events] == [
                case["means"]["tokenIds"] for case in tokens
            ]
            response = stream.response
            assert response is not None
            means = end["means"]
            assert (response.finish_reason, response.tool_calls or None) == (
                means["finishReason"],
                means["toolCalls"],
            )
            usage = response.usage
            assert [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens] == [
                means["promptTokens"],
                means["completionTokens"],
                means["cachedTokens"],
            ]


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "requestId"}


@pytest.mark.nats
@pytest.mark.parametrize("case", cases("codes.json"), ids=[str(case["name"]) for case in cases("codes.json")])
async def test_a_workers_code_is_understood(nats: NatsServer, nats_prefix: str, case: dict[str, Any]) -> None:
    changes = {"requestRouting": {"retry": {"enabled": False}}}
    async with Cluster(nats.url, nats_prefix, plan=fails(case["name"]), **changes) as cluster:
        error = await failure(cluster.buffered())
        # Nobody has cancelled anything.
        assert error.code == ("WORKER_UNAVAILABLE" if case["means"] == "CANCELLED" else case["means"])
        assert error.context["worker_id"] == "w0"


@pytest.mark.nats
async def test_a_controller_says_hello_and_beats(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Ear(nats.url, f"{nats_prefix}controller.>") as ear,
        ControllerNode(settings(nats.url, nats_prefix), controller_id="front-1"),
    ):
        for name, subject in (("hello", "controller.hello"), ("heartbeat", "controller.heartbeat")):
            message = await ear.next(f"{nats_prefix}{subject}")
            assert shape(message) == shape(golden("controller.json", name)["message"])
            assert (message["controllerId"], message["heartbeatIntervalMs"]) == ("front-1", 200)
            assert abs(message["timestamp"] - time.time() * 1000) < 5000


@pytest.mark.nats
async def test_a_controller_asks_the_unknown_to_register(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix, workers=0) as cluster,
        Ear(nats.url, f"{nats_prefix}worker.*.reregister") as ear,
    ):
        beat = {**golden("heartbeat.json", "every field")["message"], "workerId": "stranger"}
        await ear.publish(f"{nats_prefix}worker.heartbeat", json.dumps(beat).encode())
        message = await ear.raw(f"{nats_prefix}worker.stranger.reregister")
        assert message.data == b""
        assert cluster.controller.worker("stranger") is None
        registration = {**golden("registration.json", "every field")["message"], "workerId": "stranger"}
        await ear.publish(f"{nats_prefix}worker.register", json.dumps(registration).encode())
        await cluster.controller.wait_for_workers(1, timeout=PATIENCE)
        info = cluster.controller.worker("stranger")
        assert info is not None
        assert (info.incarnation, info.status, info.in_flight) == (registration["incarnation"], "online", 0)
        assert list(info.models) == registration["skills"]["availableModels"]


@pytest.mark.nats
async def test_a_worker_is_back_within_a_heartbeat_of_a_new_controller(
    nats: NatsServer, nats_prefix: str
) -> None:
    async with RawWorker(nats.url, prefix=nats_prefix, heartbeat_ms=100_000) as worker:
        for _ in range(2):
            async with ControllerNode(settings(nats.url, nats_prefix)) as controller:
                await controller.wait_for_workers(1, timeout=1)
                assert (await controller.handle_buffered_request(ask())).text == ANSWER
        assert len(worker.hellos) == 2
        assert worker.reregistered == 0


MALFORMED = cases("malformed.json")


@pytest.mark.nats
async def test_malformed_membership_is_dropped(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix) as cluster,
        Ear(nats.url, f"{nats_prefix}worker.>") as ear,
    ):
        for case in MALFORMED:
            if case["on"].startswith("worker."):
                await ear.publish(f"{nats_prefix}{case['on']}", payload(case))
        # What comes afterwards has been read afterwards.
        sound = {**golden("registration.json", "every field")["message"], "workerId": "sound"}
        await ear.publish(f"{nats_prefix}worker.register", json.dumps(sound).encode())
        await cluster.controller.wait_for_workers(2, timeout=PATIENCE)
        assert {info.worker_id for info in cluster.controller.workers()} == {"w0", "sound"}
        assert not [subject for subject in ear.subjects if subject.endswith("reregister")]


@pytest.mark.nats
@pytest.mark.parametrize(
    "case", [case for case in MALFORMED if case["on"] == "reply"], ids=lambda case: case["name"]
)
async def test_a_malformed_reply_fails_its_request_alone(
    nats: NatsServer, nats_prefix: str, case: dict[str, Any]
) -> None:
    async def plan(job: Any) -> None:
        await job.send(payload(case))
        await asyncio.Event().wait()

    async with Cluster(nats.url, nats_prefix, workers=2, plan=in_turn(plan, answers())) as cluster:
        response = await cluster.buffered()
        assert response.text == ANSWER
        (failed,) = response.metadata.failed_workers
        assert await cluster.by_id(failed).told_to_stop()


@pytest.mark.nats
async def test_fleets_with_different_prefixes_do_not_meet(nats: NatsServer, nats_prefix: str) -> None:
    async with (
        Cluster(nats.url, nats_prefix + "a.", plan=answers("a")) as first,
        Cluster(nats.url, nats_prefix + "b.", plan=answers("b")) as second,
    ):
        assert (await first.buffered()).text == "a"
        assert (await second.buffered()).text == "b"
        assert len(first.controller.workers()) == len(second.controller.workers()) == 1


@pytest.mark.nats
async def test_a_cancel_is_as_it_is_written(nats: NatsServer, nats_prefix: str) -> None:
    async with Cluster(nats.url, nats_prefix, plan=stalls()) as cluster:
        call = asyncio.create_task(cluster.buffered(request_id="r-1"))
        await cluster.worker.asked()
        call.cancel()
        cancel = await cluster.worker.told_to_stop()
        assert shape(cancel) == shape(golden("cancel.json", "every field")["message"])
        assert cancel == {"requestId": "r-1", "attempt": 1}


# === what a worker answers ===


class Ear:
    """Hears what is said on a subject, and can say something itself."""

    def __init__(self, url: str, *subjects: str) -> None:
        self._url = url
        self._subjects = subjects
        self._messages: list[Msg] = []
        self._changed = asyncio.Condition()
        self.client: Client

    async def __aenter__(self) -> Self:
        self.client = await nats_py.connect(self._url)
        for subject in self._subjects:
            await self.hear(subject)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    @property
    def subjects(self) -> list[str]:
        return [message.subject for message in self._messages]

    async def hear(self, subject: str) -> None:
        await self.client.subscribe(subject, cb=self._on_message)
        await self.client.flush()

    async def publish(
        self, subject: str, data: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        await self.client.publish(subject, data, reply=reply, headers=headers)
        await self.client.flush()

    async def raw(self, subject: str, which: Callable[[Msg], bool] = lambda _: True) -> Msg:
        """The next message on a subject; those before it are forgotten."""

        def found() -> int | None:
            for position, message in enumerate(self._messages):
                if message.subject == subject and which(message):
                    return position
            return None

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: found() is not None), PATIENCE)
            except TimeoutError:
                raise AssertionError(f"nothing on {subject}; heard {self.subjects}") from None
            position = found()
            assert position is not None
            message = self._messages[position]
            del self._messages[: position + 1]
            return message

    async def next(self, subject: str) -> dict[str, Any]:
        return dict(json.loads((await self.raw(subject)).data))

    async def _on_message(self, message: Msg) -> None:
        async with self._changed:
            self._messages.append(message)
            self._changed.notify_all()


class Parrot:
    """An engine that says each word of the prompt; `forever` is said until somebody stops it, `broken` breaks."""

    models = ("parrot",)

    def run(self, jobs: Any) -> None:
        jobs.report("ready", loaded_models=self.models)
        while (job := jobs.get()) is not None:
            words = (job.request.prompt or "").split()
            if words[0] == "broken":
                job.error("WORKER_UNAVAILABLE", "it broke", retry_after_ms=7)
                continue
            number = 0
            while words[0] == "forever" and not job.cancelled:
                job.token("x", [number])
                number += 1
                time.sleep(0.005)
            for word in words:
                job.token(word, [number, number + 1])
                number += 2
            job.done("stop", prompt_tokens=len(words), cached_tokens=1)


class Asker:
    """A controller on nats-py, for one worker of the product."""

    def __init__(self, ear: Ear, prefix: str, worker_id: str) -> None:
        self.ear = ear
        self._prefix = prefix
        self._worker_id = worker_id
        self._count = 0

    async def ask(self, body: dict[str, Any] | bytes, *, timeout_ms: int = 10_000, attempt: int = 1) -> str:
        """Send a request; gives the subject of its answer."""
        self._count += 1
        inbox = f"_INBOX.{self._prefix}{self._count}"
        await self.ear.hear(inbox)
        data = body if isinstance(body, bytes) else json.dumps({"modelId": "parrot", **body}).encode()
        request_id = "r-1" if isinstance(body, bytes) else body["requestId"]
        headers = {
            "Request-Id": request_id,
            "Attempt": str(attempt),
            "Controller-Id": "asker",
            "Timeout-Ms": str(timeout_ms),
        }
        await self.ear.publish(f"{self._prefix}inference.{self._worker_id}", data, inbox, headers)
        return inbox

    async def answer(self, inbox: str) -> list[dict[str, Any]]:
        """All of an answer."""
        messages = []
        while not messages or messages[-1]["type"] not in {"done", "response", "error"}:
            messages.append(await self.ear.next(inbox))
        return messages

    async def cancel(self, request_id: str, attempt: int = 1) -> None:
        body = json.dumps({"requestId": request_id, "attempt": attempt}).encode()
        await self.ear.publish(f"{self._prefix}cancel.{self._worker_id}", body)


@pytest.fixture
async def ear(nats: NatsServer, nats_prefix: str) -> AsyncIterator[Ear]:
    async with Ear(nats.url, f"{nats_prefix}worker.>") as ear:
        yield ear


@pytest.fixture
async def parrot(nats: NatsServer, nats_prefix: str, ear: Ear) -> AsyncIterator[Asker]:
    node = WorkerNode(
        Parrot(), config=settings(nats.url, nats_prefix), worker_id="parrot", max_concurrent=1, max_queue=2
    )
    await node.start()
    await ear.next(f"{nats_prefix}worker.register")  # whoever hears this may ask
    yield Asker(ear, nats_prefix, "parrot")
    await node.stop(1)


@pytest.mark.nats
async def test_a_worker_registers_and_beats_as_it_is_written(
    nats: NatsServer, nats_prefix: str, ear: Ear
) -> None:
    node = WorkerNode(Parrot(), config=settings(nats.url, nats_prefix), worker_id="parrot")
    await node.start()
    try:
        registration = await ear.next(f"{nats_prefix}worker.register")
        expected = shape(golden("registration.json", "every field")["message"])
        expected["skills"]["modelPaths"] = shape(registration["skills"]["modelPaths"])
        assert {key: shape(registration[key]) for key in expected} == expected
        assert (registration["protocol"], registration["workerId"]) == (1, "parrot")
        assert registration["skills"]["availableModels"] == ["parrot"]
        assert registration["status"] == "online"
        beats = [await ear.next(f"{nats_prefix}worker.heartbeat") for _ in range(2)]
        assert shape(beats[0]) == shape(golden("heartbeat.json", "every field")["message"])
        assert beats[0]["incarnation"] == registration["incarnation"]
        assert beats[1]["sequence"] == beats[0]["sequence"] + 1
        assert beats[0]["metrics"]["modelsLoaded"] == ["parrot"]
        assert (beats[0]["phase"], beats[0]["activeRequestIds"]) == ("ready", [])
    finally:
        await node.stop(1)
    deregistration = await ear.next(f"{nats_prefix}worker.deregister")
    assert shape(deregistration) == shape(golden("deregistration.json", "every field")["message"])


@pytest.mark.nats
async def test_a_worker_registers_again_when_it_is_asked(parrot: Asker, nats_prefix: str) -> None:
    hello = json.dumps(golden("controller.json", "hello")["message"]).encode()
    await parrot.ear.publish(f"{nats_prefix}controller.hello", hello)
    again = await parrot.ear.next(f"{nats_prefix}worker.register")
    await parrot.ear.publish(f"{nats_prefix}worker.parrot.reregister")
    once_more = await parrot.ear.next(f"{nats_prefix}worker.register")
    assert again["incarnation"] == once_more["incarnation"]


@pytest.mark.nats
async def test_a_worker_streams_as_it_is_written(parrot: Asker) -> None:
    inbox = await parrot.ask({"requestId": "r-1", "prompt": "one two three", "stream": True})
    accepted, *tokens, done = await parrot.answer(inbox)
    assert accepted == {"requestId": "r-1", "type": "accepted", "queuePosition": 0}
    assert "".join(token["token"] for token in tokens) == "onetwothree"
    index = 0
    for token in tokens:
        assert token["index"] == index
        index += len(token["tokenIds"])
    assert index == 6
    expected = golden("replies.json", "done")["message"]
    assert shape(without(done, "toolCalls")) == shape(expected)
    assert done["usage"] == {"promptTokens": 3, "completionTokens": 6, "cachedTokens": 1}
    assert (done["totalTokens"], done["finishReason"]) == (6, "stop")


def without(message: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


@pytest.mark.nats
async def test_a_worker_answers_a_buffered_request_in_one_piece(parrot: Asker) -> None:
    inbox = await parrot.ask({"requestId": "r-1", "prompt": "one two three", "stream": False})
    accepted, response = await parrot.answer(inbox)
    assert accepted["type"] == "accepted"
    assert (response["type"], response["text"], response["totalTokens"]) == ("response", "onetwothree", 6)
    assert response["usage"] == {"promptTokens": 3, "completionTokens": 6, "cachedTokens": 1}


@pytest.mark.nats
@pytest.mark.parametrize("case", REQUESTS, ids=ids(REQUESTS))
async def test_a_worker_takes_every_request(parrot: Asker, case: dict[str, Any]) -> None:
    body = {**case["message"], "modelId": "parrot", "prompt": "hi"}
    body.pop("messages", None)
    *_, end = await parrot.answer(await parrot.ask(body))
    assert end["type"] == ("done" if body.get("stream") else "response"), end
    assert end["requestId"] == body["requestId"]


@pytest.mark.nats
async def test_a_worker_hands_on_its_engines_error(parrot: Asker) -> None:
    _, error = await parrot.answer(await parrot.ask({"requestId": "r-1", "prompt": "broken", "stream": True}))
    assert error == {
        "requestId": "r-1",
        "type": "error",
        "error": "it broke",
        "code": "WORKER_UNAVAILABLE",
        "retryAfterMs": 7,
    }


@pytest.mark.nats
@pytest.mark.parametrize(
    "case", [case for case in MALFORMED if case["on"] == "inference"], ids=lambda case: case["name"]
)
async def test_a_worker_refuses_what_is_no_request(parrot: Asker, case: dict[str, Any]) -> None:
    *_, error = await parrot.answer(await parrot.ask(payload(case)))
    assert (error["type"], error["code"]) == ("error", "REQUEST_VALIDATION_FAILED")
    *_, end = await parrot.answer(
        await parrot.ask({"requestId": "r-2", "prompt": "still here", "stream": True})
    )
    assert end["type"] == "done"


@pytest.mark.nats
async def test_a_worker_refuses_a_model_that_it_does_not_have(parrot: Asker) -> None:
    *_, error = await parrot.answer(await parrot.ask({"requestId": "r-1", "modelId": "huge", "prompt": "hi"}))
    assert (error["type"], error["code"]) == ("error", "MODEL_NOT_FOUND")


@pytest.mark.nats
async def test_a_worker_stops_when_it_is_told_to(parrot: Asker, nats_prefix: str) -> None:
    running = await parrot.ask({"requestId": "r-1", "prompt": "forever", "stream": True})
    assert (await parrot.ear.next(running))["type"] == "accepted"
    assert (await parrot.ear.next(running))["type"] == "token"
    waiting = await parrot.ask({"requestId": "r-2", "prompt": "hi", "stream": True})
    position = (await parrot.ear.next(waiting))["queuePosition"]
    behind = await parrot.ask({"requestId": "r-3", "prompt": "hi", "stream": True})
    assert (await parrot.ear.next(behind)) == {
        "requestId": "r-3",
        "type": "accepted",
        "queuePosition": position + 1,
    }
    refused = await parrot.ask({"requestId": "r-4", "prompt": "hi", "stream": True})
    assert [message.get("code") for message in await parrot.answer(refused)] == ["WORKER_OVERLOADED"]
    beat: dict[str, Any] = {"activeRequestIds": []}
    while sorted(beat["activeRequestIds"]) != ["r-1", "r-2", "r-3"]:
        beat = await parrot.ear.next(f"{nats_prefix}worker.heartbeat")
    assert (beat["metrics"]["activeRequests"], beat["queueDepth"]) == (3, 2)

    await parrot.cancel("r-1", attempt=2)  # another attempt: not this one
    assert (await parrot.ear.next(running))["type"] == "token"
    await parrot.cancel("r-1")
    *_, error = await parrot.answer(running)
    assert (error["type"], error["code"]) == ("error", "CANCELLED")
    assert (await parrot.answer(waiting))[-1]["type"] == "done"
    assert (await parrot.answer(behind))[-1]["type"] == "done"


@pytest.mark.nats
async def test_a_worker_stops_by_itself_when_time_is_up(parrot: Asker) -> None:
    running = await parrot.ask({"requestId": "r-1", "prompt": "forever", "stream": True}, timeout_ms=400)
    assert (await parrot.ear.next(running))["type"] == "accepted"
    begun = time.monotonic()
    waiting = await parrot.ask({"requestId": "r-2", "prompt": "hi", "stream": True}, timeout_ms=100)
    *_, error = await parrot.answer(waiting)
    assert (error["type"], error["code"]) == ("error", "WORKER_TIMEOUT")
    *_, error = await parrot.answer(running)
    assert (error["type"], error["code"]) == ("error", "WORKER_TIMEOUT")
    assert time.monotonic() - begun < 1


@pytest.mark.nats
async def test_a_worker_is_found_by_service_discovery(parrot: Asker) -> None:
    await parrot.ear.hear("_INBOX.services")
    await parrot.ear.publish("$SRV.PING.mlx-worker", reply="_INBOX.services")
    pong = await parrot.ear.next("_INBOX.services")
    assert pong["name"] == "mlx-worker"


@pytest.mark.nats
async def test_the_product_understands_itself(nats: NatsServer, nats_prefix: str) -> None:
    node = WorkerNode(Parrot(), config=settings(nats.url, nats_prefix), worker_id="parrot")
    await node.start()
    try:
        async with ControllerNode(settings(nats.url, nats_prefix)) as controller:
            await controller.wait_for_workers(1, timeout=PATIENCE)
            request = ask(model_id="parrot", messages=None, prompt="one two")
            assert (await controller.handle_buffered_request(request)).text == "onetwo"
            events = await read(
                await controller.handle_streaming_request(ask(model_id="parrot", messages=None, prompt="a b"))
            )
            assert "".join(event.text for event in events) == "ab"
            with pytest.raises(ControllerError, match="it broke"):
                await controller.handle_buffered_request(
                    ask(model_id="parrot", messages=None, prompt="broken"), worker_id="parrot"
                )
    finally:
        await node.stop(1)


@pytest.mark.nats
async def test_limits_begin_when_a_model_is_loaded(nats: NatsServer, nats_prefix: str) -> None:
    limits = {"timeoutMs": 300, "modelLoadTimeoutMs": 60_000, "retry": {"enabled": False}}
    async with Cluster(nats.url, nats_prefix, plan=stalls(), requestRouting=limits) as cluster:
        worker = cluster.worker
        worker.loading = ["tiny"]
        await worker.beat()
        await until(lambda: cluster.info(worker).loading_models, "it loads")
        call = asyncio.create_task(failure(cluster.controller.handle_buffered_request(ask())))
        await worker.asked()
        done, _ = await asyncio.wait({call}, timeout=0.6)
        assert not done
        worker.loading = []
        await worker.beat()
        async with asyncio.timeout(PATIENCE):
            error = await call
        assert (error.code, error.context["limit"]) == ("WORKER_TIMEOUT", "total")
        await worker.told_to_stop()


@pytest.mark.nats
async def test_a_model_that_turns_out_to_be_loading_gets_its_time(nats: NatsServer, nats_prefix: str) -> None:
    release = asyncio.Event()
    limits = {"streamingTimeoutMs": 400, "modelLoadTimeoutMs": 60_000, "retry": {"enabled": False}}
    plan = waits(release, answers())
    async with Cluster(nats.url, nats_prefix, plan=plan, requestRouting=limits) as cluster:
        worker = cluster.worker
        call = asyncio.create_task(cluster.streaming())
        await worker.asked()
        worker.loading = ["tiny"]
        await worker.beat()
        done, _ = await asyncio.wait({call}, timeout=0.8)
        assert not done
        release.set()
        async with asyncio.timeout(PATIENCE):
            assert text(await read(await call)) == ANSWER
