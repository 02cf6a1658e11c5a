// Input rows of a matrix product, with the memory that holds them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul.h"
#include "vector_kernels.h"

namespace pellucid {

// How a buffer's rows are rounded to int8.
enum class Rounding {
    kPlain,    // every block to 8 bits
    kRefined,  // blocks whose rounding error stands out to 16; rows are stored whole
};

// Rounding to 8 bits errs in proportion to a block's scale, and a few blocks with large values make nearly all of a
// row's error. A refined row gives a second byte, 1/256 of the first one's step, to each block whose squared scale is
// more than kRefineAbove times the row's mean. The choice is the row's own, so its bits do not depend on other rows.
class ActivationBuffer {
  public:
    // Room for `rows` of `cols`, as int8, as float32 or both. Drops the contents.
    void resize(int rows, int cols, bool quantized, bool f32, Rounding rounding = Rounding::kPlain);
    // Stores columns [begin, begin + n) of a row of `cols`; all are multiples of 32 where the int8 form is kept.
    void store(const VectorKernels& kernels, int cols, int row, int begin, const float* x, int n);
    Activations view(int cols) const;

  private:
    void refine(const VectorKernels& kernels, int cols, int row, const float* x);

    bool quantized_ = false;
    bool f32_ = false;
    bool refines_ = false;
    size_t quant_capacity_ = 0;
    size_t low_capacity_ = 0;
    size_t f32_capacity_ = 0;
    AlignedBytes q_, blocks_, low_, refined_, values_;
};

}  // namespace pellucid
