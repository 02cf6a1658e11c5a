#include "executor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace pellucid {

namespace {

constexpr int kChunkPanels = 8;        // panels of gate and up that are taken together; 128 columns
constexpr int kQueryRowsPerTile = 96;  // query rows that share one pass over the KV blocks
constexpr int kTasksPerThread = 8;
constexpr int kFoldAloneBlocks = 8;  // up to so many KV blocks threads repeat the fold rather than share it

// The inputs in which rounding costs the most accuracy, for what refining them costs; figures in docs/kernels.md.
constexpr Rounding kQkvRounding = Rounding::kRefined;
constexpr Rounding kGateUpRounding = Rounding::kRefined;
constexpr Rounding kHeadRounding = Rounding::kRefined;

// The forms of an input that the matrices which read it want.
struct Forms {
    bool quantized = false;
    bool f32 = false;
    void add(const PackedMatrix& matrix) { (is_quantized(matrix.format) ? quantized : f32) = true; }
};

}  // namespace

void RopeTable::extend(int count) {
    if (count <= positions() || half() == 0) return;
    const int first = positions();
    const size_t columns = inv_freq.size();
    const size_t last = std::max<size_t>(count, size_t{2} * first);
    // Both or neither: positions() counts the cosines.
    cos.reserve(last * columns);
    sin.reserve(last * columns);
    cos.resize(last * columns);
    sin.resize(last * columns);
    for (size_t position = first; position < last; ++position) {
        for (size_t i = 0; i < columns; ++i) {
            const float angle = static_cast<float>(position) * inv_freq[i];
            cos[position * columns + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * attention_factor;
            sin[position * columns + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * attention_factor;
        }
    }
}

float* FloatBuffer::reserve(size_t size) {
    if (size > capacity_) {
        data_ = allocate_aligned(size * sizeof(float));
        capacity_ = size;
    }
    return data();
}

Executor::Executor(Model& model, KvCache& kv_cache, ThreadPool& pool, const InstructionSet& isa)
    : model_(model),
      all_layers_(model.layers.size()),
      kv_cache_(kv_cache),
      pool_(pool),
      matmul_(*isa.matmul),
      kernels_(*isa.vector),
      scratch_(pool.num_threads()) {
    std::iota(all_layers_.begin(), all_layers_.end(), 0);
}

bool Executor::forward(const Batch& batch, float* logits) {
    if (batch.capture != nullptr) clock_.start(batch.capture->seconds);
    prepare(batch);
    if (batch.capture != nullptr) clock_.done(0);
    finite_ = true;
    auto work = [this, logits](int thread) { step(thread, logits); };
    pool_.run(work);
    return finite_;
}

void Executor::prepare(const Batch& batch) {
    batch_ = batch;
    if (batch.layers == nullptr) {
        batch_.layers = all_layers_.data();
        batch_.num_layers = static_cast<int>(all_layers_.size());
    }
    single_ = batch.num_tokens == 1;
    decoding_ = batch.num_tokens == batch.num_seqs;
    seq_of_token_.resize(batch.num_tokens);
    int last_position = 0;
    for (int seq = 0; seq < batch.num_seqs; ++seq) {
        for (int token = batch.cu_seqlens[seq]; token < batch.cu_seqlens[seq + 1]; ++token) {
            seq_of_token_[token] = seq;
            last_position = std::max(last_position, batch.positions[token]);
        }
    }
    for (RopeTable& rope : model_.ropes) rope.extend(last_position + 1);

    int max_heads = 1, max_query_size = 0, max_qkv_size = 0, max_intermediate = 0, max_group = 1, max_head_dim = 0;
    Forms qkv, o, mlp, down, head;
    plans_.clear();
    plan_of_layer_.clear();
    for (const Layer& layer : model_.layers) {
        max_heads = std::max(max_heads, layer.num_kv_heads);
        max_query_size = std::max(max_query_size, layer.query_size());
        max_qkv_size = std::max(max_qkv_size, layer.query_size() + 2 * layer.key_value_size());
        max_intermediate = std::max(max_intermediate, layer.gate_proj.rows);
        max_group = std::max(max_group, layer.group_size());
        max_head_dim = std::max(max_head_dim, layer.head_dim);
        for (const PackedMatrix* matrix : {&layer.q_proj, &layer.k_proj, &layer.v_proj}) qkv.add(*matrix);
        o.add(layer.o_proj);
        for (const PackedMatrix* matrix : {&layer.gate_proj, &layer.up_proj}) mlp.add(*matrix);
        down.add(layer.down_proj);
    }
    head.add(model_.output_matrix());
    if (batch.capture != nullptr && captures_activations()) down.f32 = true;
    split_ = decoding_ && batch.num_seqs * max_heads < 4 * pool_.num_threads();
    for (const Layer& layer : model_.layers) {
        const auto same = [&layer](const AttentionPlan& plan) {
            return plan.window == layer.sliding_window && plan.num_kv_heads == layer.num_kv_heads &&
                   plan.group_size == layer.group_size();
        };
        auto plan = std::find_if(plans_.begin(), plans_.end(), same);
        if (plan == plans_.end()) plan = plans_.insert(plan, plan_attention(layer));
        plan_of_layer_.push_back(static_cast<int>(plan - plans_.begin()));
    }

    const size_t tokens = batch.num_tokens;
    const int hidden_size = model_.hidden_size;
    hidden_.reserve(tokens * hidden_size);
    qkv_.reserve(tokens * max_qkv_size);
    attention_.reserve(tokens * max_query_size);
    projected_.reserve(tokens * hidden_size);
    size_t part_rows = 0;
    for (const AttentionPlan& plan : plans_) part_rows = std::max(part_rows, plan.parts.size() * plan.group_size);
    part_max_.reserve(part_rows);
    part_sum_.reserve(part_rows);
    part_out_.reserve(part_rows * max_head_dim);
    const int rows = batch.num_tokens;
    qkv_input_.resize(rows, hidden_size, qkv.quantized, qkv.f32, kQkvRounding);
    o_input_.resize(rows, max_query_size, o.quantized, o.f32);
    mlp_input_.resize(rows, hidden_size, mlp.quantized, mlp.f32, kGateUpRounding);
    down_input_.resize(rows, max_intermediate, down.quantized, down.f32);
    head_input_.resize(batch.num_logits, hidden_size, head.quantized, head.f32, kHeadRounding);
    const size_t query_rows = std::max(kQueryRowsPerTile, max_group);
    for (Scratch& scratch : scratch_) {
        scratch.hidden.reserve(hidden_size);
        scratch.qkv_input.resize(1, hidden_size, qkv.quantized, qkv.f32, kQkvRounding);
        scratch.o_input.resize(1, max_query_size, o.quantized, o.f32);
        scratch.mlp_input.resize(1, hidden_size, mlp.quantized, mlp.f32, kGateUpRounding);
        scratch.row.reserve(hidden_size);
        scratch.attention_row.reserve(std::max(max_query_size, hidden_size));
        scratch.gate.reserve(tokens * kChunkPanels * kPanelRows);
        scratch.up.reserve(tokens * kChunkPanels * kPanelRows);
        scratch.key.reserve(max_head_dim);
        scratch.query.reserve(query_rows * max_head_dim);
        scratch.partial.reserve(query_rows * max_head_dim);
        scratch.running.reserve(query_rows * max_head_dim);
        scratch.stats.reserve(4 * query_rows);
        scratch.kernel.reserve(attention_scratch_floats(static_cast<int>(query_rows), max_head_dim));
        if (batch.capture != nullptr) scratch.weights.reserve(last_position + 1);
        scratch.begin.resize(query_rows);
        scratch.end.resize(query_rows);
    }
}

Executor::AttentionPlan Executor::plan_attention(const Layer& layer) const {
    AttentionPlan plan{layer.sliding_window, layer.num_kv_heads, layer.group_size(), {}, {}, {}};
    if (split_) {
        for (int token = 0; token < batch_.num_tokens; ++token) {
            const int position = batch_.positions[token];
            const int first = plan.window == 0 ? 0 : std::max(0, position - plan.window + 1) / kKvBlockSize;
            for (int kv_head = 0; kv_head < plan.num_kv_heads; ++kv_head) {
                plan.first_part.push_back(static_cast<int32_t>(plan.parts.size()));
                for (int block = first; block <= position / kKvBlockSize; ++block) {
                    plan.parts.push_back({token, kv_head, block});
                }
            }
        }
        plan.first_part.push_back(static_cast<int32_t>(plan.parts.size()));
        return plan;
    }
    const int tokens_per_tile = std::max(1, kQueryRowsPerTile / plan.group_size);
    for (int seq = 0; seq < batch_.num_seqs; ++seq) {
        // The longest contexts first: what is left for the end is short.
        for (int end = batch_.cu_seqlens[seq + 1]; end > batch_.cu_seqlens[seq]; end -= tokens_per_tile) {
            const int begin = std::max(batch_.cu_seqlens[seq], end - tokens_per_tile);
            for (int kv_head = 0; kv_head < plan.num_kv_heads; ++kv_head) {
                plan.tiles.push_back({seq, kv_head, begin, end});
            }
        }
    }
    return plan;
}

template <class Fn>
void Executor::for_rows(int thread, int count, Fn fn) {
    if (single_) {
        for (int row = 0; row < count; ++row) fn(row);
        return;
    }
    const int share = count / (pool_.num_threads() * kTasksPerThread);
    const int grain = std::max(1, share / kRowsPerCacheLine) * kRowsPerCacheLine;
    pool_.parallel_for(thread, count, grain, [&fn](int begin, int end) {
        for (int row = begin; row < end; ++row) fn(row);
    });
}

void Executor::step(int thread, float* logits) {
    if (batch_.capture == nullptr) {
        run_layers<false>(thread);
    } else {
        run_layers<true>(thread);
        observe_last_residual(thread);
    }
    compute_logits(thread, logits);
}

template <bool kObserved>
void Executor::run_layers(int thread) {
    int before = -1;
    for (int i = 0; i < batch_.num_layers; ++i) {
        const int layer = batch_.layers[i];
        run_layer<kObserved>(thread, layer, before);
        before = layer;
    }
}

template <bool kObserved>
void Executor::run_layer(int thread, int index, int before) {
    const auto done = [=, this](LayerOperation operation) {
        if constexpr (kObserved) observe(thread, index, operation);
    };
    const Layer& layer = model_.layers[index];
    const int tokens = batch_.num_tokens;
    const int hidden_size = model_.hidden_size;
    for_rows(thread, tokens, [&](int row) {
        float* x = hidden_row(thread, row);
        if (before < 0) {
            embed(row, x);
        } else {
            add_residual(thread, model_.layers[before].post_mlp_norm, projected_row(row), x);
        }
        store_normalized(thread, layer.attention_norm, x, qkv_input(thread), row);
    });
    done(LayerOperation::kAttentionInput);
    project(thread, {&layer.q_proj, &layer.k_proj, &layer.v_proj}, qkv_input(thread), hidden_size, tokens, qkv_.data(),
            layer.query_size() + 2 * layer.key_value_size());
    done(LayerOperation::kQkv);
    attend(thread, index);
    done(LayerOperation::kAttention);
    project(thread, {&layer.o_proj}, o_input(thread), layer.query_size(), tokens, projected_.data(), hidden_size);
    done(LayerOperation::kOutput);
    for_rows(thread, tokens, [&](int row) {
        float* x = hidden_row(thread, row);
        add_residual(thread, layer.post_attention_norm, projected_row(row), x);
        store_normalized(thread, layer.mlp_norm, x, mlp_input(thread), row);
    });
    done(LayerOperation::kMlpInput);
    run_mlp(thread, layer);
    done(LayerOperation::kGateUp);
    project(thread, {&layer.down_proj}, down_input_, layer.gate_proj.rows, tokens, projected_.data(), hidden_size);
    done(LayerOperation::kDown);
}

void Executor::embed(int row, float* x) const {
    dequantize_row(model_.embed_tokens, batch_.input_ids[row], x);
    if (model_.embedding_scale != 1.0f) kernels_.scale(x, model_.embedding_scale, model_.hidden_size);
}

void Executor::add_residual(int thread, const Norm& post_norm, const float* y, float* x) {
    if (post_norm) {
        float* normalized = scratch_[thread].row.data();
        kernels_.rms_norm(y, post_norm.weight.data(), post_norm.eps, model_.hidden_size, normalized);
        y = normalized;
    }
    kernels_.add(x, y, model_.hidden_size);
}

void Executor::store_normalized(int thread, const Norm& norm, const float* x, ActivationBuffer& out, int row) {
    float* normalized = scratch_[thread].row.data();
    kernels_.rms_norm(x, norm.weight.data(), norm.eps, model_.hidden_size, normalized);
    out.store(kernels_, model_.hidden_size, row, 0, normalized, model_.hidden_size);
}

// out[row] = the products with each matrix side by side.
void Executor::project(int thread, std::initializer_list<const PackedMatrix*> matrices, const ActivationBuffer& buffer,
                       int cols, int rows, float* out, int64_t stride) {
    const Activations input = buffer.view(cols);
    int total = 0;
    for (const PackedMatrix* matrix : matrices) total += matrix->panels();
    const int grain = std::max(1, total / (pool_.num_threads() * kTasksPerThread));
    pool_.parallel_for(thread, total, grain, [&](int begin, int end) {
        int first = 0;
        float* column = out;
        for (const PackedMatrix* matrix : matrices) {
            const int from = std::max(begin, first) - first;
            const int to = std::min(end, first + matrix->panels()) - first;
            if (from < to) {
                matmul_.matmul(*matrix, from, to, input, 0, rows, column + from * kPanelRows, stride);
            }
            first += matrix->panels();
            column += matrix->rows;
        }
    });
}

void Executor::attend(int thread, int index) {
    const Layer& layer = model_.layers[index];
    const AttentionPlan& plan = plans_[plan_of_layer_[index]];
    const int tokens = batch_.num_tokens;
    const int query_size = layer.query_size();
    if (!decoding_) {
        for_rows(thread, tokens, [&](int token) {
            for (int kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
                store_key_value(thread, index, token, kv_head);
            }
        });
    }
    if (!split_) {
        pool_.parallel_for(thread, static_cast<int>(plan.tiles.size()), 1, [&](int begin, int end) {
            for (int i = begin; i < end; ++i) attend_tile(thread, index, plan.tiles[i]);
        });
    } else {
        const int parts = static_cast<int>(plan.parts.size());
        const int grain = std::max(1, parts / (pool_.num_threads() * kTasksPerThread));
        pool_.parallel_for(thread, parts, grain, [&](int begin, int end) {
            for (int part = begin; part < end; ++part) attend_part(thread, index, plan, part);
        });
        if (single_ && parts <= kFoldAloneBlocks * layer.num_kv_heads) {
            float* row = scratch_[thread].attention_row.data();
            for (int kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
                fold_parts(thread, layer, plan, 0, kv_head, row + kv_head * layer.group_size() * layer.head_dim);
            }
            o_input(thread).store(kernels_, query_size, 0, 0, row, query_size);
            return;
        }
        pool_.parallel_for(thread, tokens * layer.num_kv_heads, 1, [&](int begin, int end) {
            for (int i = begin; i < end; ++i) {
                const int token = i / layer.num_kv_heads;
                const int kv_head = i % layer.num_kv_heads;
                fold_parts(thread, layer, plan, token, kv_head,
                           attention_.data() + static_cast<int64_t>(token) * query_size +
                               kv_head * layer.group_size() * layer.head_dim);
            }
        });
    }
    for_rows(thread, tokens, [&](int row) {
        o_input(thread).store(kernels_, query_size, row, 0, attention_.data() + static_cast<int64_t>(row) * query_size,
                              query_size);
    });
}

void Executor::store_key_value(int thread, int index, int token, int kv_head) {
    const Layer& layer = model_.layers[index];
    const RopeTable& rope = model_.ropes[layer.rope];
    const int position = batch_.positions[token];
    const int offset = kv_head * layer.head_dim;
    float* key = qkv_row(layer, token) + layer.query_size() + offset;
    float* value = key + layer.key_value_size();
    if (!layer.k_bias.empty()) kernels_.add(key, layer.k_bias.data() + offset, layer.head_dim);
    if (!layer.v_bias.empty()) kernels_.add(value, layer.v_bias.data() + offset, layer.head_dim);
    float* rotated = scratch_[thread].key.data();
    if (layer.k_norm) {
        kernels_.rms_norm(key, layer.k_norm.weight.data(), layer.k_norm.eps, layer.head_dim, rotated);
    } else {
        std::memcpy(rotated, key, layer.head_dim * sizeof(float));
    }
    kernels_.rope(rotated, rope.cos.data() + static_cast<int64_t>(position) * rope.half(),
                  rope.sin.data() + static_cast<int64_t>(position) * rope.half(), 2 * rope.half());
    const int block = block_of(layer, token, position / kKvBlockSize);
    kernels_.kv_store(kv_cache_.type(), kv_cache_.keys(block, index, kv_head), kv_cache_.values(block, index, kv_head),
                      layer.head_dim, position % kKvBlockSize, rotated, value);
}

// The query heads of one KV head for one token: bias, norm, RoPE, scale. out is [group_size][head_dim].
void Executor::load_query(const Layer& layer, int token, int kv_head, float* out) const {
    const RopeTable& rope = model_.ropes[layer.rope];
    const int64_t angles = static_cast<int64_t>(batch_.positions[token]) * rope.half();
    const int size = layer.group_size() * layer.head_dim;
    std::memcpy(out, qkv_row(layer, token) + kv_head * size, size * sizeof(float));
    if (!layer.q_bias.empty()) kernels_.add(out, layer.q_bias.data() + kv_head * size, size);
    for (int head = 0; head < layer.group_size(); ++head) {
        float* q = out + head * layer.head_dim;
        if (layer.q_norm) kernels_.rms_norm(q, layer.q_norm.weight.data(), layer.q_norm.eps, layer.head_dim, q);
        kernels_.rope(q, rope.cos.data() + angles, rope.sin.data() + angles, 2 * rope.half());
    }
    kernels_.scale(out, layer.scale, size);
}

void Executor::attend_tile(int thread, int index, const AttentionTile& tile) {
    const Layer& layer = model_.layers[index];
    Scratch& scratch = scratch_[thread];
    const int group = layer.group_size();
    const int head_dim = layer.head_dim;
    const int rows = (tile.end - tile.begin) * group;
    if (decoding_) store_key_value(thread, index, tile.begin, tile.kv_head);
    float* query = scratch.query.data();
    for (int token = tile.begin; token < tile.end; ++token) {
        load_query(layer, token, tile.kv_head, query + (token - tile.begin) * group * head_dim);
    }
    float* running_max = scratch.stats.data();
    float* running_sum = running_max + rows;
    float* max = running_sum + rows;
    float* sum = max + rows;
    float* running = scratch.running.data();
    std::fill_n(running_max, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(running_sum, rows, 0.0f);
    std::fill_n(running, rows * head_dim, 0.0f);
    const int first_position = batch_.positions[tile.begin];
    const int last_position = batch_.positions[tile.end - 1];
    const int window = layer.sliding_window;
    const int first_block = window == 0 ? 0 : std::max(0, first_position - window + 1) / kKvBlockSize;
    for (int block = first_block; block <= last_position / kKvBlockSize; ++block) {
        const int start = block * kKvBlockSize;
        for (int row = 0; row < rows; ++row) {
            const int position = first_position + row / group;
            scratch.begin[row] = window == 0 ? 0 : std::clamp(position - window + 1 - start, 0, kKvBlockSize);
            scratch.end[row] = std::clamp(position + 1 - start, 0, kKvBlockSize);
        }
        const int physical = block_of(layer, tile.begin, block);
        kernels_.attention_block(kv_cache_.type(), kv_cache_.keys(physical, index, tile.kv_head),
                                 kv_cache_.values(physical, index, tile.kv_head), head_dim, query, head_dim, rows,
                                 scratch.begin.data(), scratch.end.data(), max, sum, scratch.partial.data(),
                                 scratch.kernel.data());
        kernels_.attention_fold(head_dim, rows, running_max, running_sum, running, max, sum, scratch.partial.data());
    }
    for (int row = 0; row < rows; ++row) {
        float* out = attention_.data() + static_cast<int64_t>(tile.begin + row / group) * layer.query_size() +
                     (tile.kv_head * group + row % group) * head_dim;
        kernels_.attention_finish(head_dim, running + row * head_dim, running_sum[row], out);
    }
}

void Executor::attend_part(int thread, int index, const AttentionPlan& plan, int part) {
    const Layer& layer = model_.layers[index];
    const auto [token, kv_head, block] = plan.parts[part];
    Scratch& scratch = scratch_[thread];
    const int group = layer.group_size();
    const int position = batch_.positions[token];
    const int start = block * kKvBlockSize;
    if (block == position / kKvBlockSize) store_key_value(thread, index, token, kv_head);
    load_query(layer, token, kv_head, scratch.query.data());
    const int begin = layer.sliding_window == 0 ? 0 : std::max(0, position - layer.sliding_window + 1 - start);
    std::fill_n(scratch.begin.begin(), group, begin);
    std::fill_n(scratch.end.begin(), group, std::min(kKvBlockSize, position + 1 - start));
    if (part + 1 < static_cast<int>(plan.parts.size())) {
        const auto [next_token, next_head, next_block] = plan.parts[part + 1];
        kv_cache_.prefetch(block_of(layer, next_token, next_block), index, next_head);
    }
    const int physical = block_of(layer, token, block);
    const int64_t row = static_cast<int64_t>(part) * group;
    kernels_.attention_block(kv_cache_.type(), kv_cache_.keys(physical, index, kv_head),
                             kv_cache_.values(physical, index, kv_head), layer.head_dim, scratch.query.data(),
                             layer.head_dim, group, scratch.begin.data(), scratch.end.data(), part_max_.data() + row,
                             part_sum_.data() + row, part_out_.data() + row * layer.head_dim, scratch.kernel.data());
}

// out is [group_size][head_dim].
void Executor::fold_parts(int thread, const Layer& layer, const AttentionPlan& plan, int token, int kv_head,
                          float* out) {
    Scratch& scratch = scratch_[thread];
    const int group = layer.group_size();
    float* running_max = scratch.stats.data();
    float* running_sum = running_max + group;
    float* running = scratch.running.data();
    std::fill_n(running_max, group, -std::numeric_limits<float>::infinity());
    std::fill_n(running_sum, group, 0.0f);
    std::fill_n(running, group * layer.head_dim, 0.0f);
    const int slot = token * plan.num_kv_heads + kv_head;
    for (int part = plan.first_part[slot]; part < plan.first_part[slot + 1]; ++part) {
        const int64_t row = static_cast<int64_t>(part) * group;
        kernels_.attention_fold(layer.head_dim, group, running_max, running_sum, running, part_max_.data() + row,
                                part_sum_.data() + row, part_out_.data() + row * layer.head_dim);
    }
    for (int head = 0; head < group; ++head) {
        kernels_.attention_finish(layer.head_dim, running + head * layer.head_dim, running_sum[head],
                                  out + head * layer.head_dim);
    }
}

void Executor::run_mlp(int thread, const Layer& layer) {
    const int tokens = batch_.num_tokens;
    const int columns = layer.gate_proj.rows;
    const int chunks = (layer.gate_proj.panels() + kChunkPanels - 1) / kChunkPanels;
    constexpr int kStride = kChunkPanels * kPanelRows;
    const Activations input = mlp_input(thread).view(model_.hidden_size);
    const auto activate = layer.activation == ActivationKind::kSilu ? kernels_.silu_mul : kernels_.gelu_tanh_mul;
    float* gate = scratch_[thread].gate.data();
    float* up = scratch_[thread].up.data();
    pool_.parallel_for(thread, chunks, 1, [&](int begin, int end) {
        for (int chunk = begin; chunk < end; ++chunk) {
            const int from = chunk * kChunkPanels;
            const int to = std::min(from + kChunkPanels, layer.gate_proj.panels());
            const int width = std::min(columns - from * kPanelRows, kStride);
            matmul_.matmul(layer.gate_proj, from, to, input, 0, tokens, gate, kStride);
            matmul_.matmul(layer.up_proj, from, to, input, 0, tokens, up, kStride);
            for (int row = 0; row < tokens; ++row) {
                float* g = gate + static_cast<int64_t>(row) * kStride;
                activate(g, up + static_cast<int64_t>(row) * kStride, width, g);
                down_input_.store(kernels_, columns, row, from * kPanelRows, g, width);
            }
        }
    });
}

void Executor::compute_logits(int thread, float* logits) {
    const int rows = batch_.num_logits;
    if (rows == 0) return;
    // A row may be asked for twice, so the residual stream itself is left as it is.
    pool_.parallel_for(thread, rows, 1, [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            const int token = batch_.logits_rows[row];
            float* x = scratch_[thread].attention_row.data();
            std::memcpy(x, hidden_row(thread, token), model_.hidden_size * sizeof(float));
            add_residual(thread, last_layer().post_mlp_norm, projected_row(token), x);
            store_normalized(thread, model_.final_norm, x, head_input_, row);
        }
    });
    if (batch_.capture != nullptr) observe_head(thread, false);
    compute_head(thread, rows, logits);
    if (batch_.capture != nullptr) observe_head(thread, true);
}

// The rows of head_input_ through the head.
void Executor::compute_head(int thread, int rows, float* logits) {
    const int64_t vocab_size = model_.vocab_size;
    project(thread, {&model_.output_matrix()}, head_input_, model_.hidden_size, rows, logits, vocab_size);
    constexpr int kSegment = 8192;
    const int segments = static_cast<int>((vocab_size + kSegment - 1) / kSegment);
    pool_.parallel_for(thread, rows * segments, 1, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
            const int64_t first = int64_t{i % segments} * kSegment;
            const float* x = logits + i / segments * vocab_size + first;
            if (!kernels_.all_finite(x, std::min<int64_t>(kSegment, vocab_size - first))) finite_ = false;
        }
    });
}

bool Executor::project_hidden(const float* hidden, int rows, bool normalize, float* logits) {
    const int hidden_size = model_.hidden_size;
    Forms head;
    head.add(model_.output_matrix());
    head_input_.resize(rows, hidden_size, head.quantized, head.f32, kHeadRounding);
    for (Scratch& scratch : scratch_) scratch.row.reserve(hidden_size);
    finite_ = true;
    auto work = [=, this](int thread) {
        pool_.parallel_for(thread, rows, 1, [&](int begin, int end) {
            for (int row = begin; row < end; ++row) {
                const float* x = hidden + static_cast<int64_t>(row) * hidden_size;
                if (normalize) {
                    store_normalized(thread, model_.final_norm, x, head_input_, row);
                } else {
                    head_input_.store(kernels_, hidden_size, row, 0, x, hidden_size);
                }
            }
        });
        compute_head(thread, rows, logits);
    };
    pool_.run(work);
    return finite_;
}

}  // namespace pellucid
