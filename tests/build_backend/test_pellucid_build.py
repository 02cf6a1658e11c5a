"""The build backend's choice of compiler, and the record it leaves where there is none."""

from __future__ import annotations

import csv
import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from build_backend import pellucid_build

ROOT = Path(__file__).resolve().parents[2]


def make_program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that holds nothing, no CXX, no ziglang; the folder returned is the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "PELLUCID_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pellucid_build, "_require_python_headers", lambda: None)
    monkeypatch.setattr(pellucid_build, "_ziglang_executable", lambda: None)
    return tmp_path


def test_a_bare_machine_asks_for_ziglang(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pellucid_build, "_installable", lambda requirements: True)
    assert pellucid_build._native_requirements(["cmake"]) == ["cmake", pellucid_build.ZIGLANG]


def test_requirements_that_cannot_be_had_are_not_asked_for(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pellucid_build, "_installable", lambda requirements: False)
    assert pellucid_build._native_requirements(["cmake"]) == []


def test_a_compiler_that_works_is_used_and_ziglang_is_not_asked_for(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_program(bare_machine, "g++", "exit 0")
    monkeypatch.setattr(pellucid_build, "_installable", lambda requirements: True)
    assert pellucid_build.find_compiler().environment() == {"CXX": str(path)}
    assert pellucid_build._native_requirements(["cmake"]) == ["cmake"]


def test_a_compiler_that_fails_is_passed_over(bare_machine: Path) -> None:
    make_program(bare_machine, "c++", "exit 1")
    working = make_program(bare_machine, "clang++", "exit 0")
    assert pellucid_build.find_system_compiler().command == (str(working),)


def test_CXX_is_obeyed_with_its_arguments(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(bare_machine, "c++", "exit 0")
    launcher = make_program(bare_machine, "cache", '[ "$1" = special-c++ ]')
    monkeypatch.setenv("CXX", "cache special-c++")
    assert pellucid_build.find_system_compiler().command == (str(launcher), "special-c++")


def test_a_CXX_that_fails_is_named_in_the_reason(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(bare_machine, "c++", "exit 0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(pellucid_build.NativeBuildError, match="CXX=no-such-compiler"):
        pellucid_build.find_compiler()


def test_ziglang_is_the_last_resort(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pellucid_build, "_ziglang_executable", lambda: Path("/zig"))
    compiler = pellucid_build.find_compiler()
    assert compiler.name == "zig"
    assert compiler.environment() == {}
    assert compiler.cmake_definitions()["PELLUCID_ZIG"] == "/zig"
    assert Path(compiler.cmake_definitions()["CMAKE_TOOLCHAIN_FILE"]).is_file()


def test_missing_headers_are_the_reason(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pellucid_build.sysconfig, "get_path", lambda name: str(bare_machine))
    with pytest.raises(pellucid_build.NativeBuildError, match=r"no Python\.h in"):
        pellucid_build.find_compiler()
    assert pellucid_build._native_requirements(["cmake"]) == []


def test_off_builds_nothing(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(bare_machine, "c++", "exit 0")
    monkeypatch.setenv("PELLUCID_NATIVE", "off")
    assert pellucid_build._native_requirements(["cmake"]) == []
    with pytest.raises(pellucid_build.NativeBuildError, match="PELLUCID_NATIVE=off"):
        pellucid_build.find_compiler()


def test_require_makes_a_failure_an_error(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_NATIVE", "require")
    with pytest.raises(SystemExit, match="no reason"):
        pellucid_build._failure_record(pellucid_build.NativeBuildError("no reason"))


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_NATIVE", "maybe")
    with pytest.raises(SystemExit, match="use auto, require or off"):
        pellucid_build.native_mode()


def test_a_failed_build_reports_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    script = "for i in $(seq 100); do echo line $i; done; echo 'error: no' >&2; exit 3"
    with pytest.raises(pellucid_build.NativeBuildError) as caught:
        pellucid_build._run(["/bin/sh", "-c", script], {})
    lines = caught.value.log.splitlines()
    assert len(lines) == pellucid_build.LOG_TAIL_LINES
    assert lines[-1] == "error: no"
    assert "line 1\n" in capfd.readouterr().out


def test_on_a_terminal_steps_share_a_line_and_the_rest_stays(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["-- Found Python\n", f"[1/2] Building {'x' * 99}\n", "a.cpp:1: warning: unused\n", "[2/2] Linking\n", ""]
    for line in lines:
        pellucid_build._show(line, 20)
    screen = [part for part in capsys.readouterr().out.split("\r\033[K") if part]
    assert screen == ["-- Found Python", "[1/2] Building xxxx", "a.cpp:1: warning: unused\n", "[2/2] Linking"]
    for line in lines:
        pellucid_build._show(line, 0)
    assert capsys.readouterr().out == "".join(lines)


def test_a_failed_wheel_build_gives_a_pure_wheel_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scikit_build_core")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PELLUCID_NATIVE", "off")
    name = pellucid_build.build_wheel(str(tmp_path))
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.testzip() is None
        names = wheel.namelist()
        assert len(names) == len(set(names))
        assert "Reason: PELLUCID_NATIVE=off" in wheel.read("pellucid/backends/cpu/BUILD_FAILED.txt").decode()
        assert not [name for name in names if name.endswith(".so")]
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = {row[0] for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
    assert recorded == set(names)
    assert [entry.name for entry in os.scandir(tmp_path)] == [name]
