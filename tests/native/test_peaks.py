"""The measured peaks are plausible figures; how they compare is for the benchmarks to say."""

from __future__ import annotations

import os

import pytest

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

NUM_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MIB = 1 << 20


def test_isas_are_named_widest_first() -> None:
    order = ["amx", "avx512", "avx2", "portable"]
    isas = native.peak_isas()
    assert isas == [isa for isa in order if isa in isas]
    assert isas[-1] == "portable"


@pytest.mark.parametrize("isa", native.peak_isas())
def test_arithmetic_peaks_are_plausible(isa: str) -> None:
    int8 = native.measure_int8_peak(1, isa, seconds=0.01)
    assert 1e9 < int8 < 1e14
    if isa != "amx":
        assert 1e9 < native.measure_f32_peak(1, isa, seconds=0.01) < 1e14


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_bytes", [1_000_000, 40 * MIB + 12_345])
def test_any_thread_count_and_size(num_threads: int, num_bytes: int) -> None:
    assert 1e8 < native.measure_read_bandwidth(num_threads, num_bytes, seconds=0.005) < 1e13


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 2048 a thread"):
        native.measure_read_bandwidth(4, 100)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        native.measure_read_bandwidth(0)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        native.measure_int8_peak(0, "portable")
    with pytest.raises(ValueError, match=r"instruction set 'mmx'; this machine has .*portable"):
        native.measure_int8_peak(1, "mmx")
    with pytest.raises(ValueError, match="instruction set 'amx'"):
        native.measure_f32_peak(1, "amx")
