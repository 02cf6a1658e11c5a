"""`pellucid doctor`: this machine, what it can do at most, and what Pellucid chose for it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pellucid.core.errors import BackendError

DESCRIPTION = """
Show what Pellucid sees of this machine: processor, memory, the instruction sets the native core can use and the one it
chose, whether the core is built and why not, the read bandwidth and the int8 peak (measured now, which takes about a
second), and where models are kept. Decoding one answer is bounded by the read bandwidth, reading a prompt by the int8
peak; `pellucid bench` shows how near it comes to each.
"""

EXAMPLES = """
pellucid doctor
pellucid doctor --threads 1
pellucid doctor --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads to measure with (default: 1, and all that may be used)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine(args.threads)
    if args.json:
        import json

        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_report(report)
    return 0


def examine(threads: int | None = None) -> dict[str, Any]:
    """All findings as JSON-ready data; bytes, operations and bytes a second.

    Raises:
        InvalidRequestError: `threads` is not positive.
    """
    from pellucid import __version__
    from pellucid.cli import machine
    from pellucid.core.config import BackendConfig

    BackendConfig(threads=threads)
    facts = machine.describe()
    core = native_core()
    return {
        "pellucid": __version__,
        "machine": facts,
        "backend": {"chosen": "cpu" if core["built"] else "reference", "native": core},
        "limits": measure(sorted({1, facts["usable_cpus"]}) if threads is None else [threads]) if core["built"] else [],
        "environment": {name: value for name, value in os.environ.items() if name.startswith("PELLUCID_")},
        "models": model_cache(),
    }


def native_core() -> dict[str, Any]:
    """Whether the native core is there, and what it says of the processor; else why it is not."""
    from pellucid.cli import limits

    try:
        core = limits.native()
    except BackendError as error:
        record = Path(__file__).parents[1] / "backends" / "cpu" / "BUILD_FAILED.txt"
        reason = record.read_text(encoding="utf-8").strip() if record.is_file() else error.message
        return {"built": False, "reason": reason}
    available = core.instruction_sets()
    forced = os.environ.get("PELLUCID_ISA")
    return {
        "built": True,
        "instruction_sets": available,
        "chosen": forced or available[0],
        "reason": "PELLUCID_ISA asks for it" if forced else "the best of those this processor has",
        "cpu_features": core.cpu_features(),
        "module": core.__file__,
    }


def measure(thread_counts: list[int]) -> list[dict[str, Any]]:
    """The limits for each number of threads, and for each instruction set."""
    from pellucid.cli import limits

    return [
        {
            "threads": threads,
            "read_bandwidth_bytes_per_s": limits.read_bandwidth(threads),
            "int8_operations_per_s": {name: limits.int8_peak(threads, name) for name in limits.int8_instruction_sets()},
        }
        for threads in thread_counts
    ]


def model_cache() -> dict[str, Any]:
    from pellucid.core.errors import StorageError
    from pellucid.weights import catalog
    from pellucid.weights.cache import models_dir

    try:
        folder = models_dir()
    except StorageError as error:
        return {"folder": None, "problem": error.message, "cached": []}
    return {
        "folder": str(folder),
        "free_bytes": free_bytes(folder),
        "cached": [entry.name for entry in catalog.entries() if catalog.is_cached(entry)],
    }


def free_bytes(folder: Path) -> int | None:
    """Free space where `folder` is or would be made."""
    import shutil

    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def print_report(report: dict[str, Any]) -> None:
    from pellucid.cli.console import format_bytes

    facts, core, cache = report["machine"], report["backend"]["native"], report["models"]
    cores = ", ".join(
        f"{facts[key]} {name}"
        for key, name in (
            ("physical_cores", "physical cores"),
            ("usable_cpus", "processors usable"),
            ("logical_cpus", "in the machine"),
        )
        if facts[key] is not None
    )
    memory = ", ".join(
        f"{format_bytes(facts[key])}{suffix}"
        for key, suffix in (
            ("memory_bytes", ""),
            ("memory_available_bytes", " available"),
            ("memory_limit_bytes", " limit of this control group"),
        )
        if facts[key] is not None
    )
    section("Pellucid", [("version", report["pellucid"]), ("python", facts["python"])])
    section(
        "Machine",
        [
            ("system", f"{facts['system']}, {facts['architecture']}"),
            ("processor", facts["cpu"] or "unknown"),
            ("cores", cores),
            ("memory", memory),
        ],
    )
    if core["built"]:
        section(
            "Backend: cpu, the native core",
            [
                ("instruction set", f"{core['chosen']}: {core['reason']}"),
                ("available", ", ".join(core["instruction_sets"])),
                ("features", ", ".join(core["cpu_features"])),
                ("module", core["module"]),
            ],
        )
    else:
        section("Backend: reference (numpy, slow), since the native core is not built", [("why", core["reason"])])
    for limits in report["limits"]:
        peaks = [(f"int8, {name}", f"{rate / 1e9:.0f} GOPS") for name, rate in limits["int8_operations_per_s"].items()]
        bandwidth = ("reading memory", f"{limits['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s")
        section(f"Limits measured with {limits['threads']} thread{'s'[: limits['threads'] > 1]}", [bandwidth, *peaks])
    if report["environment"]:
        section("Environment", list(report["environment"].items()))
    free = "" if cache.get("free_bytes") is None else f" ({format_bytes(cache['free_bytes'])} free)"
    section(
        "Models",
        [("folder", f"{cache['folder'] or cache['problem']}{free}"), ("in it", ", ".join(cache["cached"]) or "none")],
    )


def section(title: str, rows: list[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    print(title)
    for name, value in rows:
        first, *rest = str(value).splitlines() or [""]
        print(f"  {name:<{width}}{first}")
        for line in rest:
            print(f"  {'':<{width}}{line}")
    print()
