"""PEP 517/660 build backend: scikit-build-core, with a way on where there is no C++ compiler.

The native core is compiled by the first of these that works:

1. the compiler in `CXX`, or `c++`, `g++`, `clang++` on the path, if it compiles C++20;
2. the compiler inside the `ziglang` package of PyPI, a build requirement only where 1 found nothing;
3. none: the package is installed without the core, and `pellucid/backends/cpu/BUILD_FAILED.txt` says why. The
   reference backend then runs the models, slowly.

`PELLUCID_NATIVE` changes the choice: `auto` (as above), `require` (3 is an error), `off` (go straight to 3).

An editable install compiles into `src/`, incrementally. So does `python build_backend/pellucid_build.py`, which takes
an argument: `requires` prints what that needs installed, one requirement a line; `check` compiles with warnings as
errors, installing nothing.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE_PACKAGE = "pellucid/backends/cpu"
RECORD_NAME = "BUILD_FAILED.txt"
ZIGLANG = "ziglang>=0.15"
CMAKE = "cmake>=3.21"
NINJA = "ninja>=1.10"
LOG_TAIL_LINES = 25
PROGRESS = re.compile(r"\[\d+/\d+\] |-- ")  # a step of Ninja's, a remark of CMake's

ConfigSettings = dict[str, str | list[str]] | None

PROBE_SOURCE = """\
#include <bit>
#include <concepts>
#include <span>
#include <thread>
template <std::integral T> T twice(std::span<const T> values) { return values[0] * 2; }
int main() {
    const int value = std::bit_cast<int>(1.0f);
    std::thread([] {}).join();
    return twice(std::span<const int>(&value, 1)) == 0;
}
"""


class NativeBuildError(Exception):
    """The native core cannot be, or was not, compiled.

    `reason` is a sentence for the user, `log` the end of what the build printed.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


@dataclass(frozen=True)
class Compiler:
    """What compiles the core: `name` is a word for a folder, `command` what runs it (empty: ziglang's)."""

    name: str
    command: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        return {"CXX": shlex.join(self.command)} if self.command else {}

    def cmake_definitions(self) -> dict[str, str]:
        if self.command:
            return {}
        return {
            "CMAKE_TOOLCHAIN_FILE": str(ROOT / "cmake" / "zig-toolchain.cmake"),
            "PELLUCID_ZIG": str(_ziglang_executable()),
        }


def native_mode() -> str:
    mode = os.environ.get("PELLUCID_NATIVE", "auto")
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"PELLUCID_NATIVE={mode!r}: use auto, require or off")
    return mode


def find_system_compiler() -> Compiler | None:
    """The first system compiler that compiles and links a C++20 program, or None."""
    if "CXX" in os.environ:
        candidates = [shlex.split(os.environ["CXX"])]
    else:
        candidates = [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        if command and (path := shutil.which(command[0])) and _compiles([path, *command[1:]]):
            return Compiler(Path(path).name, (path, *command[1:]))
    return None


def _compiles(command: Sequence[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE_SOURCE)
        arguments = [*command, "-std=c++20", "-pthread", str(source), "-o", str(source.with_suffix(""))]
        try:
            return subprocess.run(arguments, capture_output=True, timeout=120, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def _ziglang_executable() -> Path | None:
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("zig", "zig.exe"):
            if (path := Path(folder, name)).is_file():
                return path
    return None


def _require_python_headers() -> None:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NativeBuildError(
            f"the C headers of Python {version} are missing (no Python.h in {include}). "
            f"Debian and Ubuntu: apt install python{version}-dev; Fedora: dnf install python3-devel."
        )


def find_compiler() -> Compiler:
    """The compiler to use.

    Raises:
        NativeBuildError: none was found, or Python's headers are missing.
    """
    if native_mode() == "off":
        raise NativeBuildError("PELLUCID_NATIVE=off was set when Pellucid was installed.")
    _require_python_headers()
    if compiler := find_system_compiler():
        return compiler
    if _ziglang_executable():
        return Compiler("zig", ())
    raise NativeBuildError(
        f"no C++20 compiler was found ({_searched()}), and the one of the PyPI package ziglang could not be "
        f"installed for {platform.system()} {platform.machine()}."
    )


def _searched() -> str:
    if "CXX" in os.environ:
        return f"CXX={os.environ['CXX']} does not compile a C++20 program"
    return "none of c++, g++, clang++ on the path compiles a C++20 program"


def _installable(requirements: Sequence[str]) -> bool:
    """Whether pip can install the requirements here without compiling anything."""
    # An isolated build hides pip behind PYTHONPATH; the interpreter it belongs to still has it.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], env=environment, capture_output=True, check=False).returncode != 0:
        return True  # another installer is at work: let it try
    with tempfile.TemporaryDirectory() as folder:
        dry_run = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--target", folder]
        result = subprocess.run([*pip, *dry_run, *requirements], env=environment, capture_output=True, check=False)
    return result.returncode == 0


def _native_requirements(from_backend: Sequence[str]) -> list[str]:
    """`from_backend`, ziglang where no compiler was found, and nothing at all where the core cannot be built."""
    if native_mode() == "off":
        return []
    try:
        _require_python_headers()
    except NativeBuildError:
        return []
    requirements = list(from_backend)
    if find_system_compiler() is None:
        requirements.append(ZIGLANG)
    if requirements and not _installable(requirements):
        return []
    return requirements


def _without_cmake(config_settings: ConfigSettings) -> dict[str, str | list[str]]:
    return {**(config_settings or {}), "wheel.cmake": "false", "wheel.py-api": "py3"}


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    import scikit_build_core.build as backend

    return backend.get_requires_for_build_sdist(config_settings)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    import scikit_build_core.build as backend

    return backend.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    import scikit_build_core.build as backend

    return backend.prepare_metadata_for_build_wheel(metadata_directory, _without_cmake(config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    import scikit_build_core.build as backend

    return backend.prepare_metadata_for_build_editable(metadata_directory, _without_cmake(config_settings))


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    import scikit_build_core.build as backend

    return _native_requirements(backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    return _native_requirements([CMAKE, NINJA])


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """A wheel with the core for this machine, or a pure one that holds the reason why not."""
    try:
        return _build_native_wheel(wheel_directory, config_settings)
    except NativeBuildError as error:
        record = _failure_record(error)
    import scikit_build_core.build as backend

    name = backend.build_wheel(wheel_directory, _without_cmake(config_settings))
    _add_to_wheel(Path(wheel_directory, name), f"{CORE_PACKAGE}/{RECORD_NAME}", record)
    return name


def _build_native_wheel(wheel_directory: str, config_settings: ConfigSettings) -> str:
    compiler = find_compiler()
    settings: dict[str, str | list[str]] = dict(config_settings or {})
    for key, value in compiler.cmake_definitions().items():
        settings[f"cmake.define.{key}"] = value
    # A process of its own: its output can be kept for the record, and it cannot leave this one half changed.
    script = "import json, sys; from scikit_build_core.build import build_wheel; build_wheel(*json.loads(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, "-c", script, json.dumps([folder, settings])], compiler.environment())
        (wheel,) = Path(folder).glob("*.whl")
        shutil.move(wheel, Path(wheel_directory, wheel.name))
        return wheel.name


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """A wheel that points at `src/`, where the core is compiled in place."""
    import scikit_build_core.build as backend

    build_in_place()
    return backend.build_editable(wheel_directory, {**_without_cmake(config_settings), "editable.mode": "inplace"})


def build_in_place() -> None:
    """Compile the core into `src/`, doing again only what changed; on failure leave the record there instead.

    Raises:
        SystemExit: it failed, and `PELLUCID_NATIVE=require`.
    """
    package = ROOT / "src" / CORE_PACKAGE
    record = package / RECORD_NAME
    try:
        folder = _compile("dev")
        _run([_program("cmake"), "--install", str(folder), "--prefix", str(ROOT / "src")], {})
        record.unlink(missing_ok=True)
    except NativeBuildError as error:
        for stale in package.glob(f"_native*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            stale.unlink()
        record.write_text(_failure_record(error), encoding="utf-8")


def _compile(purpose: str, targets: Sequence[str] = ("all",), **options: str) -> Path:
    """Compile the core in a folder under `build/` that is kept for the next time, and return the folder."""
    compiler = find_compiler()
    if not compiler.command:
        print("with the ziglang package's compiler; its first use builds a C++ library, for minutes", flush=True)
    folder = ROOT / "build" / f"{purpose}-{sys.implementation.cache_tag}-{compiler.name}"
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        **compiler.cmake_definitions(),
        **options,
    }
    configure = [_program("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    _run([*configure, *(f"-D{key}={value}" for key, value in definitions.items())], compiler.environment())
    _run([_program("cmake"), "--build", str(folder), "--target", *targets], compiler.environment())
    return folder


def _program(name: str) -> str:
    """Path of `cmake` or `ninja`: that of the PyPI package of the name, else the system's."""
    if importlib.util.find_spec(name):
        module = importlib.import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        if folder and (path := shutil.which(name, path=folder)):
            return path
    if path := shutil.which(name):
        return path
    raise NativeBuildError(f"{name} was found neither as a Python package nor on the path.")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run, passing the output on, and keep its end for the message should it fail."""
    tail: collections.deque[str] = collections.deque(maxlen=LOG_TAIL_LINES)
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in process.stdout:
        tail.append(line)
        _show(line, columns)
    _show("", columns)
    if process.wait() != 0:
        raise NativeBuildError("compiling it failed.", "".join(tail))


def _show(line: str, columns: int) -> None:
    """Print a line of a build; on a terminal, `columns` wide, each step takes the place of the last."""
    if columns and PROGRESS.match(line):
        line = line.rstrip()[: columns - 1]
    print(("\r\033[K" if columns else "") + line, end="", flush=True)


def _failure_record(error: NativeBuildError) -> str:
    """The text of BUILD_FAILED.txt, also shown now.

    Raises:
        SystemExit: `PELLUCID_NATIVE=require`.
    """
    text = (
        "Pellucid's native core is not installed: its models run on the slow reference backend.\n"
        f"Reason: {error.reason}\n"
        "When that is put right (any C++20 compiler does: g++ 11, clang 14 or later), install again with\n"
        "`pip install --force-reinstall --no-cache-dir`, or `make clean run` in a checkout.\n"
    )
    if error.log:
        text += f"\nThe end of what the build said:\n\n{error.log}"
    if native_mode() == "require":
        raise SystemExit(text + "PELLUCID_NATIVE=require makes this an error.") from error
    print(text, file=sys.stderr)
    return text


def _add_to_wheel(wheel: Path, name: str, text: str) -> None:
    """Add a file to a wheel and to its RECORD."""
    data = text.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    changed = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = f"{name},sha256={digest},{len(data)}\n".encode() + content
                new.writestr(name, data)
            new.writestr(item, content)
    changed.replace(wheel)


def main(arguments: Sequence[str]) -> None:
    if list(arguments) == ["requires"]:
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        print("\n".join([*pyproject["build-system"]["requires"], *_native_requirements([CMAKE, NINJA])]))
    elif list(arguments) == ["check"]:
        try:
            _compile("check", ("all", "vector_kernels_bench"), PELLUCID_WERROR="ON")
        except NativeBuildError as error:
            raise SystemExit(f"The native core: {error.reason}") from error
    elif not arguments:
        build_in_place()
    else:
        raise SystemExit(f"usage: {Path(__file__).name} [requires | check]")


if __name__ == "__main__":
    main(sys.argv[1:])
