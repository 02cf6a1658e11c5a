// Matrix products against packed weights: out[row][n] = sum over k of input[row][k] * weight[n][k].
//
// Every output element is one ordered chain over blocks of 32 columns in one lane:
//   acc = fma(scale_w * scale_a, float(integer dot product), acc), then acc = fma(min_w, scaled_sum_a, acc)
// where the integer dot product has 8 more bits, below the point, in a refined block. Those of a row that is not
// refined are zeros, which change nothing: rows of both kinds share a tile.
//
// This holds// whatever the number of rows, the tile they fall in or the instruction set that did the integer part. The
// integer dot products are exact, so every kernel agrees to the bit.
#pragma once

#include <cstdint>

#include "packed_matrix.h"
#include "vector_kernels.h"

namespace pellucid {

// Input rows. Quantized weights read the int8 form, float weights read `f32`.
//
// The int8 form lies in groups of 16 rows, block by block: row r's block b of 32 columns is at
//   q[group_block * 512 + (r % 16) * 32], blocks[group_block * 16 + r % 16]
// with group_block = (r / 16) * num_blocks() + b. A tile of rows thus reads one stream, as it reads the weights; and
// four rows fill whole cache lines, so that threads which store rows by fours write no line of one another's.
constexpr int kRowGroup = 16;
constexpr int kRowsPerCacheLine = 4;

struct Activations {
    int cols = 0;
    const float* f32 = nullptr;  // [rows][f32_stride]
    int64_t f32_stride = 0;
    const int8_t* q = nullptr;
    const QuantBlock* blocks = nullptr;

    // Second bytes of the blocks that have them, laid out as q: a value is scale * (q + low / 256). `refined` says
    // which blocks do; the others' are zeros. Null where no row of the buffer is refined.
    const int8_t* low = nullptr;
    const uint8_t* refined = nullptr;

    int num_blocks() const { return cols / 32; }
    // Index of row `row`'s first block, times 32 in q; blocks are kRowGroup apart.
    int64_t block_index(int row) const {
        return static_cast<int64_t>(row / kRowGroup) * num_blocks() * kRowGroup + row % kRowGroup;
    }
};

struct MatmulKernels {
    const char* name;
    // Columns of panels [panel_begin, panel_end) for input rows [row_begin, row_end); `out` points at row 0 of the
    // first of these columns and has `out_stride` floats a row.
    void (*matmul)(const PackedMatrix& weights, int panel_begin, int panel_end, const Activations& input, int row_begin,
                   int row_end, float* out, int64_t out_stride);
};

extern const MatmulKernels kMatmulKernelsPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const MatmulKernels kMatmulKernelsAvx2;
extern const MatmulKernels kMatmulKernelsAvx512;  // AVX-512 VNNI
extern const MatmulKernels kMatmulKernelsAmx;     // AMX int8 tiles from 16 rows on, AVX-512 VNNI below
#endif

}  // namespace pellucid
