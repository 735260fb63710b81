"""What can go wrong, for Python: `ControllerError`, `ConfigError`, and the words that are enums.

The core decides which code an error has; this module gives it its class. Nothing here knows how requests run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router import _native

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CircuitState", "ConfigError", "ControllerError", "ControllerErrorCode", "ControllerState"]


class ControllerErrorCode(StrEnum):
    """The stable code of a `ControllerError`."""

    NO_WORKERS_AVAILABLE = "NO_WORKERS_AVAILABLE"
    NO_HEALTHY_WORKERS = "NO_HEALTHY_WORKERS"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    WORKER_OFFLINE = "WORKER_OFFLINE"
    CIRCUIT_BREAKER_OPEN = "CIRCUIT_BREAKER_OPEN"
    WORKER_UNAVAILABLE = "WORKER_UNAVAILABLE"
    WORKER_TIMEOUT = "WORKER_TIMEOUT"
    WORKER_OVERLOADED = "WORKER_OVERLOADED"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    ALL_RETRIES_EXHAUSTED = "ALL_RETRIES_EXHAUSTED"
    STREAM_INTERRUPTED = "STREAM_INTERRUPTED"
    REQUEST_VALIDATION_FAILED = "REQUEST_VALIDATION_FAILED"
    INVALID_SESSION_ID = "INVALID_SESSION_ID"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    CANCELLED = "CANCELLED"
    NATS_ERROR = "NATS_ERROR"
    CONTROLLER_NOT_READY = "CONTROLLER_NOT_READY"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class CircuitState(StrEnum):
    """The state of a worker's circuit breaker."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"
    FORCED_OPEN = "FORCED_OPEN"
    DISABLED = "DISABLED"


class ControllerState(StrEnum):
    """Where a controller is in its life. It goes through these in order, and once."""

    IDLE = "idle"
    CONNECTING = "connecting"
    REGISTERING = "registering"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"


class ControllerError(Exception):
    """A failed request: a code for programs, a message for people, and the facts in between.

    WORKER_TIMEOUT is also a `TimeoutError`, REQUEST_VALIDATION_FAILED and INVALID_SESSION_ID are also a `ValueError`:
    whoever makes an error of such a code gets one of that kind. `__cause__` is the error of the last attempt.

    Attributes:
        code: The code.
        message: What happened. Never holds a prompt or a token.
        context: The facts, under snake_case keys: `request_id`, `worker_id`, counts, limits, `attempts`.
        timestamp: When it happened, in milliseconds since the epoch.
    """

    code: ControllerErrorCode
    message: str
    context: dict[str, Any]
    timestamp: int

    def __new__(cls, code: ControllerErrorCode | str, message: str, **_facts: Any) -> ControllerError:
        """Choose the class by the code."""
        # With the message alone: an OSError (TimeoutError is one) takes two arguments for an errno and its text.
        kind = _CLASSES.get(str(code), cls) if cls is ControllerError else cls
        return super(ControllerError, kind).__new__(kind, message)

    def __init__(
        self,
        code: ControllerErrorCode | str,
        message: str,
        *,
        context: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Make the error.

        Args:
            code: The code, or its name.
            message: What happened, for people.
            context: The facts, under snake_case keys.
            timestamp: Milliseconds since the epoch; now where it is left out.

        Raises:
            ValueError: There is no such code.
        """
        super().__init__(message)
        self.code = ControllerErrorCode(code)
        self.message = message
        self.context = dict(context or {})
        self.timestamp = time.time_ns() // 1_000_000 if timestamp is None else timestamp

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again later."""
        return self.is_retryable(self.code)

    @staticmethod
    def is_retryable(code: ControllerErrorCode | str) -> bool:
        """Whether a request that ended with this code may succeed when it is sent again later.

        Raises:
            ValueError: There is no such code.
        """
        return _native.ERROR_CODES[ControllerErrorCode(code)]

    def to_dict(self) -> dict[str, Any]:
        """`{"error": {"code", "message", "context", "timestamp", "retryable"}}`, as HTTP answers carry it."""
        return {
            "error": {
                "code": self.code.value,
                "message": self.message,
                "context": _camel_keys(self.context),
                "timestamp": self.timestamp,
                "retryable": self.retryable,
            }
        }

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code.value!r}, {self.message!r}, context={self.context!r})"

    def __reduce__(self) -> tuple[Callable[..., ControllerError], tuple[Any, ...]]:
        """Pickle it, with what led to it as far as that is a `ControllerError` too."""
        cause = self.__cause__ if isinstance(self.__cause__, ControllerError) else None
        kind = ControllerError if type(self) in _CLASSES.values() else type(self)
        return _again, (kind, self.code.value, self.message, self.context, self.timestamp, cause)


class _WorkerTimeoutError(ControllerError, TimeoutError):
    """A limit on time passed; `context["limit"]` names it."""


class _InvalidRequestError(ControllerError, ValueError):
    """The request is at fault."""


for _class in (_WorkerTimeoutError, _InvalidRequestError):
    # Callers know one class; which of its kinds it is, they see by its code.
    _class.__name__ = _class.__qualname__ = "ControllerError"

_CLASSES: Final[dict[str, type[ControllerError]]] = {
    "WORKER_TIMEOUT": _WorkerTimeoutError,
    "REQUEST_VALIDATION_FAILED": _InvalidRequestError,
    "INVALID_SESSION_ID": _InvalidRequestError,
}


def _again(
    kind: type[ControllerError],
    code: str,
    message: str,
    context: dict[str, Any],
    timestamp: int,
    cause: ControllerError | None,
) -> ControllerError:
    error = kind(code, message, context=context, timestamp=timestamp)
    error.__cause__ = cause
    return error


class ConfigError(ValueError):
    """A configuration that cannot be used. Its text has all of it; secrets are never part of it.

    Attributes:
        message: What is wrong and what would be right.
        path: The file, where there is one.
        line: The line, from 1.
        column: The column, from 1, in characters.
        key: The keys that lead to it: `requestRouting.retry.maxRetries`.
        variable: The environment variable, where one is to blame.
    """

    def __init__(
        self,
        text: str,
        message: str | None = None,
        *,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
        key: str | None = None,
        variable: str | None = None,
    ) -> None:
        """Make the error; `text` is what is shown, with the place in front."""
        super().__init__(text)
        self.message = text if message is None else message
        self.path = path
        self.line = line
        self.column = column
        self.key = key
        self.variable = variable


def _camel(key: str) -> str:
    """`total_workers` as `totalWorkers`."""
    first, *others = key.split("_")
    return first + "".join(word.capitalize() for word in others)


def _camel_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_camel(str(key)): _camel_keys(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_camel_keys(item) for item in value]
    return value
