// How one KV head's keys and values lie in a block and become floats, for the instruction set of the including file.
//
// The layouts are those of kv_store in vector_kernels.h. A value of Q8 is float(int8) * float(f16 scale): 18
// significant bits, so that the product is exact and cannot tell where it was formed.
#pragma once

#include "../quant/quantize.inl.h"
#include "simd.h"
#include "vector_kernels.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

constexpr int kTokenGroups = kKvBlockSize / kLanes;

constexpr int padded(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// How a block's elements become floats, before the scale if the type has one. A key vector is 16 tokens at one
// dimension of a 16-token group; dimensions come in pairs (kOdd = 0, 1), which the 16-bit types interleave.
template <KvType>
struct KvReader;

template <>
struct KvReader<KvType::kF32> {
    using Element = float;
    static constexpr bool kScaled = false;
    template <int kOdd>
    PELLUCID_INLINE F32x16 key(const float* pair) {
        return load(pair + kOdd * kLanes);
    }
    PELLUCID_INLINE F32x16 value(const float* p) { return load(p); }
    PELLUCID_INLINE F32x16 value_partial(const float* p, int n) { return load_partial(p, n); }
};

template <>
struct KvReader<KvType::kF16> {
    using Element = uint16_t;
    static constexpr bool kScaled = false;
    template <int kOdd>
    PELLUCID_INLINE F32x16 key(const uint16_t* pair) {
        return kOdd ? load_odd_f16(pair) : load_even_f16(pair);
    }
    PELLUCID_INLINE F32x16 value(const uint16_t* p) { return load_f16(p); }
    PELLUCID_INLINE F32x16 value_partial(const uint16_t* p, int n) { return load_f16_partial(p, n); }
};

template <>
struct KvReader<KvType::kBF16> {
    using Element = uint16_t;
    static constexpr bool kScaled = false;
    template <int kOdd>
    PELLUCID_INLINE F32x16 key(const uint16_t* pair) {
        return kOdd ? load_odd_bf16(pair) : load_even_bf16(pair);
    }
    PELLUCID_INLINE F32x16 value(const uint16_t* p) { return load_bf16(p); }
    PELLUCID_INLINE F32x16 value_partial(const uint16_t* p, int n) { return load_bf16_partial(p, n); }
};

template <>
struct KvReader<KvType::kQ8> {
    using Element = int8_t;
    static constexpr bool kScaled = true;
    template <int kOdd>
    PELLUCID_INLINE F32x16 key(const int8_t* pair) {
        return to_f32(load_i8(pair + kOdd * kLanes));
    }
    PELLUCID_INLINE F32x16 value(const int8_t* p) { return to_f32(load_i8(p)); }
};

// The tokens that some row sees, in slots and in groups of 16.
struct TokenRange {
    int begin, end;
    int first_group() const { return begin / kLanes; }
    int end_group() const { return (end + kLanes - 1) / kLanes; }
};

template <typename Element>
struct Block {
    const Element* key;    // [64 / 16][head_dim / 2] pairs of 16-token vectors
    const Element* value;  // [64][value_stride]
    int value_stride;
    int head_dim;
    const uint16_t* key_scale = nullptr;  // Q8: f16 [64 / 16][head_dim / 32][16]
    const float* value_scale = nullptr;   // Q8: [64][head_dim / 32]

    int scales() const { return head_dim / kQuantBlockSize; }  // of a token
};

// The scales of dimension `d` and those after it, for 16 tokens.
PELLUCID_INLINE F32x16 key_scales(const Block<int8_t>& block, int group, int d) {
    return load_f16(block.key_scale + (group * block.scales() + d / kQuantBlockSize) * kLanes);
}

// A block as kv_store left it; of Q8 the value scales of the tokens in `range`, as floats, go to `value_scales`.
template <KvType kType>
static Block<typename KvReader<kType>::Element> open_block(const void* key_block, const void* value_block, int head_dim,
                                                           [[maybe_unused]] TokenRange range,
                                                           [[maybe_unused]] float* value_scales) {
    using Element = typename KvReader<kType>::Element;
    if constexpr (!KvReader<kType>::kScaled) {
        return {static_cast<const Element*>(key_block), static_cast<const Element*>(value_block), head_dim, head_dim};
    } else {
        const int scales = head_dim / kQuantBlockSize;
        const auto* key_scale = static_cast<const uint16_t*>(key_block);
        const auto* value_scale = static_cast<const uint16_t*>(value_block);
        for (int i = range.begin * scales / kLanes * kLanes; i < range.end * scales; i += kLanes) {
            store(value_scales + i, load_f16(value_scale + i));
        }
        return {reinterpret_cast<const Element*>(key_scale + kKvBlockSize * scales),
                reinterpret_cast<const Element*>(value_scale + kKvBlockSize * scales),
                head_dim,
                head_dim,
                key_scale,
                value_scales};
    }
}

// The visible groups of a block as float32, values padded to whole vectors.
template <KvType kType>
static Block<float> expand(const Block<typename KvReader<kType>::Element>& block, TokenRange range, float* scratch) {
    using Reader = KvReader<kType>;
    const int head_dim = block.head_dim, stride = padded(head_dim);
    float* key = scratch;
    float* value = scratch + kKvBlockSize * head_dim;
    for (int group = range.first_group(); group < range.end_group(); ++group) {
        for (int d = 0; d < head_dim; d += 2) {
            const int i = (group * head_dim + d) * kLanes;
            F32x16 even = Reader::template key<0>(block.key + i), odd = Reader::template key<1>(block.key + i);
            if constexpr (Reader::kScaled) {
                const F32x16 scale = key_scales(block, group, d);
                even = mul(even, scale);
                odd = mul(odd, scale);
            }
            store(key + i, even);
            store(key + i + kLanes, odd);
        }
    }
    for (int t = range.begin; t < range.end; ++t) {
        const auto* from = block.value + static_cast<int64_t>(t) * block.value_stride;
        float* to = value + t * stride;
        int d = 0;
        for (; d + kLanes <= head_dim; d += kLanes) {
            F32x16 v = Reader::value(from + d);
            if constexpr (Reader::kScaled) {
                v = mul(v, broadcast(block.value_scale[t * block.scales() + d / kQuantBlockSize]));
            }
            store(to + d, v);
        }
        if constexpr (!Reader::kScaled) {
            if (d < head_dim) store(to + d, Reader::value_partial(from + d, head_dim - d));
        }
    }
    return {key, value, stride, head_dim};
}

// To [group][dim / kPair][token][kPair]: the dimensions of the 16-bit types go in pairs, others one by one.
template <int kPair, typename Element>
static void scatter_key(Element* key_block, const Element* key, int head_dim, int slot) {
    const int group = slot / kLanes, token = slot % kLanes;
    Element* to = key_block + static_cast<int64_t>(group) * head_dim * kLanes + token * kPair;
    for (int d = 0; d < head_dim; d += kPair, to += kPair * kLanes) memcpy(to, key + d, kPair * sizeof(Element));
}

template <void (*kStore)(uint16_t*, F32x16), void (*kStorePartial)(uint16_t*, F32x16, int)>
static void narrow(const float* x, int n, uint16_t* out) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) kStore(out + i, load(x + i));
    if (i < n) kStorePartial(out + i, load_partial(x + i, n - i), n - i);
}

static void kv_store_q8(void* key_block, void* value_block, int head_dim, int slot, const float* key,
                        const float* value) {
    const auto to_f16 = narrow<store_f16, store_f16_partial>;
    const int scales = head_dim / kQuantBlockSize;
    auto* key_scale = static_cast<uint16_t*>(key_block);
    auto* value_scale = static_cast<uint16_t*>(value_block);
    int8_t* value_q = reinterpret_cast<int8_t*>(value_scale + kKvBlockSize * scales);
    int8_t* key_q = reinterpret_cast<int8_t*>(key_scale + kKvBlockSize * scales);
    int8_t q[kMaxHeadDim];
    float scale[kMaxHeadDim / kQuantBlockSize];
    uint16_t scale_f16[kMaxHeadDim / kQuantBlockSize];

    quantize_q8_0(value, head_dim, value_q + static_cast<int64_t>(slot) * head_dim, scale);
    to_f16(scale, scales, value_scale + slot * scales);
    quantize_q8_0(key, head_dim, q, scale);
    scatter_key<1>(key_q, q, head_dim, slot);
    to_f16(scale, scales, scale_f16);
    scatter_key<1>(key_scale, scale_f16, scales, slot);
}

static void kv_store(KvType type, void* key_block, void* value_block, int head_dim, int slot, const float* key,
                     const float* value) {
    if (type == KvType::kQ8) return kv_store_q8(key_block, value_block, head_dim, slot, key, value);
    const int64_t row = static_cast<int64_t>(slot) * head_dim;
    if (type == KvType::kF32) {
        scatter_key<1>(static_cast<float*>(key_block), key, head_dim, slot);
        memcpy(static_cast<float*>(value_block) + row, value, sizeof(float) * static_cast<unsigned>(head_dim));
        return;
    }
    const auto to_16_bits =
        type == KvType::kF16 ? narrow<store_f16, store_f16_partial> : narrow<store_bf16, store_bf16_partial>;
    to_16_bits(value, head_dim, static_cast<uint16_t*>(value_block) + row);
    uint16_t key_16_bits[kMaxHeadDim];
    to_16_bits(key, head_dim, key_16_bits);
    scatter_key<2>(static_cast<uint16_t*>(key_block), key_16_bits, head_dim, slot);
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
