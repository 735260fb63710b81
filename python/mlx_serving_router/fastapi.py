"""The web front-end: the OpenAI API, and the fleet's own, in front of a controller. Needs the extra `[fastapi]`.

`create_app` gives a whole application, `controller_router` the same routes for an application of one's own::

    app = FastAPI()
    app.include_router(controller_router(ControllerNode("cluster.yaml")), prefix="/llm")

It routes, reads headers and writes statuses. What bodies mean is the Rust codec's business, who answers the
controller's.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
except ImportError as error:
    raise ImportError(
        f"the web front-end needs fastapi ({error}): pip install 'mlx-serving-router[fastapi]'",
        name=error.name,
    ) from error
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from mlx_serving_router import _fleet_routes, _http, _monitoring, _openai_routes
from mlx_serving_router._config import as_config
from mlx_serving_router._controller import ControllerNode
from mlx_serving_router._errors import ControllerError, ControllerState
from mlx_serving_router._http import HttpError, api_error, get_controller, openai_error
from mlx_serving_router._keys import Keys
from mlx_serving_router._openai_routes import Endpoint
from mlx_serving_router._openapi import document

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from starlette.datastructures import Headers
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

    from mlx_serving_router._native import ClusterConfig

__all__ = ["controller_router", "create_app", "get_controller"]

#: Load balancers ask so whether there is life. The server leaves the body out.
_ASKED_BY_HEAD: Final = ("/health", "/ready")

#: What scripts of other origins may read of an answer, beside what browsers show anyway.
_EXPOSED: Final = (_http.REQUEST_ID, _http.WORKER_ID, "retry-after", "retry-after-ms", "x-should-retry")


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
        config = as_config(config)
    elif config is None:
        config = controller.config
    else:
        raise ValueError("give a config or a controller, not both: the controller has a config of its own")
    app = FastAPI(
        title="mlx_serving_router",
        description="One OpenAI API in front of a fleet of mlx-lm workers",
        lifespan=_lifespan(config, controller),
        redirect_slashes=False,  # another address is another address
    )
    keys = Keys(config.to_dict()["controller"]["apiKeys"])
    _add_routes(app.router, config, keys)
    # What is added first is asked last: everything else that an application adds comes before it.
    app.add_middleware(_PastTheRouter, routes=app.router.routes)
    app.exception_handler(HTTPException)(_no_route(keys))
    origins = config.to_dict()["controller"]["cors"]["allowOrigins"]
    if origins:
        app.add_middleware(
            _Cors,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    for route in app.routes:
        if type(route) is Route:  # FastAPI's own: the documentation
            route.app = _http.named(route.app)
    # Routes are tried in their order, and nobody waits for the documentation.
    app.router.routes.sort(key=lambda route: type(route) is Route)
    return app


class _Cors(CORSMiddleware):
    """Answers browsers' questions before anything else sees them: these answers get their id here."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser is told it may send."""
        response = super().preflight_response(request_headers)
        asked = Request({"type": "http", "headers": request_headers.raw})
        response.headers[_http.REQUEST_ID] = _http.request_id(asked)
        return response


def controller_router(controller: ControllerNode | None = None) -> APIRouter:
    """The routes for an application of one's own, with a lifespan that starts and stops the controller.

    Args:
        controller: The controller; one with all defaults where it is left out. One that is `idle` when the application
            starts is started and stopped with it; any other is left to its owner.
    """
    config = as_config(None) if controller is None else controller.config
    router = APIRouter(lifespan=_lifespan(config, controller))
    _add_routes(router, config, Keys(config.to_dict()["controller"]["apiKeys"]))
    return router


def _lifespan(config: ClusterConfig, controller: ControllerNode | None) -> Lifespan[Any]:
    settings = config.to_dict()["controller"]

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[dict[str, Any]]:
        # Made here: a controller starts once and stays in its process, an application may do neither.
        node = ControllerNode(config) if controller is None else controller
        async with AsyncExitStack() as running:
            if node.state is ControllerState.IDLE:
                await node.start()
                running.push_async_callback(node.stop, settings["drainTimeoutMs"] / 1000)
            port = settings["metricsPort"]
            if port is not None:
                await running.enter_async_context(_monitoring.serve(node, settings["bindAddress"], port))
            yield _http.lifespan_state(node)

    return lifespan


def _add_routes(router: APIRouter, config: ClusterConfig, keys: Keys) -> None:
    keyed = [Depends(_Keyed(keys))] if keys else []
    for method, path, endpoint in _routes(config.to_dict()):
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            dependencies=keyed if _wants_key(path) else [],
            response_class=Response,
            route_class_override=_OpenAIRoute if path.startswith("/v1/") else _Route,
            **(
                {"include_in_schema": False}
                if endpoint is _openai_routes.not_carried
                else document(path, endpoint)
            ),
        )
        if path in _ASKED_BY_HEAD:
            router.add_api_route(
                path, endpoint, methods=["HEAD"], include_in_schema=False, response_class=Response,
                route_class_override=_Route,
            )  # fmt: skip


def _wants_key(path: str) -> bool:
    return f"{path}/".startswith(("/v1/", "/api/"))


def _routes(config: Mapping[str, Any]) -> list[tuple[str, str, Callable[..., Any]]]:
    openai, fleet = _openai_routes, _fleet_routes
    settings = config["controller"]
    # Nobody else can be asked for what the fleet's messages have no words for.
    has_servers = bool(config["workers"]["static"])
    # Matched in this order: what is asked for most comes first.
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("POST", "/v1/chat/completions", openai.chat_completions(settings)),
        ("POST", "/v1/completions", openai.completions(settings)),
        ("GET", "/v1/models", openai.models),
        ("GET", "/v1/models/{model_id:path}", openai.model),
        ("POST", "/v1/embeddings", openai.embeddings(settings) if has_servers else openai.not_carried),
        ("POST", "/v1/responses", openai.responses(settings) if has_servers else openai.not_carried),
        ("GET", "/health", fleet.health),
        ("GET", "/ready", fleet.ready),
        ("GET", "/api/controller/metrics", fleet.controller_metrics),
        ("GET", "/api/controller/requests", fleet.requests),
        ("GET", "/api/controller/requests/{request_id}", fleet.one_request),
        ("GET", "/api/cluster/status", fleet.cluster_status),
        ("GET", "/api/cluster/workers", fleet.workers),
        ("GET", "/api/cluster/workers/{worker_id}", fleet.worker),
    ]
    if settings["metricsPort"] is None:
        routes.append(("GET", "/metrics", fleet.metrics))
    return routes


_REQUEST_ID: Final = _http.REQUEST_ID.encode()

# For the OpenAPI document: it refuses nothing itself.
_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="apiKey", description="One of `controller.apiKeys`")


class _Keyed:
    """A dependency that lets requests with one of the keys in."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    async def __call__(
        self, request: Request, _given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
    ) -> None:
        self.keys.check(request)


# === routes ===


class _Route(APIRoute):
    """Every answer has the id of its request; errors have the shape of their area, in any application."""

    @staticmethod
    def shape(error: ControllerError | HttpError) -> Response:
        """An error as an answer."""
        return api_error(error)

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """The route. FastAPI makes it anew, or handles it with more options, where an application includes it."""
        super().__init__(path, endpoint, **options)
        checks = [given.dependency for given in self.dependencies]
        keyed = [check.keys for check in checks if isinstance(check, _Keyed)]
        self.is_short = False
        if isinstance(endpoint, Endpoint) and len(keyed) == len(checks):
            # What FastAPI does between a route and its endpoint (solving dependencies, above all) costs more than all
            # of ours; where there are no dependencies but our own, completions go the short way.
            self.is_short = True
            self.app = self._short_way(endpoint, keyed)

    def _short_way(self, endpoint: Endpoint, keyed: list[Keys]) -> ASGIApp:
        async def checked(request: Request) -> Response:
            for keys in keyed:
                keys.check(request)
            return await endpoint(request)

        answer = self._answering(checked)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await answer(Request(scope, receive, send))
            await response(scope, receive, send)

        return app

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors turned into answers."""
        return self._answering(super().get_route_handler())

    def _answering(
        self, handle: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            name = _http.request_id(request)
            try:
                response = await handle(request)
            except (ControllerError, HttpError) as error:
                response = self.shape(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # for the access log; nobody is there to read it
            except HTTPException as error:  # of an application's own dependency
                response = self.shape(
                    HttpError(error.status_code, "http_error", str(error.detail), error.headers)
                )
            except RequestValidationError as error:  # likewise
                said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
                response = self.shape(HttpError(400, "REQUEST_VALIDATION_FAILED", said))
            except Exception as error:  # noqa: BLE001 whatever it is, it is logged and the client gets its answer
                response = self.shape(_http.defect(error, name))
            response.raw_headers.append((_REQUEST_ID, name.encode("latin-1")))
            return response

        return answer

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; a method that is not this address's gets its error in the shape of the area, too."""
        try:
            await super().handle(scope, receive, send)
        except HTTPException as error:
            # What an endpoint raises never comes here: the application's handlers have dealt with it.
            request = Request(scope)
            checks = [given.dependency for given in self.dependencies]
            keyed = [check.keys for check in checks if isinstance(check, _Keyed)]
            response = self.shape(_no_such(request, error, keyed))
            response.headers[_http.REQUEST_ID] = _http.request_id(request)
            await response(scope, receive, send)


class _PastTheRouter:
    """Middleware that hands completions to their routes at once; everything else goes on to the router.

    The way through the router, and what FastAPI wraps around it for the routes of others, takes longer than all that
    comes between the route and the fleet.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if isinstance(route, _Route) and route.is_short}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._routes.get(scope["path"])
            # Below a root the path is another one, and FastAPI's telemetry asks the router for the name of the route.
            if route is not None and not scope.get("root_path") and "fastapi.telemetry" not in scope:
                scope["route"], scope["endpoint"] = route, route.endpoint
                await route.app(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _OpenAIRoute(_Route):
    @staticmethod
    def shape(error: ControllerError | HttpError) -> Response:
        return openai_error(error)


def _no_route(keys: Keys) -> Callable[[Request, HTTPException], Coroutine[Any, Any, Response]]:
    """Of a whole application: addresses that are not there. Where others want a key, they do too."""

    async def handler(request: Request, error: HTTPException) -> Response:
        path = _http.path_below_root(request)
        area = api_error if f"{path}/".startswith("/api/") else openai_error
        response = area(_no_such(request, error, [keys] if keys and _wants_key(path) else []))
        response.headers[_http.REQUEST_ID] = _http.request_id(request)
        return response

    return handler


def _no_such(request: Request, error: HTTPException, keyed: Sequence[Keys]) -> HttpError:
    """What a request is told that has no route: first, that its key is none."""
    try:
        for keys in keyed:
            keys.check(request)
    except HttpError as refusal:
        return refusal
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{error.detail}: {request.method} {request.url.path}"
    return HttpError(error.status_code, code, message, error.headers)
