// The paged KV cache: blocks of 64 tokens, each holding the keys and values of one KV group's layers.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"
#include "vector_kernels.h"

namespace pellucid {

class KvCache {
  public:
    KvCache(const Model& model, KvType type);

    KvType type() const { return type_; }
    size_t block_bytes() const { return block_bytes_; }
    int num_blocks() const { return num_blocks_; }

    void allocate(int num_blocks);  // drops what was there; throws std::bad_alloc
    void copy(int source, int destination);
    void read(int block, uint8_t* data) const;  // block_bytes() of them
    void write(int block, const uint8_t* data);

    uint8_t* keys(int block, int layer, int kv_head) const {
        return block_at(block) + layer_offsets_[layer] + kv_head * head_bytes_[layer];
    }
    uint8_t* values(int block, int layer, int kv_head) const {
        return keys(block, layer, kv_head) + head_bytes_[layer] / 2;
    }

    // Asks for one KV head's part of a block ahead of its use.
    void prefetch(int block, int layer, int kv_head) const {
        const uint8_t* begin = keys(block, layer, kv_head);
        for (size_t line = 0; line < head_bytes_[layer]; line += 64) __builtin_prefetch(begin + line, 0, 2);
    }

  private:
    uint8_t* block_at(int block) const { return data_.get() + block * block_bytes_; }

    KvType type_;
    size_t block_bytes_ = 0;
    std::vector<size_t> layer_offsets_;  // within a block of the layer's group
    std::vector<size_t> head_bytes_;     // one KV head's keys and values in a block
    AlignedBytes data_;
    int num_blocks_ = 0;
};

}  // namespace pellucid
