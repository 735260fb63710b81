"""The fleet's own addresses: life, metrics, requests, workers."""

from __future__ import annotations

from typing import Final

# Not for type checking alone: FastAPI reads the annotations.
from starlette.requests import Request  # noqa: TC002
from starlette.responses import Response

from mlx_serving_router._errors import (
    CircuitState,
    ControllerError,
    ControllerErrorCode,
    ControllerState,
    _camel,
)
from mlx_serving_router._http import HttpError, get_controller, json_response

_OPENMETRICS: Final = "application/openmetrics-text"
_OPENMETRICS_TYPE: Final = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
_CLASSIC_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


async def health() -> Response:
    """The process is alive."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """At least one worker can serve."""
    controller = get_controller(request)
    refusing = (CircuitState.OPEN, CircuitState.FORCED_OPEN)
    workers = controller.workers()
    serving = sum(
        worker.status in ("online", "degraded") and worker.breaker not in refusing for worker in workers
    )
    content = {"status": "ready", "state": str(controller.state), "workers": serving}
    if controller.state is not ControllerState.READY:
        reason = f"the controller is {controller.state}"
    elif not workers:
        reason = "no worker is known"
    elif not serving:
        reason = f"none of {len(workers)} workers can serve: offline, draining, or kept out by their breakers"
    else:
        return json_response(content)
    return json_response(content | {"status": "not ready", "reason": reason}, 503)


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus: OpenMetrics for those who accept it, its older format for all others."""
    newer = _OPENMETRICS in request.headers.get("accept", "")
    text = get_controller(request).metrics_text(openmetrics=newer)
    return Response(text, media_type=_OPENMETRICS_TYPE if newer else _CLASSIC_TYPE)


async def controller_metrics(request: Request) -> Response:
    """Requests in numbers, and the circuit breakers."""
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


async def requests(request: Request) -> Response:
    """What is known of all requests, or of the newest so many."""
    limit = request.query_params.get("limit", "")
    if limit and not (limit.isascii() and limit.isdigit() and int(limit[:9]) > 0):
        raise ControllerError(
            ControllerErrorCode.REQUEST_VALIDATION_FAILED,
            f"limit is {limit[:40]!r}; it has to be a whole number of at least 1",
        )
    most = int(limit[:9]) if limit else None
    newest = get_controller(request).get_all_request_metrics(limit=most)
    return json_response([metadata.to_dict() for metadata in newest])


async def one_request(request: Request, request_id: str) -> Response:
    """What is known of one request."""
    metadata = get_controller(request).get_request_metrics(request_id)
    if metadata is None:
        return json_response({"error": "Request not found", "requestId": request_id}, 404)
    return json_response(metadata.to_dict())


async def cluster_status(request: Request) -> Response:
    """The fleet in numbers."""
    return json_response(get_controller(request).cluster_status().to_dict())


async def workers(request: Request) -> Response:
    """All workers."""
    return json_response([worker.to_dict() for worker in get_controller(request).workers()])


async def worker(request: Request, worker_id: str) -> Response:
    """One worker."""
    found = get_controller(request).worker(worker_id)
    if found is None:
        raise HttpError(
            404, "WORKER_NOT_FOUND", "no worker of this name is known; GET /api/cluster/workers lists them"
        )
    return json_response(found.to_dict())
