"""The official OpenAI client against the front-end: what it parses, and what it raises."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from mlx_serving_router.fastapi import create_app
from serving import Fleet, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(create_app(controller=Fleet().controller)) as served:
        yield f"{served}/v1"


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


# === answers ===


def test_a_chat_in_one_piece(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3


def test_a_chat_as_it_comes(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last, usage = chunks
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Hello, world"
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * len(pieces)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 3


def test_usage_is_left_out_unless_asked_for(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_clients_own_accumulator_reads_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "Hello, world"


def test_a_text(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Once upon a time")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello, world"
    chunks = list(client.completions.create(model="tiny", prompt="Once upon a time", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello, world"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_asynchronous_client(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello, world"
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Hello, world"


def test_parameters_reach_the_worker(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
        ],
        max_completion_tokens=5,
        temperature=0,
        stop="\n",
        seed=7,
        user="someone",
        extra_body={"top_k": 3, "an_unknown_one": True},
    )
    asked = json.loads(answer.choices[0].message.content or "")
    assert asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert (asked["maxTokens"], asked["temperature"], asked["stop"], asked["seed"]) == (5, 0, ["\n"], 7)
    assert (asked["topK"], asked["sessionId"]) == (3, "someone")
    assert asked["requestId"] in answer.id


def test_models(client: OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/none")
    assert (caught.value.code, caught.value.param) == ("MODEL_NOT_FOUND", "model")


# === errors ===


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "error", "status", "code"),
    [
        ("none", openai.NotFoundError, 404, "MODEL_NOT_FOUND"),
        ("refuses", openai.BadRequestError, 400, "REQUEST_VALIDATION_FAILED"),
        ("full", openai.RateLimitError, 429, "WORKER_OVERLOADED"),
        ("fails", openai.InternalServerError, 503, "WORKER_UNAVAILABLE"),
    ],
)
def test_an_error_is_raised_as_what_it_is(
    client: OpenAI, model: str, error: type[openai.APIStatusError], status: int, code: str, *, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.request_id
    assert isinstance(caught.value, openai.APIStatusError)


def test_a_bad_field_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1)
    assert (caught.value.param, caught.value.type) == ("max_tokens", "invalid_request_error")
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=image)
    assert caught.value.param == "messages[0].content[0]"


def test_the_client_is_told_when_to_come_back(client: OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="full", messages=MESSAGES)
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1500")


def test_a_stream_that_breaks_raises(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="breaks", messages=MESSAGES, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 what came before the break is looked at
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "Hel"
    assert caught.value.code == "STREAM_INTERRUPTED"


def test_an_unknown_endpoint_is_an_error_that_the_client_reads(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="tiny", input="Hello")
    assert caught.value.code == "unknown_url"


def test_a_wrong_key_is_an_authentication_error() -> None:
    fleet = Fleet(apiKeys=["right", "also right"])
    with serve(create_app(controller=fleet.controller)) as url:
        for key in ("right", "also right"):
            with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices
        with (
            OpenAI(base_url=f"{url}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
