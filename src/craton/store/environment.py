"""Where a run happens: the versions that made it, the machine it is on (without names), and whether it lives."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

_PACKAGES: Final = ("craton", "torch", "numpy", "safetensors", "tokenizers")


def environment() -> dict[str, Any]:
    """What one needs to know to repeat a run: versions, processor, threads. No user, no host, no path."""
    return {
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def process_start(pid: int) -> str | None:
    """When the process `pid` began, as a text that no other process of this number ever has; None if there is no such
    process, or if this system does not tell."""
    if Path("/proc/self/stat").exists():
        return _start_from_proc(pid)
    return _start_from_ps(pid)


def _start_from_proc(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    # The command (field 2) is in brackets and may hold anything, so fields are counted from the last bracket.
    state, *fields = stat[stat.rindex(b")") + 2 :].split()
    if state in (b"Z", b"X"):  # dead, and its parent has not noticed yet
        return None
    return f"{fields[18].decode()} ticks after boot {boot}"


def _start_from_ps(pid: int) -> str | None:
    try:
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
