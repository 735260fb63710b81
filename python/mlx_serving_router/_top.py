"""The fleet live in a terminal: `mlx-serving-router top`. It sees what the front-end's own controller sees."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_serving_router._command import CommandError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from mlx_serving_router._client import FrontEnd

_COLOURS: Final = {
    "online": "green", "degraded": "yellow", "draining": "yellow", "offline": "red",
    "CLOSED": "green", "HALF_OPEN": "yellow", "OPEN": "red", "FORCED_OPEN": "red",
    "succeeded": "green", "failed": "red", "running": "cyan", "queued": "yellow",
}  # fmt: skip
_NUMBERS: Final = ("in flight", "heard", "tries", "TTFT", "time", "tokens")
#: Lines of a screen that are no worker and no request.
_FURNITURE: Final = 8


@dataclass(frozen=True)
class View:
    """What a front-end says at one moment."""

    at: float
    status: dict[str, Any]
    workers: list[dict[str, Any]]
    requests: list[dict[str, Any]]

    @classmethod
    async def take(cls, front_end: FrontEnd, most_requests: int) -> View:
        """Ask for all of it.

        Raises:
            CommandError: Nobody answers, or somebody else.
        """
        status, workers, requests = await asyncio.gather(
            front_end.get("/api/cluster/status"),
            front_end.get("/api/cluster/workers"),
            front_end.get(f"/api/controller/requests?limit={most_requests}"),
        )
        return cls(time.monotonic(), status, workers, requests)


async def top(front_end: FrontEnd, console: Console, *, every: float, once: bool) -> None:
    """Show the fleet until Ctrl-C, or once.

    Raises:
        CommandError: Nobody answers at the start, or somebody else.
    """
    view = await View.take(front_end, console.height)
    if once:
        console.print(render(view, None, console.height, front_end.url))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        before: View | None = None
        note = ""
        while True:
            height = console.height
            live.update(render(view, before, height, front_end.url, note), refresh=True)
            await asyncio.sleep(every)
            try:
                view, before, note = await View.take(front_end, height), view, ""
            except CommandError as error:  # it may come back
                note = str(error)


def render(view: View, before: View | None, height: int, url: str, note: str = "") -> RenderableType:
    """A screen of `height` lines."""
    room = max(height - _FURNITURE - bool(note), 2)
    workers = sorted(view.workers, key=lambda worker: (worker["status"] == "offline", worker["workerId"]))
    shown = min(len(workers), max(room // 2, room - len(view.requests)))
    parts: list[RenderableType] = [_summary(view, before, url)]
    if note:
        parts.append(Text(note, style="red", no_wrap=True, overflow="ellipsis"))
    parts += [Text(), _workers(workers[:shown])]
    if shown < len(workers):
        parts.append(Text(f"... and {len(workers) - shown} more", style="dim"))
    newest = list(reversed(view.requests))[: max(room - shown, 1)]
    parts += [Text(), _requests(newest)]
    return Group(*parts)


def _summary(view: View, before: View | None, url: str) -> Text:
    workers, requests = view.status["workers"], view.status["requests"]
    parts = [
        f"workers {workers['online']} of {workers['total']} online",
        f"{requests['active']} running, {requests['queued']} waiting, {requests['completed']} done",
    ]
    if before is not None:
        done = requests["completed"] - before.status["requests"]["completed"]
        parts.append(f"{max(done, 0) / (view.at - before.at):.1f}/s")
    lines = f"{url}  {view.status['state']}\n{'   '.join(parts)}"
    return Text(lines, style="bold", no_wrap=True, overflow="ellipsis")


def _table(*columns: tuple[str, bool]) -> Table:
    """A table whose names give way where it is too wide; numbers and states do not."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name, gives_way in columns:
        right = name in _NUMBERS
        table.add_column(
            name, justify="right" if right else "left", no_wrap=not gives_way, min_width=6 if right else None
        )
    return table


def _name(text: str) -> Text:
    # The column may wrap, for its width to be taken before that of others; the name in it does not.
    return Text(text, no_wrap=True, overflow="ellipsis")


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = _table(
        ("worker", True), ("status", False), ("phase", False), ("breaker", False), ("in flight", False),
        ("heard", False), ("models", True),
    )  # fmt: skip
    for worker in workers:
        table.add_row(
            _name(worker["workerId"]),
            _coloured(worker["status"]),
            worker["phase"],
            _coloured(worker["breaker"]),
            str(worker["inFlight"]),
            _span(worker["lastSeenMs"]),
            _name(", ".join(worker["models"])),
        )
    if not workers:
        table.add_row(Text("none", style="dim"))
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = _table(
        ("request", True), ("model", True), ("worker", True), ("tries", False), ("TTFT", False), ("time", False),
        ("tokens", False), ("status", False),
    )  # fmt: skip
    for request in requests:
        status = request["status"]
        error = request["finalError"] or {}
        table.add_row(
            _name(request["requestId"][:12]),
            _name(request["modelId"]),
            _name(request["selectedWorker"] or ""),
            str(len(request["attempts"])),
            _span(request["timeToFirstTokenMs"]),
            _span(request["durationMs"]),
            str(request["tokens"] or ""),
            Text(error["code"], style="red") if status == "failed" and error else _coloured(status),
        )
    if not requests:
        table.add_row(Text("none yet", style="dim"))
    return table


def _coloured(word: str) -> Text:
    return Text(word, style=_COLOURS.get(word, ""))


def _span(ms: float | None) -> str:
    if ms is None:
        return ""
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
