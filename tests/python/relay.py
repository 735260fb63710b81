"""A TCP relay that stands before a real server: it can be cut and opened again, and notices who hangs up."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self


class Relay:
    """Hands on what comes, in both directions.

    Attributes:
        left: Set when a client has hung up while the server had not.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._open = False
        self.port = 0
        self.left = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def open(self) -> None:
        """Listen: the first time on any free port, afterwards on the same."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._open = True

    async def cut(self) -> None:
        """Refuse new connections, and end those that there are."""
        self._open = False
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        await asyncio.sleep(0)  # what was aborted is closed in the loop's next turn

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # No coroutine: one that had not begun yet would be unknown to `cut`, and leave its connection open behind it.
        if not self._open:  # it came in the moment of the cut
            writer.transport.abort()
            return
        connection = asyncio.create_task(self._connected(reader, writer))
        self._connections.add(connection)

        def over(_: object) -> None:
            self._connections.discard(connection)
            writer.transport.abort()  # here, because a task that is cancelled before it begins cleans nothing up

        connection.add_done_callback(over)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = None
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._upstream)
            there = asyncio.create_task(_hand_on(reader, to_server))
            back = asyncio.create_task(_hand_on(from_server, writer))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
                # Not which of the two has ended: where the client is gone, writing to it fails as well as reading.
                if not from_server.at_eof() and from_server.exception() is None:
                    self.left.set()
            finally:
                there.cancel()
                back.cancel()
                await asyncio.wait({there, back})
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            if to_server is not None:
                to_server.transport.abort()


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
