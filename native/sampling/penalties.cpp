#include "penalties.h"

#include <algorithm>
#include <cfloat>
#include <limits>

#include "elementary.h"

namespace pellucid {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool in_vocabulary(int32_t id, int64_t vocab_size) { return id >= 0 && id < vocab_size; }

// What overflows is held at the largest float.
float held(float logit) { return std::min(std::max(logit, -FLT_MAX), FLT_MAX); }

bool contains(Span<int32_t> ascending, int32_t id) {
    return std::binary_search(ascending.begin(), ascending.end(), id);
}

}  // namespace

bool Penalties::any(const RowInput& input) {
    const SamplingRow& row = *input.row;
    return input.bias_ids.size > 0 || row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f ||
           row.presence_penalty != 0.0f || row.dry_multiplier != 0.0f || row.no_repeat_ngram_size > 0;
}

bool Penalties::apply(float* logits, int64_t vocab_size, const RowInput& input) {
    const SamplingRow& row = *input.row;
    if (counts_.size() < static_cast<size_t>(vocab_size)) counts_.resize(static_cast<size_t>(vocab_size));
    replaced_.clear();
    valid_ = true;
    for (int64_t i = 0; i < input.bias_ids.size; ++i) {
        const int32_t id = input.bias_ids.data[i];
        if (!in_vocabulary(id, vocab_size)) continue;
        replace(logits, id, logits[id] + input.bias_values[i]);
    }
    penalize_seen(logits, vocab_size, input);
    if (row.dry_multiplier != 0.0f) dry(logits, vocab_size, input);
    first_ban_ = replaced_.size();
    return valid_;
}

void Penalties::ban_repeated_ngrams(float* logits, int64_t vocab_size, const RowInput& input) {
    if (input.row->no_repeat_ngram_size <= 0) return;
    const int64_t before = int64_t{input.row->no_repeat_ngram_size} - 1;
    const Span<int32_t> tokens = input.tokens;
    match_suffix(tokens);
    for (int64_t i = before; i < tokens.size; ++i) {
        const int32_t id = tokens.data[i];
        const bool repeats = before == 0 || matches_[static_cast<size_t>(i - 1)] >= before;
        if (!repeats || !in_vocabulary(id, vocab_size) || !(logits[id] < kInfinity)) continue;
        replaced_.emplace_back(id, logits[id]);
        logits[id] = -kInfinity;
    }
}

void Penalties::revert_bans(float* logits) {
    for (; replaced_.size() > first_ban_; replaced_.pop_back())
        logits[replaced_.back().first] = replaced_.back().second;
}

float Penalties::original(int32_t token, float now) const {
    for (const auto& [id, logit] : replaced_) {
        if (id == token) return logit;
    }
    return now;
}

void Penalties::forget_counts() {
    for (const int32_t id : ids_) counts_[static_cast<size_t>(id)] = 0;
    ids_.clear();
}

// A logit of -inf stays so; a finite one stays finite.
void Penalties::replace(float* logits, int32_t id, float value) {
    const float old = logits[id];
    if (!(old < kInfinity)) {
        valid_ = false;
        return;
    }
    if (old == -kInfinity) return;
    replaced_.emplace_back(id, old);
    logits[id] = held(value);
}

// Repetition, frequency and presence, which look at each token alone. counts_ holds 1 + how often the output has it.
void Penalties::penalize_seen(float* logits, int64_t vocab_size, const RowInput& input) {
    const SamplingRow& row = *input.row;
    const bool repeats = row.repetition_penalty != 1.0f;
    const bool counts = row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f;
    const int64_t size = input.tokens.size, num_prompt_tokens = std::min<int64_t>(row.num_prompt_tokens, size);
    for (int64_t i = repeats ? 0 : counts ? num_prompt_tokens : size; i < size; ++i) {
        const int32_t id = input.tokens.data[i];
        if (!in_vocabulary(id, vocab_size)) continue;
        int32_t& count = counts_[static_cast<size_t>(id)];
        if (count == 0) {
            count = 1;
            ids_.push_back(id);
        }
        count += i >= num_prompt_tokens;
    }
    for (const int32_t id : ids_) {
        const int32_t count = counts_[static_cast<size_t>(id)] - 1;
        float logit = logits[id];
        if (repeats) logit = held(logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty);
        if (counts && count > 0) {
            logit = logit - row.frequency_penalty * static_cast<float>(count) - row.presence_penalty;
        }
        replace(logits, id, logit);
    }
    forget_counts();
}

// counts_ holds 1 + the length of the longest repetition that a token would go on with.
void Penalties::dry(float* logits, int64_t vocab_size, const RowInput& input) {
    const SamplingRow& row = *input.row;
    Span<int32_t> window = input.tokens;
    if (row.dry_penalty_last_n >= 0 && row.dry_penalty_last_n < window.size) {
        window = {window.end() - row.dry_penalty_last_n, row.dry_penalty_last_n};
    }
    if (window.size < 2) return;
    int64_t limit = 0;  // tokens after the last breaker
    while (limit < window.size && !contains(input.dry_breakers, window.end()[-1 - limit])) ++limit;
    match_suffix(window);
    for (int64_t i = 0; i + 1 < window.size; ++i) {
        const auto length = static_cast<int32_t>(std::min<int64_t>(matches_[static_cast<size_t>(i)], limit));
        if (length < row.dry_allowed_length) continue;
        const int32_t id = window.data[i + 1];
        if (!in_vocabulary(id, vocab_size) || counts_[static_cast<size_t>(id)] > length ||
            contains(input.dry_breakers, id))
            continue;
        if (counts_[static_cast<size_t>(id)] == 0) ids_.push_back(id);
        counts_[static_cast<size_t>(id)] = length + 1;
    }
    for (const int32_t id : ids_) {
        const double excess = counts_[static_cast<size_t>(id)] - 1 - row.dry_allowed_length;
        const double penalty =
            static_cast<double>(row.dry_multiplier) * elementary::power(static_cast<double>(row.dry_base), excess);
        replace(logits, id, logits[id] - static_cast<float>(std::min(penalty, static_cast<double>(FLT_MAX))));
    }
    forget_counts();
}

// matches_[i] becomes the number of tokens up to i that equal the last ones: the Z-algorithm (Gusfield, 1997) from the
// end, linear in the number of tokens. The last entry is not set.
void Penalties::match_suffix(Span<int32_t> tokens) {
    const int64_t size = tokens.size;
    matches_.resize(static_cast<size_t>(size));
    if (size < 2) return;
    const int32_t* const last = tokens.end() - 1;
    int32_t* const matches = matches_.data() + size - 1;  // both counted back from the end
    int64_t begin = 0, end = 0;                           // of the match found so far that reaches furthest
    for (int64_t i = 1; i < size; ++i) {
        int64_t length = i < end ? std::min<int64_t>(end - i, matches[begin - i]) : 0;
        while (i + length < size && last[-length] == last[-(i + length)]) ++length;
        matches[-i] = static_cast<int32_t>(length);
        if (i + length > end) {
            begin = i;
            end = i + length;
        }
    }
}

}  // namespace pellucid
