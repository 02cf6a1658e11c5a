"""log, exp and power against the platform's, and golden bits that any platform has to give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.decoding import elementary
from tests.support.mutants import mutant


def check_log() -> None:
    generator = np.random.default_rng(0)
    near_one = 1.0 + generator.normal(0, 0.3, 3000)
    for x in (
        *generator.uniform(1e-300, 4e6, 3000),
        *10.0 ** generator.uniform(-300, 300, 3000),
        *near_one[near_one > 0],
    ):
        exact = math.log(x)
        assert abs(elementary.log(float(x)) - exact) <= 2 * math.ulp(exact), x


def check_exp() -> None:
    generator = np.random.default_rng(1)
    for x in (*generator.uniform(-708, 709, 5000), *generator.normal(0, 1, 5000)):
        exact = math.exp(x)
        assert abs(elementary.exp(float(x)) - exact) <= 2 * math.ulp(exact), x


def test_log() -> None:
    check_log()
    assert elementary.log(1.0) == 0.0
    assert elementary.log(2.0) == math.log(2.0) == elementary.LN2


def test_exp() -> None:
    check_exp()
    assert elementary.exp(0.0) == 1.0
    assert elementary.exp(710.0) == elementary.exp(math.inf) == math.inf
    assert elementary.exp(-709.0) == elementary.exp(-math.inf) == 0.0


def test_power() -> None:
    generator = np.random.default_rng(2)
    for x, y in zip(generator.uniform(0, 4, 1000), generator.uniform(0, 10, 1000), strict=True):
        assert elementary.power(float(x), float(y)) == pytest.approx(x**y, rel=1e-13)
    assert elementary.power(0.0, 0.0) == elementary.power(1.0, 1e9) == 1.0
    assert elementary.power(0.0, 0.5) == 0.0
    assert elementary.power(2.0, 1e9) == math.inf


def test_the_bits_are_these() -> None:
    assert elementary.log(3.0).hex() == "0x1.193ea7aad030bp+0"
    assert elementary.log(1e-5).hex() == "-0x1.7069e2aa2aa5bp+3"
    assert elementary.exp(1.0).hex() == "0x1.5bf0a8b14576ap+1"
    assert elementary.exp(-12.34).hex() == "0x1.257c2c1ce3704p-18"


def test_the_checks_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(elementary, "log", mutant(elementary.log, "2.0 * s + ", "1.999999999999999 * s + "))
        with pytest.raises(AssertionError):
            check_log()
    monkeypatch.setattr(elementary, "_EXP_SERIES", elementary._EXP_SERIES[2:])
    with pytest.raises(AssertionError):
        check_exp()
