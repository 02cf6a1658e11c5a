// Choosing tokens. src/pellucid/decoding is the oracle: same survivors, same token, to the bit (docs/decoding.md).
//
// Probabilities are integers, rint(2^40 * exp(logit - max)): their sums do not depend on order, instruction set or
// threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace pellucid {

constexpr int kWeightBits = 40;
constexpr int64_t kMaxVocabSize = int64_t{1} << 22;  // weights surely sum to less than 2^63
constexpr int64_t kMaximaGroup = 256;                // logits that share 16 lane maxima
constexpr int64_t kWeightChunk = 1024;               // weights that share one sum
constexpr int kNumTails = 8;                         // thresholds that `estimate_tails` takes
constexpr int64_t kCollectSlack = 16;                // entries that `collect` may write beyond what it returns
constexpr uint32_t kStreamSample = 0;                // decoding/rng.py STREAM_SAMPLE

constexpr int64_t num_maxima(int64_t n) { return (n + kMaximaGroup - 1) / kMaximaGroup * 16; }
constexpr int64_t num_weight_chunks(int64_t n) { return (n + kWeightChunk - 1) / kWeightChunk; }

// What depends on the instruction set. scaled(x) = (x - offset) * factor + 0, each operation rounded alone.
struct SamplingKernels {
    const char* name;

    // The largest of x[0..n), or NaN where some x is NaN or +inf. maxima[16 * g + l] is the largest of
    // x[256 * g + l + 16 * j], j < 16; -inf where there is none.
    float (*row_max)(const float* x, int64_t n, float* maxima);

    // weights[i] = 2^40 * exp(scaled(x[i])) in float32, for scaled(x) <= 0; the weight itself is rint of it.
    // chunk_sums[c] is the exact sum of the integer weights of chunk c. Returns the sum of all.
    uint64_t (*exp_weights)(const float* x, int64_t n, float offset, float factor, float* weights,
                            uint64_t* chunk_sums);

    // Writes, by rising index, the index and scaled(x) of every x with scaled(x) >= threshold; returns how many.
    int64_t (*collect)(const float* x, int64_t n, float offset, float factor, float threshold, int32_t* ids,
                       float* values);

    // tails[j] = about the sum of the weights below thresholds[j], from a sample of them. Only ever a hint.
    void (*estimate_tails)(const float* weights, int64_t n, const float* thresholds, float* tails);
};

extern const SamplingKernels kSamplingKernelsPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const SamplingKernels kSamplingKernelsAvx2;    // AVX2, FMA, F16C
extern const SamplingKernels kSamplingKernelsAvx512;  // AVX-512 F, BW, DQ, VL
#endif

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

// Counter and key of the draw (Philox4x32-10, Salmon et al., 2011): decoding/rng.py draw_bits.
uint64_t draw_bits(uint64_t seed, uint32_t sequence_index, uint32_t position, uint32_t stream);

// Samples rows of at most `max_vocab_size` logits, one at a time; one sampler a thread. A row's result depends on its
// arguments alone. Logits are finite or -inf, at least one finite: otherwise `begin_row` says no.
class Sampler {
  public:
    Sampler(const SamplingKernels& kernels, int64_t max_vocab_size);

    // Takes a row for the calls below. Returns false where it cannot be sampled (see describe_bad_logits).
    bool begin_row(const float* logits, int64_t vocab_size);

    // The token that `bits` chooses among the survivors of the transforms.
    int32_t choose(const SamplingRow& row, uint64_t bits);

    // Survivors of the transforms by rising id, with their integer weights. Temperature is above 0.
    struct Survivors {
        const int32_t* ids;
        const uint64_t* weights;
        int64_t size;
        uint64_t total;
    };
    Survivors survivors(const SamplingRow& row);

    // Natural log of the raw softmax at `token`.
    float raw_logprob(int32_t token);

    // The `count` most probable tokens with their raw log-probabilities, most probable first, lower id first on a tie.
    // Returns how many there are: min(count, vocab_size).
    int64_t top_logprobs(int64_t count, int32_t* ids, float* logprobs);

    int64_t max_vocab_size() const { return max_vocab_size_; }

  private:
    struct Cut {
        uint32_t key;        // order_key of the last value kept
        uint64_t remaining;  // measure that the values equal to it still have to reach
    };

    int32_t first_max() const;
    int32_t draw_from_all(float factor, uint64_t bits);
    uint64_t exp_all(float factor);
    int64_t collect_top(int64_t k, float offset, float factor);
    Survivors collect_top_k(int64_t k, float factor);
    Survivors collect_nucleus(float top_p, float factor);
    Survivors collect_above(float floor, float factor);
    float guess_floor(double tail) const;
    int64_t keep_min_p(int64_t size, float min_p);

    template <typename Value>
    int64_t weigh(int64_t size, const float* exps, Value value_of);
    template <typename Measure>
    Cut find_cut(const float* values, int64_t size, uint64_t target, Measure measure);
    template <typename Measure, typename Move>
    int64_t keep_prefix(int64_t size, uint64_t target, Measure measure, Move move);

    const SamplingKernels& kernels_;
    int64_t max_vocab_size_;
    const float* logits_ = nullptr;
    int64_t vocab_size_ = 0;
    float max_ = 0.0f;
    float exp_factor_ = 0.0f;  // the factor for which exp_ and chunk_sums_ hold the whole row; 0: none
    uint64_t exp_total_ = 0;

    std::unique_ptr<float[]> maxima_;
    std::unique_ptr<float[]> exp_;
    std::unique_ptr<uint64_t[]> chunk_sums_;
    // Candidates: parallel arrays by rising id. A value is the logit after temperature.
    std::unique_ptr<int32_t[]> ids_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<uint64_t[]> weights_;
    std::unique_ptr<uint64_t[]> pending_;
    std::unique_ptr<uint64_t[]> bins_;
};

// Why begin_row said no, in the oracle's words.
std::string describe_bad_logits(const float* logits, int64_t vocab_size, int64_t row);

}  // namespace pellucid
