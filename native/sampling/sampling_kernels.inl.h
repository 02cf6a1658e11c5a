// The sampling kernels, on the sixteen lanes of simd.h. Included by one translation unit an instruction set.
#pragma once

#include "sampling_kernels.h"
#include "simd.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

// ---- what simd.h does not have: float64 lanes, exact sums of rounded numbers, and compaction -----------------------

#if defined(PELLUCID_SIMD_AVX512)

struct U64x16 {
    __m512i lo, hi;
};
PELLUCID_INLINE U64x16 zero_u64() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F32x16 x) {
    return {_mm512_add_epi64(sum.lo, _mm512_cvtps_epi64(_mm512_castps512_ps256(x.v))),
            _mm512_add_epi64(sum.hi, _mm512_cvtps_epi64(_mm512_extractf32x8_ps(x.v, 1)))};
}
struct F64x16 {
    __m512d lo, hi;
};
PELLUCID_INLINE F64x16 zero_f64() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
PELLUCID_INLINE F64x16 widen(F32x16 x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
}
PELLUCID_INLINE F64x16 add(F64x16 a, F64x16 b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
PELLUCID_INLINE F64x16 mul(F64x16 a, F64x16 b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
PELLUCID_INLINE void store(double* p, F64x16 a) {
    _mm512_storeu_pd(p, a.lo);
    _mm512_storeu_pd(p + 8, a.hi);
}
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F64x16 x) {
    return {_mm512_add_epi64(sum.lo, _mm512_cvtpd_epi64(x.lo)), _mm512_add_epi64(sum.hi, _mm512_cvtpd_epi64(x.hi))};
}
PELLUCID_INLINE uint64_t reduce_add(U64x16 a) {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(a.lo, a.hi)));
}

// Stores all sixteen lanes, the chosen ones first: compressing into memory is microcoded on some processors.
PELLUCID_INLINE int compress(Mask16 mask, int32_t first_id, F32x16 x, int32_t* ids, float* values) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i id = _mm512_add_epi32(_mm512_set1_epi32(first_id), lane);
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(mask.v, id));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask.v, x.v));
    return __builtin_popcount(mask.v);
}

#else

#if defined(PELLUCID_SIMD_AVX2)

struct U64x16 {
    __m256i v[4];
};
PELLUCID_INLINE U64x16 zero_u64() {
    const __m256i zero = _mm256_setzero_si256();
    return {{zero, zero, zero, zero}};
}
struct F64x16 {
    __m256d v[4];
};
PELLUCID_INLINE F64x16 zero_f64() {
    const __m256d zero = _mm256_setzero_pd();
    return {{zero, zero, zero, zero}};
}
PELLUCID_INLINE F64x16 widen(F32x16 x) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.lo)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.lo, 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(x.hi)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.hi, 1))}};
}
PELLUCID_INLINE F64x16 add(F64x16 a, F64x16 b) {
    return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1]), _mm256_add_pd(a.v[2], b.v[2]),
             _mm256_add_pd(a.v[3], b.v[3])}};
}
PELLUCID_INLINE F64x16 mul(F64x16 a, F64x16 b) {
    return {{_mm256_mul_pd(a.v[0], b.v[0]), _mm256_mul_pd(a.v[1], b.v[1]), _mm256_mul_pd(a.v[2], b.v[2]),
             _mm256_mul_pd(a.v[3], b.v[3])}};
}
PELLUCID_INLINE void store(double* p, F64x16 a) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.v[i]);
}
// 2^52 + x, in float64, holds x rounded to an integer in its low mantissa bits.
PELLUCID_INLINE __m256i add_rounded(__m256i sum, __m256d x) {
    const __m256d magic = _mm256_set1_pd(0x1p52);
    const __m256i rounded = _mm256_castpd_si256(_mm256_add_pd(x, magic));
    return _mm256_add_epi64(sum, _mm256_sub_epi64(rounded, _mm256_castpd_si256(magic)));
}
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F64x16 x) {
    return {{add_rounded(sum.v[0], x.v[0]), add_rounded(sum.v[1], x.v[1]), add_rounded(sum.v[2], x.v[2]),
             add_rounded(sum.v[3], x.v[3])}};
}
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F32x16 x) { return add_rounded(sum, widen(x)); }
PELLUCID_INLINE uint64_t reduce_add(U64x16 a) {
    uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes),
                        _mm256_add_epi64(_mm256_add_epi64(a.v[0], a.v[1]), _mm256_add_epi64(a.v[2], a.v[3])));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#else

struct U64x16 {
    uint64_t lane[kLanes];
};
PELLUCID_INLINE U64x16 zero_u64() { return {}; }
struct F64x16 {
    double lane[kLanes];
};
PELLUCID_INLINE F64x16 zero_f64() { return {}; }
PELLUCID_INLINE F64x16 widen(F32x16 x) {
    float lanes[kLanes];
    store(lanes, x);
    F64x16 r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<double>(lanes[i]);
    return r;
}
PELLUCID_INLINE F64x16 add(F64x16 a, F64x16 b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
}
PELLUCID_INLINE F64x16 mul(F64x16 a, F64x16 b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
}
PELLUCID_INLINE void store(double* p, F64x16 a) { memcpy(p, a.lane, sizeof a.lane); }
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F64x16 x) {
    for (int i = 0; i < kLanes; ++i) {
        const double rounded = x.lane[i] + 0x1p52;
        uint64_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        sum.lane[i] += bits - 0x4330000000000000u;
    }
    return sum;
}
PELLUCID_INLINE U64x16 add_rounded(U64x16 sum, F32x16 x) { return add_rounded(sum, widen(x)); }
PELLUCID_INLINE uint64_t reduce_add(U64x16 a) {
    uint64_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += a.lane[i];
    return sum;
}

#endif

PELLUCID_INLINE int compress(Mask16 mask, int32_t first_id, F32x16 x, int32_t* ids, float* values) {
    float lanes[kLanes];
    store(lanes, x);
    int count = 0;
    for (uint32_t left = mask_bits(mask); left != 0; left &= left - 1, ++count) {
        const int lane = __builtin_ctz(left);
        ids[count] = first_id + lane;
        values[count] = lanes[lane];
    }
    return count;
}

#endif

// ---- the kernels ---------------------------------------------------------------------------------------------------

PELLUCID_INLINE F32x16 load_or(const float* p, int64_t n, float rest) {
    if (n >= kLanes) return load(p);
    return select(first_lanes(static_cast<int>(n)), load_partial(p, static_cast<int>(n)), broadcast(rest));
}

PELLUCID_INLINE F32x16 scale_shifted(F32x16 x, F32x16 offset, F32x16 factor) {
    return add(mul(sub(x, offset), factor), zero());
}

// decoding/distribution.py exp, times 2^40.
PELLUCID_INLINE F32x16 exp_weight(F32x16 x) {
    x = max(x, broadcast(-87.0f));
    const F32x16 magic = broadcast(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    const F32x16 n = sub(add(mul(x, broadcast(1.44269504088896341f)), magic), magic);
    const F32x16 r = sub(sub(x, mul(n, broadcast(0.693359375f))), mul(n, broadcast(-2.12194440e-4f)));
    F32x16 p = broadcast(1.9875691500e-4f);
    p = add(mul(p, r), broadcast(1.3981999507e-3f));
    p = add(mul(p, r), broadcast(8.3334519073e-3f));
    p = add(mul(p, r), broadcast(4.1665795894e-2f));
    p = add(mul(p, r), broadcast(1.6666665459e-1f));
    p = add(mul(p, r), broadcast(5.0000001201e-1f));
    p = add(add(mul(mul(p, r), r), r), broadcast(1.0f));
    const I32x16 exponent = add(to_i32(n), broadcast_i32(kWeightBits));
    return from_bits(add(bits(p), shift_left<23>(exponent)));
}

static float row_max(const float* x, int64_t n, float* maxima) {
    const float infinity = __builtin_inff();
    const F32x16 lowest = broadcast(-infinity);
    F32x16 largest = lowest;
    Mask16 valid = first_lanes(kLanes);
    for (int64_t begin = 0; begin < n; begin += kMaximaGroup, maxima += kLanes) {
        const int64_t left = n - begin;
        F32x16 group[4] = {lowest, lowest, lowest, lowest};
        if (left >= kMaximaGroup) {
            for (int64_t i = 0; i < kMaximaGroup; i += 4 * kLanes) {
                PELLUCID_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const F32x16 v = load(x + begin + i + j * kLanes);
                    valid = mask_and(valid, less(v, broadcast(infinity)));
                    group[j] = max(group[j], v);
                }
            }
        } else {
            for (int64_t i = 0; i < left; i += kLanes) {
                const F32x16 v = load_or(x + begin + i, left - i, -infinity);
                valid = mask_and(valid, less(v, broadcast(infinity)));
                group[0] = max(group[0], v);
            }
        }
        const F32x16 lanes = max(max(group[0], group[1]), max(group[2], group[3]));
        store(maxima, lanes);
        largest = max(largest, lanes);
    }
    return mask_bits(valid) == 0xffff ? reduce_max(largest) : __builtin_nanf("");
}

template <bool kStores>
static uint64_t exp_chunks(const float* x, int64_t n, float offset, float factor, float* weights,
                           uint64_t* chunk_sums) {
    const F32x16 offsets = broadcast(offset), factors = broadcast(factor);
    uint64_t total = 0;
    for (int64_t begin = 0; begin < n; begin += kWeightChunk, ++chunk_sums) {
        const int64_t end = begin + kWeightChunk < n ? begin + kWeightChunk : n;
        U64x16 sum = zero_u64();
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const F32x16 weight = exp_weight(scale_shifted(load(x + i), offsets, factors));
            if (kStores) store(weights + i, weight);
            sum = add_rounded(sum, weight);
        }
        if (i < end) {
            const int left = static_cast<int>(end - i);
            const F32x16 weight = exp_weight(scale_shifted(load_partial(x + i, left), offsets, factors));
            if (kStores) store_partial(weights + i, weight, left);
            sum = add_rounded(sum, select(first_lanes(left), weight, zero()));
        }
        *chunk_sums = reduce_add(sum);
        total += *chunk_sums;
    }
    return total;
}

static uint64_t exp_weights(const float* x, int64_t n, float offset, float factor, float* weights,
                            uint64_t* chunk_sums) {
    if (weights == nullptr) return exp_chunks<false>(x, n, offset, factor, weights, chunk_sums);
    return exp_chunks<true>(x, n, offset, factor, weights, chunk_sums);
}

// x >= 0, rounded to an integer.
PELLUCID_INLINE F32x16 round_not_negative(F32x16 x) {
    const F32x16 magic = broadcast(0x1p23f);
    return select(less(x, magic), sub(add(x, magic), magic), x);
}

PELLUCID_INLINE U64x16 add_gaps(U64x16 sum, F32x16 x, F32x16 weight) {
    const Mask16 weighty = less(broadcast(0.5f), weight);
    return add_rounded(sum, mul(widen(round_not_negative(weight)), widen(select(weighty, sub(zero(), x), zero()))));
}

static uint64_t gap_sum(const float* x, int64_t n, float offset, float factor, const float* weights) {
    const F32x16 offsets = broadcast(offset), factors = broadcast(factor);
    U64x16 sum = zero_u64();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        sum = add_gaps(sum, scale_shifted(load(x + i), offsets, factors), load(weights + i));
    }
    if (i < n) {
        const int left = static_cast<int>(n - i);
        sum =
            add_gaps(sum, scale_shifted(load_partial(x + i, left), offsets, factors), load_partial(weights + i, left));
    }
    return reduce_add(sum);
}

static int64_t spread(const float* x, int64_t n, float offset, float factor, double* sum, double* sum_of_squares) {
    const F32x16 offsets = broadcast(offset), factors = broadcast(factor), lowest = broadcast(-__builtin_inff());
    F64x16 sums = zero_f64(), squares = zero_f64();
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const F32x16 v = scale_shifted(load_or(x + i, n - i, -__builtin_inff()), offsets, factors);
        const Mask16 alive = less(lowest, v);
        const F64x16 gap = widen(select(alive, sub(zero(), v), zero()));
        count += __builtin_popcount(mask_bits(alive));
        sums = add(sums, gap);
        squares = add(squares, mul(gap, gap));
    }
    double sum_lanes[kLanes], square_lanes[kLanes];
    store(sum_lanes, sums);
    store(square_lanes, squares);
    *sum = *sum_of_squares = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
        *sum += sum_lanes[lane];
        *sum_of_squares += square_lanes[lane];
    }
    return count;
}

static int64_t count_finite(const float* x, int64_t n) {
    const F32x16 lowest = broadcast(-__builtin_inff());
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        count += __builtin_popcount(mask_bits(less(lowest, load_or(x + i, n - i, -__builtin_inff()))));
    }
    return count;
}

static float apply_mask(float* x, int64_t n, const uint32_t* mask) {
    const int32_t bit_of_lane[kLanes] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const I32x16 lane_bits = load_i32(bit_of_lane);
    const F32x16 lowest = broadcast(-__builtin_inff()), infinity = broadcast(__builtin_inff());
    F32x16 largest = lowest;
    Mask16 all_valid = first_lanes(kLanes);
    for (int64_t i = 0; i < n; i += kLanes) {
        const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
        const F32x16 v = load_or(x + i, n - i, -__builtin_inff());
        const auto bits16 = static_cast<int32_t>(mask[i >> 5] >> (i & 16) & 0xffff);
        const Mask16 allowed = less(broadcast_i32(0), bit_and(broadcast_i32(bits16), lane_bits));
        const Mask16 valid = less(v, infinity);
        all_valid = mask_and(all_valid, valid);
        largest = max(largest, v);
        store_partial(x + i, select(mask_and(valid, mask_not(allowed)), lowest, v), left);
    }
    return mask_bits(all_valid) == 0xffff ? reduce_max(largest) : __builtin_nanf("");
}

static void keep_weighted(const float* x, int64_t n, float offset, float factor, const float* exps, float* kept) {
    const F32x16 offsets = broadcast(offset), factors = broadcast(factor);
    const F32x16 half = broadcast(0.5f), lowest = broadcast(-__builtin_inff());
    for (int64_t i = 0; i < n; i += kLanes) {
        const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
        const F32x16 v = scale_shifted(load_partial(x + i, left), offsets, factors);
        store_partial(kept + i, select(less(half, load_partial(exps + i, left)), v, lowest), left);
    }
}

static int64_t collect(const float* x, int64_t n, const float* maxima, float offset, float factor, float threshold,
                       int32_t* ids, float* values) {
    const F32x16 offsets = broadcast(offset), factors = broadcast(factor), thresholds = broadcast(threshold);
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += kMaximaGroup) {
        if (maxima != nullptr) {
            const F32x16 largest = scale_shifted(load(maxima + begin / kMaximaGroup * kLanes), offsets, factors);
            if (mask_bits(less_equal(thresholds, largest)) == 0) continue;
        }
        const int64_t end = begin + kMaximaGroup < n ? begin + kMaximaGroup : n;
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const F32x16 v = scale_shifted(load(x + i), offsets, factors);
            const Mask16 mask = less_equal(thresholds, v);
            if (mask_bits(mask) != 0) count += compress(mask, static_cast<int32_t>(i), v, ids + count, values + count);
        }
        if (i < end) {
            const int left = static_cast<int>(end - i);
            const F32x16 v = scale_shifted(load_partial(x + i, left), offsets, factors);
            const Mask16 mask = mask_and(first_lanes(left), less_equal(thresholds, v));
            count += compress(mask, static_cast<int32_t>(i), v, ids + count, values + count);
        }
    }
    return count;
}

static void estimate_tails(const float* weights, int64_t n, const float* thresholds, float* tails) {
    constexpr int kStride = 4;  // one group of sixteen in so many
    F32x16 limits[kNumTails], sums[kNumTails];
    PELLUCID_UNROLL
    for (int j = 0; j < kNumTails; ++j) {
        limits[j] = broadcast(thresholds[j]);
        sums[j] = zero();
    }
    for (int64_t i = 0; i + kLanes <= n; i += kStride * kLanes) {
        const F32x16 v = load(weights + i);
        PELLUCID_UNROLL
        for (int j = 0; j < kNumTails; ++j) sums[j] = add(sums[j], select(less(v, limits[j]), v, zero()));
    }
    for (int j = 0; j < kNumTails; ++j) tails[j] = kStride * reduce_add(sums[j]);
}

constexpr SamplingKernels sampling_kernels(const char* name) {
    return {
        .name = name,
        .row_max = row_max,
        .exp_weights = exp_weights,
        .gap_sum = gap_sum,
        .spread = spread,
        .count_finite = count_finite,
        .apply_mask = apply_mask,
        .keep_weighted = keep_weighted,
        .collect = collect,
        .estimate_tails = estimate_tails,
    };
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
