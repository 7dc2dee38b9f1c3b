"""The conditions of a measurement: versions, processors and their clocks, load, the commit."""

import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from runtimes.host.gpu import gpu
from runtimes.host.nvml import nvml

PACKAGES = ("numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tritonclient", "transformers")
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def environment(threads: int) -> dict[str, Any]:
    """All conditions now; `threads` are those of an engine."""
    found, library = gpu(), nvml()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        "cpu": next(_cpuinfo("model name"), platform.machine()),
        "cpus": os.cpu_count(),
        "cpu_mhz": [round(float(each)) for each in _cpuinfo("cpu MHz")],
        "governor": _read(CPUFREQ / "scaling_governor"),
        "load": [round(each, 2) for each in os.getloadavg()],
        "threads": threads,
        "gpu": f"{found.name} {found.architecture}" if found else None,
        "gpu_state": library.state() if library else None,
        "versions": dict(_versions()),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout, with `+` behind it where files differ; None without git."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", folder, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _cpuinfo(name: str) -> Iterator[str]:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(name):
            yield line.partition(":")[2].strip()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
