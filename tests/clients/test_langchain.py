"""langchain-openai."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from front import KEY, LIVELY, TOOLS, URL, cancelled, requests_of, session
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


def chat(model: str, **more: Any) -> ChatOpenAI:
    options = {"max_retries": 0, "base_url": f"{URL}/v1", **more}
    return ChatOpenAI(model=model, api_key=KEY, **options)


def gathered(chunks: Any) -> Any:
    whole = AIMessageChunk(content="")
    for chunk in chunks:
        whole = whole + chunk
    return whole


def test_answers() -> None:
    answer = chat("tiny").invoke("Hello")
    assert answer.content == "Hello, world"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3
    streamed = gathered(chat("tiny", stream_usage=True).stream("Hello"))
    assert streamed.content == "Hello, world"
    assert streamed.response_metadata["finish_reason"] == "stop"
    assert streamed.usage_metadata["output_tokens"] == 3
    assert gathered(chat("late", base_url=f"{LIVELY}/v1").stream("Hello")).content == "Hello, world"


def test_what_a_server_over_http_has() -> None:
    options: dict[str, Any] = {"api_key": KEY, "base_url": f"{URL}/v1", "check_embedding_ctx_length": False}
    assert OpenAIEmbeddings(model="inner", **options).embed_documents(["Hello"]) == [[1.0, 2.0]]
    responding = chat("inner", use_responses_api=True)
    assert responding.invoke("Hello").text == "Hello"
    assert gathered(responding.stream("Hello")).text == "Hello"


def test_tools() -> None:
    for answer in (
        chat("calls").bind_tools(TOOLS).invoke("Hello"),
        gathered(chat("calls").bind_tools(TOOLS).stream("Hello")),
    ):
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
            ("weather", {"city": "Rome"}),
            ("weather", {"city": "Oslo"}),
        ]
        results = [ToolMessage("sunny", tool_call_id=call["id"]) for call in answer.tool_calls]
        assert chat("tiny").invoke([HumanMessage("Hello"), answer, *results]).content == "Hello, world"


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("none", openai.NotFoundError),
        ("refuses", openai.BadRequestError),
        ("fails", openai.InternalServerError),
    ],
)
def test_errors(model: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        chat(model).invoke("Hello")
    with pytest.raises(error):
        gathered(chat(model).stream("Hello"))


def test_a_stream_that_breaks_raises() -> None:
    received = []
    with pytest.raises(openai.APIError):
        for chunk in chat("breaks").stream("Hello"):
            received.append(chunk.content)
    assert "".join(received) == "Hel"


def test_what_the_router_has_tried_is_not_tried_again() -> None:
    own = session()
    with pytest.raises(openai.InternalServerError):
        chat("fails", max_retries=3, model_kwargs={"user": own}).invoke("Hello")
    assert len(requests_of(own)) == 1
    own = session()
    assert chat("busy", max_retries=3, model_kwargs={"user": own}).invoke("Hello").content == "Hello, world"
    assert len(requests_of(own)) == 2


def test_leaving_stops_the_work() -> None:
    async def run() -> None:
        own = session()
        stream = chat("babbles", model_kwargs={"user": own}).astream("Hello")
        async for chunk in stream:
            if chunk.content:
                break
        await stream.aclose()
        assert await asyncio.to_thread(cancelled, own)

    asyncio.run(run())
