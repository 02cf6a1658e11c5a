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

uint64_t multiply_high(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 Wide;
    return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
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
      penalties_(new Penalties),
      maxima_(new float[num_maxima(max_vocab_size)]),
      large_maxima_(new float[num_maxima(num_maxima(max_vocab_size))]),
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
        raw_log_total = log_total(total());
        if (row.num_logprobs > 0) {
            collect_top(std::min<int64_t>(row.num_logprobs, vocab_size), 0.0f, 1.0f);
            report_top(raw_max, raw_log_total, output);
        }
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
        collect(max_, factor_, -FLT_MAX);
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
    has_total_ = has_exp_ = is_final_ = false;
    max_ = kernels_.row_max(logits, vocab_size, maxima_.get());
    return max_ > -kInfinity;
}

void Sampler::scale(float factor) {
    has_total_ = has_total_ && factor == factor_;
    has_exp_ = has_exp_ && factor == factor_;
    factor_ = factor;
}

uint64_t Sampler::total() {
    if (!has_total_) {
        total_ = kernels_.exp_weights(logits_, vocab_size_, max_, factor_, nullptr, chunk_sums_.get());
        has_total_ = true;
    }
    return total_;
}

uint64_t Sampler::exp_all() {
    if (!has_exp_) {
        total_ = kernels_.exp_weights(logits_, vocab_size_, max_, factor_, exp_.get(), chunk_sums_.get());
        has_total_ = has_exp_ = true;
    }
    return total_;
}

double Sampler::mean_gap() {
    const uint64_t total = exp_all();
    const uint64_t sum = kernels_.gap_sum(logits_, vocab_size_, max_, factor_, exp_.get());
    return static_cast<double>(sum) / static_cast<double>(total);
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
    uint64_t target = multiply_high(bits, total());
    int64_t chunk = 0;
    while (target >= chunk_sums_[chunk]) target -= chunk_sums_[chunk++];
    int64_t i = chunk * kWeightChunk;
    if (!has_exp_) {
        const int64_t size = std::min(kWeightChunk, vocab_size_ - i);
        kernels_.exp_weights(logits_ + i, size, max_, factor_, &exp_[i], &chunk_sums_[chunk]);
    }
    for (uint64_t weight; target >= (weight = rounded(exp_[i])); ++i) target -= weight;
    return static_cast<int32_t>(i);
}

// decoding/mirostat.py surprise and next_mu.
float Sampler::next_mu(bool truncated, int32_t token, const SamplingRow& row) {
    // Of the whole row, `draw` has left the weights around the token.
    const uint64_t weight = truncated ? candidates_->weights()[candidates_->index_of(token)] : rounded(exp_[token]);
    const uint64_t sum = truncated ? candidates_->total() : total();
    const double observed = elementary::log(static_cast<double>(sum) / static_cast<double>(weight)) / elementary::kLn2;
    return static_cast<float>(static_cast<double>(row.mirostat_mu) -
                              static_cast<double>(row.mirostat_eta) *
                                  (observed - static_cast<double>(row.mirostat_tau)));
}

void Sampler::report_processed(bool truncated, const SamplingRow& row, RowOutput& output) {
    const float offset = row.temperature == 0.0f || is_final_ ? 0.0f : max_;
    float value, max;
    uint64_t sum;
    if (truncated) {
        value = candidates_->values()[candidates_->index_of(output.token)];
        max = candidates_->max_value();
        sum = candidates_->total();
    } else {
        value = (logits_[output.token] - offset) * factor_ + 0.0f;
        max = max_ - offset;
        sum = total();
    }
    const double log_of_total = log_total(sum);
    output.logprob = static_cast<float>(static_cast<double>(value) - static_cast<double>(max) - log_of_total);
    if (row.num_logprobs == 0) return;
    if (truncated) {
        candidates_->keep_top_k(std::min<int64_t>(row.num_logprobs, candidates_->size()));
    } else {
        collect_top(std::min<int64_t>(row.num_logprobs, vocab_size_), offset, factor_);
        candidates_->drop_impossible();
    }
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
