// Every vector kernel of the including file's instruction set, and the table of them.
#pragma once

#include "../attention/attention.inl.h"
#include "../norm_rope/norm_rope.inl.h"
#include "../quant/quantize.inl.h"
#include "vector_kernels.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

constexpr VectorKernels vector_kernels(const char* name) {
    return {
        .name = name,
        .rms_norm = rms_norm,
        .rope = rope,
        .add = add_in_place,
        .scale = scale_in_place,
        .silu_mul = activation_mul<silu>,
        .gelu_tanh_mul = activation_mul<gelu_tanh>,
        .quantize = quantize,
        .quantize_rest = quantize_rest,
        .kv_store = kv_store,
        .attention_block = attention_block,
        .attention_fold = attention_fold,
        .attention_finish = attention_finish,
        .all_finite = all_finite,
    };
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
