"""The shapes of the dictionaries that the package gives out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from mlx_serving_router._errors import CircuitState, ControllerErrorCode

__all__ = ["Attempt", "BreakerStats", "FinalError", "LeftOut", "RequestCounts", "WorkerCounts"]


class FinalError(TypedDict):
    """What the caller of a failed request met."""

    code: ControllerErrorCode
    message: str


class LeftOut(TypedDict):
    """A worker that was no candidate, and why."""

    worker_id: str
    reason: str


class Attempt(TypedDict):
    """One attempt: where, why there, and what came of it."""

    worker_id: str
    started_ms: int
    duration_ms: float | None
    code: ControllerErrorCode | None
    choice: str
    left_out: list[LeftOut]


class WorkerCounts(TypedDict):
    """Workers by status."""

    total: int
    online: int
    draining: int
    offline: int


class RequestCounts(TypedDict):
    """Requests by status; `queued` ones are among the active ones."""

    active: int
    queued: int
    completed: int


class BreakerStats(TypedDict):
    """What a circuit breaker has seen. Points in time are milliseconds since the epoch."""

    state: CircuitState
    failure_count: int
    success_count: int
    consecutive_failures: int
    opened_count: int
    window_requests: int
    window_failures: int
    probes: int
    last_failure_time: int | None
    last_success_time: int | None
    opened_at: int | None
    retry_after_ms: int | None
