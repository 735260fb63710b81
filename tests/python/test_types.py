"""The data classes: frozen, typed, picklable, with dictionaries of the wire, and without secrets in their `repr`."""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import pytest

from mlx_serving_router import (
    InferenceRequest,
    InferenceResponse,
    RequestMetadata,
    Router,
    TokenEvent,
    Usage,
    WorkerInfo,
)

ALL: dict[str, Any] = {
    "requestId": "r-1",
    "modelId": "tiny",
    "messages": [{"role": "user", "content": "a secret \u00e9\U0001f600"}],
    "maxTokens": 16,
    "temperature": 0.5,
    "topP": 0.25,
    "topK": 3,
    "minP": 0.125,
    "seed": 7,
    "stop": ["\n\n"],
    "repetitionPenalty": 1.5,
    "presencePenalty": 0.5,
    "frequencyPenalty": -0.5,
    "logitBias": {"50256": -100},
    "logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "toolChoice": "auto",
    "responseFormat": {"type": "text"},
    "sessionId": "s-1",
    "stream": True,
    "priority": "high",
    "resume": {"tokenIds": [1, 2], "text": "another secret"},
}

METADATA: dict[str, Any] = {
    "requestId": "r-1",
    "modelId": "tiny",
    "sessionId": None,
    "startTime": 1_762_732_800_000,
    "endTime": 1_762_732_800_250,
    "durationMs": 250.5,
    "timeToFirstTokenMs": None,
    "retryCount": 1,
    "selectedWorker": "w-2",
    "failedWorkers": ["w-1"],
    "circuitBreakerTrips": 0,
    "timeouts": 1,
    "finalError": {"code": "WORKER_TIMEOUT", "message": "late"},
    "status": "failed",
    "tokens": 0,
    "attempts": [
        {
            "workerId": "w-1",
            "startedMs": 1_762_732_800_001,
            "durationMs": 100.0,
            "code": "WORKER_TIMEOUT",
            "choice": "strategy",
            "leftOut": [{"workerId": "w-3", "reason": "full"}],
        }
    ],
}

RESPONSE: dict[str, Any] = {
    "requestId": "r-1",
    "modelId": "tiny",
    "workerId": "w-2",
    "text": "Hello",
    "finishReason": "length",
    "usage": {"promptTokens": 9, "completionTokens": 12, "cachedTokens": 4, "totalTokens": 21},
    "toolCalls": [{"id": "c"}],
    "logprobs": None,
    "metadata": METADATA,
}


# === requests ===


def test_a_request_has_the_fields_of_the_wire() -> None:
    request = InferenceRequest.from_dict(ALL)
    assert request.to_dict() == ALL
    assert request.messages == ALL["messages"]
    assert (request.max_tokens, request.top_p, request.stop, request.priority) == (16, 0.25, ["\n\n"], "high")
    assert request.logit_bias == {"50256": -100}
    assert request.tool_choice == "auto"
    assert request.resume == ALL["resume"]


def test_a_request_made_with_keywords_is_the_same() -> None:
    snake = {
        "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key): value
        for key, value in ALL.items()
    }
    assert InferenceRequest(**snake) == InferenceRequest.from_dict(ALL)


def test_what_is_not_set_is_none_and_not_sent() -> None:
    request = InferenceRequest(model_id="tiny", prompt="Hello", temperature=None)
    assert set(request.to_dict()) == {"requestId", "modelId", "prompt", "stream", "priority"}
    assert request.temperature is None
    assert request.messages is None
    assert (request.stream, request.priority) == (False, "normal")


def test_a_request_gets_an_id() -> None:
    one, other = (InferenceRequest(model_id="tiny", prompt="Hello") for _ in range(2))
    assert one.request_id != other.request_id
    assert str(uuid.UUID(one.request_id)) == one.request_id
    assert InferenceRequest.from_dict({"modelId": "tiny"}).request_id


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"max_tokens": "16"}, TypeError, "max_tokens is of type str; int is right"),
        ({"max_tokens": True}, TypeError, "max_tokens is of type bool; int is right"),
        ({"max_tokens": 2**64}, ValueError, "max_tokens is beyond 64 bits"),
        ({"temperature": "hot"}, TypeError, "temperature is of type str; float is right"),
        ({"prompt": b"Hello"}, TypeError, "prompt is of type bytes; str is right"),
        ({"stop": [1]}, TypeError, r"stop\[0\] is of type int; str is right"),
        ({"messages": "Hello"}, TypeError, "messages is of type str; list of dict is right"),
        ({"messages": ["Hello"]}, TypeError, r"messages\[0\] is of type str; dict is right"),
        ({"tools": {}}, TypeError, "tools is of type dict; list of dict is right"),
        ({"tool_choice": 1}, TypeError, "tool_choice is of type int; str or dict is right"),
        ({"response_format": "json"}, TypeError, "response_format is of type str; dict is right"),
        ({"logit_bias": [1]}, TypeError, "logit_bias is of type list; dict is right"),
        ({"stream": 1}, TypeError, "stream is of type int; bool is right"),
        ({"priority": 1}, TypeError, "priority is of type int; str is right"),
        ({"messages": [{"content": object()}]}, TypeError, r"messages\[0\].content: is of type object"),
        ({"messages": [{"content": float("nan")}]}, ValueError, r"messages\[0\].content: is NaN"),
        ({"messages": [{1.5: "x"}]}, TypeError, r"messages\[0\]: has a key of type float; str is right"),
        ({"prompt": "\ud800"}, ValueError, "half a character"),
        ({"messages": [{"content": "\ud800"}]}, ValueError, r"messages\[0\].content: holds half a character"),
        ({"max_token": 1}, TypeError, "no field max_token; did you mean max_tokens"),
        ({"model_id": None}, TypeError, "model_id is of type NoneType; str is right"),
    ],
)
def test_a_wrong_type_is_named(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        InferenceRequest(**{"model_id": "tiny", **fields})


def test_endless_nesting_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(ValueError, match="nested more than"):
        InferenceRequest(model_id="tiny", tools=[{"ring": ring}])


def test_only_types_are_checked() -> None:
    assert InferenceRequest(model_id="", max_tokens=-1, temperature=-2.0).max_tokens == -1
    urgent = InferenceRequest(model_id="tiny", prompt="Hello", priority="urgent")  # type: ignore[arg-type]
    assert urgent.priority == "urgent"


def test_tuples_and_mappings_are_taken() -> None:
    from types import MappingProxyType

    message = MappingProxyType({"role": "user", "content": ("a", "b")})
    request = InferenceRequest(model_id="tiny", messages=(message,), logit_bias={7: 1}, stop="\n")
    assert request.messages == [{"role": "user", "content": ["a", "b"]}]
    assert request.logit_bias == {"7": 1}
    assert request.stop == ["\n"]


def test_a_request_never_shows_its_prompt() -> None:
    shown = repr(InferenceRequest.from_dict(ALL))
    assert "secret" not in shown
    assert "messages=<" in shown
    assert "r-1" in shown
    assert "secret" not in repr(InferenceRequest(model_id="tiny", prompt="a secret"))


# === answers ===


def test_a_response_has_its_parts() -> None:
    response = InferenceResponse.from_dict(RESPONSE)
    assert response.to_dict() == RESPONSE
    assert (response.text, response.finish_reason, response.worker_id) == ("Hello", "length", "w-2")
    assert response.usage == Usage(9, 12, 4)
    assert response.usage.total_tokens == 21
    assert response.tool_calls == [{"id": "c"}]
    assert response.metadata == RequestMetadata.from_dict(METADATA)
    assert InferenceResponse.from_dict({**RESPONSE, "toolCalls": []}).tool_calls == []


def test_a_response_shows_the_beginning_of_its_text() -> None:
    response = InferenceResponse.from_dict({**RESPONSE, "text": "it's " + "x" * 100})
    assert f'text="it\'s {"x" * 55}"…' in repr(response)


def test_metadata_has_its_parts() -> None:
    metadata = RequestMetadata.from_dict(METADATA)
    assert metadata.to_dict() == METADATA
    assert metadata.final_error == {"code": "WORKER_TIMEOUT", "message": "late"}
    assert metadata.attempts == [
        {
            "worker_id": "w-1",
            "started_ms": 1_762_732_800_001,
            "duration_ms": 100.0,
            "code": "WORKER_TIMEOUT",
            "choice": "strategy",
            "left_out": [{"worker_id": "w-3", "reason": "full"}],
        }
    ]
    assert (metadata.status, metadata.retry_count, metadata.failed_workers) == ("failed", 1, ["w-1"])


def test_an_event_is_a_token_of_the_wire() -> None:
    event = TokenEvent("Hel", index=3, token_ids=[9906], logprobs={"content": []})
    assert (event.text, event.index, event.token_ids) == ("Hel", 3, [9906])
    assert event.logprobs == {"content": []}
    assert TokenEvent.from_dict(
        {"token": "Hel", "index": 3, "tokenIds": [9906], "type": "token"}
    ) == TokenEvent("Hel", index=3, token_ids=[9906])
    with pytest.raises(TypeError):
        TokenEvent(5)  # type: ignore[arg-type]


def test_another_shape_is_refused_without_quoting_it() -> None:
    for kind in (InferenceResponse, RequestMetadata, WorkerInfo, Usage, TokenEvent):
        with pytest.raises(TypeError, match=kind.__name__) as caught:
            kind.from_dict({"promptTokens": "a secret", "index": "a secret"})
        assert "secret" not in str(caught.value)


# === all ===


def worker() -> WorkerInfo:
    router = Router()
    router.add_worker("w-1", ["tiny"], max_concurrent=4)
    return router.workers()[0]


@pytest.mark.parametrize(
    "value",
    [
        InferenceRequest.from_dict(ALL),
        InferenceResponse.from_dict(RESPONSE),
        RequestMetadata.from_dict(METADATA),
        TokenEvent("Hel", index=3, token_ids=[9906]),
        Usage(1, 2, 3),
        worker(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_frozen_and_survives_its_copies(value: Any) -> None:
    for copied in (pickle.loads(pickle.dumps(value)), type(value).from_dict(value.to_dict())):
        assert copied == value
        assert hash(copied) == hash(value)
        assert repr(copied) == repr(value)
    assert value != 1
    assert type(value).__name__ in repr(value)
    with pytest.raises(AttributeError):
        value.text = "another"
