"""A model on its way into memory, on a thread of its own.

mlx lets each thread compute on streams of its own, and what is computed may go from one thread to another. So a model
is read, built and tried on a thread of its own, while the engine's thread goes on with the answers of others, more
slowly: they share the machine, and at times the interpreter. Loaded between two steps it would have every answer stand
still until all of it was read.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from mlx_serving_router._native import Thread
from mlx_serving_router.mlx._models import LoadedModel, ModelLoadError, describe

if TYPE_CHECKING:
    from mlx_serving_router.mlx._models import Location


class Load:
    """A model that is being loaded. It begins at once, and cannot be stopped.

    Args:
        name: The model's name.
        location: Where it is.
    """

    def __init__(self, name: str, location: Location) -> None:
        self.name = name
        self.location = location
        self.began = time.monotonic()
        self._result: LoadedModel | ModelLoadError | None = None
        self._thread = Thread(self._run, name="mlx-load")

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self._result is not None

    def result(self) -> LoadedModel:
        """The model. Only once it is `done`.

        Raises:
            ModelLoadError: It cannot be loaded.
            RuntimeError: It is not done, or the result was taken before.
        """
        result, self._result = self._result, None
        if result is None:
            raise RuntimeError(f"model {self.name!r} is still being loaded")
        if isinstance(result, ModelLoadError):
            raise result.anew()
        return result

    def join(self, seconds: float) -> bool:
        """Wait until its thread is gone. False: it is still there after so many seconds."""
        return self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._result = LoadedModel.load(self.name, self.location)
        except BaseException as error:  # noqa: BLE001 whatever it is, it is told to whoever asks for the model
            # The error itself holds the frames that it went through, and they a model that is half built.
            if isinstance(error, ModelLoadError):
                self._result = error.anew()
            else:
                words = f"loading it failed ({describe(error)})"
                self._result = ModelLoadError(self.name, os.fspath(self.location), words)
