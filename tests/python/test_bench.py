"""The benchmark runs, does its sums right, and keeps what it promises. How fast anything is does not matter here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from programs import ROOT, built_bench

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_SIDES = ["raw", "raw-headers", "rust", "python", "python-uvloop", "nats-py", "nats-py-uvloop"]
_CELLS = ["buffered-1", "buffered-64", "streaming-1", "streaming-64"]
_RATIOS = {"requests_per_second", "latency_p50_us", "latency_p99_us", "cpu_us_per_request"}


def _whole(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs the whole benchmark; the first one builds its Rust program."""
    return pytest.mark.nats(pytest.mark.slow(pytest.mark.timeout(900)(test)))


@pytest.fixture(scope="module")
def peers() -> Path:
    return built_bench("peers")


def _command(peers: Path, output: Path, *options: str, routing: Path = Path("nowhere")) -> list[str]:
    main = ROOT / "benches" / "main.py"
    programs = (f"--peers={peers}", f"--routing={routing}")
    return [sys.executable, str(main), *programs, f"--output={output}", *options]


@pytest.fixture
def report(benches: Callable[[str], ModuleType]) -> ModuleType:
    return benches("report")


def _of_worker(name: str, *options: str) -> str:
    """What a benchmark of workers with the tiny model prints."""
    pytest.importorskip("mlx_lm")
    command = [sys.executable, str(ROOT / "benches" / f"{name}.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=280, check=True)
    return done.stdout


def _with_workers(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs a benchmark of workers."""
    return pytest.mark.model(pytest.mark.nats(pytest.mark.slow(pytest.mark.timeout(300)(test))))


@_with_workers
def test_the_workers_benchmark_compares_both_sides() -> None:
    printed = _of_worker("worker", "--rounds=1", "--requests=8", "--tokens=4")
    assert re.search(
        r"round 1: direct \d+ tokens/s, through \d+ tokens/s, alone \d+ tokens/s, server \d+ tokens/s",
        printed,
    )


@_with_workers
def test_the_benchmark_of_turns_compares_affinity_with_none() -> None:
    printed = _of_worker("turns", "--rounds=1", "--sessions=1", "--workers=2")
    assert re.search(r"[\d.]+ of the time to first token at random, with affinity", printed)
    assert re.search(r"[\d.]+ of that of another worker, on its own, after 1[56]\d\d tokens", printed)


@_with_workers
def test_the_benchmark_of_liveness_listens_and_cancels() -> None:
    printed = _of_worker("liveness", "--seconds=1.2", "--cancels=2")
    for what in ("at rest", "while 16 requests generate", "while models load"):
        assert re.search(rf"heartbeats, {what}: [1-9]", printed)
    assert "cancelled in prefill: 2 requests" in printed


@_with_workers
def test_a_small_soak_answers_rightly_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Whether memory is flat takes thousands of requests, and is left to the whole one."""
    kept = tmp_path / "soak.json"
    printed = _of_worker("soak", "--requests=120", "--growth=1000", f"--output={kept}")
    assert "wrong answers: 0; left behind: 0" in printed
    soak = json.loads(kept.read_text(encoding="utf-8"))
    assert set(soak["ends"]) == {"answered", "left"}
    assert soak["samples"][-1]["requests"] == 120


# === the sums ===


def test_percentiles_are_times_that_were_measured(report: ModuleType) -> None:
    answer = {
        "seconds": 2.0,
        "cpu_seconds": 0.001,
        "latencies_ns": [*range(1000, 101_000, 1000)][::-1],
        "first_token_ns": [],
        "tokens": 0,
    }

    assert report.figures(answer) == {
        "requests": 100,
        "requests_per_second": 50,
        "cpu_us_per_request": 10,
        "latency_p50_us": 50,
        "latency_p95_us": 95,
        "latency_p99_us": 99,
    }


def test_ratios_are_taken_within_a_round(report: ModuleType) -> None:
    def measured(*rates: float) -> list[dict[str, float]]:
        others = {"latency_p50_us": 1.0, "latency_p99_us": 1.0, "cpu_us_per_request": 1.0}
        return [{"requests_per_second": rate, **others} for rate in rates]

    # The machine was ten times as fast in the second round, and half as fast in the third.
    rounds = {"raw": measured(100, 1000, 50), "rust": measured(80, 700, 45)}
    summary = report.summarize(rounds, {"raw": ["raw", "nats-py"], "rust": ["raw", "nats-py"]})

    assert summary["rust"]["ratios"]["raw"]["requests_per_second"] == {"median": 0.8, "min": 0.7, "max": 0.9}
    assert summary["rust"]["figures"]["requests_per_second"] == {"median": 80, "min": 45, "max": 700}
    assert summary["raw"]["ratios"] == {}


@pytest.fixture
def core(benches: Callable[[str], ModuleType]) -> ModuleType:
    return benches("core")


def test_a_figure_stands_beside_its_target(core: ModuleType) -> None:
    found = [
        core.Row("quick enough", 299.6, "ns", 300),
        core.Row("too slow", 12.34, "µs", 10),
        core.Row("enough", 1.61, "x", at_least=1.6),
        core.Row("too little", 1.2, "x", at_least=1.6),
        core.Row("promised by nobody", 1234.5, "ns"),
        core.Row("none at all", 0.0, "", 0),
    ]

    assert [row.holds for row in found] == [True, False, True, False, True, True]
    assert [" ".join(line.split()) for line in core.table(found)] == [
        "The deciding core",
        "target measured",
        "quick enough ≤ 300 ns 300 ns",
        "too slow ≤ 10 µs 12.3 µs missed",
        "enough ≥ 1.60 x 1.61 x",
        "too little ≥ 1.60 x 1.20 x missed",
        "promised by nobody 1,234 ns",
        "none at all ≤ 0 0",
    ]


def test_figures_of_the_core_are_medians_of_rounds(core: ModuleType) -> None:
    names = [
        "decision/least_requests/10",
        "decision/least_requests/10000",
        "decision/least_requests_busy/10000",
    ]
    names += [
        "decision/peak_ewma/10",
        "decision/peak_ewma/10000",
        "decision/session/10",
        "decision/session/10000",
    ]
    names += ["decision/prefix_aware/10", "decision/prefix_aware/1000", "attempt/timers"]
    figures = {
        "allocations": [["a", 0.0], ["b", 2.0]],
        "memory": [33_000_000, 300_000],
        "fleet_cpu": [0.2, 0.1],
        # The machine was busy with other things in the second round.
        "threads": [[10, [[1.0, 1.7, 2.0], [1.0, 0.5, 0.6], [2.0, 3.2, 3.8]]]],
        "retry": {"at_once": [0.001, 0.002, 0.9], "after_a_failure": [0.0015, 0.0027, 0.9]},
    }

    rows = {row.name: row for row in core.rows(dict.fromkeys(names, 250.0), figures, {"peak_ewma": 800.0})}

    def measured(beginning: str) -> float:
        (row,) = (row for name, row in rows.items() if name.startswith(beginning))
        return round(row.measured, 6)

    assert (measured("least_requests, 10 "), measured("least_requests, 10,000 workers, all busy")) == (
        250,
        0.25,
    )
    assert measured("Router.select") == 0.8
    assert measured("two threads to one") == 1.6
    assert measured("what a retry adds") == 0.5
    assert measured("heap allocations") == 2
    assert measured("CPU of") == 0.3
    assert not rows["heap allocations of a decision"].holds


# === whole runs ===


def _run(peers: Path, output: Path, *options: str) -> tuple[str, dict[str, Any]]:
    tiny = ("--rounds=2", "--seconds=30", "--requests=70", "--tokens=3")
    done = subprocess.run(
        _command(peers, output, *tiny, *options), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.glob("*.json")
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


@_whole
def test_every_side_does_every_kind_of_work(peers: Path, tmp_path: Path) -> None:
    printed, kept = _run(peers, tmp_path, f"--only={','.join(_CELLS)}")

    assert list(kept["cells"]) == _CELLS
    for name, cell in kept["cells"].items():
        assert list(cell["summary"]) == _SIDES
        for side, summary in cell["summary"].items():
            figures = summary["figures"]
            assert figures["requests"] == {"median": 70, "min": 70, "max": 70}
            assert 0 < figures["latency_p50_us"]["min"] <= figures["latency_p99_us"]["max"]
            assert figures["cpu_us_per_request"]["min"] > 0
            assert (
                ("first_token_p50_us" in figures) == ("tokens_per_second" in figures) == ("streaming" in name)
            )
            assert [len(cell["rounds"][side]), kept["rounds"]] == [2, 2]
            assert all(set(ratio) == _RATIOS for ratio in summary["ratios"].values())
        ratios = {side: list(summary["ratios"]) for side, summary in cell["summary"].items()}
        assert ratios == {
            "raw": ["nats-py"],
            "raw-headers": ["raw", "nats-py"],
            "rust": ["raw", "nats-py"],
            "python": ["raw", "nats-py"],
            "python-uvloop": ["raw", "nats-py-uvloop"],
            "nats-py": ["raw"],
            "nats-py-uvloop": ["raw"],
        }
        assert re.search(rf"^{cell_title(name)}$", printed, re.MULTILINE)
    assert set(kept["machine"]) == {"machine", "python", "rust", "nats", "ours"}


def cell_title(name: str) -> str:
    mode, _, concurrency = name.partition("-")
    return f"{mode}, {'one request' if concurrency == '1' else '64 requests'} at a time"


@_whole
def test_the_deciding_core_is_measured_by_itself(peers: Path, tmp_path: Path) -> None:
    command = _command(peers, tmp_path, "--only=core", "--quick", routing=built_bench("routing"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))

    assert "cells" not in kept
    assert all(row["measured"] >= 0 and row["name"] in done.stdout for row in kept["core"])
    assert len(kept["core"]) == 20
    (allocations,) = (row for row in kept["core"] if row["name"].startswith("heap allocations"))
    assert allocations["measured"] == 0


@_whole
def test_only_what_was_asked_for_runs(peers: Path, tmp_path: Path) -> None:
    _, kept = _run(peers, tmp_path, "--only=raw,nats-py,buffered-1")

    assert list(kept["cells"]) == ["buffered-1"]
    assert list(kept["cells"]["buffered-1"]["summary"]) == ["raw", "nats-py"]


@_whole
def test_the_field_measures_ours_in_front_of_every_kind_of_worker(peers: Path, tmp_path: Path) -> None:
    """Others' programs are no part of it, as they would have to be installed."""
    _, kept = _run(peers, tmp_path, "--only=ours")

    groups = kept["field"]["groups"]
    sides = {
        name: {side for cell in group["cells"].values() for side in cell["summary"]}
        for name, group in groups.items()
    }
    assert sides == {
        "mocked-4": {"ours"},
        "mocked-100": {"ours"},
        "called": {"ours"},
        "http": {"direct", "ours", "ours, NATS"},
    }
    for group in groups.values():
        for name, cell in group["cells"].items():
            for summary in cell["summary"].values():
                assert summary["figures"]["requests"] == {"median": 70, "min": 70, "max": 70}
                assert summary["figures"]["cpu_us_per_request"]["min"] > 0
                assert ("tokens_per_second" in summary["figures"]) == ("streaming" in name)
    assert set(groups["http"]["cells"]["buffered-64"]["summary"]["ours"]["ratios"]) == {
        "direct",
        "ours, NATS",
    }
    assert kept["field"]["missing"] == {}


@_whole
def test_requests_to_workers_over_http_are_compared_with_direct_ones(peers: Path, tmp_path: Path) -> None:
    program = str(ROOT / "benches" / "http_workers.py")
    command = [sys.executable, program, f"--peers={peers}", "--rounds=1", "--seconds=0.1"]
    done = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    lengths = json.loads(file.read_text(encoding="utf-8"))["http_workers"]["tokens"]

    assert list(lengths) == ["1", "64"]
    for length in lengths.values():
        for sides in length["compared"].values():
            assert list(sides) == ["direct", "httpx", "rust", "python", "python-uvloop"]
            assert all(side["is"]["min"] > 0 for side in sides.values())


@pytest.mark.slow
def test_the_front_end_is_compared_with_a_constant(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benches" / "front.py"), "--rounds=1", "--seconds=0.1"]
    done = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    front = json.loads(file.read_text(encoding="utf-8"))["front"]

    assert front["summary"]["rate_ratio"]["min"] > 0
    assert len(front["rounds"]) == 1


def test_an_unknown_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    done = subprocess.run(
        _command(Path("nowhere"), tmp_path, "--only=raw,grpc"), capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "'grpc'" in done.stderr
    assert all(name in done.stderr for name in [*_SIDES, *_CELLS])


@_whole
def test_ctrl_c_ends_everything_that_was_started(peers: Path, tmp_path: Path) -> None:
    command = _command(peers, tmp_path, "--only=raw,nats-py", "--seconds=5")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as bench:
        assert bench.stdout is not None
        assert any(line.startswith("round 0") for line in bench.stdout)
        bench.send_signal(signal.SIGINT)
        rest = bench.stdout.read()  # to its end: every process that was started holds it open

    assert bench.returncode == 130
    assert "interrupted" in rest
    assert not list(tmp_path.iterdir())
