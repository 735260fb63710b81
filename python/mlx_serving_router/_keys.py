"""Who may use the front-end, and how much: `controller.apiKeys`.

A key's limits hold for the completions of one process, from the moment that their body has been read. The keys
themselves are kept as digests.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router._http import HttpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from starlette.requests import Request

_MINUTE: Final = 60.0
_RETRY_SECONDS: Final = 1.0
"""When to come back where nobody knows how long the requests that run will take."""


class Keys:
    """All keys.

    Args:
        entries: As the configuration has them: texts, and objects with `key`, `name` and limits. None at all let
            everybody in.
        clock: Seconds that never run backwards.
    """

    def __init__(
        self, entries: Sequence[str | Mapping[str, Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = [_Key(entry, index, clock) for index, entry in enumerate(entries)]

    def __bool__(self) -> bool:
        """Whether any is needed."""
        return bool(self._keys)

    def check(self, request: Request) -> None:
        """Lets a request with one of the keys in.

        Raises:
            HttpError: 401, its header `Authorization` holds none of them.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = _digest(token.strip(" \t").encode("latin-1"))
        # All are compared, and their digests instead of themselves, so that the time tells nothing of what came close.
        found = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        if scheme.lower() != "bearer" or not found:
            message = "a valid key is needed: Authorization: Bearer <key>"
            raise HttpError(401, "invalid_api_key", message, {"www-authenticate": "Bearer"})
        request.state.api_key = found[0]


def place(request: Request) -> AbstractContextManager[None]:
    """A place for one completion, to be held while it runs.

    Raises:
        HttpError: 429 on entering, a limit of the request's key is used up.
    """
    key: _Key | None = request.scope.get("state", {}).get("api_key")
    return nullcontext() if key is None else key.place()


class _Key:
    def __init__(self, entry: str | Mapping[str, Any], index: int, clock: Callable[[], float]) -> None:
        given: Mapping[str, Any] = {"key": entry} if isinstance(entry, str) else entry
        self.digest = _digest(given["key"].encode())
        name = given.get("name")
        self._name = f"key number {index + 1}" if name is None else f"the key {name}"
        self._most_running: int | None = given.get("maxConcurrent")
        self._most_begun: int | None = given.get("requestsPerMinute")
        self._running = 0
        # When those of the last minute began; never more than are allowed.
        self._begun: deque[float] = deque()
        self._clock = clock

    @contextmanager
    def place(self) -> Iterator[None]:
        if self._most_running is not None and self._running >= self._most_running:
            raise _too_many(
                f"{self._name} has reached its limit of completions that run at a time (maxConcurrent:"
                f" {self._most_running})",
                _RETRY_SECONDS,
            )
        if self._most_begun is not None:
            now = self._clock()
            while self._begun and now - self._begun[0] >= _MINUTE:
                self._begun.popleft()
            if len(self._begun) >= self._most_begun:
                wait = self._begun[0] + _MINUTE - now
                raise _too_many(
                    f"{self._name} has reached its limit of completions that begin in a minute (requestsPerMinute:"
                    f" {self._most_begun}); the next may begin in {math.ceil(wait)} s",
                    wait,
                )
            self._begun.append(now)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _too_many(message: str, seconds: float) -> HttpError:
    headers = {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }
    return HttpError(429, "rate_limit_exceeded", message, headers)
