"""log, exp and power in float64 by fixed sequences of IEEE operations, so that native code gives the same bits.

The mathematical libraries of two compilers may differ in a result's last bit, and where a result decides over a token
that is another token. Every product and sum here is rounded alone (no fused multiply-add).
"""

from __future__ import annotations

import math

LN2 = 0.6931471805599453
_LN2_HIGH = 0.693147180369123816490  # 33 bits, so its product with an exponent is exact
_LN2_LOW = 1.90821492927058770002e-10
_LOG2_E = 1.4426950408889634
_SQRT_HALF = 0.7071067811865476
_ATANH_SERIES = tuple(1.0 / n for n in range(21, 1, -2))  # 1/21, 1/19, ... 1/3
_EXP_SERIES = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))  # 1/13!, 1/12!, ... 1
_LARGEST_EXPONENT = 709.0
_SMALLEST_EXPONENT = -708.0


def log(x: float) -> float:
    """Natural logarithm of a finite x > 0 that is not subnormal, within 2 units in the last place.

    x = m * 2**e with m within [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s) with s = (m - 1) / (m + 1), by its series.
    """
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = _ATANH_SERIES[0]
    for coefficient in _ATANH_SERIES[1:]:
        series = series * square + coefficient
    log_mantissa = 2.0 * s + 2.0 * s * (square * series)
    return exponent * _LN2_HIGH + (log_mantissa + exponent * _LN2_LOW)


def exp(x: float) -> float:
    """e**x within 2 units in the last place; inf above 709, 0 below -708 (nothing is subnormal).

    x = n ln 2 + r with an integer n, and e**r by its Taylor series.
    """
    if x > _LARGEST_EXPONENT:
        return math.inf
    if x < _SMALLEST_EXPONENT:
        return 0.0
    n = round(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _EXP_SERIES[0]
    for coefficient in _EXP_SERIES[1:]:
        series = series * r + coefficient
    return math.ldexp(series, n)


def power(x: float, y: float) -> float:
    """x**y = exp(y log x) for x >= 0 and y >= 0; 0**0 is 1."""
    if x == 0.0:
        return 1.0 if y == 0.0 else 0.0
    return exp(y * log(x))
