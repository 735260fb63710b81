"""The instructions of the hot paths (benches/check), counted under callgrind and compared with the committed figures.

A case runs so many times and twice as many times; the difference is the case alone, whatever the program needs to
start. Figures hold for the compiler, the target and the C library that they were made with, and are compared with no
others.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from environment import ROOT, environment
from progress import StepError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from valgrind import Valgrind

FIGURES = ROOT / "benches" / "check" / "figures.json"

#: How much a figure may change.
TOLERANCE = 0.05

_LONGEST = 300.0  # seconds for one run

_T = TypeVar("_T")


@dataclass(frozen=True)
class Figures:
    """Instructions by case, and what they hold for."""

    holds_for: dict[str, str]
    instructions: dict[str, float]


@dataclass(frozen=True)
class Change:
    """A case then and now, in instructions: `None` where it was not there."""

    case: str
    before: float | None
    now: float | None

    @property
    def share(self) -> float:
        """By how much it has changed: 0.1 is a tenth more. 0 where there is nothing to compare."""
        return self.now / self.before - 1.0 if self.before and self.now else 0.0

    @property
    def verdict(self) -> str:
        """`worse`, `better`, `new`, `gone`, or nothing."""
        if self.before is None or self.now is None:
            return "new" if self.before is None else "gone"
        if abs(self.share) <= TOLERANCE:
            return ""
        return "worse" if self.share > 0 else "better"


# === the committed figures ===


def here() -> dict[str, str]:
    """What figures of this machine hold for.

    Raises:
        StepError: rustc does not run.
    """
    try:
        said = subprocess.run(["rustc", "-vV"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise StepError("rustc was not found or does not run: install Rust from https://rustup.rs") from error
    host = re.search(r"^host: (.+)$", said, re.MULTILINE)
    return {
        "rustc": said.splitlines()[0],
        "target": host[1] if host else platform.machine(),
        "c_library": " ".join(platform.libc_ver()).strip() or platform.platform(),
    }


def read(path: Path = FIGURES) -> Figures:
    """Reads figures."""
    return Figures(**json.loads(path.read_text(encoding="utf-8")))


def write(figures: Figures, path: Path = FIGURES) -> None:
    """Writes figures, as they are committed."""
    rounded = {case: round(count, 1) for case, count in figures.instructions.items()}
    content = {"holds_for": figures.holds_for, "instructions": rounded}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def differences(holds_for: Mapping[str, str], machine: Mapping[str, str]) -> list[str]:
    """What keeps figures from being compared with those of a machine, in words."""
    return [
        f"{key}: {machine.get(key, 'unknown')} here, {value} there"
        for key, value in holds_for.items()
        if machine.get(key) != value
    ]


# === counting ===


def cases(program: Path, names: str = "") -> dict[str, int]:
    """The program's cases, and how often each is to be done.

    Args:
        program: The program of benches/check.
        names: As of `chosen`.

    Raises:
        StepError: No case begins so.
    """
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return chosen({name: int(times) for name, times in map(str.split, said.splitlines())}, names)


def chosen(found: Mapping[str, _T], names: str) -> dict[str, _T]:
    """Those of the cases that were asked for.

    Args:
        found: Whatever is known of each case, by name.
        names: Beginnings of names, with commas: only these. All of them where it is empty.

    Raises:
        StepError: No case begins with one of these names.
    """
    wanted = tuple(name for name in names.split(",") if name)
    unknown = [name for name in wanted if not any(case.startswith(name) for case in found)]
    if unknown:
        raise StepError(f"no case begins with {' or '.join(unknown)}; there are {', '.join(found)}")
    return {case: known for case, known in found.items() if not wanted or case.startswith(wanted)}


def count(program: Path, chosen: Mapping[str, int], valgrind: Valgrind) -> dict[str, float]:
    """Instructions by case, of doing it once.

    Raises:
        StepError: A case failed.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            case: [pool.submit(_run, program, case, times * factor, valgrind) for factor in (1, 2)]
            for case, times in chosen.items()
        }
        return {case: (twice.result() - once.result()) / chosen[case] for case, (once, twice) in runs.items()}


def _run(program: Path, case: str, times: int, valgrind: Valgrind) -> int:
    command = [
        valgrind.program,
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        os.fspath(program),
        case,
        str(times),
    ]
    try:
        done = subprocess.run(
            command,
            env={**environment(), **valgrind.environment},
            capture_output=True,
            text=True,
            timeout=_LONGEST,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepError(f"{case}: {error}") from error
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or collected is None:
        raise StepError(f"{done.stderr[-4000:]}\n{case}, {times} times: exit status {done.returncode}")
    return int(collected[1])


# === comparing ===


def compare(before: Mapping[str, float], now: Mapping[str, float], *, whole: bool = True) -> list[Change]:
    """Every case, then and now. `whole`: what is not among those of now is gone."""
    names = dict.fromkeys([*now, *before]) if whole else now
    return [Change(name, before.get(name), now.get(name)) for name in names]


def table(changes: list[Change]) -> Iterator[str]:
    """The lines to print, with what is to be done at the end."""
    rows = [("case", "committed", "now", "change", "")]
    rows += [
        (
            change.case,
            _shown(change.before),
            _shown(change.now),
            f"{change.share:+.1%}" if change.before and change.now else "",
            change.verdict,
        )
        for change in changes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, verdict in rows:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells, verdict]).rstrip()
    advice = _advice({change.verdict for change in changes})
    if advice:
        yield ""
        yield advice


def _shown(count: float | None) -> str:
    return "" if count is None else f"{count:,.1f}"


def _advice(verdicts: set[str]) -> str:
    update = "make bench-check ARGS=--update, and commit benches/check/figures.json"
    if "worse" in verdicts:
        return (
            f"More than {TOLERANCE:.0%} more instructions. Make it cheaper: callgrind_annotate says where they are,\n"
            "after valgrind --tool=callgrind on target/release/deps/check-* with the case and a number.\n"
            f"Where it is worth the price: {update}."
        )
    if verdicts & {"new", "gone"}:
        return f"The cases are not those of the committed figures. Write them anew: {update}."
    if "better" in verdicts:
        return f"More than {TOLERANCE:.0%} fewer instructions. So that it stays like this: {update}."
    return ""


def holds(changes: list[Change]) -> bool:
    """Whether the check passes: nothing is worse, and every case is compared."""
    return all(change.verdict in ("", "better") for change in changes)
