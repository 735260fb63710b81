"""A worker in front of a server that speaks the OpenAI API, such as mlx_lm.server: each request is asked of it.

python examples/engines/openai_server.py http://127.0.0.1:8081/v1 llama
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import openai

import mlx_serving_router as msr

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_STANDARD = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "tools",
    "response_format",
)
_BEYOND = ("top_k", "min_p", "repetition_penalty")  # not of the API, but known to most servers of open models
_OURS_TO_BLAME = (
    401,
    403,
    408,
)  # a key that is wrong and a request that was slow are no mistakes of the caller


class OpenAIServer:
    """A handler: it is called for every request and yields the pieces of its answer.

    Args:
        base_url: Of the server, with `/v1` where it has that.
        model: The name that the server knows the model by; `None`: the one that requests ask for.
        api_key: Where the server wants one.
    """

    def __init__(self, base_url: str, *, model: str | None = None, api_key: str = "none") -> None:
        self._model = model
        # Retries and limits on time are the router's business: it asks another worker meanwhile, and cancels this one.
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=openai.Timeout(None, connect=5.0)
        )

    async def __call__(self, request: msr.InferenceRequest) -> AsyncIterator[msr.TokenEvent | msr.Finish]:
        """Asks the server, and hands on what it says.

        Raises:
            ControllerError: WORKER_OVERLOADED, REQUEST_VALIDATION_FAILED or WORKER_UNAVAILABLE.
        """
        reason: str | None = None
        usage: msr.Usage | None = None
        calls = ToolCalls()
        try:
            # Leaving the block closes the connection, and so ends the server's work: a cancellation leaves it, too.
            async with await self._asked(request) as stream:
                async for chunk in stream:
                    usage = usage_of(chunk) or usage
                    for choice in chunk.choices[:1]:
                        reason = choice.finish_reason or reason
                        text = choice.text if request.messages is None else choice.delta.content
                        if request.messages is not None:
                            calls.add(choice.delta.tool_calls or ())
                        if text:
                            logprobs = choice.logprobs and choice.logprobs.model_dump()
                            yield msr.TokenEvent(text, logprobs=logprobs)
        except openai.APIError as error:
            raise told(error) from error
        if reason is None:
            raise msr.ControllerError("WORKER_UNAVAILABLE", "the server's stream ended before its answer did")
        known = {"length": "length", "tool_calls": "tool_calls"}
        yield msr.Finish(reason=known.get(reason, "stop"), usage=usage, tool_calls=calls.whole() or None)

    async def _asked(self, request: msr.InferenceRequest) -> openai.AsyncStream[Any]:
        parameters: dict[str, Any] = {
            "model": self._model or request.model_id,
            "stream": True,
            "stream_options": {"include_usage": True},
            **given(request, _STANDARD),
            "extra_body": given(request, _BEYOND),
        }
        if request.messages is None:
            return await self._client.completions.create(prompt=request.prompt, **parameters)
        if request.tools and request.tool_choice is not None:
            parameters["tool_choice"] = request.tool_choice
        if request.logprobs is not None:
            parameters |= {"logprobs": True, "top_logprobs": request.logprobs}
        return await self._client.chat.completions.create(messages=request.messages, **parameters)


class ToolCalls:
    """Calls of tools, which come in pieces."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, pieces: Any) -> None:
        """Takes the pieces of one chunk."""
        for piece in pieces:
            empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            call = self._calls.setdefault(piece.index, empty)
            call["id"] += piece.id or ""
            call["function"]["name"] += piece.function.name or ""
            call["function"]["arguments"] += piece.function.arguments or ""

    def whole(self) -> list[dict[str, Any]]:
        """All of them."""
        return [call for _, call in sorted(self._calls.items())]


def given(request: msr.InferenceRequest, names: tuple[str, ...]) -> dict[str, Any]:
    """What the caller has set: the rest is left to the server."""
    return {name: value for name in names if (value := getattr(request, name)) not in (None, [], {})}


def usage_of(chunk: Any) -> msr.Usage | None:
    """What the last chunk of a stream says."""
    if chunk.usage is None:
        return None
    details = chunk.usage.prompt_tokens_details
    cached = (details and details.cached_tokens) or 0
    return msr.Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, cached)


def told(error: openai.APIError) -> msr.ControllerError:
    """A failure in the router's words. What the server says of it stays here: it may quote the prompt."""
    if not isinstance(error, openai.APIStatusError):
        return msr.ControllerError(
            "WORKER_UNAVAILABLE", f"the server cannot be reached, or broke off: {type(error).__name__}"
        )
    status = error.status_code
    if status == 429:
        wait = retry_after_ms(error.response.headers)
        context = None if wait is None else {"retry_after_ms": wait}
        return msr.ControllerError("WORKER_OVERLOADED", "the server has too much to do", context=context)
    if 400 <= status < 500 and status not in _OURS_TO_BLAME:
        what = f", because of {error.param}" if error.param else ""
        return msr.ControllerError(
            "REQUEST_VALIDATION_FAILED", f"the server refused it with status {status}{what}"
        )
    return msr.ControllerError("WORKER_UNAVAILABLE", f"the server answered with status {status}")


def retry_after_ms(headers: Mapping[str, str]) -> int | None:
    """Retry-After (RFC 9110, 10.2.3) in milliseconds: seconds, or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0, round(float(value) * 1000))
    except (ValueError, OverflowError):
        pass
    try:
        left = parsedate_to_datetime(value) - datetime.now(UTC)
    except (ValueError, TypeError):
        return None
    return max(0, round(left.total_seconds() * 1000))


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the server's base URL, with /v1")
    parser.add_argument("name", help="what requests call the model")
    parser.add_argument("--upstream-model", help="what the server calls it (default: the same)")
    parser.add_argument("--max-concurrent", type=int, default=16, help="requests at a time (default 16)")
    options = parser.parse_args()
    server = OpenAIServer(
        options.url, model=options.upstream_model, api_key=os.environ.get("OPENAI_API_KEY", "none")
    )
    msr.WorkerNode(server, models=[options.name], max_concurrent=options.max_concurrent).run()


if __name__ == "__main__":
    main()
