#include "activation_buffer.h"

#include <cstring>

namespace pellucid {

namespace {

constexpr float kRefineAbove = 2.0f;

template <class T>
T* as(const AlignedBytes& bytes) {
    return reinterpret_cast<T*>(bytes.get());
}

}  // namespace

void ActivationBuffer::resize(int rows, int cols, bool quantized, bool f32, Rounding rounding) {
    quantized_ = quantized;
    f32_ = f32;
    refines_ = quantized && rounding == Rounding::kRefined;
    const size_t padded_rows = (static_cast<size_t>(rows) + kRowGroup - 1) / kRowGroup * kRowGroup;
    const size_t size = padded_rows * cols;
    const size_t blocks = size / kQuantBlockSize;
    if (quantized && size > quant_capacity_) {
        q_ = allocate_aligned(size);
        blocks_ = allocate_aligned(blocks * sizeof(QuantBlock));
        std::memset(blocks_.get(), 0, blocks * sizeof(QuantBlock));
        quant_capacity_ = size;
    }
    if (refines_ && size > low_capacity_) {
        low_ = allocate_aligned(size);
        refined_ = allocate_aligned(blocks);
        std::memset(low_.get(), 0, size);
        std::memset(refined_.get(), 0, blocks);
        low_capacity_ = size;
    }
    const size_t values = static_cast<size_t>(rows) * cols;
    if (f32 && values > f32_capacity_) {
        values_ = allocate_aligned(values * sizeof(float));
        f32_capacity_ = values;
    }
}

Activations ActivationBuffer::view(int cols) const {
    Activations view;
    view.cols = cols;
    view.f32 = as<const float>(values_);
    view.f32_stride = cols;
    view.q = as<const int8_t>(q_);
    view.blocks = as<const QuantBlock>(blocks_);
    if (refines_) {
        view.low = as<const int8_t>(low_);
        view.refined = as<const uint8_t>(refined_);
    }
    return view;
}

void ActivationBuffer::store(const VectorKernels& kernels, int cols, int row, int begin, const float* x, int n) {
    if (f32_) std::memcpy(as<float>(values_) + static_cast<int64_t>(row) * cols + begin, x, n * sizeof(float));
    if (!quantized_) return;
    const int64_t first = view(cols).block_index(row) + int64_t{begin / kQuantBlockSize} * kRowGroup;
    kernels.quantize(x, n, kRowGroup, as<int8_t>(q_) + first * kQuantBlockSize, as<QuantBlock>(blocks_) + first);
    if (refines_) refine(kernels, cols, row, x);
}

void ActivationBuffer::refine(const VectorKernels& kernels, int cols, int row, const float* x) {
    const int64_t first = view(cols).block_index(row);
    const int blocks = cols / kQuantBlockSize;
    float squares = 0.0f;
    for (int block = 0; block < blocks; ++block) {
        const float scale = as<QuantBlock>(blocks_)[first + int64_t{block} * kRowGroup].scale;
        squares += scale * scale;
    }
    const float threshold = kRefineAbove * squares / static_cast<float>(blocks);
    for (int block = 0; block < blocks; ++block) {
        const int64_t index = first + int64_t{block} * kRowGroup;
        QuantBlock& quant = as<QuantBlock>(blocks_)[index];
        int8_t* low = as<int8_t>(low_) + index * kQuantBlockSize;
        uint8_t& refined = as<uint8_t>(refined_)[index];
        // False as well where a scale is NaN, or its square beyond the range of floats.
        if (quant.scale * quant.scale > threshold) {
            quant.low_sum = kernels.quantize_rest(x + block * kQuantBlockSize, as<int8_t>(q_) + index * kQuantBlockSize,
                                                  quant.scale, low);
            const int32_t sum = quant.sum * kLowSteps + quant.low_sum;
            quant.scaled_sum = quant.scale * (static_cast<float>(sum) / kLowSteps);
            if (!refined) refined = 1;  // its cache line is shared by all rows of four blocks, and seldom changes
        } else if (refined) {           // the row that was here before; zeros are what a tile's refined neighbours need
            std::memset(low, 0, kQuantBlockSize);
            quant.low_sum = 0;
            refined = 0;
        }
    }
}

}  // namespace pellucid
