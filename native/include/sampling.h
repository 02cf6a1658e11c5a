// Choosing tokens. src/pellucid/decoding is the oracle: same survivors, same token, to the bit (docs/decoding.md).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sampling_kernels.h"
#include "sampling_row.h"

namespace pellucid {

class Candidates;
class Penalties;
class RadixSelect;

constexpr uint32_t kStreamSample = 0;  // decoding/rng.py STREAM_SAMPLE
constexpr uint32_t kStreamXtc = 1;     // STREAM_XTC

// Counter and key of the draw (Philox4x32-10, Salmon et al., 2011): decoding/rng.py draw_bits.
uint64_t draw_bits(uint64_t seed, uint32_t sequence_index, uint32_t position, uint32_t stream);

// Samples rows of at most `max_vocab_size` logits, one at a time; one sampler a thread. A row's answer depends on its
// arguments alone.
class Sampler {
  public:
    Sampler(const SamplingKernels& kernels, int64_t max_vocab_size);
    ~Sampler();

    // Chooses the next token of a row; `logits` may be overwritten.
    RowStatus sample(float* logits, int64_t vocab_size, const RowInput& input, RowOutput& output);

    // The distribution that `sample` draws from: tokens by rising id, with their integer weights. Temperature is above
    // 0. Valid until the next call.
    struct Survivors {
        Span<int32_t> ids;
        Span<uint64_t> weights;
    };
    RowStatus survivors(float* logits, int64_t vocab_size, const RowInput& input, Survivors& kept);

    int64_t max_vocab_size() const { return max_vocab_size_; }

  private:
    // Bias, penalties and masks, in place; then the row is taken for what follows.
    RowStatus begin(float* logits, int64_t vocab_size, const RowInput& input);
    // Returns false where there is NaN or +inf, or nothing but -inf.
    bool take(const float* logits, int64_t vocab_size);

    // These look at (logits - max) * factor + 0.
    float temperature_factor(const SamplingRow& row);
    void scale(float factor);
    uint64_t total();    // of the weights
    uint64_t exp_all();  // the same, and leaves the weights in exp_
    double mean_gap();

    // Each leaves the tokens that survive in candidates_, or returns false where all of the row do.
    bool truncate(const SamplingRow& row);
    bool truncate_by_mirostat(const SamplingRow& row);
    bool mirostat_top_k(float mu);
    // Truncations, in their order; top-n-sigma and top-k count as one.
    enum class Stage { kTopK, kTopP, kMinP, kTypicalP, kEpsilon, kEta, kNone };
    // Does the first one before XTC that the row asks for, on the whole row. Returns which.
    Stage truncate_row(const SamplingRow& row);
    void exclude_top_choices(float threshold);
    void keep_weights(double floor);
    void collect(float offset, float factor, float threshold);
    void collect_top(int64_t k, float offset, float factor);
    void collect_heavy(double floor);
    void collect_nucleus(float top_p);
    void collect_typical(float typical_p, double mean_gap);
    double guess_floor(double tail) const;
    double sigma_floor(float n);

    int32_t first_max() const;
    int32_t draw(bool truncated, uint64_t bits);
    float next_mu(bool truncated, int32_t token, const SamplingRow& row);
    void report_processed(bool truncated, const SamplingRow& row, RowOutput& output);
    void report_top(double max, double log_total, RowOutput& output);

    const SamplingKernels& kernels_;
    int64_t max_vocab_size_;
    const float* logits_ = nullptr;
    int64_t vocab_size_ = 0;
    float max_ = 0.0f;
    float factor_ = 1.0f;
    // Whether chunk_sums_ and total_, and whether exp_, belong to the row and the factor.
    bool has_total_ = false;
    bool has_exp_ = false;
    uint64_t total_ = 0;
    bool is_final_ = false;  // whether the row is final_, the logits after every transform, which are not to be scaled

    std::unique_ptr<RadixSelect> select_;
    std::unique_ptr<Candidates> candidates_;
    std::unique_ptr<Penalties> penalties_;
    std::unique_ptr<float[]> maxima_;
    std::unique_ptr<float[]> large_maxima_;
    std::unique_ptr<float[]> scaled_maxima_;
    std::unique_ptr<float[]> exp_;
    std::unique_ptr<float[]> final_;  // made when it is needed
    std::unique_ptr<uint64_t[]> chunk_sums_;
    std::vector<uint64_t> ranked_;
};

// Why a row has kBadLogits, in the oracle's words.
std::string describe_bad_logits(const float* logits, int64_t vocab_size, int64_t row);

}  // namespace pellucid
