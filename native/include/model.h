// A model as the executor runs it: the spec's numbers and the packed weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "packed_matrix.h"

namespace pellucid {

enum class ActivationKind { kSilu, kGeluTanh };

// cos and sin by position, half-split; grown as positions come up.
struct RopeTable {
    std::vector<float> inv_freq;
    float attention_factor = 1.0f;
    std::vector<float> cos;  // [positions][inv_freq.size()]
    std::vector<float> sin;

    int half() const { return static_cast<int>(inv_freq.size()); }
    int positions() const { return half() == 0 ? 0 : static_cast<int>(cos.size() / inv_freq.size()); }
    void extend(int positions);
};

// An empty weight means that there is no such norm.
struct Norm {
    std::vector<float> weight;
    float eps = 0.0f;

    explicit operator bool() const { return !weight.empty(); }
};

struct Layer {
    int num_heads = 0;
    int num_kv_heads = 0;
    int head_dim = 0;
    float scale = 1.0f;
    int sliding_window = 0;  // 0: none
    int rope = 0;            // index into Model::ropes
    int kv_group = 0;        // index into Model::kv_windows
    ActivationKind activation = ActivationKind::kSilu;

    Norm attention_norm, q_norm, k_norm, post_attention_norm, mlp_norm, post_mlp_norm;
    std::vector<float> q_bias, k_bias, v_bias;  // empty: none
    PackedMatrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;

    int group_size() const { return num_heads / num_kv_heads; }
    int query_size() const { return num_heads * head_dim; }
    int key_value_size() const { return num_kv_heads * head_dim; }
};

struct Model {
    Arena arena;  // holds the matrices
    int vocab_size = 0;
    int hidden_size = 0;
    float embedding_scale = 1.0f;
    std::vector<RopeTable> ropes;
    std::vector<Layer> layers;
    std::vector<int> kv_windows;  // of each KV group (models/kv_groups.py); 0: sees everything
    Norm final_norm;
    PackedMatrix embed_tokens;
    PackedMatrix lm_head;  // no data where it is embed_tokens

    const PackedMatrix& output_matrix() const { return lm_head.data ? lm_head : embed_tokens; }
};

}  // namespace pellucid
