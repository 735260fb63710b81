"""Hands the core's log records to `logging`, under the loggers `mlx_serving_router` and below it.

One thread takes them in batches. What is below the level of the logger `mlx_serving_router` is not even gathered; a
change of that level is noticed within a second. At the exit of the interpreter the rest is handed over, and the thread
ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from mlx_serving_router import _native

if TYPE_CHECKING:
    from mlx_serving_router._native import _LogRecord

_ROOT: Final = logging.getLogger("mlx_serving_router")
# An application that wants no logs is to see none: without a handler, warnings would go to stderr.
_ROOT.addHandler(logging.NullHandler())
_LOOK_EVERY: Final = 1.0  # seconds
_STOP_WITHIN: Final = 2.0

_thread: threading.Thread | None = None
_process: int | None = None


def start() -> None:
    """Begin, in this process, unless that was done."""
    global _thread, _process  # noqa: PLW0603 there is one of it for each process
    if _process != os.getpid():
        _process = os.getpid()
        _take(0.0)  # from here on the core knows what is wanted
        _thread = threading.Thread(target=_run, name="mlx_serving_router-logs", daemon=True)
        _thread.start()


def stop() -> None:
    """Hand over the rest and end."""
    _native.close_logs()
    if _thread is not None and _process == os.getpid():
        _thread.join(_STOP_WITHIN)


def _run() -> None:
    while _take(_LOOK_EVERY):
        pass


def _take(timeout: float) -> bool:
    """Wait for a batch and hand it over; false where nothing will come any more."""
    batch = _native.take_logs(min(_ROOT.getEffectiveLevel(), 255), timeout)
    for record in batch or ():
        # A handler that raises is the application's affair; later records are still wanted.
        with contextlib.suppress(Exception):
            _hand_over(record)
    return batch is not None


def _hand_over(taken: _LogRecord) -> None:
    name, level, message, created, file, line, fields = taken
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(level):
        return
    record = logger.makeRecord(name, level, file or "", line or 0, message, (), None)
    record.created = created
    record.msecs = (created % 1) * 1000
    for key, value in fields.items():
        record.__dict__.setdefault(key, value)
    logger.handle(record)
