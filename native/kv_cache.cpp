#include "kv_cache.h"

#include <algorithm>
#include <cstring>

namespace pellucid {

KvCache::KvCache(const Model& model, KvType type) : type_(type) {
    std::vector<size_t> group_bytes(model.kv_windows.size());
    for (const Layer& layer : model.layers) {
        layer_offsets_.push_back(group_bytes[layer.kv_group]);
        head_bytes_.push_back(size_t{2} * kv_block_bytes(type, layer.head_dim));
        group_bytes[layer.kv_group] += head_bytes_.back() * layer.num_kv_heads;
    }
    block_bytes_ = *std::max_element(group_bytes.begin(), group_bytes.end());
}

void KvCache::allocate(int num_blocks) {
    data_.reset();
    num_blocks_ = 0;
    data_ = allocate_aligned(block_bytes_ * num_blocks);
    num_blocks_ = num_blocks;
}

void KvCache::copy(int source, int destination) { std::memcpy(block_at(destination), block_at(source), block_bytes_); }

void KvCache::read(int block, uint8_t* data) const { std::memcpy(data, block_at(block), block_bytes_); }

void KvCache::write(int block, const uint8_t* data) { std::memcpy(block_at(block), data, block_bytes_); }

}  // namespace pellucid
