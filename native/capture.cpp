#include "capture.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "executor.h"

namespace pellucid {

namespace {

bool wanted_anywhere(const std::vector<float*>& by_layer) {
    return std::any_of(by_layer.begin(), by_layer.end(), [](const float* buffer) { return buffer != nullptr; });
}

}  // namespace

bool Executor::captures_activations() const {
    const auto& sequences = batch_.capture->sequences;
    return std::any_of(sequences.begin(), sequences.end(),
                       [](const SequenceCapture& wanted) { return wanted_anywhere(wanted.mlp); });
}

bool Executor::captures_residual(int point) const {
    const auto& sequences = batch_.capture->sequences;
    return std::any_of(sequences.begin(), sequences.end(), [point](const SequenceCapture& wanted) {
        const int32_t* end = wanted.residual_points + wanted.num_points;
        return std::find(wanted.residual_points, end, point) != end;
    });
}

// Whether something is wanted that is there once `operation` of layer `index` is done.
bool Executor::captures(int index, LayerOperation operation) const {
    const auto& sequences = batch_.capture->sequences;
    switch (operation) {
        case LayerOperation::kAttentionInput:
            return captures_residual(2 * index);
        case LayerOperation::kMlpInput:
            return captures_residual(2 * index + 1);
        case LayerOperation::kAttention:
            return std::any_of(sequences.begin(), sequences.end(),
                               [index](const SequenceCapture& wanted) { return wanted.attention[index] != nullptr; });
        case LayerOperation::kGateUp:
            return std::any_of(sequences.begin(), sequences.end(),
                               [index](const SequenceCapture& wanted) { return wanted.mlp[index] != nullptr; });
        default:
            return false;
    }
}

// Every thread comes by after each operation; the first one copies and keeps the time. Where it copies, the others wait
// for it: what it reads stays as it is, and the next operation is not under way before its time is taken.
void Executor::observe(int thread, int index, LayerOperation operation) {
    if (thread == 0) clock_.done(1 + index * kLayerOperations + static_cast<int>(operation));
    if (!captures(index, operation)) return;
    if (operation == LayerOperation::kAttention) capture_attention(thread, index);
    if (thread == 0) {
        if (operation == LayerOperation::kAttentionInput) capture_residual(2 * index);
        if (operation == LayerOperation::kMlpInput) capture_residual(2 * index + 1);
        if (operation == LayerOperation::kGateUp) capture_activations(index);
    }
    pool_.barrier(thread);
    if (thread == 0) clock_.resume();
}

void Executor::observe_last_residual(int thread) {
    const int last = 2 * static_cast<int>(model_.layers.size());
    if (!captures_residual(last) && !captures_residual(last + 1)) return;
    if (thread == 0) {
        capture_residual(last);
        capture_residual(last + 1);
    }
    pool_.barrier(thread);
    if (thread == 0) clock_.resume();
}

void Executor::observe_head(int thread, bool computed) {
    if (thread == 0) clock_.done(1 + static_cast<int>(model_.layers.size()) * kLayerOperations + computed);
}

void Executor::capture_residual(int point) {
    const int hidden_size = model_.hidden_size;
    const int last = 2 * static_cast<int>(model_.layers.size());
    const Norm& final_norm = model_.final_norm;
    for (const SequenceCapture& wanted : batch_.capture->sequences) {
        const int32_t* end = wanted.residual_points + wanted.num_points;
        const int32_t* found = std::find(wanted.residual_points, end, point);
        if (found == end) continue;
        float* x = wanted.residual + (found - wanted.residual_points) * int64_t{wanted.num_tokens} * hidden_size;
        for (int i = 0; i < wanted.num_tokens; ++i, x += hidden_size) {
            const int token = wanted.tokens[i];
            std::memcpy(x, hidden_row(0, token), hidden_size * sizeof(float));
            // The last sum and its norm are otherwise made only for the rows whose logits are wanted.
            if (point >= last) add_residual(0, last_layer().post_mlp_norm, projected_row(token), x);
            if (point > last) kernels_.rms_norm(x, final_norm.weight.data(), final_norm.eps, hidden_size, x);
        }
    }
}

void Executor::capture_activations(int index) {
    const int columns = model_.layers[index].gate_proj.rows;
    const float* activations = down_input_.view(columns).f32;
    for (const SequenceCapture& wanted : batch_.capture->sequences) {
        float* x = wanted.mlp[index];
        if (x == nullptr) continue;
        for (int i = 0; i < wanted.num_tokens; ++i, x += columns) {
            std::memcpy(x, activations + int64_t{wanted.tokens[i]} * columns, columns * sizeof(float));
        }
    }
}

void Executor::capture_attention(int thread, int index) {
    for (const SequenceCapture& wanted : batch_.capture->sequences) {
        float* weights = wanted.attention[index];
        if (weights == nullptr) continue;
        pool_.parallel_for(thread, wanted.num_heads * wanted.num_queries, 1, [&](int begin, int end) {
            for (int i = begin; i < end; ++i) {
                attention_weights(thread, index, wanted.queries[i % wanted.num_queries],
                                  wanted.heads[i / wanted.num_queries], wanted.num_keys,
                                  weights + int64_t{i} * wanted.num_keys);
            }
        });
    }
}

// out[num_keys] = the weights by which attention adds up the values for one query of one head: those of each block, as
// the kernel leaves them, folded and finished as if each token's value were a dimension of its own.
void Executor::attention_weights(int thread, int index, int token, int head, int num_keys, float* out) {
    const Layer& layer = model_.layers[index];
    Scratch& scratch = scratch_[thread];
    const int group = layer.group_size();
    const int kv_head = head / group;
    const int position = batch_.positions[token];
    const int first = layer.sliding_window == 0 ? 0 : std::max(0, position - layer.sliding_window + 1);
    load_query(layer, token, kv_head, scratch.query.data());
    const float* query = scratch.query.data() + head % group * layer.head_dim;
    float* of_block = scratch.weights.data();
    float running_max = -std::numeric_limits<float>::infinity(), running_sum = 0.0f;
    std::fill_n(out, num_keys, 0.0f);
    std::fill_n(of_block, position + 1, 0.0f);
    for (int block = first / kKvBlockSize; block <= position / kKvBlockSize; ++block) {
        const int start = block * kKvBlockSize;
        const int32_t begin = std::max(0, first - start), end = std::min(kKvBlockSize, position + 1 - start);
        const int physical = block_of(layer, token, block);
        float max, sum;
        kernels_.attention_block(kv_cache_.type(), kv_cache_.keys(physical, index, kv_head),
                                 kv_cache_.values(physical, index, kv_head), layer.head_dim, query, layer.head_dim, 1,
                                 &begin, &end, &max, &sum, scratch.partial.data(), scratch.kernel.data());
        std::memcpy(of_block + start, scratch.kernel.data(), end * sizeof(float));
        kernels_.attention_fold(start + end, 1, &running_max, &running_sum, out, &max, &sum, of_block);
        std::fill_n(of_block + start, end, 0.0f);
    }
    kernels_.attention_finish(position + 1, out, running_sum, out);
}

}  // namespace pellucid
