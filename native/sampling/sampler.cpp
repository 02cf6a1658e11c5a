#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "candidates.h"
#include "elementary.h"
#include "penalties.h"
#include "radix_select.h"
#include "sampling.h"

namespace pellucid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNumEstimated = 100;  // mirostat.py NUM_ESTIMATED

uint64_t multiply_high(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 Wide;
    return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}

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

double log_total(uint64_t total) { return elementary::log(static_cast<double>(total) / kWeightOne); }

double epsilon_floor(float epsilon, uint64_t total) {
    return std::min(static_cast<double>(epsilon) * static_cast<double>(total), kWeightOne);
}

double eta_floor(float epsilon, uint64_t total, double mean_gap) {
    const double by_entropy = std::sqrt(static_cast<double>(epsilon)) * elementary::exp(-mean_gap) * kWeightOne;
    return std::min(std::min(static_cast<double>(epsilon) * static_cast<double>(total), by_entropy), kWeightOne);
}

}  // namespace

uint64_t draw_bits(uint64_t seed, uint32_t sequence_index, uint32_t position, uint32_t stream) {
    uint32_t c0 = sequence_index, c1 = position, c2 = stream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return uint64_t{c0} << 32 | c1;
}

// Values to select from are also the maxima, which are more than the logits in a tiny vocabulary.
Sampler::Sampler(const SamplingKernels& kernels, int64_t max_vocab_size)
    : kernels_(kernels),
      max_vocab_size_(max_vocab_size),
      select_(new RadixSelect(std::max(max_vocab_size, num_maxima(max_vocab_size)))),
      candidates_(new Candidates(kernels, *select_, max_vocab_size)),
      penalties_(new Penalties(max_vocab_size)),
      maxima_(new float[num_maxima(max_vocab_size)]),
      scaled_maxima_(new float[num_maxima(max_vocab_size)]),
      exp_(new float[max_vocab_size]),
      chunk_sums_(new uint64_t[num_weight_chunks(max_vocab_size)]) {}

Sampler::~Sampler() = default;

RowStatus Sampler::sample(float* logits, int64_t vocab_size, const RowInput& input, RowOutput& output) {
    const SamplingRow& row = *input.row;
    const bool reports_raw = row.num_logprobs >= 0 && row.processed_logprobs == 0;
    double raw_max = 0.0, raw_log_total = 0.0;
    output.num_top = 0;
    if (reports_raw) {
        if (!take(logits, vocab_size)) return RowStatus::kBadLogits;
        raw_max = static_cast<double>(max_);
        raw_log_total = log_total(exp_all());
        collect_top(std::min<int64_t>(row.num_logprobs, vocab_size), 0.0f, 1.0f);
        report_top(raw_max, raw_log_total, output);
    }
    const bool penalizes = Penalties::any(input);
    if (penalizes || input.mask != nullptr || !reports_raw) {
        const RowStatus status = begin(logits, vocab_size, input);
        if (status != RowStatus::kOk) return status;
    }

    const bool greedy = row.temperature == 0.0f;
    const bool truncated = !greedy && truncate(row);
    output.mirostat_mu = row.mirostat_mu;
    if (greedy) {
        output.token = first_max();
    } else {
        output.token = draw(truncated, draw_bits(row.seed, row.sequence_index, row.position, kStreamSample));
        if (row.mirostat != 0) output.mirostat_mu = next_mu(truncated, output.token, row);
    }
    if (reports_raw) {
        const float now = logits[output.token], logit = penalizes ? penalties_->original(output.token, now) : now;
        output.logprob = static_cast<float>(static_cast<double>(logit) - raw_max - raw_log_total);
    } else if (row.num_logprobs >= 0) {
        report_processed(truncated, row, output);
    }
    return RowStatus::kOk;
}

RowStatus Sampler::survivors(float* logits, int64_t vocab_size, const RowInput& input, Survivors& kept) {
    const RowStatus status = begin(logits, vocab_size, input);
    if (status != RowStatus::kOk) return status;
    if (!truncate(*input.row)) {
        candidates_->collect(logits_, vocab_size_, max_, factor_, -FLT_MAX);
        candidates_->weigh();
    }
    kept = {{candidates_->ids(), candidates_->size()}, {candidates_->weights(), candidates_->size()}};
    return RowStatus::kOk;
}

// ---- the row -------------------------------------------------------------------------------------------------------

RowStatus Sampler::begin(float* logits, int64_t vocab_size, const RowInput& input) {
    const bool penalizes = Penalties::any(input);
    if (penalizes && !penalties_->apply(logits, vocab_size, input)) return RowStatus::kBadLogits;
    if (input.mask != nullptr && !(kernels_.apply_mask(logits, vocab_size, input.mask) > -kInfinity)) {
        return RowStatus::kBadLogits;
    }
    if (penalizes) penalties_->ban_repeated_ngrams(logits, vocab_size, input);
    if (take(logits, vocab_size)) return RowStatus::kOk;
    if (std::isnan(max_)) return RowStatus::kBadLogits;
    if (input.mask != nullptr) return RowStatus::kNothingLeft;
    if (!penalizes) return RowStatus::kBadLogits;
    penalties_->revert_bans(logits);
    return take(logits, vocab_size) ? RowStatus::kNothingLeft : RowStatus::kBadLogits;
}

bool Sampler::take(const float* logits, int64_t vocab_size) {
    logits_ = logits;
    vocab_size_ = vocab_size;
    factor_ = 1.0f;
    has_exp_ = false;
    max_ = kernels_.row_max(logits, vocab_size, maxima_.get());
    return max_ > -kInfinity;
}

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

void Sampler::scale(float factor) {
    has_exp_ = has_exp_ && factor == factor_;
    factor_ = factor;
}

uint64_t Sampler::exp_all() {
    if (!has_exp_) {
        exp_total_ = kernels_.exp_weights(logits_, vocab_size_, max_, factor_, exp_.get(), chunk_sums_.get());
        has_exp_ = true;
    }
    return exp_total_;
}

double Sampler::mean_gap() {
    const uint64_t total = exp_all();
    const uint64_t sum = kernels_.gap_sum(logits_, vocab_size_, max_, factor_, exp_.get());
    return static_cast<double>(sum) / static_cast<double>(total);
}

// ---- truncation ----------------------------------------------------------------------------------------------------

bool Sampler::truncate(const SamplingRow& row) {
    scale(temperature_factor(row));
    if (row.mirostat != 0) return truncate_by_mirostat(row);
    const bool excludes_top_choices = coin(row);
    Candidates& kept = *candidates_;
    if (!collect(row)) {
        if (!excludes_top_choices) return false;
        collect_heavy(0.0);
        return kept.exclude_top_choices(row.xtc_threshold);
    }
    if (row.top_p < 1.0f) kept.keep_top_p(row.top_p);
    if (row.min_p > 0.0f) kept.keep_weights(static_cast<double>(row.min_p) * kWeightOne);
    if (row.typical_p < 1.0f) kept.keep_typical(row.typical_p);
    if (row.epsilon_cutoff > 0.0f) kept.keep_weights(epsilon_floor(row.epsilon_cutoff, kept.total()));
    if (row.eta_cutoff > 0.0f) kept.keep_weights(eta_floor(row.eta_cutoff, kept.total(), kept.mean_gap()));
    if (excludes_top_choices) kept.exclude_top_choices(row.xtc_threshold);
    return true;
}

bool Sampler::collect(const SamplingRow& row) {
    const bool has_top_k = row.top_k > 0 && row.top_k < vocab_size_;
    if (has_top_k || row.top_n_sigma > 0.0f) {
        const double floor = row.top_n_sigma > 0.0f ? sigma_floor(row.top_n_sigma) : -DBL_MAX;
        if (has_top_k) {
            collect_top(row.top_k, max_, factor_);
        } else {
            candidates_->collect(logits_, vocab_size_, max_, factor_, rounded_up(floor));
        }
        candidates_->weigh();
        if (has_top_k && row.top_n_sigma > 0.0f) candidates_->keep_values(floor);
    } else if (row.top_p < 1.0f) {
        collect_nucleus(row.top_p);
    } else if (row.min_p > 0.0f) {
        collect_heavy(static_cast<double>(row.min_p) * kWeightOne);
    } else if (row.typical_p >= 1.0f && row.epsilon_cutoff > 0.0f) {
        collect_heavy(epsilon_floor(row.epsilon_cutoff, exp_all()));
    } else if (row.typical_p < 1.0f || row.eta_cutoff > 0.0f) {
        collect_heavy(0.0);
    } else {
        return false;
    }
    return true;
}

bool Sampler::truncate_by_mirostat(const SamplingRow& row) {
    if (row.mirostat == 1) return mirostat_top_k(row.mirostat_mu);
    const double floor =
        static_cast<double>(exp_all()) * elementary::exp(-static_cast<double>(row.mirostat_mu) * elementary::kLn2);
    if (floor <= 0.0) return false;
    collect_heavy(std::min(floor, kWeightOne));
    candidates_->keep_weights(std::min(floor, kWeightOne));
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

// Leaves the k highest of (logits - offset) * factor + 0 as the candidates, without weights.
void Sampler::collect_top(int64_t k, float offset, float factor) {
    // The k-th largest of the maxima of disjoint parts has at least k logits at or above it.
    float threshold = -kInfinity;
    const int64_t parts = num_maxima(vocab_size_);
    if (k == 0) {
        threshold = kInfinity;
    } else if (k <= parts) {
        for (int64_t i = 0; i < parts; ++i) scaled_maxima_[i] = (maxima_[i] - offset) * factor + 0.0f;
        threshold = select_->kth_largest(scaled_maxima_.get(), parts, k);
    }
    candidates_->collect(logits_, vocab_size_, offset, factor, threshold);
    candidates_->keep_top_k(k);
}

// Leaves the tokens of at least that weight as the candidates, and perhaps lighter ones, none of weight 0.
void Sampler::collect_heavy(double floor) {
    const uint64_t total = exp_all();  // before exp_ is read
    // Half of the floor leaves room for rounding.
    candidates_->collect_heavy(logits_, vocab_size_, max_, factor_, exp_.get(), total, std::max(floor * 0.5, 0.5));
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

// ---- the choice, and what is reported of it ------------------------------------------------------------------------

int32_t Sampler::first_max() const {
    int64_t group = 0;
    while (std::none_of(&maxima_[group * 16], &maxima_[group * 16] + 16, [this](float m) { return m == max_; }))
        ++group;
    const float* begin = logits_ + group * kMaximaGroup;
    return static_cast<int32_t>(std::find(begin, logits_ + vocab_size_, max_) - logits_);
}

// The token that `bits` choose: by rising id, the first whose cumulative weight exceeds their share of the total.
int32_t Sampler::draw(bool truncated, uint64_t bits) {
    if (truncated) {
        const uint64_t* weights = candidates_->weights();
        uint64_t target = multiply_high(bits, candidates_->total());
        int64_t i = 0;
        while (target >= weights[i]) target -= weights[i++];
        return candidates_->ids()[i];
    }
    uint64_t target = multiply_high(bits, exp_all());
    int64_t chunk = 0;
    while (target >= chunk_sums_[chunk]) target -= chunk_sums_[chunk++];
    int64_t i = chunk * kWeightChunk;
    for (uint64_t weight; target >= (weight = rounded(exp_[i])); ++i) target -= weight;
    return static_cast<int32_t>(i);
}

// decoding/mirostat.py surprise and next_mu.
float Sampler::next_mu(bool truncated, int32_t token, const SamplingRow& row) {
    uint64_t weight, total;
    if (truncated) {
        weight = candidates_->weights()[candidates_->index_of(token)];
        total = candidates_->total();
    } else {
        total = exp_all();
        weight = rounded(exp_[token]);
    }
    const double observed =
        elementary::log(static_cast<double>(total) / static_cast<double>(weight)) / elementary::kLn2;
    return static_cast<float>(static_cast<double>(row.mirostat_mu) -
                              static_cast<double>(row.mirostat_eta) *
                                  (observed - static_cast<double>(row.mirostat_tau)));
}

void Sampler::report_processed(bool truncated, const SamplingRow& row, RowOutput& output) {
    float value, max = 0.0f;
    uint64_t total;
    if (truncated) {
        value = candidates_->values()[candidates_->index_of(output.token)];
        max = candidates_->max_value();
        total = candidates_->total();
        candidates_->keep_top_k(std::min<int64_t>(row.num_logprobs, candidates_->size()));
    } else {
        // Greedy leaves the row as it is.
        const float offset = row.temperature == 0.0f ? 0.0f : max_;
        value = (logits_[output.token] - offset) * factor_ + 0.0f;
        max = max_ - offset;
        total = exp_all();
        collect_top(std::min<int64_t>(row.num_logprobs, vocab_size_), offset, factor_);
        candidates_->drop_impossible();
    }
    const double log_of_total = log_total(total);
    output.logprob = static_cast<float>(static_cast<double>(value) - static_cast<double>(max) - log_of_total);
    report_top(static_cast<double>(max), log_of_total, output);
}

// Reports the candidates, most probable first, lower id first on a tie.
void Sampler::report_top(double max, double log_total, RowOutput& output) {
    const int32_t* ids = candidates_->ids();
    const float* values = candidates_->values();
    ranked_.clear();
    for (int64_t i = 0; i < candidates_->size(); ++i) {
        ranked_.push_back(uint64_t{~order_key(values[i])} << 32 | static_cast<uint32_t>(ids[i]));
    }
    std::sort(ranked_.begin(), ranked_.end());
    output.num_top = candidates_->size();
    for (int64_t i = 0; i < output.num_top; ++i) {
        const float value = from_order_key(~static_cast<uint32_t>(ranked_[i] >> 32));
        output.top_ids[i] = static_cast<int32_t>(ranked_[i]);
        output.top_logprobs[i] = static_cast<float>(static_cast<double>(value) - max - log_total);
    }
}

std::string describe_bad_logits(const float* logits, int64_t vocab_size, int64_t row) {
    const std::string prefix = "logits of row " + std::to_string(row) + " cannot be sampled: ";
    const float* bad = std::find_if(logits, logits + vocab_size, [](float x) { return !(x < kInfinity); });
    if (bad == logits + vocab_size) return prefix + "every token has -inf";
    return prefix + "token " + std::to_string(bad - logits) + " has " + (std::isnan(*bad) ? "NaN" : "+inf");
}

}  // namespace pellucid
