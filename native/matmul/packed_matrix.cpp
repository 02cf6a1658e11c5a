#include "packed_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "half.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pellucid {

namespace {

constexpr uint32_t kLowNibbles = 0x0f0f0f0fu;

uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

uint32_t load_u32(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

void store_u16(uint8_t* p, uint16_t value) { std::memcpy(p, &value, 2); }
void store_u32(uint8_t* p, uint32_t value) { std::memcpy(p, &value, 4); }

// One lane of a block as eight little-endian words of four weights: words[j] = columns 4j .. 4j+3.
struct LaneWords {
    uint32_t words[8];
};

void store_nibbles(uint8_t* block, int lane, const LaneWords& lane_words) {
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = lane_words.words[2 * i] & kLowNibbles;
        const uint32_t high = lane_words.words[2 * i + 1] & kLowNibbles;
        store_u32(block + 64 * i + 4 * lane, low | (high << 4));
    }
}

// Bit 4 of each byte of a word, as four adjacent bits.
uint8_t gather_bit4(uint32_t word) {
    const uint32_t bits = (word >> 4) & 0x01010101u;
    return static_cast<uint8_t>((bits * 0x10204080u) >> 28);
}

void store_plane1(uint8_t* plane, int lane, const LaneWords& lane_words) {
    for (int j = 0; j < 8; ++j) {
        uint8_t& byte = plane[8 * j + lane / 2];
        byte = static_cast<uint8_t>(byte | (gather_bit4(lane_words.words[j]) << (4 * (lane % 2))));
    }
}

void store_plane2(uint8_t* planes, int lane, const LaneWords& lane_words) {
    for (int half = 0; half < 2; ++half) {
        uint32_t word = 0;
        for (int j = 0; j < 4; ++j) word |= ((lane_words.words[4 * half + j] >> 4) & 0x03030303u) << (2 * j);
        store_u32(planes + 64 * half + 4 * lane, word);
    }
}

template <int bits>
void store_lane(uint8_t* block, int lane, const LaneWords& lane_words) {
    if constexpr (bits == 8) {
        for (int j = 0; j < 8; ++j) store_u32(block + 64 * j + 4 * lane, lane_words.words[j]);
    } else {
        store_nibbles(block, lane, lane_words);
        if constexpr (bits == 5) store_plane1(block + 256, lane, lane_words);
        if constexpr (bits == 6) store_plane2(block + 256, lane, lane_words);
    }
}

// The nibbles of a GGUF Q4/Q5 block: column i in the low half of byte i, column i + 16 in the high half.
LaneWords split_nibbles(const uint8_t* qs) {
    LaneWords lane;
    for (int j = 0; j < 4; ++j) {
        const uint32_t word = load_u32(qs + 4 * j);
        lane.words[j] = word & kLowNibbles;
        lane.words[j + 4] = (word >> 4) & kLowNibbles;
    }
    return lane;
}

// Adds bit i of `bits` as bit 4 of column i.
void add_fifth_bits(LaneWords& lane, uint32_t bits) {
    for (int j = 0; j < 8; ++j) {
        const uint32_t four = (bits >> (4 * j)) & 0xfu;
        lane.words[j] |= ((four * 0x00204081u) & 0x01010101u) << 4;
    }
}

// Scale and min (6 bits each) of sub-block `j` of a Q4_K / Q5_K super-block.
void k_scale_min(const uint8_t* scales, int j, uint8_t& scale, uint8_t& min) {
    if (j < 4) {
        scale = scales[j] & 63;
        min = scales[j + 4] & 63;
    } else {
        scale = static_cast<uint8_t>((scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4));
        min = static_cast<uint8_t>((scales[j + 4] >> 4) | ((scales[j] >> 6) << 4));
    }
}

template <WeightFormat format>
struct Source;

template <>
struct Source<WeightFormat::kQ4_0> {
    static constexpr int bytes = 18;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ4_0>;
        store_lane<4>(super, lane, split_nibbles(s + 2));
        store_u16(super + L::scale_offset + 2 * lane, load_u16(s));
        return f16_is_finite(load_u16(s));
    }
};

template <>
struct Source<WeightFormat::kQ4_1> {
    static constexpr int bytes = 20;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ4_1>;
        store_lane<4>(super, lane, split_nibbles(s + 4));
        store_u16(super + L::scale_offset + 2 * lane, load_u16(s));
        store_u16(super + L::scale_offset + 32 + 2 * lane, load_u16(s + 2));
        return f16_is_finite(load_u16(s)) && f16_is_finite(load_u16(s + 2));
    }
};

template <>
struct Source<WeightFormat::kQ5_0> {
    static constexpr int bytes = 22;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ5_0>;
        LaneWords words = split_nibbles(s + 6);
        add_fifth_bits(words, load_u32(s + 2));
        store_lane<5>(super, lane, words);
        store_u16(super + L::scale_offset + 2 * lane, load_u16(s));
        return f16_is_finite(load_u16(s));
    }
};

template <>
struct Source<WeightFormat::kQ5_1> {
    static constexpr int bytes = 24;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ5_1>;
        LaneWords words = split_nibbles(s + 8);
        add_fifth_bits(words, load_u32(s + 4));
        store_lane<5>(super, lane, words);
        store_u16(super + L::scale_offset + 2 * lane, load_u16(s));
        store_u16(super + L::scale_offset + 32 + 2 * lane, load_u16(s + 2));
        return f16_is_finite(load_u16(s)) && f16_is_finite(load_u16(s + 2));
    }
};

template <>
struct Source<WeightFormat::kQ8_0> {
    static constexpr int bytes = 34;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ8_0>;
        LaneWords words;
        for (int j = 0; j < 8; ++j) words.words[j] = load_u32(s + 2 + 4 * j) ^ 0x80808080u;
        store_lane<8>(super, lane, words);
        store_u16(super + L::scale_offset + 2 * lane, load_u16(s));
        return f16_is_finite(load_u16(s));
    }
};

// Q4_K and Q5_K: d, dmin, 12 bytes of 6-bit scales and mins, (32 bytes of fifth bits,) 128 bytes of nibbles in four
// groups of 64 columns: columns 0-31 low halves, 32-63 high halves.
template <WeightFormat format>
bool pack_k_super(const uint8_t* s, uint8_t* super, int lane) {
    using L = PackedLayout<format>;
    const uint16_t d = load_u16(s);
    const uint16_t dmin = load_u16(s + 2);
    store_u16(super + 2 * lane, d);
    store_u16(super + 32 + 2 * lane, dmin ^ 0x8000u);
    const uint8_t* scales = s + 4;
    const uint8_t* high = s + 16;
    const uint8_t* nibbles = L::bits == 5 ? s + 48 : s + 16;
    for (int j = 0; j < 8; ++j) {
        uint8_t* block = super + L::header_bytes + j * L::block_bytes;
        LaneWords words;
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = load_u32(nibbles + 32 * (j / 2) + 4 * i);
            words.words[i] = (j % 2 ? word >> 4 : word) & kLowNibbles;
            if constexpr (L::bits == 5) words.words[i] |= ((load_u32(high + 4 * i) >> j) & 0x01010101u) << 4;
        }
        store_lane<L::bits>(block, lane, words);
        k_scale_min(scales, j, block[L::scale_offset + lane], block[L::scale_offset + 16 + lane]);
    }
    return f16_is_finite(d) && f16_is_finite(dmin);
}

template <>
struct Source<WeightFormat::kQ4_K> {
    static constexpr int bytes = 144;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        return pack_k_super<WeightFormat::kQ4_K>(s, super, lane);
    }
};

template <>
struct Source<WeightFormat::kQ5_K> {
    static constexpr int bytes = 176;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        return pack_k_super<WeightFormat::kQ5_K>(s, super, lane);
    }
};

// Q6_K: 128 bytes of low nibbles, 64 of two-bit planes, 16 signed scales, d. Each half of 128 columns holds four runs
// of 32: run r has its nibbles in bytes 32 (r % 2) of the half, low or high by r / 2, and its planes at bits 2r.
template <>
struct Source<WeightFormat::kQ6_K> {
    static constexpr int bytes = 210;
    static bool pack(const uint8_t* s, uint8_t* super, int lane) {
        using L = PackedLayout<WeightFormat::kQ6_K>;
        const uint16_t d = load_u16(s + 208);
        store_u16(super + 2 * lane, d);
        for (int j = 0; j < 8; ++j) {
            const int half = j / 4;
            const int run = j % 4;
            uint8_t* block = super + L::header_bytes + j * L::block_bytes;
            LaneWords words;
            for (int i = 0; i < 8; ++i) {
                const uint32_t low = load_u32(s + 64 * half + 32 * (run % 2) + 4 * i);
                const uint32_t high = load_u32(s + 128 + 32 * half + 4 * i);
                words.words[i] =
                    ((run / 2 ? low >> 4 : low) & kLowNibbles) | (((high >> (2 * run)) & 0x03030303u) << 4);
            }
            store_lane<6>(block, lane, words);
            block[L::scale_offset + lane] = s[192 + 2 * j];
            block[L::scale_offset + 16 + lane] = s[192 + 2 * j + 1];
        }
        return f16_is_finite(d);
    }
};

template <WeightFormat format>
bool pack_quantized(PackedMatrix& matrix, const uint8_t* source, int begin, int end) {
    using L = PackedLayout<format>;
    const int supers = matrix.cols / (kPanelRows * 2 * L::blocks_per_super);
    const size_t row_bytes = static_cast<size_t>(supers) * Source<format>::bytes;
    bool finite = true;
    for (int panel = begin; panel < end; ++panel) {
        uint8_t* out = matrix.data + static_cast<size_t>(panel) * matrix.panel_bytes;
        const int lanes = std::min(kPanelRows, matrix.rows - panel * kPanelRows);
        // Planes are or-ed in, and lanes past the last row must be zeros.
        if (L::bits == 5 || lanes < kPanelRows) std::memset(out, 0, matrix.panel_bytes);
        const uint8_t* first_row = source + static_cast<size_t>(panel) * kPanelRows * row_bytes;
        for (int super = 0; super < supers; ++super) {
            for (int lane = 0; lane < lanes; ++lane) {
                finite &= Source<format>::pack(first_row + lane * row_bytes + super * Source<format>::bytes,
                                               out + static_cast<size_t>(super) * L::super_bytes, lane);
            }
        }
    }
    return finite;
}

bool element_is_finite(WeightFormat format, const uint8_t* p) {
    if (format == WeightFormat::kF32) return std::isfinite(std::bit_cast<float>(load_u32(p)));
    if (format == WeightFormat::kF16) return f16_is_finite(load_u16(p));
    return std::isfinite(bf16_to_f32(load_u16(p)));
}

bool pack_float(PackedMatrix& matrix, const uint8_t* source, int begin, int end) {
    const size_t size = matrix.format == WeightFormat::kF32 ? 4 : 2;
    const size_t row_bytes = size * static_cast<size_t>(matrix.cols);
    bool finite = true;
    for (int panel = begin; panel < end; ++panel) {
        uint8_t* out = matrix.data + static_cast<size_t>(panel) * matrix.panel_bytes;
        const int lanes = std::min(kPanelRows, matrix.rows - panel * kPanelRows);
        if (lanes < kPanelRows) std::memset(out, 0, matrix.panel_bytes);
        for (int lane = 0; lane < lanes; ++lane) {
            const uint8_t* row = source + (static_cast<size_t>(panel) * kPanelRows + lane) * row_bytes;
            for (int k = 0; k < matrix.cols; ++k) {
                std::memcpy(out + (static_cast<size_t>(k) * kPanelRows + lane) * size, row + k * size, size);
                finite &= element_is_finite(matrix.format, row + k * size);
            }
        }
    }
    return finite;
}

// Calls fn.template operator()<format>() for a quantized format.
template <class Fn>
auto with_quantized_format(WeightFormat format, Fn fn) {
    switch (format) {
        case WeightFormat::kQ4_0:
            return fn.template operator()<WeightFormat::kQ4_0>();
        case WeightFormat::kQ4_1:
            return fn.template operator()<WeightFormat::kQ4_1>();
        case WeightFormat::kQ5_0:
            return fn.template operator()<WeightFormat::kQ5_0>();
        case WeightFormat::kQ5_1:
            return fn.template operator()<WeightFormat::kQ5_1>();
        case WeightFormat::kQ8_0:
            return fn.template operator()<WeightFormat::kQ8_0>();
        case WeightFormat::kQ4_K:
            return fn.template operator()<WeightFormat::kQ4_K>();
        case WeightFormat::kQ5_K:
            return fn.template operator()<WeightFormat::kQ5_K>();
        default:
            return fn.template operator()<WeightFormat::kQ6_K>();
    }
}

template <class L>
int stored_weight(const uint8_t* block, int lane, int k) {
    const int reg = k / 4;
    const int byte = 4 * lane + k % 4;
    if constexpr (L::bits == 8) return block[64 * reg + byte];
    int value = block[64 * (reg / 2) + byte] >> (4 * (reg % 2)) & 15;
    if constexpr (L::bits == 5) value |= (block[256 + 8 * reg + byte / 8] >> (byte % 8) & 1) << 4;
    if constexpr (L::bits == 6) value |= (block[256 + 64 * (reg / 4) + byte] >> (2 * (reg % 4)) & 3) << 4;
    return value;
}

template <WeightFormat format>
void dequantize_quantized_row(const PackedMatrix& matrix, int row, float* out) {
    using L = PackedLayout<format>;
    const int lane = row % kPanelRows;
    const uint8_t* super = matrix.panel(row / kPanelRows);
    for (int k0 = 0; k0 < matrix.cols; super += L::super_bytes) {
        for (int j = 0; j < L::blocks_per_super; ++j, k0 += 32) {
            const uint8_t* block = super + L::header_bytes + j * L::block_bytes;
            const uint8_t* scales = block + L::scale_offset;
            float scale[2];
            float min = 0.0f;
            if constexpr (L::blocks_per_super == 1) {
                scale[0] = scale[1] = f16_to_f32(load_u16(scales + 2 * lane));
                if constexpr (L::has_min) min = f16_to_f32(load_u16(scales + 32 + 2 * lane));
            } else {
                const float d = f16_to_f32(load_u16(super + 2 * lane));
                if constexpr (L::has_two_scales) {
                    scale[0] = d * static_cast<float>(static_cast<int8_t>(scales[lane]));
                    scale[1] = d * static_cast<float>(static_cast<int8_t>(scales[16 + lane]));
                } else {
                    scale[0] = scale[1] = d * static_cast<float>(scales[lane]);
                    min = f16_to_f32(load_u16(super + 32 + 2 * lane)) * static_cast<float>(scales[16 + lane]);
                }
            }
            for (int k = 0; k < 32; ++k) {
                out[k0 + k] =
                    scale[k / 16] * static_cast<float>(stored_weight<L>(block, lane, k) - L::zero_point) + min;
            }
        }
    }
}

}  // namespace

bool is_supported(int format_number) {
    switch (static_cast<WeightFormat>(format_number)) {
        case WeightFormat::kF32:
        case WeightFormat::kF16:
        case WeightFormat::kBF16:
        case WeightFormat::kQ4_0:
        case WeightFormat::kQ4_1:
        case WeightFormat::kQ5_0:
        case WeightFormat::kQ5_1:
        case WeightFormat::kQ8_0:
        case WeightFormat::kQ4_K:
        case WeightFormat::kQ5_K:
        case WeightFormat::kQ6_K:
            return true;
    }
    return false;
}

bool is_quantized(WeightFormat format) {
    return format != WeightFormat::kF32 && format != WeightFormat::kF16 && format != WeightFormat::kBF16;
}

int source_block_size(WeightFormat format) {
    if (!is_quantized(format)) return 1;
    return with_quantized_format(format, []<WeightFormat f>() { return 32 * PackedLayout<f>::blocks_per_super; });
}

size_t source_row_bytes(WeightFormat format, int64_t cols) {
    if (!is_quantized(format)) return static_cast<size_t>(cols) * (format == WeightFormat::kF32 ? 4 : 2);
    const int unit = with_quantized_format(format, []<WeightFormat f>() { return Source<f>::bytes; });
    return static_cast<size_t>(cols / source_block_size(format)) * static_cast<size_t>(unit);
}

void AlignedDelete::operator()(uint8_t* p) const { std::free(p); }

AlignedBytes allocate_aligned(size_t bytes) {
    const size_t huge_page = size_t{2} << 20;
    const size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
    const size_t rounded = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    void* p = std::aligned_alloc(alignment, rounded);
    if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == huge_page) madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return AlignedBytes(static_cast<uint8_t*>(p));
}

uint8_t* Arena::allocate(size_t bytes) {
    constexpr size_t kChunk = size_t{256} << 20;  // of addresses: what is not written to takes no memory
    const size_t rounded = (bytes + 63) / 64 * 64;
    if (used_ + rounded > capacity_) {
        const size_t size = std::max(kChunk, rounded);
        chunks_.push_back(allocate_aligned(size));
        capacity_ = size;
        used_ = 0;
    }
    uint8_t* p = chunks_.back().get() + used_;
    used_ += rounded;
    return p;
}

size_t packed_panel_bytes(WeightFormat format, int cols) {
    if (!is_quantized(format)) return source_row_bytes(format, cols) * kPanelRows;
    return with_quantized_format(format, [cols]<WeightFormat f>() {
        using L = PackedLayout<f>;
        return static_cast<size_t>(cols / (32 * L::blocks_per_super)) * L::super_bytes;
    });
}

bool pack_panels(PackedMatrix& matrix, const uint8_t* source, int begin, int end) {
    if (!is_quantized(matrix.format)) return pack_float(matrix, source, begin, end);
    return with_quantized_format(matrix.format,
                                 [&]<WeightFormat f>() { return pack_quantized<f>(matrix, source, begin, end); });
}

void dequantize_row(const PackedMatrix& matrix, int row, float* out) {
    if (is_quantized(matrix.format)) {
        with_quantized_format(matrix.format, [&]<WeightFormat f>() { dequantize_quantized_row<f>(matrix, row, out); });
        return;
    }
    const uint8_t* panel = matrix.panel(row / kPanelRows);
    const int lane = row % kPanelRows;
    for (int k = 0; k < matrix.cols; ++k) {
        const size_t index = static_cast<size_t>(k) * kPanelRows + lane;
        if (matrix.format == WeightFormat::kF32) {
            out[k] = std::bit_cast<float>(load_u32(panel + 4 * index));
        } else if (matrix.format == WeightFormat::kF16) {
            out[k] = f16_to_f32(load_u16(panel + 2 * index));
        } else {
            out[k] = bf16_to_f32(load_u16(panel + 2 * index));
        }
    }
}

}  // namespace pellucid
