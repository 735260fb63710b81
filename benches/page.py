"""Usage: make bench-report ARGS="[--folder FOLDER]".

One page of the latest figures that the benchmarks kept in target/bench: tables and plots, with the machine and the
versions they hold for. It needs nothing beside it.
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kept
from chart import Bar, bars
from report import Row, added, number, ratio_columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_BOUNDS = ("raw", "direct", "constant")
_OTHERS = ("nats-py", "nats-py-uvloop")
_OF_TRANSPORT = ("rust", "python", "python-uvloop")

#: What is plotted of a kind of load: the figure, the title, the unit and which way is better.
_Plot = tuple[str, str, str]
_LATENCY: _Plot = ("latency_p50_us", "Latency", "median, µs (lower is better)")
_FIRST: _Plot = ("first_token_p50_us", "First token", "median, µs (lower is better)")
_CPU: _Plot = ("cpu_us_per_request", "CPU", "µs for each (lower is better)")

_STYLE = Path(__file__).with_name("page.css")


def main() -> int:
    """Writes the page and returns the exit status."""
    options = _options()
    found = {kind: kept.latest(options.folder, kind) for kind in _SECTIONS}
    if not any(found.values()):
        print(f"no figures in {options.folder} yet: `make bench` keeps some", file=sys.stderr)
        return 1
    path = options.folder / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found), encoding="utf-8")
    for kind, run in found.items():
        print(f"{kind}: {run['time'] if run else 'no figures: ' + _SECTIONS[kind][1]}")
    print(path)
    return 0


def page(found: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The page for runs by the kind of figures that are taken from each; None: there are none."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>mlx_serving_router: benchmarks</title>",
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style><h1>mlx_serving_router: benchmarks</h1>",
        "<p class=key>Medians over the rounds, lines from the least to the most.",
        "<i class=ours></i>ours <i class=other></i>others <i class=bound></i>a bound: the same without a router</p>",
    ]
    for kind, (title, command, section) in _SECTIONS.items():
        run = found.get(kind)
        parts.append(f"<h2>{escape(title)}</h2>")
        if run is None:
            parts.append(f"<p>Not measured here yet: <code>{escape(command)}</code></p>")
            continue
        machine = "".join(f"<dt>{escape(name)}<dd>{escape(text)}" for name, text in run["machine"].items())
        parts.append(
            f"<p class=when>{escape(run['time'][:16].replace('T', ' '))} UTC, <code>{escape(command)}</code>,"
        )
        parts.append(f" load of the machine before: {run['load_before']:.1f}<dl>{machine}</dl>")
        parts += section(run)
    return "\n".join([*parts, "</html>\n"])


# === sections ===


def _core(run: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for row in (Row(**row) for row in run["core"]):
        measured = f'<span class="{"" if row.holds else "missed"}">{number(row.measured)}</span>'
        rows.append([escape(row.name), escape(row.target), measured, escape(row.unit)])
    yield _table(["", "target", "measured", "unit"], rows)


def _cells(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"<p class=when>{run['rounds']} rounds of {run['seconds_per_round']} s for each side and kind of load"
    for name, cell in run["cells"].items():
        title = _named(name, run["tokens_per_stream"])
        yield from _cell(title[0].upper() + title[1:], name, cell, "tokens")


def _field(run: Mapping[str, Any]) -> Iterator[str]:
    field = run["field"]
    yield f"<p class=when>{field['rounds']} rounds of {field['seconds_per_round']} s for each side and kind of load"
    for name, why in field["missing"].items():
        yield f"<p>Not measured: {escape(name)}: {escape(why)}"
    for group in field["groups"].values():
        for name, cell in group["cells"].items():
            title = f"{group['title']}: {_named(name, field['tokens_per_stream'])}"
            yield from _cell(title[0].upper() + title[1:], name, cell, "requests")


def _front(run: Mapping[str, Any]) -> Iterator[str]:
    front, summary = run["front"], run["front"]["summary"]
    yield f"<p class=when>{len(front['rounds'])} rounds of {front['seconds_per_round']} s, uvicorn with {front['http']}"
    plots = []
    for figure, title, unit in (
        ("rate", "Buffered, 64 at a time", "requests/s (higher is better)"),
        ("loop_us", "Buffered, 64 at a time", "CPU of the loop's thread for each, µs (lower is better)"),
        ("p50_us", "Buffered, one at a time", _LATENCY[2]),
    ):
        sides = {"front-end": summary[f"front_{figure}"], "constant": summary[f"constant_{figure}"]}
        plots.append(bars(title, unit, [_bar(name, spread, _kind(name)) for name, spread in sides.items()]))
    yield _plots(plots)
    rows = [[escape(name.replace("_", " ")), *_cells_of(spread)] for name, spread in summary.items()]
    yield _table(["", "median", "least", "most"], rows)


def _http_workers(run: Mapping[str, Any]) -> Iterator[str]:
    found = run["http_workers"]
    yield f"<p class=when>{found['rounds']} rounds of {found['seconds_per_round']} s for each side and kind of load"
    for tokens, length in found["tokens"].items():
        compared = length["compared"]
        yield f"<h3>Answers of {tokens} {'token' if tokens == '1' else 'tokens'}, one at a time</h3>"
        # httpx would make bars of all others too short to be seen; the table has it.
        yield _plots(
            [
                bars(
                    what[0].upper() + what[1:],
                    _LATENCY[2],
                    [_bar(name, side["is"], _kind(name)) for name, side in sides.items() if name != "httpx"],
                )
                for what, sides in compared.items()
            ]
        )
        rows = [
            [escape(what), escape(name), _with_range(side["is"]), added(side["added"])]
            for what, sides in compared.items()
            for name, side in sides.items()
        ]
        yield _table(["", "", "p50 µs", "added to direct, µs"], rows)


#: The kinds of figures: title, what measures them, what shows them.
_SECTIONS = {
    "core": ("The deciding core", "make bench", _core),
    "cells": ("Against the transport", "make bench", _cells),
    "field": ("Beside its peers", "make bench ARGS=--only=field", _field),
    "front": ("The front-end beside a constant", "python benches/front.py", _front),
    "http_workers": (
        "Workers over HTTP beside a direct request",
        "make bench ARGS=--only=http-workers",
        _http_workers,
    ),
}


# === parts ===


def _cell(title: str, name: str, cell: Mapping[str, Any], counted: str) -> Iterator[str]:
    """One kind of load: what matters in it and the CPU as plots, everything as a table."""
    mode, _, concurrency = name.partition("-")
    streaming = mode == "streaming"
    summary = cell["summary"]
    thing = "requests" if not streaming else "tokens" if counted == "tokens" else "streams"
    key = "tokens_per_second" if thing == "tokens" else "requests_per_second"
    rate: _Plot = (key, "Throughput", f"{thing}/s (higher is better)")
    shown = [rate, _CPU] if concurrency != "1" else [_FIRST, _LATENCY] if streaming else [_LATENCY, _CPU]
    yield f"<h3>{escape(title)}</h3>"
    yield _plots(
        [
            bars(
                heading,
                unit,
                [_bar(side, found["figures"][figure], _kind(side)) for side, found in summary.items()],
            )
            for figure, heading, unit in shown
        ]
    )
    # With their ranges: a range of the others would say little.
    figures = {key: f"{thing}/s", "latency_p50_us": "p50 µs"}
    if streaming:
        figures["first_token_p50_us"] = "1st p50 µs"
    figures["cpu_us_per_request"] = "CPU µs"
    tails = {"latency_p95_us": "p95 µs", "latency_p99_us": "p99 µs"}
    compared = "requests_per_second" if concurrency != "1" else "latency_p50_us"
    ratios = ratio_columns(summary)
    rows = []
    for side, found in summary.items():
        row = [escape(side)]
        row += [_with_range(found["figures"][figure]) for figure in figures]
        row += [number(found["figures"][figure]["median"]) for figure in tails]
        row += [
            number(column[side][compared]["median"]) if side in column else "" for column in ratios.values()
        ]
        rows.append(row)
    what = "throughput" if concurrency != "1" else "p50"
    yield _table(["", *figures.values(), *tails.values(), *(f"{what} {heading}" for heading in ratios)], rows)


def _with_range(spread: Mapping[str, float]) -> str:
    least, most = number(spread["min"]), number(spread["max"])
    return f'{number(spread["median"])} <span class="range-text">({least}-{most})</span>'


def _named(cell: str, tokens: int) -> str:
    mode, _, concurrency = cell.partition("-")
    what = f"streams of {tokens} tokens" if mode == "streaming" else "buffered"
    return f"{what}, {'one' if concurrency == '1' else concurrency} at a time"


def _kind(side: str) -> str:
    if side in _BOUNDS:
        return "bound"
    return "ours" if side in (*_OF_TRANSPORT, "front-end") or side.startswith("ours") else "other"


def _bar(label: str, spread: Mapping[str, float], kind: str) -> Bar:
    return Bar(label, spread["median"], spread["min"], spread["max"], kind)


def _cells_of(spread: Mapping[str, float]) -> list[str]:
    return [number(spread[name]) for name in ("median", "min", "max")]


def _plots(plots: Sequence[str]) -> str:
    return f"<div class=plots>{''.join(plots)}</div>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of HTML."""
    head = "".join(f"<th>{escape(heading)}" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-report", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--folder", type=Path, default=kept.FOLDER, help="where the figures are")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
