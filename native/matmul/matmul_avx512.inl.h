// AVX-512 VNNI pieces of the matmul; shared by the VNNI and the AMX translation unit.
#include "matmul.h"
#include "simd.h"

namespace pellucid {
inline namespace simd_avx512 {
namespace {

constexpr int kTileRows = 16;  // input rows that share one unpacking of a block
constexpr int kSpanRows = 8;   // of them, those that are refined together

struct Weights {
    __m512i v[8];
};

PELLUCID_INLINE __m512i load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }

PELLUCID_INLINE void load_nibbles(const uint8_t* p, Weights& w) {
    const __m512i low = _mm512_set1_epi8(15);
    PELLUCID_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512i both = load_line(p + 64 * i);
        w.v[2 * i] = _mm512_and_si512(both, low);
        w.v[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

PELLUCID_INLINE void load_bytes(const uint8_t* p, Weights& w) {
    PELLUCID_UNROLL
    for (int j = 0; j < 8; ++j) w.v[j] = load_line(p + 64 * j);
}

PELLUCID_INLINE void add_plane1(const uint8_t* plane, Weights& w) {
    const __m512i bit4 = _mm512_set1_epi8(16);
    PELLUCID_UNROLL
    for (int j = 0; j < 8; ++j) {
        __mmask64 mask;
        memcpy(&mask, plane + 8 * j, 8);
        w.v[j] = _mm512_mask_add_epi8(w.v[j], mask, w.v[j], bit4);
    }
}

PELLUCID_INLINE void add_plane2(const uint8_t* planes, Weights& w) {
    const __m512i bits = _mm512_set1_epi8(0x30);
    PELLUCID_UNROLL
    for (int half = 0; half < 2; ++half) {
        const __m512i p = load_line(planes + 64 * half);
        __m512i* v = w.v + 4 * half;
        v[0] = _mm512_or_si512(v[0], _mm512_and_si512(_mm512_slli_epi16(p, 4), bits));
        v[1] = _mm512_or_si512(v[1], _mm512_and_si512(_mm512_slli_epi16(p, 2), bits));
        v[2] = _mm512_or_si512(v[2], _mm512_and_si512(p, bits));
        v[3] = _mm512_or_si512(v[3], _mm512_and_si512(_mm512_srli_epi16(p, 2), bits));
    }
}

// acc += w[lane][0..3] . q[0..3]. Inline assembly because GCC does not fold the broadcast of the four bytes into the
// instruction's memory operand, and a separate broadcast competes with the dot products for a port.
PELLUCID_INLINE void dot4(__m512i& acc, __m512i w, const int8_t* q) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(q)));
}

template <int kBits>
PELLUCID_INLINE I32x16 dot(const Weights& w, const int8_t* q, I32x16 start) {
    __m512i even = start.v;
    __m512i odd = _mm512_setzero_si512();
    PELLUCID_UNROLL
    for (int j = 0; j < 8; j += 2) {
        dot4(even, w.v[j], q + 4 * j);
        dot4(odd, w.v[j + 1], q + 4 * j + 4);
    }
    return {_mm512_add_epi32(even, odd)};
}

template <int kBits, int kHalf>
PELLUCID_INLINE I32x16 dot_half(const Weights& w, const int8_t* q, I32x16 start) {
    __m512i acc = start.v;
    PELLUCID_UNROLL
    for (int j = 4 * kHalf; j < 4 * kHalf + 4; ++j) dot4(acc, w.v[j], q + 4 * j);
    return {acc};
}

#include "matmul.inl.h"

}  // namespace
}  // namespace simd_avx512
}  // namespace pellucid
