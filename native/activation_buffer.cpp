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
        scale_ = allocate_aligned(blocks * sizeof(float));
        sum_ = allocate_aligned(blocks * sizeof(int32_t));
        scaled_sum_ = allocate_aligned(blocks * sizeof(float));
        quant_capacity_ = size;
    }
    if (refines_ && size > low_capacity_) {
        low_ = allocate_aligned(size);
        low_sum_ = allocate_aligned(blocks * sizeof(int32_t));
        refined_ = allocate_aligned(blocks);
        std::memset(low_.get(), 0, size);
        std::memset(low_sum_.get(), 0, blocks * sizeof(int32_t));
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
    view.scale = as<const float>(scale_);
    view.sum = as<const int32_t>(sum_);
    view.scaled_sum = as<const float>(scaled_sum_);
    if (refines_) {
        view.low = as<const int8_t>(low_);
        view.low_sum = as<const int32_t>(low_sum_);
        view.refined = as<const uint8_t>(refined_);
    }
    return view;
}

void ActivationBuffer::store(const VectorKernels& kernels, int cols, int row, int begin, const float* x, int n) {
    if (f32_) std::memcpy(as<float>(values_) + static_cast<int64_t>(row) * cols + begin, x, n * sizeof(float));
    if (!quantized_) return;
    const int64_t first = view(cols).block_index(row) + int64_t{begin / kQuantBlockSize} * kRowGroup;
    kernels.quantize(x, n, kRowGroup, as<int8_t>(q_) + first * kQuantBlockSize, as<float>(scale_) + first,
                     as<int32_t>(sum_) + first, as<float>(scaled_sum_) + first);
    if (refines_) refine(kernels, cols, row, x);
}

void ActivationBuffer::refine(const VectorKernels& kernels, int cols, int row, const float* x) {
    const int64_t first = view(cols).block_index(row);
    const int blocks = cols / kQuantBlockSize;
    const float* scale = as<float>(scale_) + first;
    float squares = 0.0f;
    for (int block = 0; block < blocks; ++block) squares += scale[block * kRowGroup] * scale[block * kRowGroup];
    const float threshold = kRefineAbove * squares / static_cast<float>(blocks);
    for (int block = 0; block < blocks; ++block) {
        const int64_t index = first + int64_t{block} * kRowGroup;
        const float block_scale = scale[block * kRowGroup];
        int8_t* low = as<int8_t>(low_) + index * kQuantBlockSize;
        int32_t& low_sum = as<int32_t>(low_sum_)[index];
        uint8_t& refined = as<uint8_t>(refined_)[index];
        // False as well where a scale is NaN, or its square beyond the range of floats.
        if (block_scale * block_scale > threshold) {
            low_sum = kernels.quantize_rest(x + block * kQuantBlockSize, as<int8_t>(q_) + index * kQuantBlockSize,
                                            block_scale, low);
            const int32_t sum = as<int32_t>(sum_)[index] * kLowSteps + low_sum;
            as<float>(scaled_sum_)[index] = block_scale * (static_cast<float>(sum) / kLowSteps);
            refined = 1;
        } else if (refined) {  // the row that was here before; zeros are what a tile's refined neighbours need
            std::memset(low, 0, kQuantBlockSize);
            low_sum = 0;
            refined = 0;
        }
    }
}

}  // namespace pellucid
