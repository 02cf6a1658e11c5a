// The matmul, written once. An instruction set includes this after defining, in its own namespace:
//   Weights                      eight registers of 16 lanes x 4 unsigned bytes
//   load_nibbles, load_bytes, add_plane1, add_plane2, dot<bits>   (see matmul_avx512.cpp)
// on top of simd.h.

// How far ahead of the stream of weights memory is asked for, into L2: a line's way from memory takes longer than
// the fill buffers of L1 can cover.
constexpr int kPrefetchBytes = 16384;

template <WeightFormat format>
PELLUCID_INLINE void unpack(const uint8_t* block, Weights& w) {
    using L = PackedLayout<format>;
    if constexpr (L::bits == 8) {
        load_bytes(block, w);
    } else {
        load_nibbles(block, w);
        if constexpr (L::bits == 5) add_plane1(block + 256, w);
        if constexpr (L::bits == 6) add_plane2(block + 256, w);
    }
}

PELLUCID_INLINE F32x16 load_unsigned(const uint8_t* p) {
    int32_t lanes[16];
    PELLUCID_UNROLL
    for (int i = 0; i < 16; ++i) lanes[i] = p[i];
    return to_f32(load_i32(lanes));
}

PELLUCID_INLINE F32x16 load_signed(const uint8_t* p) { return to_f32(load_i8(reinterpret_cast<const int8_t*>(p))); }

PELLUCID_INLINE F32x16 load_half(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }

// The scales of one block of 32 columns: scale[0] for all of them, or for the first 16 and scale[1] for the rest.
struct BlockScales {
    F32x16 scale[2];
    F32x16 min;
};

template <WeightFormat format>
PELLUCID_INLINE BlockScales load_scales(const uint8_t* super, const uint8_t* block) {
    using L = PackedLayout<format>;
    const uint8_t* scales = block + L::scale_offset;
    BlockScales s;
    if constexpr (L::blocks_per_super == 1) {
        s.scale[0] = load_half(scales);
        if constexpr (L::has_min) s.min = load_half(scales + 32);
    } else if constexpr (L::has_two_scales) {
        s.scale[0] = mul(load_half(super), load_signed(scales));
        s.scale[1] = mul(load_half(super), load_signed(scales + 16));
    } else {
        s.scale[0] = mul(load_half(super), load_unsigned(scales));
        s.min = mul(load_half(super + 32), load_unsigned(scales + 16));
    }
    return s;
}

// Sum of the first 16 of 32 int8 values; the layout with two scales needs it for its zero point.
PELLUCID_INLINE int32_t sum_first_half(const int8_t* q) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += q[i];
    return sum;
}

// Sums of a block with the bits below the point that a refined one has, as float: exact up to float's own rounding.
PELLUCID_INLINE F32x16 with_low(I32x16 d, I32x16 low) {
    return mul(to_f32(add(shift_left<8>(d), low)), broadcast(1.0f / 256));
}

// acc[i] += one block of 32 columns for the i-th of kRows rows of one group; `index` is the first row's block.
template <WeightFormat format, int kRows, bool kRefined>
PELLUCID_INLINE void accumulate_block(const Weights& w, const BlockScales& s, const Activations& input, int64_t index,
                                      F32x16* acc) {
    using L = PackedLayout<format>;
    const int8_t* rows = input.q + index * 32;
    const QuantBlock* block = input.blocks + index;
    PELLUCID_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const int8_t* q = rows + 32 * i;
        [[maybe_unused]] const int8_t* low = kRefined ? input.low + (index + i) * 32 : nullptr;
        if constexpr (L::has_two_scales) {
            const int32_t first = sum_first_half(q);
            const I32x16 d0 = dot_half<L::bits, 0>(w, q, broadcast_i32(-L::zero_point * first));
            const I32x16 d1 = dot_half<L::bits, 1>(w, q, broadcast_i32(-L::zero_point * (block[i].sum - first)));
            F32x16 product0, product1;
            if constexpr (kRefined) {
                const int32_t first_low = sum_first_half(low);
                product0 = with_low(d0, dot_half<L::bits, 0>(w, low, broadcast_i32(-L::zero_point * first_low)));
                product1 = with_low(
                    d1, dot_half<L::bits, 1>(w, low, broadcast_i32(-L::zero_point * (block[i].low_sum - first_low))));
            } else {
                product0 = to_f32(d0);
                product1 = to_f32(d1);
            }
            acc[i] = fma(mul(s.scale[0], broadcast(block[i].scale)), product0, acc[i]);
            acc[i] = fma(mul(s.scale[1], broadcast(block[i].scale)), product1, acc[i]);
        } else {
            const I32x16 d = dot<L::bits>(w, q, broadcast_i32(L::zero_point ? -L::zero_point * block[i].sum : 0));
            F32x16 product;
            if constexpr (kRefined) {
                const int32_t start = L::zero_point ? -L::zero_point * block[i].low_sum : 0;
                product = with_low(d, dot<L::bits>(w, low, broadcast_i32(start)));
            } else {
                product = to_f32(d);
            }
            acc[i] = fma(mul(s.scale[0], broadcast(block[i].scale)), product, acc[i]);
        }
        if constexpr (L::has_min) acc[i] = fma(s.min, broadcast(block[i].scaled_sum), acc[i]);
    }
}

template <int kRows>
PELLUCID_INLINE bool any_refined(const Activations& input, int64_t index) {
    if (input.refined == nullptr) return false;
    uint8_t any = 0;
    PELLUCID_UNROLL
    for (int i = 0; i < kRows; ++i) any |= input.refined[index + i];
    return any != 0;
}

template <int kRows>
PELLUCID_INLINE void store_tile(const F32x16* acc, float* out, int64_t stride, int lanes) {
    PELLUCID_UNROLL
    for (int i = 0; i < kRows; ++i) {
        if (lanes == kLanes) {
            store(out + i * stride, acc[i]);
        } else {
            store_partial(out + i * stride, acc[i], lanes);
        }
    }
}

template <WeightFormat format, int kRows>
void matmul_tile(const uint8_t* panel, const Activations& input, int row, float* out, int64_t stride, int lanes) {
    using L = PackedLayout<format>;
    F32x16 acc[kRows];
    PELLUCID_UNROLL
    for (int i = 0; i < kRows; ++i) acc[i] = broadcast(0.0f);
    int64_t index = input.block_index(row);
    const uint8_t* super = panel;
    for (int block = 0; block < input.num_blocks(); block += L::blocks_per_super, super += L::super_bytes) {
        for (int j = 0; j < L::blocks_per_super; ++j, index += kRowGroup) {
            const uint8_t* bytes = super + L::header_bytes + j * L::block_bytes;
            PELLUCID_UNROLL
            for (int line = 0; line < L::block_bytes; line += 64) {
                __builtin_prefetch(bytes + line + kPrefetchBytes, 0, 2);
            }
            Weights w;
            unpack<format>(bytes, w);
            const BlockScales scales = load_scales<format>(super, bytes);
            constexpr int kSpan = kRows < kSpanRows ? kRows : kSpanRows;
            PELLUCID_UNROLL
            for (int i = 0; i < kRows; i += kSpan) {
                if (any_refined<kSpan>(input, index + i)) {
                    accumulate_block<format, kSpan, true>(w, scales, input, index + i, acc + i);
                } else {
                    accumulate_block<format, kSpan, false>(w, scales, input, index + i, acc + i);
                }
            }
        }
    }
    store_tile<kRows>(acc, out, stride, lanes);
}

template <WeightFormat format>
PELLUCID_INLINE F32x16 load_float_weights(const uint8_t* panel, int k) {
    if constexpr (format == WeightFormat::kF32) return load(reinterpret_cast<const float*>(panel) + k * kPanelRows);
    const uint16_t* p = reinterpret_cast<const uint16_t*>(panel) + k * kPanelRows;
    if constexpr (format == WeightFormat::kF16) return load_f16(p);
    return from_bits(shift_left<16>(load_u16(p)));
}

template <WeightFormat format, int kRows>
void matmul_float_tile(const uint8_t* panel, const Activations& input, int row, float* out, int64_t stride, int lanes) {
    F32x16 acc[kRows];
    PELLUCID_UNROLL
    for (int i = 0; i < kRows; ++i) acc[i] = broadcast(0.0f);
    const float* x = input.f32 + row * input.f32_stride;
    for (int k = 0; k < input.cols; ++k) {
        const F32x16 w = load_float_weights<format>(panel, k);
        PELLUCID_UNROLL
        for (int i = 0; i < kRows; ++i) acc[i] = fma(broadcast(x[i * input.f32_stride + k]), w, acc[i]);
    }
    store_tile<kRows>(acc, out, stride, lanes);
}

template <WeightFormat format, int kRows>
PELLUCID_INLINE void any_tile(const uint8_t* panel, const Activations& input, int row, float* out, int64_t stride,
                              int lanes) {
    if constexpr (format == WeightFormat::kF32 || format == WeightFormat::kF16 || format == WeightFormat::kBF16) {
        matmul_float_tile<format, kRows>(panel, input, row, out, stride, lanes);
    } else {
        matmul_tile<format, kRows>(panel, input, row, out, stride, lanes);
    }
}

// The widest tile of at most kRows that begins at `row`; returns its rows. A tile stays within one group of rows:
// widths are powers of two and start at multiples of themselves.
template <WeightFormat format, int kRows>
int widest_tile(const uint8_t* panel, const Activations& input, int row, int row_end, float* out, int64_t stride,
                int lanes) {
    if constexpr (kRows > 1) {
        if (row % kRows != 0 || row + kRows > row_end) {
            return widest_tile<format, kRows / 2>(panel, input, row, row_end, out, stride, lanes);
        }
    }
    any_tile<format, kRows>(panel, input, row, out, stride, lanes);
    return kRows;
}

template <WeightFormat format>
void matmul_panels(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
                   int row_end, float* out, int64_t stride) {
    for (int p = panel_begin; p < panel_end; ++p) {
        const uint8_t* panel = weights.panel(p);
        const int left = weights.rows - p * kPanelRows;
        const int lanes = left < kPanelRows ? left : kPanelRows;
        float* column = out + (p - panel_begin) * kPanelRows;
        for (int row = row_begin; row < row_end;) {
            row += widest_tile<format, kTileRows>(panel, input, row, row_end, column + row * stride, stride, lanes);
        }
    }
}

void matmul(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
            int row_end, float* out, int64_t stride) {
    switch (weights.format) {
#define PELLUCID_CASE(format)                                                                                       \
    case WeightFormat::format:                                                                                      \
        return matmul_panels<WeightFormat::format>(weights, panel_begin, panel_end, input, row_begin, row_end, out, \
                                                   stride);
        PELLUCID_CASE(kF32)
        PELLUCID_CASE(kF16)
        PELLUCID_CASE(kBF16)
        PELLUCID_CASE(kQ4_0)
        PELLUCID_CASE(kQ4_1)
        PELLUCID_CASE(kQ5_0)
        PELLUCID_CASE(kQ5_1)
        PELLUCID_CASE(kQ8_0)
        PELLUCID_CASE(kQ4_K)
        PELLUCID_CASE(kQ5_K)
        PELLUCID_CASE(kQ6_K)
#undef PELLUCID_CASE
    }
}
