"""openai-python, 2.x and 3.x."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from front import KEY, LIVELY, MESSAGES, TOOLS, URL, cancelled, requests_of, session
from openai import AsyncOpenAI, OpenAI

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def client() -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def streamed(client: OpenAI, model: str, **more: Any) -> list[Any]:
    return list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **more))


def text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello, world", "stop")
    chunks = streamed(client, "tiny", stream_options={"include_usage": True})
    assert text(chunks) == "Hello, world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], answer.usage.completion_tokens)
    assert client.completions.create(model="tiny", prompt="Once").choices[0].text == "Hello, world"
    pieces = client.completions.create(model="tiny", prompt="Once", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello, world"
    assert "tiny" in [model.id for model in client.models.list()]


def test_what_a_server_over_http_has(client: OpenAI) -> None:
    # It is found a moment after the start: the client comes again.
    patient = client.with_options(max_retries=5)
    vectors = patient.embeddings.create(model="inner", input=["Hello", "world"])
    assert [one.embedding for one in vectors.data] == [[1.0, 2.0], [1.0, 2.0]]
    assert client.responses.create(model="inner", input="Hello").output_text == "Hello"
    with client.responses.stream(model="inner", input="Hello") as stream:
        assert stream.get_final_response().output_text == "Hello"
    for create in (client.embeddings.create, client.responses.create):
        with pytest.raises(openai.NotFoundError):
            create(model="tiny", input="Hello")
    with pytest.raises(openai.APIError):
        list(client.responses.create(model="inner", input="break", stream=True))


def test_signs_of_life_are_skipped(client: OpenAI) -> None:
    with client.with_options(base_url=f"{LIVELY}/v1") as lively:
        assert text(streamed(lively, "late")) == "Hello, world"


def test_tools(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="calls", messages=MESSAGES, tools=TOOLS)
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls or []
    assert [(call.id, call.function.arguments) for call in calls] == [
        ("call_1", '{"city": "Rome"}'),
        ("call_2", '{"city": "Oslo"}'),
    ]
    with client.chat.completions.stream(model="calls", messages=MESSAGES, tools=TOOLS) as stream:
        stream.until_done()
        gathered = stream.get_final_completion()
    assert gathered.choices[0].finish_reason == "tool_calls"
    assert [call.to_dict()["function"]["name"] for call in gathered.choices[0].message.tool_calls or []] == [
        "weather",
        "weather",
    ]
    # The conversation goes on with what the functions gave.
    assistant: Any = answer.choices[0].message.to_dict()
    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    more = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, assistant, *results], tools=TOOLS
    )
    assert more.choices[0].message.content == "Hello, world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("none", openai.NotFoundError, "MODEL_NOT_FOUND"),
        ("refuses", openai.BadRequestError, "REQUEST_VALIDATION_FAILED"),
        ("fails", openai.InternalServerError, "ALL_RETRIES_EXHAUSTED"),
    ],
)
def test_errors(
    client: OpenAI, model: str, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
    assert caught.value.code == code
    assert caught.value.request_id


def test_a_wrong_key_and_a_limit(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    slow = client.with_options(api_key="slow down")
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(2):
            slow.chat.completions.create(model="tiny", messages=MESSAGES)
    assert caught.value.code == "rate_limit_exceeded"


def test_a_stream_that_breaks_raises(client: OpenAI) -> None:
    received = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model="breaks", messages=MESSAGES, stream=True):
            received.append(chunk)
    assert text(received) == "Hel"
    assert caught.value.code == "STREAM_INTERRUPTED"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_router_has_tried_the_client_does_not_try_again(client: OpenAI, stream: bool) -> None:
    own = session()
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=3).chat.completions.create(
            model="fails", messages=MESSAGES, user=own, stream=stream
        )
    [request] = requests_of(own)
    assert request["retryCount"] == 2


def test_what_may_succeed_later_the_client_tries_again(client: OpenAI) -> None:
    own = session()
    answer = client.with_options(max_retries=3).chat.completions.create(
        model="busy", messages=MESSAGES, user=own
    )
    assert answer.choices[0].message.content == "Hello, world"
    assert len(requests_of(own)) == 2


def test_a_client_that_leaves_stops_the_work(client: OpenAI) -> None:
    own = session()
    stream = client.chat.completions.create(model="babbles", messages=MESSAGES, user=own, stream=True)
    next(iter(stream))
    stream.close()
    assert cancelled(own)
    own = session()
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="babbles", messages=MESSAGES, user=own, timeout=0.5)
    assert cancelled(own)


def test_the_asynchronous_client() -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="tiny", messages=MESSAGES) for _ in range(20))
            )
            assert {answer.choices[0].message.content for answer in answers} == {"Hello, world"}
            own = session()
            stream: Any = await client.chat.completions.create(
                model="babbles", messages=MESSAGES, user=own, stream=True
            )
            async for _ in stream:
                break
            await stream.close()
            assert cancelled(own)

    asyncio.run(run())
