"""A front-end as the commands `top`, `chat` and `bench` see it: over HTTP, like any other client of it.

Knows the shapes of its answers and tells what goes wrong in words. Any server that speaks the OpenAI API will do for
`chat` and `bench`.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import httpx

from mlx_serving_router._command import CommandError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

#: Seconds for a connection. Answers may take as long as the router lets them.
_CONNECT: Final = 5.0
#: Seconds for what no worker is asked for.
_LOOK: Final = 10.0


class AnswerError(Exception):
    """A request was answered with an error, before its first token or in the middle of a stream.

    Attributes:
        code: The router's code, or the HTTP status where the answer names none.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: What it adds.
        finish_reason: Why the answer ended, with its last part.
        completion_tokens: How many tokens the whole answer has, with the usage.
        worker_id: Who answered, of an answer in one piece.
    """

    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    worker_id: str | None = None


class FrontEnd:
    """A connection to one front-end, for use in `async with`.

    Args:
        url: Its address, with or without `http://` and `/v1`.
        api_key: One of its keys, where it wants one.
        concurrency: The most requests at a time.
    """

    def __init__(self, url: str, api_key: str | None = None, *, concurrency: int = 10) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(None, connect=_CONNECT),
                limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                trust_env=False,  # a proxy is for the world outside
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise CommandError(f"--url {url!r} is no address: {error}; http://host:port is right") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """What an address gives, as Python values.

        Raises:
            CommandError: Nobody answers, or with an error.
        """
        try:
            response = await self._http.get(path, timeout=_LOOK)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code == httpx.codes.NOT_FOUND and path.startswith("/api/"):
            raise CommandError(
                f"what answers at {self.url} is no front-end of this router: it has no {path}; --url names another"
            )
        if response.is_error:
            told = _error(response.status_code, response.content)
            advice = "; --api-key names a key" if response.status_code == httpx.codes.UNAUTHORIZED else ""
            raise CommandError(f"{self.url}{path} answers {response.status_code}: {told}{advice}")
        try:
            return response.json()
        except ValueError as error:
            raise CommandError(f"{self.url}{path} answers with something that is no JSON") from error

    async def models(self) -> list[str]:
        """What is served now.

        Raises:
            CommandError: Nobody answers, or with an error.
        """
        listing = await self.get("/v1/models")
        return [str(model["id"]) for model in listing.get("data", [])]

    async def choose(self, model: str | None) -> str:
        """The model that is meant: the one named, or the only one there is.

        Raises:
            CommandError: None is served, or there are several to choose from; nobody answers.
        """
        if model is not None:
            return model
        models = await self.models()
        if len(models) == 1:
            return models[0]
        if not models:
            raise CommandError(
                f"no worker serves a model at {self.url} now: start one with mlx-serving-router worker --model"
                " NAME=PATH, or see mlx-serving-router top"
            )
        raise CommandError(f"several models are served: choose one with --model ({', '.join(models)})")

    @asynccontextmanager
    async def answer(
        self, body: dict[str, Any], *, session_id: str | None = None
    ) -> AsyncIterator[tuple[str | None, AsyncIterator[Piece]]]:
        """Ask for a streamed answer: who gives it, and its parts as they come. Leaving it early ends it.

        Raises:
            AnswerError: It is answered with an error, at once or in the middle.
            CommandError: Nobody answers.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        headers = {"x-session-id": session_id} if session_id else {}
        try:
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=headers
            ) as response:
                if response.is_error:
                    raise _error(response.status_code, await response.aread())
                yield response.headers.get("x-worker-id"), _pieces(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx.HTTPError as error:
            raise AnswerError("connection lost", f"the connection broke: {error!r}") from error

    async def whole(self, body: dict[str, Any]) -> Piece:
        """Ask for an answer in one piece.

        Raises:
            AnswerError: It is answered with an error.
            CommandError: Nobody answers.
        """
        try:
            response = await self._http.post("/v1/chat/completions", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx.HTTPError as error:
            raise AnswerError("connection lost", f"the connection broke: {error!r}") from error
        if response.is_error:
            raise _error(response.status_code, response.content)
        answer = response.json()
        (choice, *_) = answer["choices"]
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        worker_id = response.headers.get("x-worker-id")
        return Piece(choice["message"].get("content") or "", choice.get("finish_reason"), tokens, worker_id)

    def _unreachable(self, error: httpx.HTTPError) -> CommandError:
        return CommandError(
            f"nobody answers at {self.url} ({str(error) or type(error).__name__}): start a front-end with"
            " mlx-serving-router serve or up, or name another one with --url"
        )


async def _pieces(response: httpx.Response) -> AsyncIterator[Piece]:
    ended = False
    async for line in response.aiter_lines():
        field, _, data = line.partition(":")
        if field != "data":
            continue
        data = data.strip()
        if data == "[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise _in_stream(chunk["error"])
        usage = chunk.get("usage") or {}
        tokens = usage.get("completion_tokens")
        for choice in chunk.get("choices", []):
            delta = choice.get("delta", {})
            yield Piece(delta.get("content") or "", choice.get("finish_reason"))
        if tokens is not None:
            yield Piece(completion_tokens=tokens)
    if not ended:
        raise AnswerError("cut off", "the answer ended without its end")


def _in_stream(error: Any) -> AnswerError:
    told = error if isinstance(error, dict) else {"message": error}
    return AnswerError(str(told.get("code") or "error"), str(told.get("message")))


def _error(status: int, content: bytes) -> AnswerError:
    try:
        told = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return AnswerError(f"HTTP {status}", content[:200].decode(errors="replace") or f"HTTP {status}")
    return (
        _in_stream(told)
        if not isinstance(told, dict) or told.get("code")
        else AnswerError(f"HTTP {status}", str(told.get("message")))
    )
