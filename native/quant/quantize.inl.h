// Symmetric int8 in blocks of 32, for the instruction set of the including file: activations, and Q8_0 for the KV
// cache.
//
// Activations:
// q = round(x * (127 / max|x|)), a multiplication by the rounded reciprocal of the scale: |q| <= 127 always, since the
// product exceeds 127 by at most two units in the last place. A block whose scale would be subnormal
// (max|x| < 2^-118) counts as zeros: its reciprocal would overflow. A block with an inf or NaN gets q = 0 and scale
// NaN, so that the fault shows in every output computed from it.
#pragma once

#include "simd.h"
#include "vector_kernels.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

struct FourBlocks {
    int8_t q[128];
    float scale[4];
    int32_t sum[4];
    float scaled_sum[4];
};

// Four blocks at a time, a block a quarter of the vectors that hold scales and sums.
static void quantize_four_blocks(const float* x, FourBlocks& out) {
    constexpr int kVectors = 8;
    F32x16 v[kVectors];
    I32x16 block[4];
    PELLUCID_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = load(x + i * kLanes);
    // Magnitudes compare as integers, where a NaN is the largest of all.
    PELLUCID_UNROLL
    for (int b = 0; b < 4; ++b) block[b] = max(abs_bits(v[2 * b]), abs_bits(v[2 * b + 1]));
    const I32x16 largest_bits = reduce_max4(block[0], block[1], block[2], block[3]);
    const F32x16 largest = from_bits(largest_bits);

    const Mask16 is_normal = less_equal(broadcast(0x1p-118f), largest);
    const F32x16 levels = broadcast(127.0f);
    F32x16 d = select(is_normal, div(largest, levels), zero());
    F32x16 inverse = select(is_normal, div(levels, largest), zero());
    const Mask16 is_finite = less(largest_bits, broadcast_i32(0x7f800000));
    if (mask_bits(is_finite) != 0xffff) [[unlikely]] {
        d = select(is_finite, d, from_bits(broadcast_i32(0x7fc00000)));
        inverse = select(is_finite, inverse, zero());
        PELLUCID_UNROLL
        for (int i = 0; i < kVectors; ++i) {
            v[i] = select(less(abs_bits(v[i]), broadcast_i32(0x7f800000)), v[i], zero());
        }
    }

    I32x16 level[kVectors];
    const F32x16 block_inverse[4] = {broadcast_quarter<0>(inverse), broadcast_quarter<1>(inverse),
                                     broadcast_quarter<2>(inverse), broadcast_quarter<3>(inverse)};
    PELLUCID_UNROLL
    for (int i = 0; i < kVectors; ++i) level[i] = to_i32(mul(v[i], block_inverse[i / 2]));
    store_i8x4(out.q, level[0], level[1], level[2], level[3]);
    store_i8x4(out.q + 64, level[4], level[5], level[6], level[7]);
    const I32x16 sums =
        reduce_add4(add(level[0], level[1]), add(level[2], level[3]), add(level[4], level[5]), add(level[6], level[7]));
    store_quarters(out.scale, bits(d));
    store_quarters(out.sum, sums);
    store_quarters(out.scaled_sum, bits(mul(d, to_f32(sums))));
}

static void quantize(const float* x, int n, int64_t stride, int8_t* q, QuantBlock* out) {
    constexpr int kBlock = 32, kStep = 4 * kBlock;
    for (int i = 0; i < n; i += kStep) {
        FourBlocks four;
        const int rest = n - i < kStep ? n - i : kStep;
        if (rest == kStep) {
            quantize_four_blocks(x + i, four);
        } else {
            float padded[kStep] = {};
            memcpy(padded, x + i, static_cast<unsigned>(rest) * sizeof(float));
            quantize_four_blocks(padded, four);
        }
        for (int b = 0; b < rest / kBlock; ++b) {
            memcpy(q, four.q + b * kBlock, kBlock);
            out->scale = four.scale[b];
            out->sum = four.sum[b];
            out->scaled_sum = four.scaled_sum[b];
            q += stride * kBlock;
            out += stride;
        }
    }
}

static int32_t quantize_rest(const float* x, const int8_t* q, float scale, int8_t* low) {
    const F32x16 step = broadcast(scale), inverse = broadcast(static_cast<float>(kLowSteps) / scale);
    const F32x16 largest = broadcast(127.0f), smallest = broadcast(-127.0f);
    I32x16 level[2];
    PELLUCID_UNROLL
    for (int i = 0; i < 2; ++i) {
        const F32x16 rest = fnma(step, to_f32(load_i8(q + i * kLanes)), load(x + i * kLanes));
        level[i] = to_i32(max(min(mul(rest, inverse), largest), smallest));
        store_i8(low + i * kLanes, level[i]);
    }
    return reduce_add(add(level[0], level[1]));
}

// To the nearest integer, halves away from zero, as C's roundf. |x| < 2^22.
PELLUCID_INLINE I32x16 round_half_away(F32x16 x) {
    const F32x16 magnitude = abs(x);
    const I32x16 even = to_i32(magnitude);
    const Mask16 rounded_down = equal(sub(magnitude, to_f32(even)), broadcast(0.5f));
    const I32x16 rounded = select(rounded_down, add(even, broadcast_i32(1)), even);
    return select(less(x, zero()), sub(broadcast_i32(0), rounded), rounded);
}

// GGUF's Q8_0 as ggml makes it (src/pellucid/quant/blocks.py): scale[b] = max|x| / 127, to become f16, and
// q = roundf(x * (1 / scale)) with the scale before that rounding. As above, a block with max|x| < 2^-118 counts as
// zeros; one that is not finite, or whose scale is beyond f16, gets q = 0 and scale NaN. n is a multiple of 32.
static void quantize_q8_0(const float* x, int n, int8_t* q, float* scale) {
    constexpr int kBlock = 32;
    for (int b = 0; b < n / kBlock; ++b, x += kBlock, q += kBlock) {
        const F32x16 low = load(x), high = load(x + kLanes);
        const float largest = float_from_bits(reduce_max(max(abs_bits(low), abs_bits(high))));
        float d = largest / 127.0f;
        const bool fits_f16 = d < 65520.0f;  // a NaN does not
        if (!fits_f16) d = __builtin_nanf("");
        if (largest < 0x1p-118f) d = 0.0f;
        scale[b] = d;
        if (d > 0.0f) {
            const F32x16 inverse = broadcast(1.0f / d);
            store_i8(q, round_half_away(mul(low, inverse)));
            store_i8(q + kLanes, round_half_away(mul(high, inverse)));
        } else {
            memset(q, 0, kBlock);
        }
    }
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
