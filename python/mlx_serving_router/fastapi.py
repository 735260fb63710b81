"""The web front-end: the OpenAI API, and the fleet's own, in front of a controller. Needs the extra `[fastapi]`.

`create_app` gives a whole application, `controller_router` the same routes for an application of one's own::

    app = FastAPI()
    app.include_router(controller_router(ControllerNode("cluster.yaml")), prefix="/llm")

It routes, reads headers and writes statuses. What bodies mean is the Rust codec's business, who answers the
controller's.
"""

from __future__ import annotations

import hmac
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from mlx_serving_router import _http, _native
from mlx_serving_router._config import as_config
from mlx_serving_router._controller import ControllerNode
from mlx_serving_router._errors import (
    CircuitState,
    ControllerError,
    ControllerErrorCode,
    ControllerState,
    _camel,
)
from mlx_serving_router._http import HttpError, api_error, json_bytes, json_response, openai_error

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mlx_serving_router._native import ClusterConfig, CompletionCall

__all__ = ["controller_router", "create_app", "get_controller"]

_STATE: Final = "mlx_serving_router"
# Models have no birthday here; clients want one that stays.
_STARTED: Final = int(time.time())
_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def create_app(
    config: ClusterConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    controller: ControllerNode | None = None,
) -> FastAPI:
    """A whole application: `uvicorn.run(create_app("cluster.yaml"))`.

    Args:
        config: What the controller is made with, as `ControllerNode` takes it.
        controller: A controller that is there already, in place of `config`. One that is `idle` is started and stopped
            with the application; any other is left to its owner.

    Raises:
        ConfigError: The configuration cannot be used.
        ValueError: Both are given.
    """
    if controller is None:
        router = _router(as_config(config))
    elif config is None:
        router = controller_router(controller)
    else:
        raise ValueError("give a config or a controller, not both: the controller has a config of its own")
    app = FastAPI(
        title="mlx_serving_router", description="One OpenAI API in front of a fleet of mlx-lm workers"
    )
    app.include_router(router)
    app.exception_handler(HTTPException)(_no_route)
    for route in app.routes:
        if type(route) is Route:  # FastAPI's own: the documentation
            route.app = _named(route.app)
    return app


def controller_router(controller: ControllerNode | None = None) -> APIRouter:
    """The routes for an application of one's own, with a lifespan that starts and stops the controller.

    Args:
        controller: The controller; one with all defaults where it is left out. One that is `idle` when the application
            starts is started and stopped with it; any other is left to its owner.
    """
    return _router(as_config(None) if controller is None else controller.config, controller)


def _router(config: ClusterConfig, controller: ControllerNode | None = None) -> APIRouter:
    settings = config.to_dict()["controller"]

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[dict[str, Any]]:
        # Made here: a controller starts once and stays in its process, an application may do neither.
        node = ControllerNode(config) if controller is None else controller
        if node.state is not ControllerState.IDLE:
            yield {_STATE: node}
            return
        await node.start()
        try:
            yield {_STATE: node}
        finally:
            await node.stop(settings["drainTimeoutMs"] / 1000)

    keys = [key.encode() for key in settings["apiKeys"]]
    keyed = [Depends(_require_key(keys))] if keys else []
    router = APIRouter(lifespan=lifespan)
    for method, path, endpoint, summary in _ROUTES:
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            summary=summary,
            dependencies=keyed if path.startswith(("/v1/", "/api/")) else [],
            response_class=Response,
            route_class_override=_OpenAIRoute if path.startswith("/v1/") else _Route,
        )
    return router


def get_controller(request: Request) -> ControllerNode:
    """The application's controller, for `Depends`.

    Raises:
        RuntimeError: The application has none: its lifespan has not run, or includes no `controller_router`.
    """
    controller: ControllerNode | None = getattr(request.state, _STATE, None)
    if controller is None:
        raise RuntimeError(
            "no controller: the application's lifespan has not run. An application that is mounted in another one has"
            " no lifespan of its own; use app.include_router(controller_router(...), prefix=...) there"
        )
    return controller


# === routes ===


class _Route(APIRoute):
    """Every answer has the id of its request; errors have the shape of their area, in any application."""

    @staticmethod
    def shape(error: ControllerError | HttpError) -> Response:
        """An error as an answer."""
        return api_error(error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors turned into answers."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except (ControllerError, HttpError) as error:
                response = self.shape(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # for the access log; nobody is there to read it
            except Exception as error:  # noqa: BLE001 whatever it is, it is logged and the client gets its answer
                response = self.shape(_http.defect(error, _http.request_id(request)))
            response.headers[_http.REQUEST_ID] = _http.request_id(request)
            return response

        return answer


class _OpenAIRoute(_Route):
    @staticmethod
    def shape(error: ControllerError | HttpError) -> Response:
        return openai_error(error)


def _require_key(keys: list[bytes]) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")
        # All are compared, so that the time tells nothing of which one came close.
        matches = [hmac.compare_digest(given, key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            message = "a valid key is needed: Authorization: Bearer <key>"
            raise HttpError(401, "invalid_api_key", message, {"www-authenticate": "Bearer"})

    return check


def _named(app: ASGIApp) -> ASGIApp:
    """The application with an id in its answers."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_http.REQUEST_ID] = _http.request_id(Request(scope))
            await send(message)

        await app(scope, receive, send_named)

    return named


async def _no_route(request: Request, error: HTTPException) -> Response:
    """Of a whole application: addresses that are not there, methods that are not theirs."""
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    told = HttpError(
        error.status_code, code, f"{error.detail}: {request.method} {request.url.path}", error.headers
    )
    response = api_error(told) if "/api/" in request.url.path else openai_error(told)
    response.headers[_http.REQUEST_ID] = _http.request_id(request)
    return response


# === the OpenAI API ===


async def _chat_completions(request: Request) -> Response:
    return await _complete(request, _native.CompletionCall.chat)


async def _completions(request: Request) -> Response:
    return await _complete(request, _native.CompletionCall.text)


async def _complete(request: Request, parse: Callable[..., CompletionCall]) -> Response:
    controller = get_controller(request)
    headers = request.headers
    body = await _http.read_body(request)
    call = parse(body, request_id=_http.request_id(request), session_id=headers.get("x-session-id"))
    worker_id = headers.get(_http.WORKER_ID)
    traceparent = headers.get("traceparent")
    if call.stream:
        streaming = controller.handle_streaming_request(
            call.request, worker_id=worker_id, traceparent=traceparent
        )
        stream = await _http.until_disconnect(request.receive, streaming)
        return _http.EventStream(stream, call.stream_encoder(int(time.time())))
    buffered = controller.handle_buffered_request(call.request, worker_id=worker_id, traceparent=traceparent)
    answer = await _http.until_disconnect(request.receive, buffered)
    return json_bytes(call.encode(answer, int(time.time())), headers={_http.WORKER_ID: answer.worker_id})


async def _models(request: Request) -> Response:
    return json_bytes(_native.openai_models(get_controller(request).cluster_status().models, _STARTED))


async def _model(request: Request, model_id: str) -> Response:
    if model_id not in get_controller(request).cluster_status().models:
        raise ControllerError(
            ControllerErrorCode.MODEL_NOT_FOUND,
            "no online worker serves this model; GET /v1/models lists what is served",
        )
    return json_bytes(_native.openai_model(model_id, _STARTED))


# === the fleet ===


async def _health() -> Response:
    return json_response({"status": "ok"})


async def _ready(request: Request) -> Response:
    controller = get_controller(request)
    refusing = (CircuitState.OPEN, CircuitState.FORCED_OPEN)
    serving = sum(
        worker.status in ("online", "degraded") and worker.breaker not in refusing
        for worker in controller.workers()
    )
    ready = controller.state is ControllerState.READY and serving > 0
    content = {
        "status": "ready" if ready else "not ready",
        "state": str(controller.state),
        "workers": serving,
    }
    return json_response(content, 200 if ready else 503)


async def _controller_metrics(request: Request) -> Response:
    controller = get_controller(request)
    status = controller.cluster_status()
    # Worker ids are names, whatever they look like: only what is said of them is renamed.
    breakers = {
        worker_id: {_camel(key): value for key, value in stats.items()}
        for worker_id, stats in controller.get_circuit_breaker_stats().items()
    }
    return json_response(
        {
            "activeRequests": status.requests["active"],
            "completedRequests": status.requests["completed"],
            "circuitBreaker": breakers,
            "timestamp": status.timestamp,
        }
    )


async def _requests(request: Request) -> Response:
    limit = request.query_params.get("limit", "")
    if limit and not (limit.isascii() and limit.isdigit() and int(limit[:9]) > 0):
        raise ControllerError(
            ControllerErrorCode.REQUEST_VALIDATION_FAILED,
            f"limit is {limit[:40]!r}; it has to be a whole number of at least 1",
        )
    newest = get_controller(request).get_all_request_metrics()[-int(limit[:9] or 0) :]
    return json_response([metadata.to_dict() for metadata in newest])


async def _request(request: Request, request_id: str) -> Response:
    metadata = get_controller(request).get_request_metrics(request_id)
    if metadata is None:
        return json_response({"error": "Request not found", "requestId": request_id}, 404)
    return json_response(metadata.to_dict())


async def _cluster_status(request: Request) -> Response:
    return json_response(get_controller(request).cluster_status().to_dict())


async def _workers(request: Request) -> Response:
    return json_response([worker.to_dict() for worker in get_controller(request).workers()])


async def _worker(request: Request, worker_id: str) -> Response:
    worker = get_controller(request).worker(worker_id)
    if worker is None:
        raise HttpError(
            404, "WORKER_NOT_FOUND", "no worker of this name is known; GET /api/cluster/workers lists them"
        )
    return json_response(worker.to_dict())


async def _metrics(request: Request) -> Response:
    return Response(get_controller(request).metrics_text(), media_type=_OPENMETRICS)


_ROUTES: Final[list[tuple[str, str, Callable[..., Any], str]]] = [
    ("POST", "/v1/chat/completions", _chat_completions, "Answer a conversation"),
    ("POST", "/v1/completions", _completions, "Continue a text"),
    ("GET", "/v1/models", _models, "What is served"),
    ("GET", "/v1/models/{model_id:path}", _model, "One model that is served"),
    ("GET", "/health", _health, "Whether the process is alive"),
    ("GET", "/ready", _ready, "Whether a worker can serve"),
    ("GET", "/metrics", _metrics, "Metrics for Prometheus"),
    ("GET", "/api/controller/metrics", _controller_metrics, "Requests in numbers, and the circuit breakers"),
    ("GET", "/api/controller/requests", _requests, "What is known of all requests"),
    ("GET", "/api/controller/requests/{request_id}", _request, "What is known of one request"),
    ("GET", "/api/cluster/status", _cluster_status, "The fleet in numbers"),
    ("GET", "/api/cluster/workers", _workers, "All workers"),
    ("GET", "/api/cluster/workers/{worker_id}", _worker, "One worker"),
]
