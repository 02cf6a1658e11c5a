// Temperature and truncations of a whole row: what is left of it, without sorting the vocabulary.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "candidates.h"
#include "elementary.h"
#include "radix_select.h"
#include "sampling.h"

namespace pellucid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNumEstimated = 100;  // mirostat.py NUM_ESTIMATED

float inverse(float temperature) { return std::min(std::max(1.0f / temperature, FLT_MIN), FLT_MAX); }

// The smallest float32 that is >= x.
float rounded_up(double x) {
    const auto nearest = static_cast<float>(std::max(x, -static_cast<double>(FLT_MAX)));
    return static_cast<double>(nearest) >= x ? nearest : std::nextafter(nearest, kInfinity);
}

bool coin(const SamplingRow& row) {
    if (row.xtc_probability <= 0.0f) return false;
    const uint64_t bits = draw_bits(row.seed, row.sequence_index, row.position, kStreamXtc);
    return static_cast<double>(bits >> 11) * 0x1p-53 < static_cast<double>(row.xtc_probability);
}

// The float weight from which collect_heavy takes tokens: half of the floor leaves room for rounding.
double collected_from(double floor) { return std::max(floor * 0.5, 0.5); }

double epsilon_floor(float epsilon, uint64_t total) {
    return std::min(static_cast<double>(epsilon) * static_cast<double>(total), kWeightOne);
}

double eta_floor(float epsilon, uint64_t total, double mean_gap) {
    const double by_entropy = std::sqrt(static_cast<double>(epsilon)) * elementary::exp(-mean_gap) * kWeightOne;
    return std::min(std::min(static_cast<double>(epsilon) * static_cast<double>(total), by_entropy), kWeightOne);
}

}  // namespace

float Sampler::temperature_factor(const SamplingRow& row) {
    if (row.dynatemp_range <= 0.0f) return inverse(row.temperature);
    const double middle = row.temperature, range = row.dynatemp_range;
    const double low = std::max(0.0, middle - range), high = middle + range;
    const int64_t count = kernels_.count_finite(logits_, vocab_size_);
    double uncertainty = 0.0;
    if (count > 1) {
        const double entropy = log_total(exp_all()) + mean_gap();
        uncertainty = entropy / elementary::log(static_cast<double>(count));
    }
    const double share = elementary::power(uncertainty, row.dynatemp_exponent);
    return inverse(static_cast<float>(low + (high - low) * share));
}

bool Sampler::truncate(const SamplingRow& row) {
    scale(temperature_factor(row));
    if (row.mirostat != 0) return truncate_by_mirostat(row);
    const bool excludes_top_choices = coin(row);
    const Stage done = truncate_row(row);
    Candidates& kept = *candidates_;
    if (done == Stage::kNone) {
        if (excludes_top_choices) exclude_top_choices(row.xtc_threshold);
        return false;
    }
    if (done < Stage::kTopP && row.top_p < 1.0f) kept.keep_top_p(row.top_p);
    if (done < Stage::kMinP && row.min_p > 0.0f) kept.keep_weights(static_cast<double>(row.min_p) * kWeightOne);
    if (done < Stage::kTypicalP && row.typical_p < 1.0f) kept.keep_typical(row.typical_p, kept.mean_gap());
    if (done < Stage::kEpsilon && row.epsilon_cutoff > 0.0f) {
        kept.keep_weights(epsilon_floor(row.epsilon_cutoff, kept.total()));
    }
    if (done < Stage::kEta && row.eta_cutoff > 0.0f) {
        kept.keep_weights(eta_floor(row.eta_cutoff, kept.total(), kept.mean_gap()));
    }
    if (excludes_top_choices) kept.exclude_top_choices(row.xtc_threshold);
    return true;
}

Sampler::Stage Sampler::truncate_row(const SamplingRow& row) {
    const bool has_top_k = row.top_k > 0 && row.top_k < vocab_size_, has_sigma = row.top_n_sigma > 0.0f;
    if (has_top_k || has_sigma) {
        const double floor = has_sigma ? sigma_floor(row.top_n_sigma) : -DBL_MAX;
        if (has_top_k) {
            collect_top(row.top_k, max_, factor_);
        } else {
            collect(max_, factor_, rounded_up(floor));
        }
        candidates_->weigh();
        if (has_top_k && has_sigma) candidates_->keep_values(floor);
        return Stage::kTopK;
    }
    if (row.top_p < 1.0f) {
        collect_nucleus(row.top_p);
        candidates_->keep_top_p(row.top_p);
        return Stage::kTopP;
    }
    if (row.min_p > 0.0f) {
        keep_weights(static_cast<double>(row.min_p) * kWeightOne);
        return Stage::kMinP;
    }
    if (row.typical_p < 1.0f) {
        const double mean = mean_gap();
        collect_typical(row.typical_p, mean);
        candidates_->keep_typical(row.typical_p, mean);
        return Stage::kTypicalP;
    }
    if (row.epsilon_cutoff > 0.0f) {
        keep_weights(epsilon_floor(row.epsilon_cutoff, exp_all()));
        return Stage::kEpsilon;
    }
    if (row.eta_cutoff > 0.0f) {
        keep_weights(eta_floor(row.eta_cutoff, exp_all(), mean_gap()));
        return Stage::kEta;
    }
    return Stage::kNone;
}

// Candidates::exclude_top_choices of the whole row; what is left of it takes its place.
void Sampler::exclude_top_choices(float threshold) {
    keep_weights(std::max(static_cast<double>(threshold) * static_cast<double>(exp_all()), 1.0));
    const int64_t num_top = candidates_->size();
    if (num_top < 2) return;
    const float* values = candidates_->values();
    int64_t last = 0;
    for (int64_t i = 1; i < num_top; ++i) last = values[i] <= values[last] ? i : last;
    if (final_ == nullptr) final_.reset(new float[max_vocab_size_]);
    kernels_.keep_weighted(logits_, vocab_size_, max_, factor_, exp_.get(), final_.get());
    for (int64_t i = 0; i < num_top; ++i) {
        if (i != last) final_[candidates_->ids()[i]] = -kInfinity;
    }
    take(final_.get(), vocab_size_);
    is_final_ = true;
}

bool Sampler::truncate_by_mirostat(const SamplingRow& row) {
    if (row.mirostat == 1) return mirostat_top_k(row.mirostat_mu);
    const double floor =
        static_cast<double>(exp_all()) * elementary::exp(-static_cast<double>(row.mirostat_mu) * elementary::kLn2);
    if (floor <= 0.0) return false;
    keep_weights(std::min(floor, kWeightOne));
    return true;
}

// decoding/mirostat.py mirostat_v1.
bool Sampler::mirostat_top_k(float mu) {
    collect_top(std::min(kNumEstimated, vocab_size_), max_, factor_);
    candidates_->weigh();
    const int64_t size = candidates_->size();
    std::vector<float> top(candidates_->values(), candidates_->values() + size);
    std::sort(top.begin(), top.end(), [](float a, float b) { return a > b; });
    const auto weighted =
        static_cast<size_t>(size - std::count(candidates_->weights(), candidates_->weights() + size, uint64_t{0}));
    double sum_tb = 0.0, sum_tt = 0.0;
    for (size_t i = 1; i < weighted; ++i) {
        const double t = elementary::log(static_cast<double>(i + 1) / static_cast<double>(i));
        sum_tb += t * (static_cast<double>(top[i - 1]) - static_cast<double>(top[i]));
        sum_tt += t * t;
    }
    if (sum_tb == 0.0) return false;
    const double s = sum_tb / sum_tt, a = s - 1.0;
    const double log_size = elementary::log(static_cast<double>(vocab_size_));
    const double denominator = 1.0 - elementary::exp(-a * log_size);
    const double fraction = denominator != 0.0 ? a / denominator : 1.0 / log_size;
    const double k = elementary::exp((elementary::log(fraction) + static_cast<double>(mu) * elementary::kLn2) / s);
    if (k >= static_cast<double>(vocab_size_)) return false;
    collect_top(std::max<int64_t>(1, static_cast<int64_t>(k)), max_, factor_);
    candidates_->weigh();
    return true;
}

void Sampler::collect(float offset, float factor, float threshold) {
    candidates_->collect(logits_, vocab_size_, maxima_.get(), offset, factor, threshold);
}

// Leaves the k highest of (logits - offset) * factor + 0 as the candidates, without weights.
void Sampler::collect_top(int64_t k, float offset, float factor) {
    // The k-th largest of the maxima of disjoint parts of the row has at least k logits at or above it, and few more
    // where there are many more parts than k.
    float threshold = -kInfinity;
    const int64_t parts = num_maxima(vocab_size_), large_parts = num_maxima(parts);
    const bool takes_large = 2 * k <= large_parts;
    if (takes_large || k <= parts) {
        if (takes_large) kernels_.row_max(maxima_.get(), parts, large_maxima_.get());
        const float* maxima = takes_large ? large_maxima_.get() : maxima_.get();
        const int64_t size = takes_large ? large_parts : parts;
        for (int64_t i = 0; i < size; ++i) scaled_maxima_[i] = (maxima[i] - offset) * factor + 0.0f;
        threshold = select_->kth_largest(scaled_maxima_.get(), size, k);
    }
    collect(offset, factor, threshold);
    candidates_->keep_top_k(k);
}

void Sampler::keep_weights(double floor) {
    collect_heavy(floor);
    candidates_->keep_weights(floor);
}

// Leaves the tokens of at least that weight as the candidates, and perhaps lighter ones, none of weight 0.
void Sampler::collect_heavy(double floor) {
    const uint64_t total = exp_all();  // before exp_ is read
    candidates_->collect_heavy(logits_, vocab_size_, max_, factor_, exp_.get(), total, collected_from(floor));
}

// Candidates that hold every survivor of top-p. exp is monotonic, so that the tokens above a weight are the first ones
// by falling logit; they are enough once they weigh as much as top-p asks for.
void Sampler::collect_nucleus(float top_p) {
    const uint64_t total = exp_all();
    const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    // The last token that top-p keeps and those after it weigh more than total - target together, so that it weighs
    // more than their mean over the vocabulary.
    const auto tail = static_cast<double>(total - target);
    const double safe_floor = tail / static_cast<double>(vocab_size_);
    const double floor = guess_floor(tail);
    if (floor > safe_floor) {
        collect_heavy(floor);
        uint64_t collected = 0;
        for (int64_t i = 0; i < candidates_->size(); ++i) collected += candidates_->weights()[i];
        if (collected >= target) return;
    }
    collect_heavy(safe_floor);
}

// Candidates that hold every survivor of typical-p. A token that is not collected is further below the most probable
// one than its weight allows; they are enough once those nearer to the mean weigh as much as typical-p asks for.
void Sampler::collect_typical(float typical_p, double mean_gap) {
    constexpr double kMargin = 0.01;  // far more than exp errs
    const uint64_t total = exp_all();
    const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(typical_p) * static_cast<double>(total)));
    // Down to where a token is as far beyond the mean as the most probable one is before it.
    double floor =
        std::min(guess_floor(static_cast<double>(total - target)), elementary::exp(-2.0 * mean_gap) * kWeightOne);
    for (; floor >= 1.0; floor /= 16.0) {
        collect_heavy(floor);
        const double gap = elementary::log(kWeightOne / collected_from(floor)) - kMargin;
        if (candidates_->weight_within(gap - mean_gap, mean_gap) >= target) return;
    }
    collect_heavy(0.0);
}

// A weight such that the tokens below half of it probably weigh less than `tail` together; 0 where there is none to be
// had.
double Sampler::guess_floor(double tail) const {
    constexpr double kMargin = 1.2;
    float thresholds[kNumTails], tails[kNumTails];
    for (int j = 0; j < kNumTails; ++j) thresholds[j] = std::ldexp(1.0f, kWeightBits - 4 - 2 * j);
    kernels_.estimate_tails(exp_.get(), vocab_size_, thresholds, tails);
    for (int j = 0; j < kNumTails; ++j) {
        if (static_cast<double>(tails[j]) * kMargin < tail) return 2.0 * static_cast<double>(thresholds[j]);
    }
    return 0.0;
}

double Sampler::sigma_floor(float n) {
    double sum, sum_of_squares;
    const auto count = static_cast<double>(kernels_.spread(logits_, vocab_size_, max_, factor_, &sum, &sum_of_squares));
    const double mean = sum / count;
    const double variance = sum_of_squares / count - mean * mean;
    return 0.0 - static_cast<double>(n) * std::sqrt(std::max(variance, 0.0));
}

}  // namespace pellucid
