// A weight matrix in the layout the matmul kernels stream: panels of 16 output rows, one row a 32-bit lane.
//
// A panel is a run of blocks of 16 rows x 32 columns, in column order:
//   quantized formats   [super header] then, per block: low nibbles, bit plane, scales (see PackedLayout)
//   F16, BF16, F32      [column][16 rows], element by element
// Byte k of a quantized block's lane n belongs to row n: register j (0..7) holds columns 4j..4j+3 of all 16 rows,
// byte 4n + c = (row n, column 4j + c). Low nibbles of the i-th 64 bytes are register 2i, high nibbles 2i + 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pellucid {

constexpr int kPanelRows = 16;

// The number of a GGUF tensor type.
enum class WeightFormat : int {
    kF32 = 0,
    kF16 = 1,
    kQ4_0 = 2,
    kQ4_1 = 3,
    kQ5_0 = 6,
    kQ5_1 = 7,
    kQ8_0 = 8,
    kQ4_K = 12,
    kQ5_K = 13,
    kQ6_K = 14,
    kBF16 = 30,
};

// Geometry of the packed form of a quantized format. `bits` of a weight are stored as low nibbles plus planes:
//   5 bits: one 64-byte plane, bit 4 of register j's byte i is bit i of the j-th 64-bit word
//   6 bits: two 64-byte planes, bits 4-5 of register j's byte i are bits 2(j%4).. of byte i of plane j / 4
//   8 bits: no nibbles, register after register
template <WeightFormat format>
struct PackedLayout;

namespace detail {
constexpr int quant_bytes(int bits) { return bits == 4 ? 256 : bits == 5 ? 256 + 64 : bits == 6 ? 256 + 128 : 512; }

template <int bits_, int zero_point_, bool has_min_>
struct SimpleLayout {
    static constexpr int bits = bits_;
    static constexpr int zero_point = zero_point_;  // weight = scale * (stored - zero_point)
    static constexpr bool has_min = has_min_;       // ... + min
    static constexpr bool has_two_scales = false;   // one scale per 16 columns instead of per 32
    static constexpr int blocks_per_super = 1;
    static constexpr int header_bytes = 0;
    static constexpr int scale_offset = quant_bytes(bits);  // f16 scale[16], then f16 min[16]
    static constexpr int block_bytes = scale_offset + 32 + (has_min ? 32 : 0);
    static constexpr int super_bytes = block_bytes;
};

template <int bits_, int zero_point_, bool has_min_, bool has_two_scales_>
struct SuperLayout {
    static constexpr int bits = bits_;
    static constexpr int zero_point = zero_point_;
    static constexpr bool has_min = has_min_;
    static constexpr bool has_two_scales = has_two_scales_;
    static constexpr int blocks_per_super = 8;
    static constexpr int header_bytes = has_min ? 64 : 32;  // f16 d[16], then f16 -dmin[16]
    static constexpr int scale_offset = quant_bytes(bits);  // 16 bytes of scales, then 16 of mins or second scales
    static constexpr int block_bytes = scale_offset + 32;
    static constexpr int super_bytes = header_bytes + blocks_per_super * block_bytes;
};
}  // namespace detail

template <>
struct PackedLayout<WeightFormat::kQ4_0> : detail::SimpleLayout<4, 8, false> {};
template <>
struct PackedLayout<WeightFormat::kQ4_1> : detail::SimpleLayout<4, 0, true> {};
template <>
struct PackedLayout<WeightFormat::kQ5_0> : detail::SimpleLayout<5, 16, false> {};
template <>
struct PackedLayout<WeightFormat::kQ5_1> : detail::SimpleLayout<5, 0, true> {};
template <>
struct PackedLayout<WeightFormat::kQ8_0> : detail::SimpleLayout<8, 128, false> {};
template <>
struct PackedLayout<WeightFormat::kQ4_K> : detail::SuperLayout<4, 0, true, false> {};
template <>
struct PackedLayout<WeightFormat::kQ5_K> : detail::SuperLayout<5, 0, true, false> {};
template <>
struct PackedLayout<WeightFormat::kQ6_K> : detail::SuperLayout<6, 32, false, true> {};

bool is_quantized(WeightFormat format);
bool is_supported(int format_number);

// Columns that one unit of the source format holds; `cols` of a matrix is a multiple of it.
int source_block_size(WeightFormat format);
size_t source_row_bytes(WeightFormat format, int64_t cols);

struct AlignedDelete {
    void operator()(uint8_t* p) const;
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;
// 64-byte aligned; 2 MiB and in huge pages, where the system has them, from 4 MiB on. Throws std::bad_alloc.
AlignedBytes allocate_aligned(size_t bytes);

// Memory for the weights of a model: large chunks, handed out in order and freed together. Weights that are read one
// after another lie one after another, in huge pages where the system has them: reading is up to twice as fast so.
class Arena {
  public:
    uint8_t* allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc

  private:
    std::vector<AlignedBytes> chunks_;
    size_t used_ = 0;
    size_t capacity_ = 0;  // of the last chunk
};

// The bytes belong to an Arena.
struct PackedMatrix {
    WeightFormat format = WeightFormat::kF32;
    int rows = 0;  // output features
    int cols = 0;  // input features
    size_t panel_bytes = 0;
    uint8_t* data = nullptr;

    int panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    const uint8_t* panel(int index) const { return data + static_cast<size_t>(index) * panel_bytes; }
    size_t bytes() const { return static_cast<size_t>(panels()) * panel_bytes; }
};

// Packed size of one panel.
size_t packed_panel_bytes(WeightFormat format, int cols);

// Packs panels [begin, end) of `matrix` (format, rows, cols, data set) from encoded rows. Rows past the end are zeros.
// Returns false where a scale or a float weight is not finite.
bool pack_panels(PackedMatrix& matrix, const uint8_t* source, int begin, int end);

// out[0 .. cols) = row `row` of the matrix.
void dequantize_row(const PackedMatrix& matrix, int row, float* out);

}  // namespace pellucid
