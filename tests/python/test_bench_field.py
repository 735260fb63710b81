"""The comparison with peers and the page of all figures: rounds, load over HTTP, what is left out and shown."""

from __future__ import annotations

import asyncio
import json
import tomllib
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from programs import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path
    from types import ModuleType


# === rounds ===


class _Side:
    """Answers at once, until it has answered so often."""

    def __init__(self, good_for: int, asked: list[str], name: str) -> None:
        self._good_for = good_for
        self._asked = asked
        self._name = name

    def ask(self, _command: Mapping[str, object], _seconds: float) -> dict[str, Any]:
        self._asked.append(self._name)
        self._good_for -= 1
        failures = [] if self._good_for >= 0 else ["no good answer"]
        whole = {
            "seconds": 1.0,
            "cpu_seconds": 0.001,
            "latencies_ns": [1000],
            "first_token_ns": [],
            "tokens": 0,
        }
        return whole | {"failures": failures}


def test_a_peer_that_fails_is_named_and_the_others_go_on(benches: Callable[[str], ModuleType]) -> None:
    rounds, cell = benches("rounds"), benches("report").Cell("buffered", 1)
    asked: list[str] = []
    sides = {name: _Side(good, asked, name) for name, good in (("ours", 9), ("theirs", 2), ("others", 9))}
    dropped: dict[str, str] = {}

    measured = rounds.measure(sides, [cell], rounds=3, seconds=1.0, dropped=dropped)

    assert dropped == {"theirs": "theirs, buffered-1: no good answer"}
    assert {side: len(figures) for side, figures in measured[cell].items()} == {"ours": 3, "others": 3}
    by_round = [asked[:3], asked[3:6], asked[6:9], asked[9:]]
    assert by_round == [
        ["ours", "theirs", "others"],
        ["theirs", "others", "ours"],
        ["others", "ours", "theirs"],
        ["others", "ours"],
    ]


def test_a_side_that_fails_ends_the_rounds_where_none_may_be_left_out(
    benches: Callable[[str], ModuleType],
) -> None:
    rounds, cell = benches("rounds"), benches("report").Cell("buffered", 1)

    with pytest.raises(benches("sides").SideError, match="ours, buffered-1: no good answer"):
        rounds.measure({"ours": _Side(0, [], "ours")}, [cell], rounds=1, seconds=1.0)


def test_peers_are_installed_in_exact_versions() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    peers = [group for name, group in groups.items() if name.startswith("peers-")]

    assert len(peers) == 5
    assert all("==" in requirement for group in peers for requirement in group)


# === load over HTTP ===

_WHOLE = b'{"content": " token token"}'
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n"
_CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENTS = [b"e\r\ndata:  token\n\n\r\n"] * 2 + [b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"]


@pytest.fixture
async def server() -> AsyncIterator[Callable[[list[bytes]], Any]]:
    """Starts servers on the loopback interface that answer every request with these pieces; gives their ports."""
    servers: list[asyncio.Server] = []

    async def start(pieces: list[bytes]) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                if line != b"\r\n":
                    continue
                await reader.readexactly(2)  # the body
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            writer.close()

        servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        port: int = servers[-1].sockets[0].getsockname()[1]
        return port

    yield start
    for one in servers:
        one.close()
        await one.wait_closed()


@pytest.mark.parametrize(
    "pieces",
    [
        [_HEAD + _WHOLE],
        [_HEAD[:20], _HEAD[20:] + _WHOLE[:5], _WHOLE[5:]],
        [_CHUNKED, b"1b\r\n" + _WHOLE + b"\r\n", b"0\r", b"\n\r\n"],
    ],
    ids=["at once", "in pieces", "chunked"],
)
async def test_whole_answers_are_counted(
    benches: Callable[[str], ModuleType], server: Callable[[list[bytes]], Any], pieces: list[bytes]
) -> None:
    load = benches("over_http").Load(await server(pieces), b"{}", stream=False, tokens=2)

    outcome = await load.run(concurrency=3, seconds=30.0, requests=20)

    assert len(outcome.latencies_ns) == 20
    assert (outcome.first_token_ns, outcome.tokens) == ([], 0)


async def test_tokens_of_streams_are_counted(
    benches: Callable[[str], ModuleType], server: Callable[[list[bytes]], Any]
) -> None:
    load = benches("over_http").Load(await server([_CHUNKED, *_EVENTS]), b"{}", stream=True, tokens=2)

    outcome = await load.run(concurrency=3, seconds=30.0, requests=20)

    assert outcome.tokens == 40
    assert all(
        first <= last for first, last in zip(outcome.first_token_ns, outcome.latencies_ns, strict=True)
    )


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}"],
        [_CHUNKED, _EVENTS[0], _EVENTS[2]],
        [_CHUNKED, *_EVENTS[:2], b"0\r\n\r\n"],
    ],
    ids=["refused", "a token is missing", "no end"],
)
async def test_a_wrong_answer_is_no_figure(
    benches: Callable[[str], ModuleType], server: Callable[[list[bytes]], Any], pieces: list[bytes]
) -> None:
    load = benches("over_http").Load(await server(pieces), b"{}", stream=True, tokens=2)

    with pytest.raises(benches("measure").WrongAnswerError, match="no good answer"):
        await load.run(concurrency=1, seconds=30.0, requests=1)


# === requests to workers over HTTP ===


def test_what_the_controller_adds_is_taken_within_a_round(benches: Callable[[str], ModuleType]) -> None:
    # The machine was ten times as slow in the second round.
    rounds = {"direct": (30.0, 300.0, 40.0), "rust": (60.0, 350.0, 60.0)}
    figures = {
        side: [{"latency_p50_us": p50, "first_token_p50_us": p50 / 2} for p50 in p50s]
        for side, p50s in rounds.items()
    }

    http_workers = benches("http_workers")
    compared = http_workers.compare({"buffered-1": figures, "streaming-1": figures})

    assert compared["whole answer"]["rust"]["is"] == {"median": 60, "min": 60, "max": 350}
    assert compared["whole answer"]["rust"]["added"] == {"median": 30, "min": 20, "max": 50}
    assert compared["first token"]["rust"]["added"] == {"median": 15, "min": 10, "max": 25}
    _, head, direct, rust = http_workers.table(1, compared)
    assert head.split() == ["whole", "answer", "first", "token", "end", "of", "the", "stream"]
    assert direct.split() == ["direct", "40", "20", "40"]
    assert "60, +30 (+20 to +50)" in rust


# === the page ===


def test_the_latest_run_that_has_a_figure_is_taken(
    benches: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    kept = benches("kept")
    for name, result in (("1", {"core": 1}), ("2", {"core": 2}), ("3", {"field": 3})):
        (tmp_path / f"2026010{name}T000000Z.json").write_text(json.dumps(result), encoding="utf-8")

    assert kept.latest(tmp_path, "core") == {"core": 2}
    assert kept.latest(tmp_path, "front") is None


def _lengths(svg: str) -> list[float]:
    root = ET.fromstring(svg)
    return [float(bar.attrib["width"]) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]


def test_bars_are_as_long_as_their_figures(benches: Callable[[str], ModuleType]) -> None:
    chart = benches("chart")

    svg = chart.bars("a & b", "requests/s", [chart.Bar("one", 100, 90, 120), chart.Bar("<two>", 50, 50, 50)])

    long, short = _lengths(svg)
    assert long == pytest.approx(2 * short, rel=0.01)
    assert "logarithmic" not in svg


def test_bars_too_far_apart_for_one_scale_are_logarithmic(benches: Callable[[str], ModuleType]) -> None:
    chart = benches("chart")

    svg = chart.bars("", "µs", [chart.Bar(str(value), value, value, value) for value in (10_000, 1000, 100)])

    long, middle, short = _lengths(svg)
    assert long - middle == pytest.approx(middle - short, abs=0.2)
    assert short > 10
    assert "logarithmic scale" in svg


def _cell(benches: Callable[[str], ModuleType], *sides: str) -> dict[str, Any]:
    figures = {"requests_per_second": 1234.0, "tokens_per_second": 9876.0, "first_token_p50_us": 77.0}
    figures |= {
        "latency_p50_us": 55.5,
        "latency_p95_us": 66.6,
        "latency_p99_us": 88.8,
        "cpu_us_per_request": 33.3,
    }
    rounds = {side: [figures] for side in sides}
    return {"summary": benches("report").summarize(rounds, {sides[0]: sides}), "rounds": rounds}


def _run_of(kind: str, figures: Any, **others: Any) -> dict[str, Any]:
    machine = {"machine": "two cores", "ours": "0.1.0"}
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "machine": machine,
        "load_before": 0.25,
        kind: figures,
        **others,
    }


def test_the_page_shows_every_kind_of_figure(benches: Callable[[str], ModuleType]) -> None:
    row = {"name": "a decision", "unit": "ns", "at_least": float("-inf")}
    core = [row | {"measured": 250.0, "at_most": 300.0}, row | {"measured": 350.0, "at_most": 300.0}]
    cells = {name: _cell(benches, "python", "raw") for name in ("buffered-1", "buffered-64", "streaming-64")}
    field = {
        "rounds": 3,
        "seconds_per_round": 1.0,
        "tokens_per_stream": 64,
        "missing": {"slow-router": "cannot be <installed>"},
        "groups": {
            "http": {
                "title": "over HTTP",
                "cells": {"streaming-1": _cell(benches, "ours", "direct", "theirs")},
            }
        },
    }
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    names = [f"{side}_{figure}" for side in ("front", "constant") for figure in ("rate", "loop_us", "p50_us")]
    front = {"http": "h11", "seconds_per_round": 2.0, "rounds": [{}], "summary": dict.fromkeys(names, spread)}
    of_cells = {"rounds": 9, "seconds_per_round": 0.6, "tokens_per_stream": 64}
    sides = {name: {"is": spread, "added": spread} for name in ("direct", "httpx", "rust")}
    lengths = {"1": {"compared": {"whole answer": sides}}}

    written = benches("page").page(
        {
            "core": _run_of("core", core),
            "cells": _run_of("cells", cells, **of_cells),
            "field": _run_of("field", field),
            "front": _run_of("front", front),
            "http_workers": _run_of("http_workers", {**of_cells, "tokens": lengths}),
        }
    )

    for words in (
        "two cores",
        "2026-01-02 03:04",
        "load of the machine before: 0.2",
        "Streams of 64 tokens, 64 at a time",
    ):
        assert words in written
    assert "slow-router: cannot be &lt;installed&gt;" in written
    assert written.count('class="missed"') == 1
    assert written.count("<th>p50 ours / it") == 1
    assert written.count("<th>throughput / raw") == 2
    plots = [f"<svg{rest.partition('</svg>')[0]}</svg>" for rest in written.split("<svg")[1:]]
    assert len(plots) == 3 * 2 + 2 + 3 + 1
    assert all(len(_lengths(plot)) >= 2 for plot in plots)


def test_the_page_says_how_to_get_what_is_missing(benches: Callable[[str], ModuleType]) -> None:
    written = benches("page").page({"core": None})

    assert written.count("Not measured here yet") == 5
    assert "make bench ARGS=--only=field" in written
