#include "kv_cache.h"

#include <cstring>

namespace pellucid {

KvCache::KvCache(const Model& model, KvType type) : type_(type) {
    for (const Layer& layer : model.layers) {
        layer_offsets_.push_back(block_bytes_);
        head_bytes_.push_back(size_t{2} * kKvBlockSize * layer.head_dim * kv_element_size(type));
        block_bytes_ += head_bytes_.back() * layer.num_kv_heads;
    }
}

void KvCache::allocate(int num_blocks) {
    data_.reset();
    num_blocks_ = 0;
    data_ = allocate_aligned(block_bytes_ * num_blocks);
    num_blocks_ = num_blocks;
}

void KvCache::copy(int source, int destination) {
    std::memcpy(keys(destination, 0, 0), keys(source, 0, 0), block_bytes_);
}

void KvCache::read(int block, uint8_t* data) const { std::memcpy(data, keys(block, 0, 0), block_bytes_); }

void KvCache::write(int block, const uint8_t* data) { std::memcpy(keys(block, 0, 0), data, block_bytes_); }

}  // namespace pellucid
