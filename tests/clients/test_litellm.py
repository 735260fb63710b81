"""litellm."""

from __future__ import annotations

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched over the network

import litellm
import pytest
from front import KEY, LIVELY, MESSAGES, TOOLS, URL, cancelled, requests_of, session


def complete(model: str, **more: Any) -> Any:
    options = {"max_retries": 0, "api_base": f"{URL}/v1", **more}
    return litellm.completion(model=f"openai/{model}", api_key=KEY, messages=MESSAGES, **options)


def text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_answers() -> None:
    answer = complete("tiny")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello, world", "stop")
    assert answer.usage.completion_tokens == 3
    chunks = list(complete("tiny", stream=True, stream_options={"include_usage": True}))
    assert text(chunks) == "Hello, world"
    assert "stop" in [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert text(complete("late", stream=True, api_base=f"{LIVELY}/v1")) == "Hello, world"


def test_what_a_server_over_http_has() -> None:
    options: dict[str, Any] = {"api_key": KEY, "api_base": f"{URL}/v1"}
    vectors = litellm.embedding(model="openai/inner", input=["Hello"], encoding_format="float", **options)
    assert vectors.data[0]["embedding"] == [1.0, 2.0]
    response = litellm.responses(model="openai/inner", input="Hello", **options)
    assert response.output[0].content[0].text == "Hello"


def test_tools() -> None:
    calls = complete("calls", tools=TOOLS).choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"city": "Rome"}'),
        ("weather", '{"city": "Oslo"}'),
    ]
    chunks = list(complete("calls", tools=TOOLS, stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert [call.function.arguments for call in whole.choices[0].message.tool_calls] == [
        call.function.arguments for call in calls
    ]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("none", litellm.NotFoundError),
        ("refuses", litellm.BadRequestError),
        ("fails", litellm.ServiceUnavailableError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(model: str, error: type[Exception], stream: bool) -> None:
    with pytest.raises(error):
        complete(model, stream=stream)


def test_a_stream_that_breaks_raises() -> None:
    received = []
    with pytest.raises(Exception, match="broke"):
        for chunk in complete("breaks", stream=True):
            received.append(chunk)
    assert text(received) == "Hel"


def test_what_the_router_has_tried_is_not_tried_again() -> None:
    own = session()
    with pytest.raises(litellm.ServiceUnavailableError):
        complete("fails", max_retries=3, extra_body={"session_id": own})
    assert len(requests_of(own)) == 1
    own = session()
    assert (
        complete("busy", max_retries=3, extra_body={"session_id": own}).choices[0].message.content
        == "Hello, world"
    )
    assert len(requests_of(own)) == 2


def test_leaving_stops_the_work() -> None:
    own = session()
    stream = complete("babbles", stream=True, extra_body={"session_id": own})
    next(iter(stream))
    stream.completion_stream.close()
    assert cancelled(own)
