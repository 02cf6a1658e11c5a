#define PELLUCID_SIMD_AVX512
// AMX int8 tiles for 16 input rows at a time. The integer dot products are exact, and the epilogue is the one of the
// vector kernels, so the bits are theirs too.
#include "matmul_avx512.inl.h"

namespace pellucid {
inline namespace simd_avx512 {
namespace {

constexpr int kGroupBytes = kRowGroup * 32;  // of one block
constexpr int kBatch = 2;                    // steps whose products are under way at a time
constexpr int kChunkBlocks = 48;  // blocks unpacked at a time: they stay in L1 while the groups of rows go by

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0-3: results [16 rows][16 lanes] i32. 4-5: input [16 rows][32 bytes]. 6-7: weights [8 column quads][16 x 4].
// The compiler's own intrinsics name no memory operands in GCC 12; these do.
void configure_tiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = tile < 6 ? kRowGroup : 8;
        config.row_bytes[tile] = tile == 4 || tile == 5 ? 32 : 64;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
}

void release_tiles() { asm volatile("tilerelease"); }

#define PELLUCID_TILE_PRODUCT(result, input, weight)                                                   \
    asm volatile("tilezero %%tmm" #result "\n\ttileloadd (%0,%1,1), %%tmm" #input                      \
                 "\n\ttileloadd (%2,%3,1), %%tmm" #weight "\n\ttdpbssd %%tmm" #weight ", %%tmm" #input \
                 ", %%tmm" #result "\n\ttilestored %%tmm" #result ", (%4,%3,1)"                        \
                 :                                                                                     \
                 : "r"(q), "r"(int64_t{32}), "r"(weights), "r"(int64_t{64}), "r"(products)             \
                 : "memory")

// products[16 rows][16 lanes] = q[16 rows][32] . weights[8 quads][16 lanes][4], in tile set step % 4
PELLUCID_INLINE void tile_product(int step, const int8_t* q, const int8_t* weights, int32_t* products) {
    switch (step % 4) {
        case 0:
            PELLUCID_TILE_PRODUCT(0, 4, 6);
            break;
        case 1:
            PELLUCID_TILE_PRODUCT(1, 5, 7);
            break;
        case 2:
            PELLUCID_TILE_PRODUCT(2, 4, 6);
            break;
        default:
            PELLUCID_TILE_PRODUCT(3, 5, 7);
            break;
    }
}

template <WeightFormat format>
struct alignas(64) UnpackedBlock {
    static constexpr int kScales = PackedLayout<format>::has_two_scales ? 2 : 1;
    int8_t q[kScales][512];  // zero point taken off; of two, each is zero outside its half
    float scale[kScales][16];
    float min[16];
};

template <WeightFormat format>
void unpack_block(const uint8_t* super, const uint8_t* bytes, UnpackedBlock<format>& out) {
    using L = PackedLayout<format>;
    Weights w;
    unpack<format>(bytes, w);
    const __m512i zero_point = _mm512_set1_epi8(static_cast<char>(L::zero_point));
    PELLUCID_UNROLL
    for (int j = 0; j < 8; ++j) {
        const __m512i q = _mm512_sub_epi8(w.v[j], zero_point);
        if constexpr (L::has_two_scales) {
            _mm512_store_si512(out.q[j / 4] + 64 * j, q);
            _mm512_store_si512(out.q[1 - j / 4] + 64 * j, _mm512_setzero_si512());
        } else {
            _mm512_store_si512(out.q[0] + 64 * j, q);
        }
    }
    const BlockScales s = load_scales<format>(super, bytes);
    store(out.scale[0], s.scale[0]);
    if constexpr (L::has_two_scales) store(out.scale[1], s.scale[1]);
    if constexpr (L::has_min) store(out.min, s.min);
}

// acc[i] += scale_w * scale[i] * products[i], and the minimum's part. `low` are the products of the second bytes,
// null where no row of the group has any.
template <bool kHasMin>
PELLUCID_INLINE void fold_products(const int32_t* products, const int32_t* low, const float* scale_w,
                                   const float* min_w, const QuantBlock* input, F32x16* acc) {
    const F32x16 scale = load(scale_w);
    PELLUCID_UNROLL
    for (int i = 0; i < kRowGroup; ++i) {
        const I32x16 d = load_i32(products + 16 * i);
        const F32x16 product = low == nullptr ? to_f32(d) : with_low(d, load_i32(low + 16 * i));
        acc[i] = fma(mul(scale, broadcast(input[i].scale)), product, acc[i]);
    }
    if constexpr (kHasMin) {
        const F32x16 min = load(min_w);
        PELLUCID_UNROLL
        for (int i = 0; i < kRowGroup; ++i) acc[i] = fma(min, broadcast(input[i].scaled_sum), acc[i]);
    }
}

// Products of `count` (at most kBatch) successive steps; a step is a block, or one of the two halves of a block with
// two scales.
template <WeightFormat format>
PELLUCID_INLINE void batch_products(const UnpackedBlock<format>* w, const int8_t* q, int count,
                                    int32_t (*products)[256]) {
    constexpr int kScales = UnpackedBlock<format>::kScales;
    PELLUCID_UNROLL
    for (int step = 0; step < kBatch; ++step) {
        if (step >= count) break;
        tile_product(step, q + step / kScales * kGroupBytes, w[step / kScales].q[step % kScales], products[step]);
    }
}

// A group of 16 input rows against `blocks` unpacked blocks, continuing the sums in `out` unless these are the first.
//
// The products of one batch of steps are under way while the batch before it is folded: what a tile store has just
// written is slow to load.
template <WeightFormat format>
void accumulate_group(const UnpackedBlock<format>* w, bool first, int blocks, const Activations& input, int64_t index,
                      float* out, int64_t stride, int lanes) {
    using L = PackedLayout<format>;
    constexpr int kScales = UnpackedBlock<format>::kScales;
    constexpr int kBatchBlocks = kBatch / kScales;
    alignas(64) int32_t products[2][kBatch][256];
    alignas(64) int32_t low_products[256];
    F32x16 acc[kRowGroup];
    PELLUCID_UNROLL
    for (int i = 0; i < kRowGroup; ++i) acc[i] = first ? broadcast(0.0f) : load_partial(out + i * stride, lanes);
    const int8_t* q = input.q + index * 32;
    batch_products<format>(w, q, blocks * kScales, products[0]);
    for (int block = 0, parity = 0; block < blocks; block += kBatchBlocks, parity ^= 1) {
        const int next = block + kBatchBlocks;
        if (next < blocks) {
            batch_products<format>(w + next, q + next * kGroupBytes, (blocks - next) * kScales, products[parity ^ 1]);
        }
        for (int step = 0; step < kBatch && step < (blocks - block) * kScales; ++step) {
            const int b = block + step / kScales;
            const int64_t at = index + int64_t{b} * kRowGroup;
            const int32_t* low = nullptr;
            if (any_refined<kRowGroup>(input, at)) {
                tile_product(step, input.low + at * 32, w[b].q[step % kScales], low_products);
                low = low_products;
            }
            fold_products<L::has_min>(products[parity][step], low, w[b].scale[step % kScales], w[b].min,
                                      input.blocks + at, acc);
        }
    }
    store_tile<kRowGroup>(acc, out, stride, lanes);
}

template <WeightFormat format>
void amx_panels(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
                int row_end, float* out, int64_t stride) {
    using L = PackedLayout<format>;
    alignas(64) UnpackedBlock<format> unpacked[kChunkBlocks];
    configure_tiles();
    for (int p = panel_begin; p < panel_end; ++p) {
        const int left = weights.rows - p * kPanelRows;
        const int lanes = left < kPanelRows ? left : kPanelRows;
        const uint8_t* super = weights.panel(p);
        for (int first = 0; first < input.num_blocks(); first += kChunkBlocks) {
            const int blocks = input.num_blocks() - first < kChunkBlocks ? input.num_blocks() - first : kChunkBlocks;
            for (int b = 0; b < blocks; b += L::blocks_per_super, super += L::super_bytes) {
                for (int j = 0; j < L::blocks_per_super; ++j) {
                    unpack_block<format>(super, super + L::header_bytes + j * L::block_bytes, unpacked[b + j]);
                }
            }
            for (int row = row_begin; row < row_end; row += kRowGroup) {
                accumulate_group<format>(unpacked, first == 0, blocks, input,
                                         input.block_index(row) + first * kRowGroup,
                                         out + row * stride + (p - panel_begin) * kPanelRows, stride, lanes);
            }
        }
    }
    release_tiles();
}

void matmul_tiles(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
                  int row_end, float* out, int64_t stride) {
    switch (weights.format) {
#define PELLUCID_CASE(format)                                                                                    \
    case WeightFormat::format:                                                                                   \
        return amx_panels<WeightFormat::format>(weights, panel_begin, panel_end, input, row_begin, row_end, out, \
                                                stride);
        PELLUCID_CASE(kQ4_0)
        PELLUCID_CASE(kQ4_1)
        PELLUCID_CASE(kQ5_0)
        PELLUCID_CASE(kQ5_1)
        PELLUCID_CASE(kQ8_0)
        PELLUCID_CASE(kQ4_K)
        PELLUCID_CASE(kQ5_K)
        PELLUCID_CASE(kQ6_K)
#undef PELLUCID_CASE
        default:
            return matmul(weights, panel_begin, panel_end, input, row_begin, row_end, out, stride);
    }
}

void matmul_amx(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
                int row_end, float* out, int64_t stride) {
    const int tiled_begin = (row_begin + kRowGroup - 1) / kRowGroup * kRowGroup;
    const int tiled_end = row_end / kRowGroup * kRowGroup;
    if (tiled_begin >= tiled_end) {
        matmul(weights, panel_begin, panel_end, input, row_begin, row_end, out, stride);
        return;
    }
    matmul(weights, panel_begin, panel_end, input, row_begin, tiled_begin, out, stride);
    matmul_tiles(weights, panel_begin, panel_end, input, tiled_begin, tiled_end, out, stride);
    matmul(weights, panel_begin, panel_end, input, tiled_end, row_end, out, stride);
}

}  // namespace
}  // namespace simd_avx512

const MatmulKernels kMatmulKernelsAmx = {"amx-int8", simd_avx512::matmul_amx};

}  // namespace pellucid
