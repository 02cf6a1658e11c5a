// Sixteen float lanes, written once for AVX-512 (one register), AVX2 (two) and portable C++ (four).
//
// A translation unit says which by defining PELLUCID_SIMD_AVX512, PELLUCID_SIMD_AVX2 or PELLUCID_SIMD_PORTABLE before
// this include, and holds nothing but kernels of that instruction set. Every name lives in an inline namespace of that
// set and has internal linkage, so the linker can never take one set's code for another's.
//
// The order of operations is the same in all three: lane i of a result depends on lanes i of the operands, and the
// horizontal reductions add lane i to lane i + 8, then i + 4, i + 2, i + 1. AVX-512 and AVX2 therefore agree to the
// bit. The portable set does too where the compiler's target has a fused multiply-add; elsewhere fma() rounds twice,
// because an emulated one is some fifty times slower.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(PELLUCID_SIMD_AVX512)
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "PELLUCID_SIMD_AVX512 needs -mavx512f -mavx512bw -mavx512dq -mavx512vl"
#endif
#define PELLUCID_SIMD_NAMESPACE simd_avx512
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from an undefined register and it then warns about them (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(PELLUCID_SIMD_AVX2)
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "PELLUCID_SIMD_AVX2 needs -mavx2 -mfma -mf16c"
#endif
#define PELLUCID_SIMD_NAMESPACE simd_avx2
#include <immintrin.h>
#elif defined(PELLUCID_SIMD_PORTABLE)
#define PELLUCID_SIMD_NAMESPACE simd_portable
#else
#error "define PELLUCID_SIMD_AVX512, PELLUCID_SIMD_AVX2 or PELLUCID_SIMD_PORTABLE before including simd.h"
#endif

#define PELLUCID_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define PELLUCID_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PELLUCID_UNROLL _Pragma("GCC unroll 32")
#endif

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

constexpr int kLanes = 16;

// ---- scalars -------------------------------------------------------------------------------------------------------

PELLUCID_INLINE int32_t float_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

PELLUCID_INLINE float float_from_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// ---- the types and what differs between the sets -------------------------------------------------------------------
//
// load_partial reads n lanes (0 <= n <= 16) and gives zero in the rest; store_partial writes n lanes. Neither touches
// memory beyond them. max(a, b) is a > b ? a : b and min(a, b) is a < b ? a : b, so a NaN on either side gives b.
// Conversions to 16 bits and to integers round to nearest, ties to even. to_i32 takes |x| < 2^22.
// load_even_* and load_odd_* read 16 pairs of 16-bit values and give the first, or the second, of each pair.
//
// The *4 functions work on four vectors at once, whose results fill the four quarters (4 lanes each) of one; the order
// of additions is that of reduce_add.

#if defined(PELLUCID_SIMD_AVX512)

struct F32x16 {
    __m512 v;
};
struct I32x16 {
    __m512i v;
};
struct Mask16 {
    __mmask16 v;
};

PELLUCID_INLINE Mask16 first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }
PELLUCID_INLINE Mask16 mask_and(Mask16 a, Mask16 b) { return {static_cast<__mmask16>(a.v & b.v)}; }
PELLUCID_INLINE Mask16 mask_not(Mask16 a) { return {static_cast<__mmask16>(~a.v)}; }
PELLUCID_INLINE uint32_t mask_bits(Mask16 a) { return a.v; }

PELLUCID_INLINE F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
PELLUCID_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PELLUCID_INLINE F32x16 load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n).v, p)}; }
PELLUCID_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
PELLUCID_INLINE void store_partial(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n).v, a.v); }

PELLUCID_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
PELLUCID_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PELLUCID_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PELLUCID_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
PELLUCID_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PELLUCID_INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
PELLUCID_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PELLUCID_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
PELLUCID_INLINE Mask16 less(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PELLUCID_INLINE Mask16 less_equal(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
PELLUCID_INLINE Mask16 equal(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PELLUCID_INLINE F32x16 select(Mask16 m, F32x16 a, F32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }

PELLUCID_INLINE I32x16 broadcast_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
PELLUCID_INLINE I32x16 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
PELLUCID_INLINE void store_i32(int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
PELLUCID_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
PELLUCID_INLINE I32x16 sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PELLUCID_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
PELLUCID_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
PELLUCID_INLINE I32x16 bit_or(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
PELLUCID_INLINE I32x16 shift_left(I32x16 a) {
    return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
PELLUCID_INLINE I32x16 shift_right_logical(I32x16 a) {
    return {_mm512_srli_epi32(a.v, kBits)};
}
PELLUCID_INLINE Mask16 less(I32x16 a, I32x16 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
PELLUCID_INLINE I32x16 select(Mask16 m, I32x16 a, I32x16 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

PELLUCID_INLINE I32x16 bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
PELLUCID_INLINE F32x16 from_bits(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
PELLUCID_INLINE I32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
PELLUCID_INLINE F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }

PELLUCID_INLINE I32x16 load_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PELLUCID_INLINE void store_i8(int8_t* p, I32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
PELLUCID_INLINE I32x16 load_u16(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PELLUCID_INLINE void store_u16(uint16_t* p, I32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
PELLUCID_INLINE F32x16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PELLUCID_INLINE void store_f16(uint16_t* p, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PELLUCID_INLINE F32x16 load_even_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_loadu_si512(p)))};
}
PELLUCID_INLINE F32x16 load_odd_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(p), 16)))};
}

template <int kQuarter>
PELLUCID_INLINE F32x16 broadcast_quarter(F32x16 a) {
    return {_mm512_shuffle_f32x4(a.v, a.v, kQuarter * 0x55)};
}
// The first lane of each quarter.
PELLUCID_INLINE void store_quarters(void* p, I32x16 a) {
    const __m512i first =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), a.v);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_castsi512_si128(first));
}
// Quarter k gets the largest (the sum) of vector k in each of its lanes.
PELLUCID_INLINE I32x16 reduce_max4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    const __m512i ab = _mm512_max_epi32(_mm512_shuffle_i32x4(a.v, b.v, 0x44), _mm512_shuffle_i32x4(a.v, b.v, 0xee));
    const __m512i cd = _mm512_max_epi32(_mm512_shuffle_i32x4(c.v, d.v, 0x44), _mm512_shuffle_i32x4(c.v, d.v, 0xee));
    __m512i r = _mm512_max_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
    r = _mm512_max_epi32(r, _mm512_shuffle_epi32(r, static_cast<_MM_PERM_ENUM>(0x4e)));
    return {_mm512_max_epi32(r, _mm512_shuffle_epi32(r, static_cast<_MM_PERM_ENUM>(0xb1)))};
}
PELLUCID_INLINE I32x16 reduce_add4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a.v, b.v, 0x44), _mm512_shuffle_i32x4(a.v, b.v, 0xee));
    const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c.v, d.v, 0x44), _mm512_shuffle_i32x4(c.v, d.v, 0xee));
    __m512i r = _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
    r = _mm512_add_epi32(r, _mm512_shuffle_epi32(r, static_cast<_MM_PERM_ENUM>(0x4e)));
    return {_mm512_add_epi32(r, _mm512_shuffle_epi32(r, static_cast<_MM_PERM_ENUM>(0xb1)))};
}
PELLUCID_INLINE F32x16 reduce_max4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    const __m512 ab = _mm512_max_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
    const __m512 cd = _mm512_max_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
    __m512 r = _mm512_max_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    r = _mm512_max_ps(r, _mm512_permute_ps(r, 0x4e));
    return {_mm512_max_ps(r, _mm512_permute_ps(r, 0xb1))};
}
PELLUCID_INLINE F32x16 reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
    __m512 r = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    r = _mm512_add_ps(r, _mm512_permute_ps(r, 0x4e));
    return {_mm512_add_ps(r, _mm512_permute_ps(r, 0xb1))};
}
// 64 values, vector after vector.
PELLUCID_INLINE void store_i8x4(int8_t* p, I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

struct Half8 {
    __m256 v;
};
PELLUCID_INLINE Half8 halves_add(F32x16 a) {
    return {_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))};
}
PELLUCID_INLINE Half8 halves_max(F32x16 a) {
    return {_mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))};
}
struct HalfI8 {
    __m256i v;
};
PELLUCID_INLINE HalfI8 halves_add(I32x16 a) {
    return {_mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1))};
}
PELLUCID_INLINE HalfI8 halves_max(I32x16 a) {
    return {_mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1))};
}

#elif defined(PELLUCID_SIMD_AVX2)

struct F32x16 {
    __m256 lo, hi;
};
struct I32x16 {
    __m256i lo, hi;
};
struct Mask16 {
    __m256i lo, hi;
};

PELLUCID_INLINE Mask16 first_lanes(int n) {
    const __m256i count = _mm256_set1_epi32(n);
    return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
PELLUCID_INLINE Mask16 mask_and(Mask16 a, Mask16 b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
PELLUCID_INLINE Mask16 mask_not(Mask16 a) {
    const __m256i ones = _mm256_set1_epi32(-1);
    return {_mm256_xor_si256(a.lo, ones), _mm256_xor_si256(a.hi, ones)};
}
PELLUCID_INLINE uint32_t mask_bits(Mask16 a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a.lo))) |
           static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a.hi))) << 8;
}

PELLUCID_INLINE F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PELLUCID_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PELLUCID_INLINE F32x16 load_partial(const float* p, int n) {
    const Mask16 m = first_lanes(n);
    return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
PELLUCID_INLINE void store(float* p, F32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
PELLUCID_INLINE void store_partial(float* p, F32x16 a, int n) {
    const Mask16 m = first_lanes(n);
    _mm256_maskstore_ps(p, m.lo, a.lo);
    _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}

PELLUCID_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
PELLUCID_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
PELLUCID_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
PELLUCID_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
PELLUCID_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PELLUCID_INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
PELLUCID_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
PELLUCID_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
template <int kPredicate>
PELLUCID_INLINE Mask16 compare(F32x16 a, F32x16 b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, kPredicate)),
            _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, kPredicate))};
}
PELLUCID_INLINE Mask16 less(F32x16 a, F32x16 b) { return compare<_CMP_LT_OQ>(a, b); }
PELLUCID_INLINE Mask16 less_equal(F32x16 a, F32x16 b) { return compare<_CMP_LE_OQ>(a, b); }
PELLUCID_INLINE Mask16 equal(F32x16 a, F32x16 b) { return compare<_CMP_EQ_OQ>(a, b); }
PELLUCID_INLINE F32x16 select(Mask16 m, F32x16 a, F32x16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(m.lo)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(m.hi))};
}

PELLUCID_INLINE I32x16 broadcast_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PELLUCID_INLINE I32x16 load_i32(const void* p) {
    const __m256i* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
PELLUCID_INLINE void store_i32(int32_t* p, I32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
PELLUCID_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
PELLUCID_INLINE I32x16 sub(I32x16 a, I32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
PELLUCID_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
PELLUCID_INLINE I32x16 bit_and(I32x16 a, I32x16 b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
PELLUCID_INLINE I32x16 bit_or(I32x16 a, I32x16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int kBits>
PELLUCID_INLINE I32x16 shift_left(I32x16 a) {
    return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
PELLUCID_INLINE I32x16 shift_right_logical(I32x16 a) {
    return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
PELLUCID_INLINE Mask16 less(I32x16 a, I32x16 b) {
    return {_mm256_cmpgt_epi32(b.lo, a.lo), _mm256_cmpgt_epi32(b.hi, a.hi)};
}
PELLUCID_INLINE I32x16 select(Mask16 m, I32x16 a, I32x16 b) {
    return {_mm256_blendv_epi8(b.lo, a.lo, m.lo), _mm256_blendv_epi8(b.hi, a.hi, m.hi)};
}

PELLUCID_INLINE I32x16 bits(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
PELLUCID_INLINE F32x16 from_bits(I32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
PELLUCID_INLINE I32x16 to_i32(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
PELLUCID_INLINE F32x16 to_f32(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

PELLUCID_INLINE I32x16 load_i8(const int8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
PELLUCID_INLINE void store_i8(int8_t* p, I32x16 a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
PELLUCID_INLINE I32x16 load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
PELLUCID_INLINE void store_u16(uint16_t* p, I32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8));
}
PELLUCID_INLINE F32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
PELLUCID_INLINE void store_f16(uint16_t* p, F32x16 a) {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kRound));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kRound));
}
PELLUCID_INLINE F32x16 low_halves_f16(__m256i a, __m256i b) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
}
PELLUCID_INLINE F32x16 load_even_f16(const uint16_t* p) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return low_halves_f16(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), low),
                          _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)), low));
}
PELLUCID_INLINE F32x16 load_odd_f16(const uint16_t* p) {
    return low_halves_f16(_mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16),
                          _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)), 16));
}

template <int kQuarter>
PELLUCID_INLINE F32x16 broadcast_quarter(F32x16 a) {
    const __m256 half = kQuarter < 2 ? a.lo : a.hi;
    const __m256 r = _mm256_permute2f128_ps(half, half, kQuarter % 2 * 0x11);
    return {r, r};
}
// The first lane of each quarter.
PELLUCID_INLINE void store_quarters(void* p, I32x16 a) {
    const __m256i low = _mm256_unpacklo_epi32(a.lo, a.hi);  // 0 8 1 9 | 4 12 5 13
    const __m128i r = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));  // 0 4 8 12
    _mm_storeu_si128(static_cast<__m128i*>(p), r);
}
// Quarter k gets the largest (the sum) of vector k in each of its lanes.
PELLUCID_INLINE __m256i reduce_max2(__m256i a, __m256i b) {
    __m256i r = _mm256_max_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    r = _mm256_max_epi32(r, _mm256_shuffle_epi32(r, 0x4e));
    return _mm256_max_epi32(r, _mm256_shuffle_epi32(r, 0xb1));
}
PELLUCID_INLINE __m256i reduce_add2(__m256i a, __m256i b) {
    __m256i r = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    r = _mm256_add_epi32(r, _mm256_shuffle_epi32(r, 0x4e));
    return _mm256_add_epi32(r, _mm256_shuffle_epi32(r, 0xb1));
}
PELLUCID_INLINE I32x16 reduce_max4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    return {reduce_max2(_mm256_max_epi32(a.lo, a.hi), _mm256_max_epi32(b.lo, b.hi)),
            reduce_max2(_mm256_max_epi32(c.lo, c.hi), _mm256_max_epi32(d.lo, d.hi))};
}
PELLUCID_INLINE I32x16 reduce_add4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    return {reduce_add2(_mm256_add_epi32(a.lo, a.hi), _mm256_add_epi32(b.lo, b.hi)),
            reduce_add2(_mm256_add_epi32(c.lo, c.hi), _mm256_add_epi32(d.lo, d.hi))};
}
PELLUCID_INLINE __m256 reduce_max2(__m256 a, __m256 b) {
    __m256 r = _mm256_max_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    r = _mm256_max_ps(r, _mm256_permute_ps(r, 0x4e));
    return _mm256_max_ps(r, _mm256_permute_ps(r, 0xb1));
}
PELLUCID_INLINE __m256 reduce_add2(__m256 a, __m256 b) {
    __m256 r = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    r = _mm256_add_ps(r, _mm256_permute_ps(r, 0x4e));
    return _mm256_add_ps(r, _mm256_permute_ps(r, 0xb1));
}
PELLUCID_INLINE F32x16 reduce_max4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    return {reduce_max2(_mm256_max_ps(a.lo, a.hi), _mm256_max_ps(b.lo, b.hi)),
            reduce_max2(_mm256_max_ps(c.lo, c.hi), _mm256_max_ps(d.lo, d.hi))};
}
PELLUCID_INLINE F32x16 reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    return {reduce_add2(_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi)),
            reduce_add2(_mm256_add_ps(c.lo, c.hi), _mm256_add_ps(d.lo, d.hi))};
}
// 64 values, vector after vector.
PELLUCID_INLINE void store_i8x4(int8_t* p, I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i first = _mm256_packs_epi16(_mm256_packs_epi32(a.lo, a.hi), _mm256_packs_epi32(b.lo, b.hi));
    const __m256i second = _mm256_packs_epi16(_mm256_packs_epi32(c.lo, c.hi), _mm256_packs_epi32(d.lo, d.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(first, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm256_permutevar8x32_epi32(second, order));
}

struct Half8 {
    __m256 v;
};
PELLUCID_INLINE Half8 halves_add(F32x16 a) { return {_mm256_add_ps(a.lo, a.hi)}; }
PELLUCID_INLINE Half8 halves_max(F32x16 a) { return {_mm256_max_ps(a.lo, a.hi)}; }
struct HalfI8 {
    __m256i v;
};
PELLUCID_INLINE HalfI8 halves_add(I32x16 a) { return {_mm256_add_epi32(a.lo, a.hi)}; }
PELLUCID_INLINE HalfI8 halves_max(I32x16 a) { return {_mm256_max_epi32(a.lo, a.hi)}; }

#else  // portable

// Four 4-lane vectors of the compiler's own: SSE2, NEON, or scalars where the target has neither.
typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));

struct F32x16 {
    F32x4 v[4];
};
struct I32x16 {
    I32x4 v[4];
};
struct Mask16 {
    I32x4 v[4];
};

#define PELLUCID_EACH(expression) \
    PELLUCID_UNROLL               \
    for (int i = 0; i < 4; ++i) { \
        r.v[i] = (expression);    \
    }                             \
    return r

PELLUCID_INLINE I32x4 blend(I32x4 m, I32x4 a, I32x4 b) { return (m & a) | (~m & b); }

PELLUCID_INLINE I32x16 broadcast_i32(int32_t x) {
    I32x16 r;
    PELLUCID_EACH((I32x4{x, x, x, x}));
}
PELLUCID_INLINE I32x16 load_i32(const void* p) {
    I32x16 r;
    memcpy(&r, p, sizeof r);
    return r;
}
PELLUCID_INLINE void store_i32(int32_t* p, I32x16 a) { memcpy(p, &a, sizeof a); }
PELLUCID_INLINE I32x16 add(I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH((I32x4)((U32x4)a.v[i] + (U32x4)b.v[i]));
}
PELLUCID_INLINE I32x16 sub(I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH((I32x4)((U32x4)a.v[i] - (U32x4)b.v[i]));
}
PELLUCID_INLINE I32x16 max(I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH(blend((I32x4)(a.v[i] > b.v[i]), a.v[i], b.v[i]));
}
PELLUCID_INLINE I32x16 bit_and(I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH(a.v[i] & b.v[i]);
}
PELLUCID_INLINE I32x16 bit_or(I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH(a.v[i] | b.v[i]);
}
template <int kBits>
PELLUCID_INLINE I32x16 shift_left(I32x16 a) {
    I32x16 r;
    PELLUCID_EACH((I32x4)((U32x4)a.v[i] << kBits));
}
template <int kBits>
PELLUCID_INLINE I32x16 shift_right_logical(I32x16 a) {
    I32x16 r;
    PELLUCID_EACH((I32x4)((U32x4)a.v[i] >> kBits));
}
PELLUCID_INLINE Mask16 less(I32x16 a, I32x16 b) {
    Mask16 r;
    PELLUCID_EACH((I32x4)(a.v[i] < b.v[i]));
}
PELLUCID_INLINE I32x16 select(Mask16 m, I32x16 a, I32x16 b) {
    I32x16 r;
    PELLUCID_EACH(blend(m.v[i], a.v[i], b.v[i]));
}

PELLUCID_INLINE Mask16 first_lanes(int n) {
    const int32_t lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return less(load_i32(lanes), broadcast_i32(n));
}
PELLUCID_INLINE Mask16 mask_and(Mask16 a, Mask16 b) {
    Mask16 r;
    PELLUCID_EACH(a.v[i] & b.v[i]);
}
PELLUCID_INLINE Mask16 mask_not(Mask16 a) {
    Mask16 r;
    PELLUCID_EACH(~a.v[i]);
}
PELLUCID_INLINE uint32_t mask_bits(Mask16 a) {
    uint32_t r = 0;
    for (int i = 0; i < kLanes; ++i) r |= (static_cast<uint32_t>(a.v[i / 4][i % 4]) & 1u) << i;
    return r;
}

PELLUCID_INLINE I32x16 bits(F32x16 a) {
    I32x16 r;
    PELLUCID_EACH((I32x4)a.v[i]);
}
PELLUCID_INLINE F32x16 from_bits(I32x16 a) {
    F32x16 r;
    PELLUCID_EACH((F32x4)a.v[i]);
}

PELLUCID_INLINE F32x16 broadcast(float x) {
    F32x16 r;
    PELLUCID_EACH((F32x4{x, x, x, x}));
}
PELLUCID_INLINE F32x16 load(const float* p) {
    F32x16 r;
    memcpy(&r, p, sizeof r);
    return r;
}
PELLUCID_INLINE F32x16 load_partial(const float* p, int n) {
    float lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
PELLUCID_INLINE void store(float* p, F32x16 a) { memcpy(p, &a, sizeof a); }
PELLUCID_INLINE void store_partial(float* p, F32x16 a, int n) {
    float lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

PELLUCID_INLINE F32x16 add(F32x16 a, F32x16 b) {
    F32x16 r;
    PELLUCID_EACH(a.v[i] + b.v[i]);
}
PELLUCID_INLINE F32x16 sub(F32x16 a, F32x16 b) {
    F32x16 r;
    PELLUCID_EACH(a.v[i] - b.v[i]);
}
PELLUCID_INLINE F32x16 mul(F32x16 a, F32x16 b) {
    F32x16 r;
    PELLUCID_EACH(a.v[i] * b.v[i]);
}
PELLUCID_INLINE F32x16 div(F32x16 a, F32x16 b) {
    F32x16 r;
    PELLUCID_EACH(a.v[i] / b.v[i]);
}
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_f)
PELLUCID_INLINE F32x4 fma4(F32x4 a, F32x4 b, F32x4 c) {
    return F32x4{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
                 __builtin_fmaf(a[3], b[3], c[3])};
}
#else
PELLUCID_INLINE F32x4 fma4(F32x4 a, F32x4 b, F32x4 c) { return a * b + c; }
#endif
PELLUCID_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    F32x16 r;
    PELLUCID_EACH(fma4(a.v[i], b.v[i], c.v[i]));
}
PELLUCID_INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) {
    F32x16 r;
    PELLUCID_EACH(fma4(-a.v[i], b.v[i], c.v[i]));
}
PELLUCID_INLINE Mask16 less(F32x16 a, F32x16 b) {
    Mask16 r;
    PELLUCID_EACH((I32x4)(a.v[i] < b.v[i]));
}
PELLUCID_INLINE Mask16 less_equal(F32x16 a, F32x16 b) {
    Mask16 r;
    PELLUCID_EACH((I32x4)(a.v[i] <= b.v[i]));
}
PELLUCID_INLINE Mask16 equal(F32x16 a, F32x16 b) {
    Mask16 r;
    PELLUCID_EACH((I32x4)(a.v[i] == b.v[i]));
}
PELLUCID_INLINE F32x16 select(Mask16 m, F32x16 a, F32x16 b) { return from_bits(select(m, bits(a), bits(b))); }
PELLUCID_INLINE F32x16 max(F32x16 a, F32x16 b) { return select(less(b, a), a, b); }
PELLUCID_INLINE F32x16 min(F32x16 a, F32x16 b) { return select(less(a, b), a, b); }

// Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits.
PELLUCID_INLINE I32x16 to_i32(F32x16 a) {
    const F32x16 magic = broadcast(12582912.0f);
    return sub(bits(add(a, magic)), bits(magic));
}
PELLUCID_INLINE F32x16 to_f32(I32x16 a) {
    F32x16 r;
    PELLUCID_EACH(__builtin_convertvector(a.v[i], F32x4));
}

PELLUCID_INLINE uint16_t float_to_half(float x) {
    const uint32_t whole = static_cast<uint32_t>(float_bits(x)), sign = whole >> 16 & 0x8000;
    uint32_t a = whole & 0x7fffffff;
    if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (a >> 13 & 0x3ff));
    if (a >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (a < 0x38800000) {
        // Below 2^-14 a half is a multiple of 2^-24, which is the unit in the last place of 0.5.
        const float shifted = float_from_bits(static_cast<int32_t>(a)) + 0.5f;
        return static_cast<uint16_t>(sign | (static_cast<uint32_t>(float_bits(shifted)) - 0x3f000000));
    }
    a += 0xc8000fffu + (a >> 13 & 1);
    return static_cast<uint16_t>(sign | a >> 13);
}

PELLUCID_INLINE I32x16 load_i8(const int8_t* p) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = p[i];
    return load_i32(lanes);
}
PELLUCID_INLINE void store_i8(int8_t* p, I32x16 a) {
    for (int i = 0; i < kLanes; ++i) {
        const int32_t x = a.v[i / 4][i % 4];
        p[i] = static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
    }
}
PELLUCID_INLINE I32x16 load_u16(const uint16_t* p) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = p[i];
    return load_i32(lanes);
}
PELLUCID_INLINE void store_u16(uint16_t* p, I32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(a.v[i / 4][i % 4]);
}
// Halves in the low 16 bits of each lane; the high ones are zero.
PELLUCID_INLINE F32x16 halves_to_floats(I32x16 half) {
    I32x16 r;
    const I32x16 mantissa = bit_and(half, broadcast_i32(0x3ff));
    const I32x16 subnormal = bits(mul(to_f32(mantissa), broadcast(0x1p-24f)));
    PELLUCID_UNROLL
    for (int i = 0; i < 4; ++i) {
        const I32x4 exponent = half.v[i] & 0x7c00, magnitude = (half.v[i] & 0x7fff) << 13;
        const I32x4 quiet = (I32x4)(mantissa.v[i] != 0) & 0x400000;
        const I32x4 normal_or_special =
            blend((I32x4)(exponent == 0x7c00), magnitude | 0x7f800000 | quiet, magnitude + 0x38000000);
        r.v[i] = (half.v[i] & 0x8000) << 16 | blend((I32x4)(exponent == 0), subnormal.v[i], normal_or_special);
    }
    return from_bits(r);
}
PELLUCID_INLINE F32x16 load_f16(const uint16_t* p) { return halves_to_floats(load_u16(p)); }
PELLUCID_INLINE void store_f16(uint16_t* p, F32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i / 4][i % 4]);
}
PELLUCID_INLINE F32x16 load_even_f16(const uint16_t* p) {
    return halves_to_floats(bit_and(load_i32(p), broadcast_i32(0xffff)));
}
PELLUCID_INLINE F32x16 load_odd_f16(const uint16_t* p) {
    return halves_to_floats(shift_right_logical<16>(load_i32(p)));
}

template <int kQuarter>
PELLUCID_INLINE F32x16 broadcast_quarter(F32x16 a) {
    F32x16 r;
    PELLUCID_EACH(a.v[kQuarter]);
}
// The first lane of each quarter.
PELLUCID_INLINE void store_quarters(void* p, I32x16 a) {
    const int32_t first[4] = {a.v[0][0], a.v[1][0], a.v[2][0], a.v[3][0]};
    memcpy(p, first, sizeof first);
}
// Quarter k gets the largest (the sum) of vector k in each of its lanes.
PELLUCID_INLINE I32x4 reduce_max1(I32x16 a) {
    int32_t largest = a.v[0][0];
    for (int i = 1; i < kLanes; ++i) {
        const int32_t x = a.v[i / 4][i % 4];
        largest = x > largest ? x : largest;
    }
    return I32x4{largest, largest, largest, largest};
}
PELLUCID_INLINE I32x4 reduce_add1(I32x16 a) {
    const I32x4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    const int32_t sum = (four[0] + four[2]) + (four[1] + four[3]);
    return I32x4{sum, sum, sum, sum};
}
PELLUCID_INLINE I32x16 reduce_max4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    return {{reduce_max1(a), reduce_max1(b), reduce_max1(c), reduce_max1(d)}};
}
PELLUCID_INLINE I32x16 reduce_add4(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    return {{reduce_add1(a), reduce_add1(b), reduce_add1(c), reduce_add1(d)}};
}
PELLUCID_INLINE float greater_of(float a, float b) { return a > b ? a : b; }
PELLUCID_INLINE F32x4 reduce_max1(F32x16 a) {
    float four[4];
    for (int i = 0; i < 4; ++i) {
        four[i] = greater_of(greater_of(a.v[0][i], a.v[2][i]), greater_of(a.v[1][i], a.v[3][i]));
    }
    const float largest = greater_of(greater_of(four[0], four[2]), greater_of(four[1], four[3]));
    return F32x4{largest, largest, largest, largest};
}
PELLUCID_INLINE F32x4 reduce_add1(F32x16 a) {
    const F32x4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    const float sum = (four[0] + four[2]) + (four[1] + four[3]);
    return F32x4{sum, sum, sum, sum};
}
PELLUCID_INLINE F32x16 reduce_max4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    return {{reduce_max1(a), reduce_max1(b), reduce_max1(c), reduce_max1(d)}};
}
PELLUCID_INLINE F32x16 reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    return {{reduce_add1(a), reduce_add1(b), reduce_add1(c), reduce_add1(d)}};
}
// 64 values, vector after vector.
PELLUCID_INLINE void store_i8x4(int8_t* p, I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
    store_i8(p, a);
    store_i8(p + 16, b);
    store_i8(p + 32, c);
    store_i8(p + 48, d);
}

#undef PELLUCID_EACH

#endif

// ---- reductions ----------------------------------------------------------------------------------------------------

#if defined(PELLUCID_SIMD_AVX512) || defined(PELLUCID_SIMD_AVX2)

PELLUCID_INLINE float reduce_add(F32x16 a) {
    const __m256 eight = halves_add(a).v;
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PELLUCID_INLINE float reduce_max(F32x16 a) {
    const __m256 eight = halves_max(a).v;
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
PELLUCID_INLINE int32_t reduce_add(I32x16 a) {
    const __m256i eight = halves_add(a).v;
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
PELLUCID_INLINE int32_t reduce_max(I32x16 a) {
    const __m256i eight = halves_max(a).v;
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

#else

PELLUCID_INLINE float reduce_add(F32x16 a) { return reduce_add1(a)[0]; }
PELLUCID_INLINE float reduce_max(F32x16 a) { return reduce_max1(a)[0]; }
PELLUCID_INLINE int32_t reduce_add(I32x16 a) { return reduce_add1(a)[0]; }
PELLUCID_INLINE int32_t reduce_max(I32x16 a) { return reduce_max1(a)[0]; }

#endif

PELLUCID_INLINE F32x16 broadcast_quarter(F32x16 a, int quarter) {
    switch (quarter) {
        case 0:
            return broadcast_quarter<0>(a);
        case 1:
            return broadcast_quarter<1>(a);
        case 2:
            return broadcast_quarter<2>(a);
        default:
            return broadcast_quarter<3>(a);
    }
}

// ---- built from the above ------------------------------------------------------------------------------------------

PELLUCID_INLINE F32x16 zero() { return broadcast(0.0f); }
PELLUCID_INLINE I32x16 abs_bits(F32x16 a) { return bit_and(bits(a), broadcast_i32(0x7fffffff)); }
PELLUCID_INLINE F32x16 abs(F32x16 a) { return from_bits(abs_bits(a)); }
PELLUCID_INLINE F32x16 neg(F32x16 a) { return sub(broadcast(-0.0f), a); }

// Lanes begin <= i < end, for begin and end in 0..16.
PELLUCID_INLINE Mask16 lane_range(int begin, int end) {
    return mask_and(first_lanes(end), mask_not(first_lanes(begin)));
}

PELLUCID_INLINE F32x16 load_f16_partial(const uint16_t* p, int n) {
    uint16_t lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load_f16(lanes);
}
PELLUCID_INLINE void store_f16_partial(uint16_t* p, F32x16 a, int n) {
    uint16_t lanes[kLanes];
    store_f16(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

PELLUCID_INLINE F32x16 load_bf16(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }
PELLUCID_INLINE F32x16 load_bf16_partial(const uint16_t* p, int n) {
    uint16_t lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load_bf16(lanes);
}
PELLUCID_INLINE void store_bf16(uint16_t* p, F32x16 a) {
    const I32x16 whole = bits(a);
    const I32x16 odd = bit_and(shift_right_logical<16>(whole), broadcast_i32(1));
    const I32x16 rounded = shift_right_logical<16>(add(add(whole, broadcast_i32(0x7fff)), odd));
    const I32x16 quiet_nan = bit_or(shift_right_logical<16>(whole), broadcast_i32(0x40));
    const Mask16 is_nan = less(broadcast_i32(0x7f800000), abs_bits(a));
    store_u16(p, select(is_nan, quiet_nan, rounded));
}
PELLUCID_INLINE void store_bf16_partial(uint16_t* p, F32x16 a, int n) {
    uint16_t lanes[kLanes];
    store_bf16(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
PELLUCID_INLINE F32x16 load_even_bf16(const uint16_t* p) { return from_bits(shift_left<16>(load_i32(p))); }
PELLUCID_INLINE F32x16 load_odd_bf16(const uint16_t* p) {
    return from_bits(bit_and(load_i32(p), broadcast_i32(static_cast<int32_t>(0xffff0000))));
}

// e^x within 1.2 units in the last place for -86.9 < x < 88.72 (0.9 with a fused multiply-add); e^0 is 1 exactly.
// Below about -86.99 (results under 2^-125.5, down to e^-inf) it is 0, never subnormal, so that a thread's
// flush-to-zero state cannot show; above 88.73 it is inf; a NaN stays one.
// exp_not_positive gives the same bits for x <= 0 with one operation less.
PELLUCID_INLINE F32x16 exp_not_positive(F32x16 x) {
    x = max(broadcast(-87.3f), x);
    // n = x / ln 2 rounded sits, biased by 126, in the low bits of t: shifted into the exponent field they are 2^(n-1),
    // and 0 for n = -126. The polynomial is 2 e^r (degree 6, minimax in relative error on |r| <= ln 2 / 2).
    const F32x16 magic = broadcast(12582912.0f + 126.0f);
    const F32x16 t = fma(x, broadcast(1.44269504f), magic);
    const F32x16 n = sub(t, magic);
    F32x16 r = fnma(n, broadcast(0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    F32x16 p = broadcast(0x1.6a23bcp-9f);
    p = fma(p, r, broadcast(0x1.123a2cp-6f));
    p = fma(p, r, broadcast(0x1.5558f4p-4f));
    p = fma(p, r, broadcast(0x1.555490p-2f));
    p = fma(p, r, broadcast(0x1.fffffcp-1f));
    p = fma(p, r, broadcast(2.0f));
    p = fma(p, r, broadcast(2.0f));
    return mul(p, from_bits(shift_left<23>(bits(t))));
}
PELLUCID_INLINE F32x16 exp(F32x16 x) { return exp_not_positive(min(broadcast(88.8f), x)); }

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
