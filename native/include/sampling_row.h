// What is asked of one row of logits, and the answer.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pellucid {

// How to choose one token: a record of SAMPLING_DTYPE (core/batch.py), where the fields are described. A test holds
// names, types and offsets against it.
struct SamplingRow {
    float temperature = 1.0f;  // 0: greedy
    float dynatemp_range = 0.0f;
    float dynatemp_exponent = 1.0f;
    float top_n_sigma = 0.0f;
    int32_t top_k = 0;   // 0: all
    float top_p = 1.0f;  // 1: all
    float min_p = 0.0f;  // 0: all
    float typical_p = 1.0f;
    float epsilon_cutoff = 0.0f;
    float eta_cutoff = 0.0f;
    float xtc_probability = 0.0f;
    float xtc_threshold = 0.0f;
    int32_t mirostat = 0;
    float mirostat_tau = 0.0f;
    float mirostat_eta = 0.0f;
    float mirostat_mu = 0.0f;
    float repetition_penalty = 1.0f;
    float presence_penalty = 0.0f;
    float frequency_penalty = 0.0f;
    float dry_multiplier = 0.0f;
    float dry_base = 0.0f;
    int32_t dry_allowed_length = 0;
    int32_t dry_penalty_last_n = 0;
    int32_t no_repeat_ngram_size = 0;
    int32_t num_prompt_tokens = 0;
    int32_t num_logprobs = -1;
    int32_t processed_logprobs = 0;
    uint32_t sequence_index = 0;
    uint32_t position = 0;
    uint64_t seed = 0;
};
static_assert(sizeof(SamplingRow) == 128 && std::is_standard_layout_v<SamplingRow>);

constexpr int32_t kNothingAllowed = -1;  // core/batch.py NOTHING_ALLOWED

// Numbers that somebody else keeps.
template <typename T>
struct Span {
    const T* data = nullptr;
    int64_t size = 0;

    const T* begin() const { return data; }
    const T* end() const { return data + size; }
};

// One row of a SamplingBatch.
struct RowInput {
    const SamplingRow* row = nullptr;
    Span<int32_t> tokens;    // prompt and output so far
    Span<int32_t> bias_ids;  // each once
    const float* bias_values = nullptr;
    const uint32_t* mask = nullptr;  // null: every token may be chosen
    Span<int32_t> dry_breakers;      // ascending
};

struct RowOutput {
    int32_t token = 0;
    float logprob = 0.0f;
    float mirostat_mu = 0.0f;
    // Room for num_logprobs or vocab_size entries each, whichever is less; num_top of them are filled.
    int32_t* top_ids = nullptr;
    float* top_logprobs = nullptr;
    int64_t num_top = 0;
};

enum class RowStatus {
    kOk,
    kBadLogits,    // a logit is NaN or +inf, or all are -inf: describe_bad_logits
    kNothingLeft,  // the masks leave no token
};

}  // namespace pellucid
