import json
import os
from types import SimpleNamespace

import pytest

from pellucid.cli import limits, machine
from pellucid.cli.main import main
from pellucid.core.errors import BackendError


@pytest.fixture
def native_core(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for name in [name for name in os.environ if name.startswith("PELLUCID_")]:
        monkeypatch.delenv(name)  # the report lists them
    core = SimpleNamespace(
        __file__="/x/_native.so",
        instruction_sets=lambda: ["avx2", "portable"],
        cpu_features=lambda: ["avx2", "fma"],
        peak_isas=lambda: ["avx2", "portable"],
        measure_read_bandwidth=lambda threads, size, seconds: threads * 10e9,
        measure_int8_peak=lambda threads, isa, seconds: threads * (400e9 if isa == "avx2" else 10e9),
    )
    monkeypatch.setattr(limits, "native", lambda: core)
    return core


def test_report(native_core, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert "Backend: cpu, the native core" in out
    assert "instruction set  avx2: the best of those this processor has" in out
    assert "Limits measured with 2 threads" in out
    assert "20.0 GB/s" in out
    assert "int8, avx2      800 GOPS" in out


def test_a_forced_instruction_set_is_said(native_core, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PELLUCID_ISA", "portable")
    assert main(["doctor", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "instruction set  portable: PELLUCID_ISA asks for it" in out
    assert "PELLUCID_ISA  portable" in out


def test_json(native_core, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"]["chosen"] == "cpu"
    assert report["limits"][0]["threads"] == 1
    assert report["limits"][0]["int8_operations_per_s"] == {"avx2": 400e9, "portable": 10e9}
    assert report["machine"]["usable_cpus"] >= 1


def test_without_the_native_core_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise BackendError("the native core is not built")

    monkeypatch.setattr(limits, "native", missing)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Backend: reference (numpy, slow), since the native core is not built" in out
    assert "why" in out
    assert "Limits measured" not in out


def test_threads_out_of_range(native_core, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--threads", "0"]) == 2
    assert "threads must be" in capsys.readouterr().err


def test_machine_facts_are_plausible() -> None:
    facts = machine.describe()
    assert 1 <= facts["usable_cpus"] <= facts["logical_cpus"]
    assert facts["memory_bytes"] > 1 << 28
    if facts["physical_cores"] is not None:
        assert 1 <= facts["physical_cores"] <= facts["usable_cpus"]
