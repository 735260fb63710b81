"""The web front-end of a controller in a thread of its own, so that clients that block can talk to it too."""

from __future__ import annotations

import asyncio
import atexit
import socket
import threading
from typing import TYPE_CHECKING, Final

from mlx_serving_router._command import unless
from mlx_serving_router._serve import Address, front_end

if TYPE_CHECKING:
    from mlx_serving_router._controller import ControllerNode

__all__ = ["FrontEnd"]

_HOST: Final = "127.0.0.1"
#: Seconds that connections have to end once the controller has ended their requests.
_DRAIN: Final = 1.0


class FrontEnd:
    """It serves from its making until `stop()`.

    Args:
        controller: What it stands before. It is left to its owner.
        port: 0 takes any free one.

    Raises:
        RuntimeError: The port is taken, or not to be had.
    """

    def __init__(self, controller: ControllerNode, port: int) -> None:
        try:
            listener = socket.create_server((_HOST, port))
        except (OSError, OverflowError) as error:
            raise RuntimeError(
                f"the front-end cannot listen on controller_port {port}: {error}; 0 takes any free one"
            ) from error
        self.url = f"http://{_HOST}:{listener.getsockname()[1]}"
        self._controller = controller
        self._address = Address(listener, self.url)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        # At the exit of the interpreter it is stopped below, which comes too late for threads that are waited for.
        self._thread = threading.Thread(target=self._run, name="mlx_serving_router-front-end", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop, and return when the thread is gone."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with front_end(self._controller, self._address, _DRAIN) as ended:
            # The listener takes connections already; those of the first moments wait for it.
            await unless(self._stopping, asyncio.wait((ended,)))
