"""Handlers: async generator functions that answer one job each, as tasks of an event loop.

Promises that each job meets an end, whatever its handler does; that a handler is cancelled when nobody waits any more;
and that its place is free when it has come to its end. What a handler raises is told without what it says, which may
quote the prompt.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from mlx_serving_router._errors import ControllerError
from mlx_serving_router._native import TokenEvent, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mlx_serving_router import _native

    Handler: TypeAlias = Callable[[_native.InferenceRequest], AsyncIterator[str | TokenEvent | "Finish"]]

_logger = logging.getLogger("mlx_serving_router.worker")

#: A handler that never waits for anything lets its event loop go on after so many pieces.
_BREATH: Final = 16


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How an answer ends, where a handler knows more than that it does: the last thing that it yields.

    What comes after it is not read. A handler that yields none has ended with `"stop"`.

    Args:
        reason: Why no further token came.
        usage: Tokens of the request and its answer. `None`: the answer's are counted, the prompt's unknown.
        tool_calls: The functions that the model wants called, in the OpenAI API's shape.
    """

    reason: Literal["stop", "length", "tool_calls"] = "stop"
    usage: Usage | None = None
    tool_calls: list[dict[str, Any]] | None = None


async def answer(job: _native.Job, handler: Handler) -> None:
    """Run a handler for one job, for as long as somebody waits."""
    generation = asyncio.create_task(_generate(job, handler))
    gone = asyncio.ensure_future(job.gone())
    try:
        await asyncio.wait({generation, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        try:
            if not generation.done():
                generation.cancel()
                await asyncio.wait({generation})
        finally:
            job.let_go()


async def _generate(job: _native.Job, handler: Handler) -> None:
    try:
        pieces = handler(job.request)
        try:
            finish = await _deliver(job, pieces)
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()
        _end(job, finish)
    except ControllerError as error:
        job.error(error.code, error.message, retry_after_ms=_retry_after(error))
    except Exception as error:  # noqa: BLE001 a handler may raise anything, and it ends its request alone
        if not job.cancelled:
            # Neither on the wire nor in the log: what an exception says may quote the prompt.
            kind = type(error).__name__
            where = "".join(traceback.format_tb(error.__traceback__))
            _logger.error("the handler raised %s for request %s\n%s", kind, job.request.request_id, where)
            job.error("WORKER_UNAVAILABLE", f"the worker's handler raised {kind}")


def _end(job: _native.Job, finish: Finish) -> None:
    usage = finish.usage
    job.done(
        finish.reason,
        prompt_tokens=0 if usage is None else usage.prompt_tokens,
        completion_tokens=None if usage is None else usage.completion_tokens,
        cached_tokens=0 if usage is None else usage.cached_tokens,
        tool_calls=finish.tool_calls,
    )


async def _deliver(job: _native.Job, pieces: AsyncIterator[str | TokenEvent | Finish]) -> Finish:
    count = 0
    async for piece in pieces:
        if isinstance(piece, str):
            job.piece(piece)
        elif isinstance(piece, TokenEvent):
            job.event(piece)
        elif isinstance(piece, Finish):
            return piece
        else:
            raise TypeError(f"a handler yields str, TokenEvent or Finish, not {type(piece).__name__}")
        if job.cancelled:
            break
        count += 1
        if not job.has_room:
            await job.room()
        elif count % _BREATH == 0:
            await asyncio.sleep(0)
    return Finish()


def _retry_after(error: ControllerError) -> int | None:
    value = error.context.get("retry_after_ms")
    return value if isinstance(value, int) else None


def gives_pieces(handler: object) -> bool:
    """Whether this can be a handler."""
    function: Any = handler if inspect.isroutine(handler) else getattr(handler, "__call__", None)  # noqa: B004
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    # A plain function may hand on the generator of another one; a plain generator, or a coroutine, is no such thing.
    is_other = inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
    return callable(handler) and not is_other and not inspect.isclass(handler)
