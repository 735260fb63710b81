"""A long prompt on its way into tokens, on a thread of its own.

Writing out a conversation of some hundred thousand characters and cutting it into tokens takes tenths of a second. Done
between two steps it would have every answer stand still; beside them it hardly shows, because tokenizers let go of the
interpreter.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from mlx_serving_router._native import Thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving_router.engine import EngineRequest, Job
    from mlx_serving_router.mlx._answer import Answer
    from mlx_serving_router.mlx._models import LoadedModel

_LONG: Final = 16 * 1024  # characters, which take some milliseconds


class Reading:
    """The prompt of one job that is being read. It begins at once, and cannot be stopped.

    Args:
        job: Whose prompt it is.
        model: The model that is to answer.
        read: Makes the answer that is to be begun, of its prompt.
    """

    def __init__(self, job: Job, model: LoadedModel, read: Callable[[], Answer]) -> None:
        self.job = job
        self.model = model
        self._read = read
        self._over = threading.Event()
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self._thread = Thread(self._run, name="mlx-prompt")

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait until it is done. False: it is not after so many seconds."""
        return self._over.wait(seconds) and self._thread.join(seconds)

    def result(self) -> Answer:
        """The answer that is to be begun. Only once it is `done`, and once.

        Raises:
            Exception: What reading it has raised.
            RuntimeError: It is not done, or the result was taken before.
        """
        answer, self._answer = self._answer, None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame
        if answer is None:
            raise RuntimeError("the prompt is still being read")
        return answer

    def _run(self) -> None:
        try:
            self._answer = self._read()
        except Exception as error:  # noqa: BLE001 a tokenizer or template may raise anything
            self._error = error
        finally:
            self._over.set()


def is_long(request: EngineRequest) -> bool:
    """Whether a prompt takes so long to read that others would notice."""
    contents = [message.get("content") for message in request.messages or ()]
    return len(request.prompt or "") + sum(map(_length, contents)) > _LONG


def _length(content: object) -> int:
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))
