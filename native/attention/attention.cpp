#include <cstring>
#include <stdexcept>
#include <string>

#include "vector_kernels.h"

namespace pellucid {
namespace {

constexpr KvType kKvTypes[] = {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8};

}  // namespace

const char* kv_type_name(KvType type) {
    switch (type) {
        case KvType::kF32:
            return "f32";
        case KvType::kF16:
            return "f16";
        case KvType::kBF16:
            return "bf16";
        default:
            return "q8";
    }
}

KvType kv_type_named(const char* name) {
    std::string names;
    for (const KvType type : kKvTypes) {
        if (std::strcmp(name, kv_type_name(type)) == 0) return type;
        names += (names.empty() ? "" : ", ") + std::string(kv_type_name(type));
    }
    throw std::invalid_argument("no KV cache type '" + std::string(name) + "'; there are " + names);
}

// The scores of one tile of query rows; the block's keys and values as float32, the latter padded to whole vectors of
// 16; the scales of the values as float32.
int64_t attention_scratch_floats(int /*num_queries*/, int head_dim) {
    const int64_t padded_head_dim = (head_dim + 15) / 16 * 16;
    return kKvBlockSize * (kMaxQueryTile + head_dim + padded_head_dim + head_dim / kQuantBlockSize);
}

}  // namespace pellucid
