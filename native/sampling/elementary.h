// log, exp and power in float64, operation for operation as src/pellucid/decoding/elementary.py: a mathematical library
// could differ in the last bit, and so in a token. Compiled without contraction, as everything here.
#pragma once

#include <cmath>
#include <limits>

namespace pellucid::elementary {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLn2High = 0.693147180369123816490;  // 33 bits, so its product with an exponent is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;

// Natural logarithm of a finite x > 0 that is not subnormal.
inline double log(double x) {
    int exponent;
    double mantissa = std::frexp(x, &exponent);
    if (mantissa < 0.7071067811865476) {
        mantissa *= 2.0;
        --exponent;
    }
    const double s = (mantissa - 1.0) / (mantissa + 1.0);
    const double square = s * s;
    double series = 1.0 / 21.0;
    for (int n = 19; n > 1; n -= 2) series = series * square + 1.0 / n;
    const double log_mantissa = 2.0 * s + 2.0 * s * (square * series);
    return exponent * kLn2High + (log_mantissa + exponent * kLn2Low);
}

// e^x; infinity above 709, 0 below -708.
inline double exp(double x) {
    constexpr double kSeries[] = {
        1.0 / 6227020800.0,
        1.0 / 479001600.0,
        1.0 / 39916800.0,
        1.0 / 3628800.0,
        1.0 / 362880.0,
        1.0 / 40320.0,
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
        1.0,
        1.0,
    };
    if (x > 709.0) return std::numeric_limits<double>::infinity();
    if (x < -708.0) return 0.0;
    const double n = std::nearbyint(x * 1.4426950408889634);
    const double r = (x - n * kLn2High) - n * kLn2Low;
    double series = 0.0;
    for (const double coefficient : kSeries) series = series * r + coefficient;
    return std::ldexp(series, static_cast<int>(n));
}

// x^y for x >= 0 and y >= 0; 0^0 is 1.
inline double power(double x, double y) {
    if (x == 0.0) return y == 0.0 ? 1.0 : 0.0;
    return exp(y * log(x));
}

}  // namespace pellucid::elementary
