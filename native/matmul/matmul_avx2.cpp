#define PELLUCID_SIMD_AVX2
#include "matmul.h"
#include "simd.h"

namespace pellucid {
inline namespace simd_avx2 {
namespace {

constexpr int kTileRows = 4;
constexpr int kSpanRows = 4;

struct Weights {
    __m256i v[8][2];
};

PELLUCID_INLINE __m256i load_line(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

PELLUCID_INLINE void load_nibbles(const uint8_t* p, Weights& w) {
    const __m256i low = _mm256_set1_epi8(15);
    PELLUCID_UNROLL
    for (int i = 0; i < 4; ++i) {
        PELLUCID_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m256i both = load_line(p + 64 * i + 32 * half);
            w.v[2 * i][half] = _mm256_and_si256(both, low);
            w.v[2 * i + 1][half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
    }
}

PELLUCID_INLINE void load_bytes(const uint8_t* p, Weights& w) {
    PELLUCID_UNROLL
    for (int j = 0; j < 8; ++j) {
        w.v[j][0] = load_line(p + 64 * j);
        w.v[j][1] = load_line(p + 64 * j + 32);
    }
}

PELLUCID_INLINE void add_plane1(const uint8_t* plane, Weights& w) {
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                            3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const __m256i bit4 = _mm256_set1_epi8(16);
    PELLUCID_UNROLL
    for (int j = 0; j < 8; ++j) {
        PELLUCID_UNROLL
        for (int half = 0; half < 2; ++half) {
            int32_t word;
            memcpy(&word, plane + 8 * j + 4 * half, 4);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            w.v[j][half] = _mm256_or_si256(w.v[j][half], _mm256_and_si256(set, bit4));
        }
    }
}

PELLUCID_INLINE void add_plane2(const uint8_t* planes, Weights& w) {
    const __m256i bits = _mm256_set1_epi8(0x30);
    PELLUCID_UNROLL
    for (int quad = 0; quad < 2; ++quad) {
        PELLUCID_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m256i p = load_line(planes + 64 * quad + 32 * half);
            __m256i(*v)[2] = w.v + 4 * quad;
            v[0][half] = _mm256_or_si256(v[0][half], _mm256_and_si256(_mm256_slli_epi16(p, 4), bits));
            v[1][half] = _mm256_or_si256(v[1][half], _mm256_and_si256(_mm256_slli_epi16(p, 2), bits));
            v[2][half] = _mm256_or_si256(v[2][half], _mm256_and_si256(p, bits));
            v[3][half] = _mm256_or_si256(v[3][half], _mm256_and_si256(_mm256_srli_epi16(p, 2), bits));
        }
    }
}

// vpmaddubsw saturates at 32767: two products of an 8-bit weight do not fit. Weights are stored plus 128, so take them
// back to signed, move their sign to the activation and multiply magnitudes: 2 * 128 * 127 fits. The zero point is
// thereby taken off, so dot_range leaves out the start that would do it.
template <int kBits>
PELLUCID_INLINE __m256i pair_products(__m256i w, __m256i q) {
    if constexpr (kBits < 8) return _mm256_maddubs_epi16(w, q);
    const __m256i sign = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(sign), _mm256_sign_epi8(q, sign));
}

template <int kBits, int kBegin, int kEnd>
PELLUCID_INLINE I32x16 dot_range(const Weights& w, const int8_t* q, I32x16 start) {
    // Sums of this many 16-bit pair products cannot overflow: 2 * (2^bits - 1) * 127 each.
    constexpr int kLongestRun = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
    constexpr int kRun = kLongestRun < kEnd - kBegin ? kLongestRun : kEnd - kBegin;
    const __m256i ones = _mm256_set1_epi16(1);
    I32x16 acc = start;
    if constexpr (kBits == 8) acc = broadcast_i32(0);
    PELLUCID_UNROLL
    for (int j = kBegin; j < kEnd; j += kRun) {
        __m256i lo = _mm256_setzero_si256();
        __m256i hi = _mm256_setzero_si256();
        PELLUCID_UNROLL
        for (int i = j; i < j + kRun; ++i) {
            int32_t word;
            memcpy(&word, q + 4 * i, 4);
            const __m256i a = _mm256_set1_epi32(word);
            lo = _mm256_add_epi16(lo, pair_products<kBits>(w.v[i][0], a));
            hi = _mm256_add_epi16(hi, pair_products<kBits>(w.v[i][1], a));
        }
        acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(lo, ones));
        acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(hi, ones));
    }
    return acc;
}

template <int kBits>
PELLUCID_INLINE I32x16 dot(const Weights& w, const int8_t* q, I32x16 start) {
    return dot_range<kBits, 0, 8>(w, q, start);
}

template <int kBits, int kHalf>
PELLUCID_INLINE I32x16 dot_half(const Weights& w, const int8_t* q, I32x16 start) {
    return dot_range<kBits, 4 * kHalf, 4 * kHalf + 4>(w, q, start);
}

#include "matmul.inl.h"

}  // namespace
}  // namespace simd_avx2

const MatmulKernels kMatmulKernelsAvx2 = {"avx2", simd_avx2::matmul};

}  // namespace pellucid
