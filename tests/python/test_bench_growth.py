"""What is said of growth and of memory follows from what was measured, and both benchmarks run."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from programs import ROOT, built_bench

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


@pytest.fixture
def growth(benches: Callable[[str], ModuleType]) -> ModuleType:
    return benches("growth")


@pytest.fixture
def memory(benches: Callable[[str], ModuleType]) -> ModuleType:
    return benches("memory")


def test_growth_is_to_the_smallest_of_the_same_round(growth: ModuleType) -> None:
    # The machine was half as fast in the second round.
    found = growth.summarize([{1: 10.0, 100: 11.0}, {1: 20.0, 100: 24.0}, {1: 10.0, 100: 13.0}])

    assert found[1] == {"figures": [10.0, 20.0, 10.0], "median": 10.0, "to_the_smallest": 1.0}
    assert found[100]["to_the_smallest"] == pytest.approx(1.2)
    assert found[100]["median"] == 13.0


def test_growth_beyond_the_target_is_marked(growth: ModuleType) -> None:
    found = growth.summarize([{1: 10.0, 10: 11.5, 100: 11.6}])

    marked = [line.endswith("not flat") for line in growth.table("streams", "us", found)]

    assert marked == [False, False, False, True]


def test_bytes_of_one_are_the_slope_of_many(memory: ModuleType) -> None:
    assert memory.slope([(0, 1000), (10, 1200), (20, 1400)]) == 20
    assert memory.slope([(0, 0), (1, 3), (2, 3), (3, 6)]) == pytest.approx(1.8)


def test_what_python_has_no_part_in_is_rusts(memory: ModuleType) -> None:
    def samples(each: int) -> dict[str, list[dict[str, object]]]:
        rising = [{"phase": "more", "count": n, "mode": 100 + n * each} for n in range(3)]
        named = [
            {**sample, mode: sample["mode"]} for mode in ("resident", "heap", "python") for sample in rising
        ]
        return {mode: [one for one in named if mode in one] for mode in ("resident", "heap", "python")}

    streams = samples(10)
    for mode, each in streams.items():
        each.append({"phase": "after", "count": 0, mode: 107})
    life = {
        mode: [{"phase": "idle", "count": 0, mode: size}]
        for mode, size in zip(streams, (9, 5, 2), strict=True)
    }

    rows = memory.summarize({"life": life, "streams": streams, "sessions": samples(4), "records": samples(6)})

    assert rows["idle"] == {"resident": 9, "heap": 5, "python": 2, "rust": 3}
    assert rows["per stream"]["heap"] == 10
    assert rows["per session"]["heap"] == 4
    assert rows["left of the streams"]["heap"] == 7


@pytest.mark.nats
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("memory", (), r"per stream +[\d,]+ B +[\d,]+ B +[\d,]+ B"),
        (
            "growth",
            ("--rounds=1", "--seconds=0.1"),
            r"one core: p50 [\d.]+, p95 [\d.]+, p99 [\d.]+, p100 [\d.]+",
        ),
    ],
)
def test_a_quick_run_measures_everything(name: str, options: tuple[str, ...], says: str) -> None:
    command = [
        sys.executable,
        str(ROOT / "benches" / f"{name}.py"),
        "--quick",
        "--peers",
        built_bench("peers"),
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=280, check=True)
    assert re.search(says, done.stdout), done.stdout
