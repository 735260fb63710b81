"""The count of instructions says rightly what has changed, and counts what it says it does."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from programs import ROOT, built_bench

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


@pytest.fixture
def instructions(scripts: Callable[[str], ModuleType]) -> ModuleType:
    return scripts("instructions")


def _verdicts(changes: list[object]) -> dict[str, str]:
    return {change.case: change.verdict for change in changes}  # type: ignore[attr-defined]


def test_a_figure_may_change_by_a_twentieth(instructions: ModuleType) -> None:
    before = {"same": 1000.0, "a little more": 1000.0, "more": 1000.0, "less": 1000.0}
    now = {"same": 1000.0, "a little more": 1049.0, "more": 1051.0, "less": 949.0}

    changes = instructions.compare(before, now)

    assert _verdicts(changes) == {"same": "", "a little more": "", "more": "worse", "less": "better"}
    assert not instructions.holds(changes)
    assert instructions.holds([change for change in changes if change.case != "more"])


def test_the_table_names_the_case_its_figures_and_what_to_do(instructions: ModuleType) -> None:
    changes = instructions.compare(
        {"wire/decode": 2000.0, "select": 100.0}, {"wire/decode": 2500.0, "select": 100.0}
    )

    lines = list(instructions.table(changes))

    assert lines[1].split() == ["wire/decode", "2,000.0", "2,500.0", "+25.0%", "worse"]
    assert lines[2].split() == ["select", "100.0", "100.0", "+0.0%"]
    assert "callgrind_annotate" in lines[-1]
    assert "make bench-check ARGS=--update" in lines[-1]


def test_what_is_better_passes_and_asks_to_be_kept(instructions: ModuleType) -> None:
    changes = instructions.compare({"select": 100.0}, {"select": 50.0})

    assert instructions.holds(changes)
    assert "make bench-check ARGS=--update" in list(instructions.table(changes))[-1]


def test_nothing_is_said_where_nothing_is_to_be_done(instructions: ModuleType) -> None:
    changes = instructions.compare({"select": 100.0}, {"select": 101.0})

    assert list(instructions.table(changes))[-1].split() == ["select", "100.0", "101.0", "+1.0%"]


def test_cases_that_come_or_go_do_not_pass_unnoticed(instructions: ModuleType) -> None:
    changes = instructions.compare({"old": 1.0}, {"new": 1.0})

    assert _verdicts(changes) == {"new": "new", "old": "gone"}
    assert not any(instructions.holds([change]) for change in changes)
    assert _verdicts(instructions.compare({"old": 1.0}, {"new": 1.0}, whole=False)) == {"new": "new"}


def test_figures_of_another_compiler_are_not_compared(instructions: ModuleType) -> None:
    there = {"rustc": "rustc 1.90.0", "target": "x86_64-unknown-linux-gnu"}

    assert instructions.differences(there, {**there, "more": "of no interest"}) == []
    assert instructions.differences(there, {**there, "rustc": "rustc 1.95.0"}) == [
        "rustc: rustc 1.95.0 here, rustc 1.90.0 there"
    ]


def test_figures_are_read_as_they_were_written(instructions: ModuleType, tmp_path: Path) -> None:
    figures = instructions.Figures({"rustc": "rustc 1.95.0"}, {"select": 123.44})

    instructions.write(figures, tmp_path / "figures.json")

    assert instructions.read(tmp_path / "figures.json") == instructions.Figures(
        {"rustc": "rustc 1.95.0"}, {"select": 123.4}
    )


def test_cases_are_chosen_by_how_their_names_begin(instructions: ModuleType) -> None:
    figures = {"wire/decode": 1, "wire/encode": 2, "select/10": 3}

    assert instructions.chosen(figures, "") == figures
    assert instructions.chosen(figures, "wire/e,select") == {"wire/encode": 2, "select/10": 3}


@pytest.mark.parametrize("names", ["nonsense", "wire,nonsense"])
def test_an_unknown_case_is_refused_before_anything_is_built(
    instructions: ModuleType, tmp_path: Path, names: str
) -> None:
    # Nothing that builds could be found.
    done = subprocess.run(
        [sys.executable, "-B", ROOT / "scripts" / "dev.py", "bench-check", f"--only={names}"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path)},
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert (
        f"no case begins with nonsense; there are {', '.join(instructions.read().instructions)}"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_committed_figures_are_of_the_programs_cases_and_each_case_runs(instructions: ModuleType) -> None:
    program = built_bench("check")

    cases = instructions.cases(program)

    assert set(instructions.read().instructions) == set(cases)
    assert set(instructions.read().holds_for) == set(instructions.here())
    for case in cases:
        subprocess.run([program, case, "64"], check=True)
