#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

namespace pellucid {

namespace {

constexpr double kWeightOne = 0x1p40;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBins = 2048;

// Adding 2^52 leaves the integer nearest to x in the low mantissa bits.
uint64_t rounded(float x) {
    const double sum = static_cast<double>(x) + 0x1p52;
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return bits - 0x4330000000000000u;
}

// Unsigned integers in the order of the floats (no NaN, no -0).
uint32_t order_key(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float from_order_key(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float scaled(float x, float offset, float factor) { return (x - offset) * factor + 0.0f; }

float inverse(float temperature) { return std::min(std::max(1.0f / temperature, FLT_MIN), FLT_MAX); }

// The weight that top-p has to reach.
uint64_t mass(float top_p, uint64_t total) {
    return static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

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

// Values and pending entries are also made of the maxima, which are more than the logits in a tiny vocabulary.
Sampler::Sampler(const SamplingKernels& kernels, int64_t max_vocab_size)
    : kernels_(kernels),
      max_vocab_size_(max_vocab_size),
      maxima_(new float[num_maxima(max_vocab_size)]),
      exp_(new float[max_vocab_size]),
      chunk_sums_(new uint64_t[num_weight_chunks(max_vocab_size)]),
      ids_(new int32_t[max_vocab_size + kCollectSlack]),
      values_(new float[std::max(max_vocab_size, num_maxima(max_vocab_size)) + kCollectSlack]),
      weights_(new uint64_t[max_vocab_size]),
      pending_(new uint64_t[std::max(max_vocab_size, num_maxima(max_vocab_size))]),
      bins_(new uint64_t[2 * kBins]) {}

bool Sampler::begin_row(const float* logits, int64_t vocab_size) {
    logits_ = logits;
    vocab_size_ = vocab_size;
    exp_factor_ = 0.0f;
    max_ = kernels_.row_max(logits, vocab_size, maxima_.get());
    return max_ > -kInfinity;
}

int32_t Sampler::choose(const SamplingRow& row, uint64_t bits) {
    if (row.temperature == 0.0f) return first_max();
    const bool keeps_all = (row.top_k == 0 || row.top_k >= vocab_size_) && row.top_p >= 1.0f && row.min_p <= 0.0f;
    if (keeps_all) return draw_from_all(inverse(row.temperature), bits);
    const Survivors kept = survivors(row);
    uint64_t target = multiply_high(bits, kept.total);
    int64_t i = 0;
    while (target >= kept.weights[i]) target -= kept.weights[i++];
    return kept.ids[i];
}

Sampler::Survivors Sampler::survivors(const SamplingRow& row) {
    const float factor = inverse(row.temperature);
    const bool has_top_k = row.top_k > 0 && row.top_k < vocab_size_;
    Survivors kept;
    if (has_top_k) {
        kept = collect_top_k(row.top_k, factor);
    } else if (row.top_p < 1.0f) {
        kept = collect_nucleus(row.top_p, factor);
    } else {
        exp_all(factor);
        kept = collect_above(static_cast<float>(row.min_p * kWeightOne * 0.5), factor);  // half: keep_min_p is exact
    }
    if (row.top_p < 1.0f) {
        kept.size = keep_prefix(
            kept.size, mass(row.top_p, kept.total), [&](int64_t i) { return weights_[i]; },
            [&](int64_t from, int64_t to) {
                ids_[to] = ids_[from];
                weights_[to] = weights_[from];
            });
    }
    if (row.min_p > 0.0f) kept.size = keep_min_p(kept.size, row.min_p);
    kept.total = 0;
    for (int64_t i = 0; i < kept.size; ++i) kept.total += weights_[i];
    return kept;
}

float Sampler::raw_logprob(int32_t token) {
    const double log_sum = std::log(static_cast<double>(exp_all(1.0f)) / kWeightOne);
    return static_cast<float>(static_cast<double>(logits_[token]) - static_cast<double>(max_) - log_sum);
}

int64_t Sampler::top_logprobs(int64_t count, int32_t* ids, float* logprobs) {
    count = std::min(count, vocab_size_);
    if (count == 0) return 0;
    collect_top(count, 0.0f, 1.0f);
    for (int64_t i = 0; i < count; ++i) {
        pending_[i] = uint64_t{order_key(values_[i])} << 32 | ~static_cast<uint32_t>(ids_[i]);
    }
    std::sort(pending_.get(), pending_.get() + count, [](uint64_t a, uint64_t b) { return a > b; });
    for (int64_t i = 0; i < count; ++i) {
        ids[i] = static_cast<int32_t>(~static_cast<uint32_t>(pending_[i]));
        logprobs[i] = raw_logprob(ids[i]);
    }
    return count;
}

int32_t Sampler::first_max() const {
    int64_t group = 0;
    while (std::none_of(&maxima_[group * 16], &maxima_[group * 16] + 16, [this](float m) { return m == max_; }))
        ++group;
    const float* begin = logits_ + group * kMaximaGroup;
    return static_cast<int32_t>(std::find(begin, logits_ + vocab_size_, max_) - logits_);
}

int32_t Sampler::draw_from_all(float factor, uint64_t bits) {
    uint64_t target = multiply_high(bits, exp_all(factor));
    int64_t chunk = 0;
    while (target >= chunk_sums_[chunk]) target -= chunk_sums_[chunk++];
    int64_t i = chunk * kWeightChunk;
    for (uint64_t weight; target >= (weight = rounded(exp_[i])); ++i) target -= weight;
    return static_cast<int32_t>(i);
}

uint64_t Sampler::exp_all(float factor) {
    if (exp_factor_ != factor) {
        exp_total_ = kernels_.exp_weights(logits_, vocab_size_, max_, factor, exp_.get(), chunk_sums_.get());
        exp_factor_ = factor;
    }
    return exp_total_;
}

// The candidates after top-k, and their total.
Sampler::Survivors Sampler::collect_top_k(int64_t k, float factor) {
    int64_t size = collect_top(k, max_, factor);
    exp_factor_ = 0.0f;
    const uint64_t total = kernels_.exp_weights(values_.get(), size, 0.0f, 1.0f, exp_.get(), chunk_sums_.get());
    size = weigh(size, exp_.get(), [&](int64_t i) { return values_[i]; });
    return {ids_.get(), weights_.get(), size, total};
}

// Candidates that hold every survivor of top-p, with the total of all tokens. exp is monotonic, so that the tokens
// above a weight are the first ones by falling logit; they are enough once they weigh as much as top-p asks for.
Sampler::Survivors Sampler::collect_nucleus(float top_p, float factor) {
    const uint64_t total = exp_all(factor), target = mass(top_p, total);
    // The last token that top-p keeps and those after it weigh more than total - target together, so that it weighs
    // more than their mean over the vocabulary. Half of that leaves room for rounding.
    const auto tail = static_cast<double>(total - target);
    const auto safe_floor = static_cast<float>(tail / static_cast<double>(vocab_size_) * 0.5);
    const float floor = guess_floor(tail);
    if (floor > safe_floor) {
        Survivors heavy = collect_above(floor, factor);
        if (heavy.total >= target) return {heavy.ids, heavy.weights, heavy.size, total};
    }
    const Survivors all = collect_above(safe_floor, factor);
    return {all.ids, all.weights, all.size, total};
}

// A weight such that the tokens below it probably weigh less than `tail` together; 0 where there is none to be had.
float Sampler::guess_floor(double tail) const {
    constexpr double kMargin = 1.2;
    float thresholds[kNumTails], tails[kNumTails];
    for (int j = 0; j < kNumTails; ++j) thresholds[j] = std::ldexp(1.0f, kWeightBits - 4 - 2 * j);
    kernels_.estimate_tails(exp_.get(), vocab_size_, thresholds, tails);
    for (int j = 0; j < kNumTails; ++j) {
        if (static_cast<double>(tails[j]) * kMargin < tail) return thresholds[j];
    }
    return 0.0f;
}

// The candidates of at least that float weight, with their total.
Sampler::Survivors Sampler::collect_above(float floor, float factor) {
    int64_t size = kernels_.collect(exp_.get(), vocab_size_, 0.0f, 1.0f, floor, ids_.get(), values_.get());
    size = weigh(size, values_.get(), [&](int64_t i) { return scaled(logits_[ids_[i]], max_, factor); });
    uint64_t total = 0;
    for (int64_t i = 0; i < size; ++i) total += weights_[i];
    return {ids_.get(), weights_.get(), size, total};
}

// Sets the weights and values of the candidates; drops those of value -inf, which no transform keeps.
template <typename Value>
int64_t Sampler::weigh(int64_t size, const float* exps, Value value_of) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
        const float value = value_of(i);
        weights_[kept] = rounded(exps[i]);
        ids_[kept] = ids_[i];
        values_[kept] = value;
        kept += value > -kInfinity;
    }
    return kept;
}

// Leaves the k highest scaled logits as the candidates; returns k.
int64_t Sampler::collect_top(int64_t k, float offset, float factor) {
    // The k-th largest of the maxima of disjoint parts has at least k logits at or above it.
    float threshold = -kInfinity;
    const int64_t parts = num_maxima(vocab_size_);
    const auto one = [](int64_t) { return uint64_t{1}; };
    if (k <= parts) {
        for (int64_t i = 0; i < parts; ++i) values_[i] = scaled(maxima_[i], offset, factor);
        threshold = from_order_key(find_cut(values_.get(), parts, static_cast<uint64_t>(k), one).key);
    }
    const int64_t size = kernels_.collect(logits_, vocab_size_, offset, factor, threshold, ids_.get(), values_.get());
    if (size == k) return size;
    return keep_prefix(size, static_cast<uint64_t>(k), one, [&](int64_t from, int64_t to) {
        ids_[to] = ids_[from];
        values_[to] = values_[from];
    });
}

int64_t Sampler::keep_min_p(int64_t size, float min_p) {
    const double floor = static_cast<double>(min_p) * kWeightOne;
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (static_cast<double>(weights_[i]) < floor) continue;
        ids_[kept] = ids_[i];
        weights_[kept++] = weights_[i];
    }
    return kept;
}

// Finds where the running sum of measure(i), by falling value, reaches `target` (>= 1, at most the whole sum): a radix
// search from the highest digit, so linear in `size` whatever the values.
template <typename Measure>
Sampler::Cut Sampler::find_cut(const float* values, int64_t size, uint64_t target, Measure measure) {
    uint64_t* const pending = pending_.get();  // key << 32 | index, of the values that share the digits found so far
    uint32_t key = 0;
    const auto search = [&](int shift, uint32_t mask, auto entry) {
        const auto digit_of = [&](uint64_t e) { return static_cast<uint32_t>(e >> 32 >> shift) & mask; };
        // Neighbours count into different halves: one value's bin is often the next one's too.
        uint64_t* const bins = bins_.get();
        std::fill_n(bins, 2 * kBins, uint64_t{0});
        for (int64_t i = 0; i < size; ++i) {
            const uint64_t e = entry(i);
            bins[(i & 1) * kBins + digit_of(e)] += measure(static_cast<uint32_t>(e));
        }
        uint32_t bin = mask;
        for (; bin > 0; --bin) {
            const uint64_t sum = bins[bin] + bins[kBins + bin];
            if (sum >= target) break;
            target -= sum;
        }
        key |= bin << shift;
        int64_t left = 0;
        for (int64_t i = 0; i < size; ++i) {
            const uint64_t e = entry(i);
            pending[left] = e;
            left += digit_of(e) == bin;
        }
        size = left;
    };
    search(21, 2047, [&](int64_t i) { return uint64_t{order_key(values[i])} << 32 | static_cast<uint64_t>(i); });
    search(10, 2047, [&](int64_t i) { return pending[i]; });
    search(0, 1023, [&](int64_t i) { return pending[i]; });
    return {key, target};
}

// Keeps the fewest candidates of the highest values whose measures together reach `target`; lowest ids on a tie.
template <typename Measure, typename Move>
int64_t Sampler::keep_prefix(int64_t size, uint64_t target, Measure measure, Move move) {
    Cut cut = find_cut(values_.get(), size, target, measure);
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t key = order_key(values_[i]);
        bool keep = key > cut.key;
        if (key == cut.key) {
            keep = cut.remaining > 0;
            cut.remaining -= std::min<uint64_t>(cut.remaining, measure(i));
        }
        move(i, kept);
        kept += keep;
    }
    return kept;
}

std::string describe_bad_logits(const float* logits, int64_t vocab_size, int64_t row) {
    const std::string prefix = "logits of row " + std::to_string(row) + " cannot be sampled: ";
    const float* bad = std::find_if(logits, logits + vocab_size, [](float x) { return !(x < kInfinity); });
    if (bad == logits + vocab_size) return prefix + "every token has -inf";
    return prefix + "token " + std::to_string(bad - logits) + " has " + (std::isnan(*bad) ? "NaN" : "+inf");
}

}  // namespace pellucid
