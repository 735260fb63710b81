"""The OpenAI API's addresses: headers in, the codec's bytes out. What bodies mean is the codec's business."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

# Not for type checking alone: FastAPI reads the annotations.
from starlette.requests import Request  # noqa: TC002
from starlette.responses import Response  # noqa: TC002

from mlx_serving_router import _keys, _native
from mlx_serving_router._errors import ControllerError, ControllerErrorCode
from mlx_serving_router._http import (
    WORKER_ID,
    HttpError,
    get_controller,
    json_bytes,
    read_body,
    request_id,
    until_disconnect,
)
from mlx_serving_router._sse import EventStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mlx_serving_router._native import CompletionCall, RelayedCall

_WORKER_ID: Final = WORKER_ID.encode()
_READ: Final = {_WORKER_ID, b"x-session-id", b"traceparent"}
# Models have no birthday here; clients want one that stays.
_STARTED: Final = int(time.time())


class Endpoint:
    """An endpoint that the fleet answers, with what the configuration says of it.

    Args:
        parse: Reads its bodies.
        summary: What it does.
        settings: The section `controller`, with camelCase keys.
    """

    def __init__(
        self, parse: Callable[..., CompletionCall | RelayedCall], summary: str, settings: Mapping[str, Any]
    ) -> None:
        self.__doc__ = summary
        # FastAPI names the operation after it.
        self.__name__ = summary.lower().replace(" ", "_")
        self._parse = parse
        self._max_body: int = settings["maxBodyBytes"]
        self._keepalive = settings["sseKeepalive"]
        self._keepalive_seconds: float = settings["sseKeepaliveIntervalMs"] / 1000

    async def __call__(self, request: Request) -> Response:
        controller = get_controller(request)
        name = request_id(request)
        # One pass over them all: ASGI has their names in lower case.
        headers = {name: value.decode("latin-1") for name, value in request.scope["headers"] if name in _READ}
        body = await read_body(request, self._max_body)
        call = self._parse(body, request_id=name, session_id=headers.get(b"x-session-id"))
        worker_id = headers.get(_WORKER_ID)
        traceparent = headers.get(b"traceparent")
        place = _keys.place(request)
        if call.stream:
            return EventStream(
                lambda: controller.handle_streaming_request(
                    call.request, worker_id=worker_id, traceparent=traceparent
                ),
                call.stream_encoder(int(time.time())),
                request_id=name,
                place=place,
                keepalive=self._keepalive,
                keepalive_seconds=self._keepalive_seconds,
            )
        with place:
            answer = await until_disconnect(
                request.receive,
                controller.handle_buffered_request(
                    call.request, worker_id=worker_id, traceparent=traceparent
                ),
            )
        return json_bytes(call.encode(answer, int(time.time())), headers={WORKER_ID: answer.worker_id})


def chat_completions(settings: Mapping[str, Any]) -> Endpoint:
    """The endpoint of conversations."""
    return Endpoint(_native.CompletionCall.chat, "Answer a conversation", settings)


def completions(settings: Mapping[str, Any]) -> Endpoint:
    """The endpoint of texts."""
    return Endpoint(_native.CompletionCall.text, "Continue a text", settings)


def embeddings(settings: Mapping[str, Any]) -> Endpoint:
    """The endpoint of embeddings, which servers over HTTP may have."""
    return Endpoint(_native.RelayedCall.embeddings, "Embed texts", settings)


def responses(settings: Mapping[str, Any]) -> Endpoint:
    """The endpoint of responses, which servers over HTTP may have."""
    return Endpoint(_native.RelayedCall.responses, "Create a response", settings)


async def not_carried(request: Request) -> Response:
    """An endpoint that no worker can have: what runs between controllers and workers carries completions alone."""
    what = request.url.path.rsplit("/", 1)[-1]
    raise HttpError(
        404,
        "unknown_url",
        f"no worker serves {what}: only servers in workers.static can, and the configuration names none",
    )


async def models(request: Request) -> Response:
    """What is served."""
    return json_bytes(_native.openai_models(get_controller(request).cluster_status().models, _STARTED))


async def model(request: Request, model_id: str) -> Response:
    """One model that is served."""
    if model_id not in get_controller(request).cluster_status().models:
        raise ControllerError(
            ControllerErrorCode.MODEL_NOT_FOUND,
            "no online worker serves this model; GET /v1/models lists what is served",
        )
    return json_bytes(_native.openai_model(model_id, _STARTED))
