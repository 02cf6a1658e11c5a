"""What machine this is, from the operating system: for `pellucid doctor` and the heading of a benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from pellucid.core.processors import usable_processors


def describe() -> dict[str, Any]:
    """JSON-ready facts; sizes in bytes. A fact that this system does not tell is None."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": usable_processors(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory_bytes(),
        "memory_available_bytes": memory_available_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "python": platform.python_version(),
    }


def cpu_model() -> str | None:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def physical_cores() -> int | None:
    """Distinct cores among the usable processors: hyper-threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    siblings = {
        tuple(_lines(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        for cpu in os.sched_getaffinity(0)
    }
    return None if () in siblings else len(siblings)


def memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_available_bytes() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def memory_limit_bytes() -> int | None:
    """The control group's limit, where there is one below the machine's memory."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        for line in _lines(path):
            if line.isdigit() and int(line) < (memory_bytes() or 0):
                return int(line)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
