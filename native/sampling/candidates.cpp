#include "candidates.h"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace pellucid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The weight that the first tokens have to reach together for a share of p.
uint64_t share(float p, uint64_t total) {
    return static_cast<uint64_t>(std::ceil(static_cast<double>(p) * static_cast<double>(total)));
}

}  // namespace

Candidates::Candidates(const SamplingKernels& kernels, RadixSelect& select, int64_t max_vocab_size)
    : kernels_(kernels),
      select_(select),
      ids_(new int32_t[max_vocab_size + kCollectSlack]),
      values_(new float[max_vocab_size + kCollectSlack]),
      weights_(new uint64_t[max_vocab_size]),
      scratch_(new float[max_vocab_size + kCollectSlack]),
      chunk_sums_(new uint64_t[num_weight_chunks(max_vocab_size)]) {}

void Candidates::collect(const float* x, int64_t n, const float* maxima, float offset, float factor, float threshold) {
    size_ = kernels_.collect(x, n, maxima, offset, factor, threshold, ids_.get(), values_.get());
}

void Candidates::collect_heavy(const float* x, int64_t n, float offset, float factor, const float* exps, uint64_t total,
                               double floor) {
    const int64_t size =
        kernels_.collect(exps, n, nullptr, 0.0f, 1.0f, static_cast<float>(floor), ids_.get(), scratch_.get());
    size_ = 0;
    for (int64_t i = 0; i < size; ++i) {
        const float value = (x[ids_[i]] - offset) * factor + 0.0f;
        ids_[size_] = ids_[i];
        values_[size_] = value;
        weights_[size_] = rounded(scratch_[i]);
        size_ += value > -kInfinity;
    }
    max_value_ = 0.0f;
    total_ = total;
}

void Candidates::drop_impossible() {
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
        ids_[kept] = ids_[i];
        values_[kept] = values_[i];
        kept += values_[i] > -kInfinity;
    }
    size_ = kept;
}

void Candidates::weigh() {
    drop_impossible();
    max_value_ = *std::max_element(values_.get(), values_.get() + size_);
    total_ = kernels_.exp_weights(values_.get(), size_, max_value_, 1.0f, scratch_.get(), chunk_sums_.get());
    for (int64_t i = 0; i < size_; ++i) weights_[i] = rounded(scratch_[i]);
}

template <typename Keep>
void Candidates::filter(Keep keep) {
    int64_t kept = 0;
    total_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
        const bool keeps = keep(i);
        ids_[kept] = ids_[i];
        values_[kept] = values_[i];
        weights_[kept] = weights_[i];
        total_ += keeps ? weights_[i] : 0;
        kept += keeps;
    }
    size_ = kept;
}

void Candidates::keep_top_k(int64_t k) {
    if (size_ == k) return;
    RadixSelect::Cut cut =
        select_.find(values_.get(), size_, static_cast<uint64_t>(k), [](int64_t) { return uint64_t{1}; });
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
        const uint32_t key = order_key(values_[i]);
        bool keep = key > cut.key;
        if (key == cut.key && cut.remaining > 0) {
            keep = true;
            --cut.remaining;
        }
        ids_[kept] = ids_[i];
        values_[kept] = values_[i];
        kept += keep;
    }
    size_ = kept;
}

void Candidates::keep_values(double floor) {
    filter([&](int64_t i) { return static_cast<double>(values_[i]) >= floor; });
}

void Candidates::keep_weights(double floor) {
    filter([&](int64_t i) { return static_cast<double>(weights_[i]) >= floor; });
}

void Candidates::keep_top_p(float p) {
    RadixSelect::Cut cut = select_.find(values_.get(), size_, share(p, total_), [&](int64_t i) { return weights_[i]; });
    filter([&](int64_t i) {
        const uint32_t key = order_key(values_[i]);
        if (key != cut.key) return key > cut.key;
        const bool keep = cut.remaining > 0;
        cut.remaining -= std::min(cut.remaining, weights_[i]);
        return keep;
    });
}

// Tokens are ranked by their distance rounded to float32, and those that tie with the last one kept by the distance.
void Candidates::keep_typical(float p, double mean_gap) {
    for (int64_t i = 0; i < size_; ++i) scratch_[i] = 0.0f - static_cast<float>(distance(i, mean_gap));
    RadixSelect::Cut cut =
        select_.find(scratch_.get(), size_, share(p, total_), [&](int64_t i) { return weights_[i]; });
    std::vector<std::pair<double, int64_t>> ties;
    for (int64_t i = 0; i < size_; ++i) {
        if (order_key(scratch_[i]) == cut.key && weights_[i] > 0) ties.emplace_back(distance(i, mean_gap), i);
    }
    std::sort(ties.begin(), ties.end());
    for (const auto& [unused, i] : ties) {
        if (cut.remaining == 0) scratch_[i] = -kInfinity;
        cut.remaining -= std::min(cut.remaining, weights_[i]);
    }
    filter([&](int64_t i) { return order_key(scratch_[i]) >= cut.key && weights_[i] > 0; });
    weigh_again();
}

uint64_t Candidates::weight_within(double bound, double mean_gap) const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < size_; ++i) sum += distance(i, mean_gap) < bound ? weights_[i] : 0;
    return sum;
}

void Candidates::exclude_top_choices(float threshold) {
    const double floor = static_cast<double>(threshold) * static_cast<double>(total_);
    const auto is_top = [&](int64_t i) { return weights_[i] > 0 && static_cast<double>(weights_[i]) >= floor; };
    int64_t num_top = 0, last = -1;
    for (int64_t i = 0; i < size_; ++i) {
        if (!is_top(i)) continue;
        ++num_top;
        if (last < 0 || values_[i] <= values_[last]) last = i;
    }
    if (num_top < 2) return;
    filter([&](int64_t i) { return weights_[i] > 0 && (i == last || !is_top(i)); });
    weigh_again();
}

double Candidates::mean_gap() const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < size_; ++i) {
        if (weights_[i] == 0) continue;
        sum += rounded(static_cast<double>(weights_[i]) * static_cast<double>(max_value_ - values_[i]));
    }
    return static_cast<double>(sum) / static_cast<double>(total_);
}

// The highest value may have been dropped.
void Candidates::weigh_again() {
    if (*std::max_element(values_.get(), values_.get() + size_) < max_value_) weigh();
}

}  // namespace pellucid
