// Every kernel but the matmul, as one table of function pointers an instruction set.
//
// All of them are deterministic: a result depends on the arguments alone, with a fixed order of operations that does
// not know about threads, batches or chunks. Multiply-adds are explicit; nothing is contracted or reassociated.
#pragma once

#include <cstdint>

namespace pellucid {

enum class KvType : int { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8 = 3 };

const char* kv_type_name(KvType type);
KvType kv_type_named(const char* name);  // throws std::invalid_argument

constexpr int kKvBlockSize = 64;     // tokens a KV block holds
constexpr int kQuantBlockSize = 32;  // activations that share one scale
constexpr int kLowSteps = 256;       // steps of a second byte in one of the first
constexpr int kMaxHeadDim = 512;     // head_dim is a multiple of 2 up to this
constexpr int kMaxQueryTile = 12;    // query rows that an attention kernel takes at a time, at most

// Bytes of one KV head's key block, and of its value block. Q8 has an f16 scale for each 32 values of a token.
constexpr int64_t kv_block_bytes(KvType type, int head_dim) {
    if (type == KvType::kQ8) return int64_t{kKvBlockSize} * (head_dim + head_dim / kQuantBlockSize * 2);
    return int64_t{kKvBlockSize} * head_dim * (type == KvType::kF32 ? 4 : 2);
}

// What head_dim is a multiple of.
constexpr int kv_head_dim_step(KvType type) { return type == KvType::kQ8 ? kQuantBlockSize : 2; }

// What goes with 32 activations rounded to int8. A value is scale * (q + low / kLowSteps), low being its second byte
// where the block is refined (activation_buffer.h).
struct QuantBlock {
    float scale;
    int32_t sum;       // of q
    float scaled_sum;  // scale * (sum + low_sum / kLowSteps)
    int32_t low_sum;   // of low
};

struct VectorKernels {
    const char* name;

    // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]; out may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);

    // Half-split rotary embedding in place: (x[i], x[i + h]) turned by (cos[i], sin[i]) for i < h = rotary_dim / 2.
    void (*rope)(float* x, const float* cos, const float* sin, int rotary_dim);

    void (*add)(float* x, const float* y, int n);                                  // x += y
    void (*scale)(float* x, float factor, int n);                                  // x *= factor
    void (*silu_mul)(const float* gate, const float* up, int n, float* out);       // out may be gate
    void (*gelu_tanh_mul)(const float* gate, const float* up, int n, float* out);  // out may be gate

    // Symmetric int8 in blocks of 32 (n is a multiple of 32): d = max|x| / 127, q = round-to-nearest-even(x * (127 /
    // max|x|)), so |q| <= 127. blocks[b] gets scale d, its sum and scaled_sum = d * sum, and keeps its low_sum. A block
    // with max|x| < 2^-118 counts as zeros: scale 0, q 0. One with an inf or NaN has scale NaN and q 0. Successive
    // blocks go `stride` blocks apart: q + 32 * stride * b, blocks[stride * b].
    void (*quantize)(const float* x, int n, int64_t stride, int8_t* q, QuantBlock* blocks);

    // The rest of one block of 32 that `quantize` rounded to q with a normal scale d: low = round-to-nearest-even((x -
    // d * q) * (256 / d)), within +-127. Returns the sum of low.
    int32_t (*quantize_rest)(const float* x, const int8_t* q, float scale, int8_t* low);

    // Writes one token's key and value (float32 [head_dim]) into slot `slot` of one KV head's block.
    // Key block:   16-bit types [64 / 16][head_dim / 2][16 tokens][2], f32 [64 / 16][head_dim][16 tokens].
    // Value block: [64 tokens][head_dim].
    // Q8 is GGUF's Q8_0: int8 with an f16 scale for each 32 dimensions of a token; the scales lie in front.
    // Key block:   f16 [64 / 16][head_dim / 32][16 tokens], int8 [64 / 16][head_dim][16 tokens].
    // Value block: f16 [64 tokens][head_dim / 32], int8 [64 tokens][head_dim].
    // Values of 32 that are not finite, or too large for an f16 scale, get a scale of NaN.
    void (*kv_store)(KvType type, void* key_block, void* value_block, int head_dim, int slot, const float* key,
                     const float* value);

    // Attention of `num_queries` query rows (float32 [num_queries][head_dim], already scaled, row stride
    // `query_stride` floats) over ONE KV block. Query i sees the tokens of the block with begin[i] <= slot < end[i]
    // (0 <= begin < end <= 64, or begin >= end for none). For each query it writes the partial result of the block:
    //   max[i]    = the largest score (-inf where the query sees nothing)
    //   sum[i]    = sum of exp(score - max)
    //   out[i][:] = sum of exp(score - max) * value     (row stride head_dim floats)
    // Row i's bits depend on its own query, range and the block only, never on num_queries or on its neighbours.
    // Slots outside a query's range may hold anything that is finite or lie beyond every `end` (then: anything).
    // `scratch` has attention_scratch_floats(num_queries, head_dim) floats, 64-byte aligned. A single query that sees
    // something leaves its 64 weights exp(score - max) at the beginning, 0 where it does not see the token.
    void (*attention_block)(KvType type, const void* key_block, const void* value_block, int head_dim,
                            const float* query, int64_t query_stride, int num_queries, const int32_t* begin,
                            const int32_t* end, float* max, float* sum, float* out, float* scratch);

    // Folds one block's partial result into the running one, left to right; starts from running_max = -inf,
    // running_sum = 0, running_out = 0. A partial with max = -inf changes nothing.
    void (*attention_fold)(int head_dim, int num_queries, float* running_max, float* running_sum, float* running_out,
                           const float* max, const float* sum, const float* out);

    // out[i] = running_out[i] / running_sum
    void (*attention_finish)(int head_dim, const float* running_out, float running_sum, float* out);

    // Whether all n values are finite.
    bool (*all_finite)(const float* x, int64_t n);
};

int64_t attention_scratch_floats(int num_queries, int head_dim);

extern const VectorKernels kVectorKernelsPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const VectorKernels kVectorKernelsAvx2;    // AVX2, FMA, F16C
extern const VectorKernels kVectorKernelsAvx512;  // AVX-512 F, BW, DQ, VL, VNNI
#endif

}  // namespace pellucid
