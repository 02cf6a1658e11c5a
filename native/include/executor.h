// Runs a model over a batch: the whole forward pass in one call.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>
#include <vector>

#include "activation_buffer.h"
#include "capture.h"
#include "cpu_info.h"
#include "kv_cache.h"
#include "model.h"
#include "thread_pool.h"

namespace pellucid {

// core/batch.py ForwardBatch.
struct Batch {
    int num_tokens = 0;
    int num_seqs = 0;
    int num_logits = 0;
    const int32_t* input_ids = nullptr;     // [num_tokens]
    const int32_t* positions = nullptr;     // [num_tokens]
    const int32_t* cu_seqlens = nullptr;    // [num_seqs + 1]
    const int32_t* kv_lens = nullptr;       // [num_seqs]
    const int32_t* block_tables = nullptr;  // [num_groups][num_seqs][blocks], rows contiguous
    const int32_t* logits_rows = nullptr;   // [num_logits]
    const int32_t* layers = nullptr;        // [num_layers], rising; null: all of the model's
    int num_layers = 0;
    const StepCapture* capture = nullptr;  // null where nothing is asked for
    int64_t group_stride = 0;              // elements from a group's table to the next group's
    int64_t seq_stride = 0;                // elements from a sequence's row to the next sequence's

    const int32_t* block_table(int group, int seq) const {
        return block_tables + group * group_stride + seq * seq_stride;
    }
};

// A growing array of floats, 64-byte aligned; growing drops the contents.
class FloatBuffer {
  public:
    float* reserve(size_t size);
    float* data() const { return reinterpret_cast<float*>(data_.get()); }

  private:
    size_t capacity_ = 0;
    AlignedBytes data_;
};

class Executor {
  public:
    Executor(Model& model, KvCache& kv_cache, ThreadPool& pool, const InstructionSet& isa);

    // Writes float32 [num_logits][vocab_size]. Returns whether all of them are finite.
    bool forward(const Batch& batch, float* logits);

    // The head alone: float32 [rows][hidden_size], through the final norm first if `normalize`, to float32
    // [rows][vocab_size]. Returns whether all of them are finite.
    bool project_hidden(const float* hidden, int rows, bool normalize, float* logits);

  private:
    // Query rows of one KV head that are attended to together: tokens [begin, end) of the batch, one sequence.
    struct AttentionTile {
        int seq;
        int kv_head;
        int begin;
        int end;
    };
    // One KV block of a single query token, whose partial results are folded later.
    struct AttentionPart {
        int token;
        int kv_head;
        int block;
    };
    // The work of attention in one step; layers that agree in window and heads share it.
    struct AttentionPlan {
        int window;
        int num_kv_heads;
        int group_size;
        std::vector<AttentionTile> tiles;  // unless split
        std::vector<AttentionPart> parts;  // if split: by token, KV head, block
        std::vector<int32_t> first_part;   // [num_tokens * num_kv_heads + 1]
    };
    // What a thread has to itself.
    struct Scratch {
        FloatBuffer hidden;  // of a single-token step
        ActivationBuffer qkv_input, o_input, mlp_input;
        FloatBuffer row, attention_row, gate, up, key, query, partial, running, stats, kernel;
        FloatBuffer weights;  // of one row of attention that is captured
        std::vector<int32_t> begin, end;
    };

    // Everything that a step allocates is allocated here: nothing may throw once the threads run.
    void prepare(const Batch& batch);
    AttentionPlan plan_attention(const Layer& layer) const;
    void step(int thread, float* logits);
    template <bool kObserved>
    void run_layers(int thread);
    // `before` is the layer that ran before it, -1 for none.
    template <bool kObserved>
    void run_layer(int thread, int index, int before);
    void attend(int thread, int index);
    void run_mlp(int thread, const Layer& layer);
    void compute_logits(int thread, float* logits);
    void compute_head(int thread, int rows, float* logits);

    void embed(int row, float* x) const;
    void add_residual(int thread, const Norm& post_norm, const float* y, float* x);
    void store_normalized(int thread, const Norm& norm, const float* x, ActivationBuffer& out, int row);
    void project(int thread, std::initializer_list<const PackedMatrix*> matrices, const ActivationBuffer& buffer,
                 int cols, int rows, float* out, int64_t stride);
    void store_key_value(int thread, int index, int token, int kv_head);
    void load_query(const Layer& layer, int token, int kv_head, float* out) const;
    void attend_tile(int thread, int index, const AttentionTile& tile);
    void attend_part(int thread, int index, const AttentionPlan& plan, int part);
    void fold_parts(int thread, const Layer& layer, const AttentionPlan& plan, int token, int kv_head, float* out);

    // What a batch asks to see (capture.cpp). Of a batch that asks for nothing, none of these is called.
    bool captures_activations() const;
    bool captures(int index, LayerOperation operation) const;
    void observe(int thread, int index, LayerOperation operation);
    void observe_last_residual(int thread);
    void observe_head(int thread, bool computed);
    bool captures_residual(int point) const;
    void capture_residual(int point);
    void capture_activations(int index);
    void capture_attention(int thread, int index);
    void attention_weights(int thread, int index, int token, int head, int num_keys, float* out);

    const Layer& last_layer() const { return model_.layers[batch_.layers[batch_.num_layers - 1]]; }
    int32_t block_of(const Layer& layer, int token, int block) const {
        return batch_.block_table(layer.kv_group, seq_of_token_[token])[block];
    }
    float* qkv_row(const Layer& layer, int token) const {
        return qkv_.data() + static_cast<int64_t>(token) * (layer.query_size() + 2 * layer.key_value_size());
    }
    float* hidden_row(int thread, int row) const {
        return single_ ? scratch_[thread].hidden.data()
                       : hidden_.data() + static_cast<int64_t>(row) * model_.hidden_size;
    }
    float* projected_row(int row) const { return projected_.data() + static_cast<int64_t>(row) * model_.hidden_size; }
    ActivationBuffer& qkv_input(int thread) { return single_ ? scratch_[thread].qkv_input : qkv_input_; }
    ActivationBuffer& o_input(int thread) { return single_ ? scratch_[thread].o_input : o_input_; }
    ActivationBuffer& mlp_input(int thread) { return single_ ? scratch_[thread].mlp_input : mlp_input_; }
    // Calls fn(row) for every row. Where the step has a single token every thread does so for itself, else rows are
    // shared out and all wait for the last.
    template <class Fn>
    void for_rows(int thread, int count, Fn fn);

    Model& model_;
    std::vector<int32_t> all_layers_;
    KvCache& kv_cache_;
    ThreadPool& pool_;
    const MatmulKernels& matmul_;
    const VectorKernels& kernels_;

    Batch batch_;
    bool single_ = false;    // one token: threads repeat the row work rather than wait for each other
    bool decoding_ = false;  // one new token a sequence
    bool split_ = false;     // attention goes by KV block, and is folded afterwards
    std::vector<int32_t> seq_of_token_;
    std::vector<AttentionPlan> plans_;
    std::vector<int> plan_of_layer_;

    FloatBuffer hidden_, qkv_, attention_, projected_;
    FloatBuffer part_max_, part_sum_, part_out_;
    ActivationBuffer qkv_input_, o_input_, mlp_input_, down_input_, head_input_;
    std::vector<Scratch> scratch_;
    OperationClock clock_;
    std::atomic<bool> finite_{true};
};

}  // namespace pellucid
