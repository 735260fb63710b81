"""docs/errors.md and docs/monitoring.md say what the program does: their tables against the classes and the sources."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving_router import (
    CircuitState,
    ClusterConfig,
    ControllerError,
    ControllerErrorCode,
    ControllerNode,
    ControllerState,
    InferenceRequest,
    Router,
    _native,
    _types,
)
from programs import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
SOURCES = ROOT / "src"
PACKAGE = ROOT / "python" / "mlx_serving_router"


def tables(document: str, header: str) -> list[dict[str, str]]:
    """The rows of all tables whose first column is headed so, by the names of their columns."""
    rows = []
    for block in re.findall(r"(?:^\|.*\n)+", document, re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in block.splitlines()
        ]
        names, _rule, *cells = lines
        if names[0].strip("` ") == header:
            rows += [dict(zip(names, row, strict=True)) for row in cells]
    assert rows, f"no table of {header}"
    return rows


def column(document: str, header: str) -> list[str]:
    """What stands in the first column of these tables."""
    return [next(iter(row.values())).strip("`") for row in tables(document, header)]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def source(file: str) -> str:
    """A file of the core without its tests."""
    return (SOURCES / file).read_text(encoding="utf-8").split("#[cfg(test)]")[0]


def words_of(file: str, enum: str) -> list[str]:
    """What `as_str` of an enum of the core gives."""
    body = source(file).split(f"impl {enum} {{")[1]
    return re.findall(r'=> "([a-z_]+)"', body.split("const fn as_str")[1].split("\n    }\n")[0])


# === errors ===

CODES = {ControllerErrorCode(row["code"]): row for row in tables(ERRORS, "code")}


def test_every_code_is_there_in_the_order_of_the_core() -> None:
    assert list(CODES) == list(ControllerErrorCode)


@pytest.mark.parametrize("code", ControllerErrorCode)
def test_a_code_is_described_as_it_is(code: ControllerErrorCode) -> None:
    row = CODES[code]
    status, headers, _body = _native.openai_error(ControllerError(code, "why"))
    shown = {"an error event in the stream": 500, "\N{EN DASH}": 499, "that of the last error": 503}
    said = row["HTTP"].removesuffix(", Retry-After")
    assert (shown.get(said) or int(said)) == status
    assert row["HTTP"].endswith("Retry-After") == ("retry-after" in dict(headers))
    assert row["retryable"] == ("yes" if ControllerError.is_retryable(code) else "no")
    retried = ClusterConfig().to_dict()["requestRouting"]["retry"]["retryOnErrors"]
    assert (row["retried"] in ("yes", "before the first token")) == (code in retried)
    assert {"yes": "both", "the failure rate only": "rate"}.get(row["breaker"], "none") == effect(code)


def effect(code: ControllerErrorCode) -> str:
    """What a failure with this code tells a breaker."""

    def opens(**breaker: Any) -> bool:
        router = Router({"requestRouting": {"circuitBreaker": breaker}})
        router.add_worker("w", ["tiny"])
        router.select("tiny").failure(code)
        return router.get_circuit_breaker_stats()["w"]["state"] is CircuitState.OPEN

    in_a_row = opens(failureThreshold=1, minimumRequests=1000)
    by_rate = opens(failureThreshold=1000, minimumRequests=1, failureRatePercent=1)
    return {(True, True): "both", (False, True): "rate", (False, False): "none"}[in_a_row, by_rate]


def test_the_last_errors_status_is_that_of_exhausted_retries() -> None:
    error = ControllerError("ALL_RETRIES_EXHAUSTED", "tried")
    error.__cause__ = ControllerError("WORKER_TIMEOUT", "late")
    assert _native.openai_error(error)[0] == 504


def test_every_fact_of_an_error_is_described() -> None:
    said = {key for row in tables(ERRORS, "key") for key in quoted(row["key"])}
    used = {
        re.sub(r"([A-Z])", lambda match: f"_{match[1].lower()}", key)
        for file in SOURCES.rglob("*.rs")
        for key in re.findall(r'\b(?:or_)?with\("(\w+)"', source(str(file.relative_to(SOURCES))))
    }
    assert said == used


def test_every_limit_is_named() -> None:
    [row] = [row for row in tables(ERRORS, "key") if row["key"] == "`limit`"]
    assert set(quoted(row["meaning"])) == {*words_of("dispatch/limits.rs", "Limit"), "reader"}


# === what is known of requests and of the fleet ===


def properties(name: str) -> list[str]:
    described = vars(getattr(_native, name)).items()
    return [key for key, value in described if type(value).__name__ == "getset_descriptor"]


@pytest.mark.parametrize("name", ["RequestMetadata", "WorkerInfo", "ClusterStatus", "ControllerEvent"])
def test_every_attribute_is_described(name: str) -> None:
    assert sorted(column(MONITORING, name)) == sorted(properties(name))


@pytest.mark.parametrize("name", _types.__all__)
def test_every_key_is_described(name: str) -> None:
    assert column(MONITORING, name) == list(getattr(_types, name).__annotations__)


async def words(request: InferenceRequest) -> AsyncIterator[str]:
    if request.prompt == "break":
        raise ControllerError("WORKER_UNAVAILABLE", "it broke")
    yield "word"


async def test_the_described_keys_are_those_of_the_dictionaries() -> None:
    config = {"nats": {"mode": "none"}, "requestRouting": {"retry": {"maxRetries": 0}}}
    async with ControllerNode(config) as controller:
        for name in ("a", "b"):
            controller.add_local_worker(words, worker_id=name, models=["tiny"])
        controller.force_open_circuit_breaker("b")
        with pytest.raises(ControllerError):
            await controller.handle_buffered_request(InferenceRequest(model_id="tiny", prompt="break"))
        [metadata] = controller.get_all_request_metrics()
        assert metadata.final_error is not None
        [attempt] = metadata.attempts
        status = controller.cluster_status()
        for name, shown in {
            "FinalError": metadata.final_error,
            "Attempt": attempt,
            "LeftOut": attempt["left_out"][0],
            "BreakerStats": controller.get_circuit_breaker_stats()["a"],
            "WorkerCounts": status.workers,
            "RequestCounts": status.requests,
        }.items():
            assert column(MONITORING, name) == list(shown)


def test_every_word_for_a_choice_and_a_reason_is_described() -> None:
    assert column(MONITORING, "choice") == words_of("routing/lease.rs", "Choice")
    assert column(MONITORING, "reason") == words_of("routing/selection.rs", "LeftOut")
    assert column(MONITORING, "breaker's reason") == words_of("routing/breaker/mod.rs", "BreakerReason")


@pytest.mark.parametrize(
    ("table", "field", "values"),
    [
        ("WorkerInfo", "breaker", CircuitState),
        ("ClusterStatus", "state", ControllerState),
        ("RequestMetadata", "status", words_of("telemetry/metadata.rs", "RequestStatus")),
    ],
)
def test_every_state_is_named(table: str, field: str, values: Any) -> None:
    [row] = [row for row in tables(MONITORING, table) if row[f"`{table}`"] == f"`{field}`"]
    assert set(quoted(row["meaning"])) == {str(value) for value in values}


# === events ===


def test_every_event_is_described_with_its_details() -> None:
    events = source("routing/event.rs") + source("dispatch/events.rs")
    told = re.findall(r'"(\w+)", (?:worker, )?json!\(\{(.*?)\}\)', events)
    assert {kind: {snake(key) for key in re.findall(r'"(\w+)":', facts)} for kind, facts in told} == {
        row["event"].strip("`"): set(quoted(row["details"])) for row in tables(MONITORING, "event")
    }


def test_the_stubs_know_every_event() -> None:
    stubs = (PACKAGE / "_native.pyi").read_text(encoding="utf-8")
    kinds = stubs.split("class ControllerEvent:")[1].split("]:")[0]
    assert sorted(re.findall(r'"(\w+)"', kinds)) == sorted(column(MONITORING, "event"))


def snake(key: str) -> str:
    return re.sub(r"([A-Z])", lambda match: f"_{match[1].lower()}", key)


# === metrics ===


async def test_every_metric_is_described_with_its_type_and_labels() -> None:
    async def breaks(_request: InferenceRequest) -> AsyncIterator[str]:
        raise ControllerError("WORKER_UNAVAILABLE", "it broke")
        yield ""

    routing = {"circuitBreaker": {"failureThreshold": 1}, "retry": {"retryDelayMs": 0}}
    config = {"nats": {"mode": "none"}, "requestRouting": routing}
    async with ControllerNode(config) as controller:
        controller.add_local_worker(words, worker_id="a", models=["tiny"])
        controller.add_local_worker(breaks, worker_id="b", models=["tiny"])
        for _ in range(2):  # in turn: one of the two begins with `b`
            await controller.handle_buffered_request(InferenceRequest(model_id="tiny", prompt="x"))
        stream = await controller.handle_streaming_request(InferenceRequest(model_id="tiny", prompt="x"))
        async with stream:
            assert [event.text async for event in stream] == ["word"]
        text = controller.metrics_text()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {}
    for name, found in re.findall(r"^(mlx_\w+?)(?:\{(.*?)\})? ", text, re.MULTILINE):
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        labels.setdefault(family, set()).update(set(re.findall(r'(\w+)="', found)) - {"le"})
    described = {row["metric"].strip("`"): row for row in tables(MONITORING, "metric")}
    assert {name: (row["type"], set(quoted(row["labels"]))) for name, row in described.items()} == {
        name: (kind, labels[name]) for name, kind in types.items()
    }
    assert "mlx_router_failovers_total 1" in text
    for query in re.findall(r"```promql\n(.*?)```", MONITORING, re.DOTALL):
        used = {re.sub(r"_bucket$", "", name) for name in re.findall(r"mlx_router_\w+", query)}
        assert used <= set(described)


def test_the_stores_and_statuses_of_gauges_are_named() -> None:
    described = {row["metric"].strip("`"): row["meaning"] for row in tables(MONITORING, "metric")}
    stores = re.findall(r'\("(\w+)", self\.', source("dispatch/core.rs"))
    assert quoted(described["mlx_router_store_entries"]) == stores
    statuses = re.findall(r"for status in \[(.*?)\]", source("telemetry/metrics.rs"))
    assert quoted(described["mlx_router_workers"])[1:] == re.findall(r'"(\w+)"', statuses[0])


# === log records ===

Record = tuple[str, str, str, frozenset[str]]
LEVELS = {"warn": "WARNING"}


def described_records() -> set[Record]:
    return {
        (row["logger"].strip("`"), row["level"], row["message"], frozenset(quoted(row["fields"])))
        for row in tables(MONITORING, "logger")
    }


def plain(message: str) -> str:
    """A message with `…` for each value."""
    return " ".join(re.sub(r"%(\.\d+)?[a-z]|\{\w*\}", "…", message).split())


def records_of_the_core() -> Iterator[Record]:
    for file in sorted(SOURCES.rglob("*.rs")):
        place = file.relative_to(SOURCES)
        if place.parts[0] == "python":
            continue
        text = source(str(place))
        logger = ".".join(place.with_suffix("").parts)
        for match in re.finditer(r"tracing::(error|warn|info|debug|trace)!\(", text):
            *fields, message = arguments(text[match.end() :])
            names = frozenset(re.sub(r"^[%?]", "", field.split("=")[0].strip()) for field in fields)
            yield logger, LEVELS.get(match[1], match[1].upper()), plain(message), names


def arguments(text: str) -> list[str]:
    """The arguments of a macro up to its message, that without its quotes."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"|[\[({]|[\])}]|,', text):
        token = match[0]
        if token in "[({":
            depth += 1
        elif token in "])}":
            depth -= 1
        elif depth == 0 and token == ",":
            found.append(text[start : match.start()].strip())
            start = match.end()
        elif depth == 0 and not text[start : match.start()].strip():
            return [*found, match[1]]
    raise AssertionError("a record without a message")


def records_of_the_package() -> Iterator[Record]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield from records_of_a_module(file)


def records_of_a_module(file: Path) -> Iterator[Record]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    logger = file.stem
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger" and call.args:
            named = call.args[0]
            if isinstance(named, ast.Constant) and str(named.value).startswith("mlx_serving_router."):
                logger = str(named.value).removeprefix("mlx_serving_router.")
    for call in calls:
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="logger" | "_logger"), attr=level),
                args=[ast.Constant(value=str(message)), *_],
                keywords=options,
            ):
                extra = [option.value for option in options if option.arg == "extra"]
                keys = [key for value in extra if isinstance(value, ast.Dict) for key in value.keys]
                names = frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant))
                yield logger, level.upper(), plain(message), names


def test_every_log_record_is_described() -> None:
    assert described_records() == {*records_of_the_core(), *records_of_the_package()}


# === addresses ===


def test_every_address_that_shows_something_is_described() -> None:
    fastapi = pytest.importorskip("mlx_serving_router.fastapi")
    routes = fastapi._routes(ClusterConfig().to_dict())
    shown = {f"{method} {path}" for method, path, _ in routes if not path.startswith("/v1/")}
    assert set(column(MONITORING, "address")) == shown
