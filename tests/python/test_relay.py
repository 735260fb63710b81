"""The relay that other tests put before a server: whom it says has hung up."""

from __future__ import annotations

import asyncio

from cluster import PATIENCE, until
from relay import Relay


async def test_a_client_that_is_reset_while_it_is_written_to_has_left() -> None:
    flooded: list[asyncio.StreamWriter] = []

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flooded.append(writer)
        while not writer.is_closing():
            writer.write(bytes(65536))
            await writer.drain()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    async with server, Relay(server.sockets[0].getsockname()[1]) as relay:
        _, client = await asyncio.open_connection("127.0.0.1", relay.port)
        client.transport.pause_reading()  # type: ignore[attr-defined]
        await until(
            lambda: any(writer.transport.get_write_buffer_size() for writer in flooded), "the way is full"
        )
        assert not relay.left.is_set()
        client.transport.abort()  # what it has not read makes this a reset
        await asyncio.wait_for(relay.left.wait(), PATIENCE)


async def test_a_server_that_hangs_up_is_no_client_that_left() -> None:
    async def brief(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"that is all")
        writer.close()

    server = await asyncio.start_server(brief, "127.0.0.1", 0)
    async with server, Relay(server.sockets[0].getsockname()[1]) as relay:
        reader, client = await asyncio.open_connection("127.0.0.1", relay.port)
        assert await reader.read() == b"that is all"
        client.close()
        await client.wait_closed()
        assert not relay.left.is_set()
