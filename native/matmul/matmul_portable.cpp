#define PELLUCID_SIMD_PORTABLE
#include "matmul.h"
#include "simd.h"

namespace pellucid {
inline namespace simd_portable {
namespace {

constexpr int kTileRows = 4;
constexpr int kSpanRows = 4;

struct Weights {
    uint8_t v[8][64];
};

PELLUCID_INLINE void load_nibbles(const uint8_t* p, Weights& w) {
    for (int i = 0; i < 4; ++i) {
        for (int byte = 0; byte < 64; ++byte) {
            w.v[2 * i][byte] = p[64 * i + byte] & 15;
            w.v[2 * i + 1][byte] = static_cast<uint8_t>(p[64 * i + byte] >> 4);
        }
    }
}

PELLUCID_INLINE void load_bytes(const uint8_t* p, Weights& w) { memcpy(w.v, p, sizeof w.v); }

PELLUCID_INLINE void add_plane1(const uint8_t* plane, Weights& w) {
    for (int j = 0; j < 8; ++j) {
        for (int byte = 0; byte < 64; ++byte) {
            w.v[j][byte] = static_cast<uint8_t>(w.v[j][byte] | ((plane[8 * j + byte / 8] >> (byte % 8) & 1) << 4));
        }
    }
}

PELLUCID_INLINE void add_plane2(const uint8_t* planes, Weights& w) {
    for (int j = 0; j < 8; ++j) {
        for (int byte = 0; byte < 64; ++byte) {
            const int bits = planes[64 * (j / 4) + byte] >> (2 * (j % 4)) & 3;
            w.v[j][byte] = static_cast<uint8_t>(w.v[j][byte] | (bits << 4));
        }
    }
}

template <int kBegin, int kEnd>
PELLUCID_INLINE I32x16 dot_range(const Weights& w, const int8_t* q, I32x16 start) {
    int32_t lanes[16];
    store_i32(lanes, start);
    for (int lane = 0; lane < 16; ++lane) {
        int32_t sum = 0;
        for (int j = kBegin; j < kEnd; ++j) {
            for (int c = 0; c < 4; ++c) sum += w.v[j][4 * lane + c] * q[4 * j + c];
        }
        lanes[lane] += sum;
    }
    return load_i32(lanes);
}

template <int kBits>
PELLUCID_INLINE I32x16 dot(const Weights& w, const int8_t* q, I32x16 start) {
    return dot_range<0, 8>(w, q, start);
}

template <int kBits, int kHalf>
PELLUCID_INLINE I32x16 dot_half(const Weights& w, const int8_t* q, I32x16 start) {
    return dot_range<4 * kHalf, 4 * kHalf + 4>(w, q, start);
}

#include "matmul.inl.h"

}  // namespace
}  // namespace simd_portable

const MatmulKernels kMatmulKernelsPortable = {"portable", simd_portable::matmul};

}  // namespace pellucid
