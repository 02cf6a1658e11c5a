// The fields of a SamplingRow: their names and places for Python, and the ranges of the oracle.
#pragma once

#include <cfloat>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sampling_row.h"

namespace pellucid {

enum class FieldType { kFloat32, kInt32, kUint32, kUint64 };

struct SamplingField {
    const char* name;
    FieldType type;
    size_t offset;
    // What values a batch may hold: of float32 and int32 fields, which double holds exactly.
    double low = 0, high = 0;
    bool above_low = false;  // low itself is out
    const char* wanted = nullptr;

    double value(const SamplingRow& row) const {
        const auto* bytes = reinterpret_cast<const char*>(&row) + offset;
        if (type == FieldType::kFloat32) {
            float x;
            std::memcpy(&x, bytes, sizeof x);
            return static_cast<double>(x);
        }
        int32_t x;
        std::memcpy(&x, bytes, sizeof x);
        return x;
    }
    bool in_range(double x) const { return x <= high && (above_low ? x > low : x >= low); }
};

template <typename T>
constexpr FieldType field_type() {
    if (std::is_same_v<T, float>) return FieldType::kFloat32;
    if (std::is_same_v<T, int32_t>) return FieldType::kInt32;
    return std::is_same_v<T, uint32_t> ? FieldType::kUint32 : FieldType::kUint64;
}

#define PELLUCID_FIELD(name, ...) \
    SamplingField { #name, field_type<decltype(SamplingRow::name)>(), offsetof(SamplingRow, name), __VA_ARGS__ }
constexpr SamplingField kSamplingFields[] = {
    PELLUCID_FIELD(temperature, 0, FLT_MAX, false, "0 (greedy) or above"),
    PELLUCID_FIELD(dynatemp_range, 0, FLT_MAX, false, "0 or above"),
    PELLUCID_FIELD(dynatemp_exponent, 0, FLT_MAX, false, "0 or above"),
    PELLUCID_FIELD(top_n_sigma, 0, FLT_MAX, false, "0 (keep all) or above"),
    PELLUCID_FIELD(top_k, 0, INT_MAX, false, "0 (keep all) or above"),
    PELLUCID_FIELD(top_p, 0, 1, true, "above 0 and at most 1"),
    PELLUCID_FIELD(min_p, 0, 1, false, "from 0 to 1"),
    PELLUCID_FIELD(typical_p, 0, 1, true, "above 0 and at most 1"),
    PELLUCID_FIELD(epsilon_cutoff, 0, 1, false, "from 0 to 1"),
    PELLUCID_FIELD(eta_cutoff, 0, 1, false, "from 0 to 1"),
    PELLUCID_FIELD(xtc_probability, 0, 1, false, "from 0 to 1"),
    PELLUCID_FIELD(xtc_threshold, 0, 1, false, "from 0 to 1"),
    PELLUCID_FIELD(mirostat, 0, 2, false, "0 (off), 1 or 2"),
    PELLUCID_FIELD(mirostat_tau, 0, FLT_MAX, false, "0 or above"),
    PELLUCID_FIELD(mirostat_eta, 0, FLT_MAX, false, "0 or above"),
    PELLUCID_FIELD(mirostat_mu, -FLT_MAX, FLT_MAX, false, "finite"),
    PELLUCID_FIELD(repetition_penalty, 0, FLT_MAX, true, "above 0"),
    PELLUCID_FIELD(presence_penalty, -FLT_MAX, FLT_MAX, false, "finite"),
    PELLUCID_FIELD(frequency_penalty, -FLT_MAX, FLT_MAX, false, "finite"),
    PELLUCID_FIELD(dry_multiplier, 0, FLT_MAX, false, "0 (off) or above"),
    PELLUCID_FIELD(dry_base, 1, FLT_MAX, false, "1 or above"),
    PELLUCID_FIELD(dry_allowed_length, 1, INT_MAX, false, "1 or above"),
    PELLUCID_FIELD(dry_penalty_last_n, -1, INT_MAX, false, "-1 (all) or above"),
    PELLUCID_FIELD(no_repeat_ngram_size, 0, INT_MAX, false, "0 (off) or above"),
    PELLUCID_FIELD(num_prompt_tokens, 0, INT_MAX, false, "0 or above"),
    PELLUCID_FIELD(num_logprobs, -1, INT_MAX, false, "-1 (none) or above"),
    PELLUCID_FIELD(processed_logprobs, 0, 1, false, "0 or 1"),
    PELLUCID_FIELD(sequence_index),
    PELLUCID_FIELD(position),
    PELLUCID_FIELD(seed),
};
#undef PELLUCID_FIELD

}  // namespace pellucid
