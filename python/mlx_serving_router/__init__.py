"""A routing controller for a fleet of mlx-lm inference workers, inside a Python process.

`ControllerNode` is where to begin; `README.md` has a tour. The parts with extra dependencies are modules of their own:
`mlx_serving_router.fastapi` and `mlx_serving_router.mlx`.
"""

from __future__ import annotations

import atexit
import os

from mlx_serving_router import _logs, _native
from mlx_serving_router._controller import ControllerNode
from mlx_serving_router._errors import (
    CircuitState,
    ConfigError,
    ControllerError,
    ControllerErrorCode,
    ControllerState,
)
from mlx_serving_router._handlers import Finish
from mlx_serving_router._native import (
    BlockingTokenStream,
    ClusterConfig,
    ClusterStatus,
    ControllerEvent,
    InferenceRequest,
    InferenceResponse,
    Lease,
    RequestMetadata,
    Router,
    TokenEvent,
    TokenStream,
    Usage,
    WorkerInfo,
)
from mlx_serving_router._worker import WorkerNode

__all__ = [
    "BlockingTokenStream",
    "CircuitState",
    "ClusterConfig",
    "ClusterStatus",
    "ConfigError",
    "ControllerError",
    "ControllerErrorCode",
    "ControllerEvent",
    "ControllerNode",
    "ControllerState",
    "Finish",
    "InferenceRequest",
    "InferenceResponse",
    "Lease",
    "RequestMetadata",
    "Router",
    "TokenEvent",
    "TokenStream",
    "Usage",
    "WorkerInfo",
    "WorkerNode",
    "__version__",
]

__version__: str = _native.VERSION


def _exit() -> None:
    _native.exits()
    _native.shutdown()
    _logs.stop()


os.register_at_fork(after_in_child=_native.forked)
# Before the interpreter goes: what runs is ended while there is something to end it in.
atexit.register(_exit)
