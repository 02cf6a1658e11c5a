// The tokens of a row that are still in play, and the transforms that drop some of them: what
// src/pellucid/decoding/truncation.py does to a whole row, without sorting it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "elementary.h"
#include "radix_select.h"
#include "sampling_kernels.h"

namespace pellucid {

constexpr double kWeightOne = 0x1p40;  // weight of the most probable token

// The integer nearest to x, 0 <= x < 2^52: adding 2^52 leaves it in the low mantissa bits.
inline uint64_t rounded(double x) {
    const double sum = x + 0x1p52;
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return bits - 0x4330000000000000u;
}

// -ln of the probability of the most probable token (decoding/distribution.py log_total).
inline double log_total(uint64_t total) { return elementary::log(static_cast<double>(total) / kWeightOne); }

class Candidates {
  public:
    Candidates(const SamplingKernels& kernels, RadixSelect& select, int64_t max_vocab_size);

    // Parallel arrays by rising id. A value is the logit after temperature, above -inf.
    const int32_t* ids() const { return ids_.get(); }
    const float* values() const { return values_.get(); }
    const uint64_t* weights() const { return weights_.get(); }
    int64_t size() const { return size_; }
    int64_t index_of(int32_t id) const { return std::lower_bound(ids(), ids() + size_, id) - ids(); }

    // What a filter goes by: the sum of the weights, those of tokens that were not collected included.
    uint64_t total() const { return total_; }
    // What the weights are relative to.
    float max_value() const { return max_value_; }

    // Starts anew with the values v = scaled(x) of a row that are >= threshold, without weights. `maxima` are the
    // row's.
    void collect(const float* x, int64_t n, const float* maxima, float offset, float factor, float threshold);
    // Starts anew with the tokens of a row whose weight is about `floor` or more, surely with those from 2 * floor on.
    // `exps` is what the kernel exp_weights made of the row, with `total` as their sum.
    void collect_heavy(const float* x, int64_t n, float offset, float factor, const float* exps, uint64_t total,
                       double floor);

    // Drops those of value -inf.
    void drop_impossible();
    // The same, and gives the others their weights, relative to the highest value.
    void weigh();

    // Each keeps what the transform of that name does, and then total() is that of what it kept.
    void keep_top_k(int64_t k);  // k <= size; moves no weights
    void keep_values(double floor);
    void keep_weights(double floor);
    void keep_top_p(float p);
    void keep_typical(float p, double mean_gap);
    void exclude_top_choices(float threshold);

    // The mean of max_value - value under the weights (distribution.py mean_gap).
    double mean_gap() const;
    // The weight of those whose gap is less than `bound` from the mean.
    uint64_t weight_within(double bound, double mean_gap) const;

  private:
    double distance(int64_t i, double mean_gap) const {
        return std::fabs(static_cast<double>(max_value_ - values_[i]) - mean_gap);
    }
    template <typename Keep>
    void filter(Keep keep);
    void weigh_again();

    const SamplingKernels& kernels_;
    RadixSelect& select_;
    int64_t size_ = 0;
    uint64_t total_ = 0;
    float max_value_ = 0.0f;
    std::unique_ptr<int32_t[]> ids_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<uint64_t[]> weights_;
    std::unique_ptr<float[]> scratch_;
    std::unique_ptr<uint64_t[]> chunk_sums_;
};

}  // namespace pellucid
