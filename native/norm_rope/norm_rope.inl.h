// RMS norm, rotary embedding, gated activations and the other row-wise kernels, for the instruction set of the
// including file.
#pragma once

#include "simd.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

// The sum of squares: value i is accumulated in lane i % 16 of accumulator (i / 16) % 4; then (0 + 1) + (2 + 3), then
// the lanes.
static float sum_of_squares(const float* x, int n) {
    constexpr int kAccumulators = 4;
    F32x16 sum[kAccumulators] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + kAccumulators * kLanes <= n; i += kAccumulators * kLanes) {
        PELLUCID_UNROLL
        for (int a = 0; a < kAccumulators; ++a) {
            const F32x16 v = load(x + i + a * kLanes);
            sum[a] = fma(v, v, sum[a]);
        }
    }
    for (int a = 0; i < n; ++a, i += kLanes) {
        const F32x16 v = load_partial(x + i, n - i < kLanes ? n - i : kLanes);
        sum[a] = fma(v, v, sum[a]);
    }
    return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    const float mean = sum_of_squares(x, n) / static_cast<float>(n);
    const F32x16 inverse = broadcast(1.0f / __builtin_sqrtf(mean + eps));
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
    if (i < n) {
        const F32x16 v = mul(mul(load_partial(x + i, n - i), inverse), load_partial(weight + i, n - i));
        store_partial(out + i, v, n - i);
    }
}

static void rope(float* x, const float* cos, const float* sin, int rotary_dim) {
    const int half = rotary_dim / 2;
    for (int i = 0; i < half; i += kLanes) {
        const int n = half - i < kLanes ? half - i : kLanes;
        const F32x16 first = load_partial(x + i, n), second = load_partial(x + half + i, n);
        const F32x16 c = load_partial(cos + i, n), s = load_partial(sin + i, n);
        store_partial(x + i, fnma(second, s, mul(first, c)), n);
        store_partial(x + half + i, fma(first, s, mul(second, c)), n);
    }
}

static void add_in_place(float* x, const float* y, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
    if (i < n) store_partial(x + i, add(load_partial(x + i, n - i), load_partial(y + i, n - i)), n - i);
}

static void scale_in_place(float* x, float factor, int n) {
    const F32x16 f = broadcast(factor);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, mul(load(x + i), f));
    if (i < n) store_partial(x + i, mul(load_partial(x + i, n - i), f), n - i);
}

PELLUCID_INLINE F32x16 silu(F32x16 x) {
    const F32x16 one = broadcast(1.0f);
    return div(x, add(one, exp(neg(x))));
}

// x / 2 (1 + tanh u) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the same function, without the
// cancellation of 1 + tanh u for negative x.
PELLUCID_INLINE F32x16 gelu_tanh(F32x16 x) {
    const F32x16 one = broadcast(1.0f);
    const F32x16 cubic = fma(mul(x, x), broadcast(-2.0f * 0.797884561f * 0.044715f), broadcast(-2.0f * 0.797884561f));
    return div(x, add(one, exp(mul(x, cubic))));
}

template <F32x16 (*kActivation)(F32x16)>
static void activation_mul(const float* gate, const float* up, int n, float* out) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(kActivation(load(gate + i)), load(up + i)));
    if (i < n) {
        const F32x16 v = mul(kActivation(load_partial(gate + i, n - i)), load_partial(up + i, n - i));
        store_partial(out + i, v, n - i);
    }
}

static bool all_finite(const float* x, int64_t n) {
    constexpr int64_t kChunk = 4096;
    const I32x16 limit = broadcast_i32(0x7f800000);
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t end = n - begin < kChunk ? n : begin + kChunk;
        I32x16 largest = broadcast_i32(0);
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) largest = max(largest, abs_bits(load(x + i)));
        if (i < end) largest = max(largest, abs_bits(load_partial(x + i, static_cast<int>(end - i))));
        if (mask_bits(less(largest, limit)) != 0xffff) return false;
    }
    return true;
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
