#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpuid_features.h"
#include "sampling.h"

namespace nb = nanobind;

namespace pellucid {

namespace {

using Rows = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// By the names of the backend's instruction sets; amx adds nothing to sampling.
const SamplingKernels& kernels_for(const std::optional<std::string>& isa) {
    std::vector<std::pair<std::string, const SamplingKernels*>> available;
#if defined(__x86_64__) || defined(_M_X64)
    const CpuidFeatures& features = cpuid_features();
    if (features.has_amx()) available.emplace_back("amx", &kSamplingKernelsAvx512);
    if (features.has_avx512()) available.emplace_back("avx512", &kSamplingKernelsAvx512);
    if (features.has_avx2()) available.emplace_back("avx2", &kSamplingKernelsAvx2);
#endif
    available.emplace_back("portable", &kSamplingKernelsPortable);
    if (!isa) return *available.front().second;
    std::string names;
    for (const auto& [name, kernels] : available) {
        if (*isa == name) return *kernels;
        names += (names.empty() ? "" : ", ") + name;
    }
    throw nb::value_error(("no instruction set '" + *isa + "' on this machine; it has " + names).c_str());
}

// Raises a class of pellucid.core.errors.
[[noreturn]] void raise_typed(const char* name, const std::string& message, const char* param = nullptr) {
    const nb::object type = nb::module_::import_("pellucid.core.errors").attr(name);
    const nb::object error = param ? type(message, nb::arg("param") = param) : type(message);
    PyErr_SetObject(type.ptr(), error.ptr());
    throw nb::python_error();
}

struct Field {
    const char* name;
    const char* type;  // numpy's name
    size_t offset;
};

template <typename T>
constexpr const char* numpy_name() {
    if (std::is_same_v<T, float>) return "float32";
    if (std::is_same_v<T, int32_t>) return "int32";
    return std::is_same_v<T, uint32_t> ? "uint32" : "uint64";
}

#define FIELD(name) \
    Field { #name, numpy_name<decltype(SamplingRow::name)>(), offsetof(SamplingRow, name) }
constexpr Field kFields[] = {
    FIELD(temperature),
    FIELD(dynatemp_range),
    FIELD(dynatemp_exponent),
    FIELD(top_n_sigma),
    FIELD(top_k),
    FIELD(top_p),
    FIELD(min_p),
    FIELD(typical_p),
    FIELD(epsilon_cutoff),
    FIELD(eta_cutoff),
    FIELD(xtc_probability),
    FIELD(xtc_threshold),
    FIELD(mirostat),
    FIELD(mirostat_tau),
    FIELD(mirostat_eta),
    FIELD(mirostat_mu),
    FIELD(repetition_penalty),
    FIELD(presence_penalty),
    FIELD(frequency_penalty),
    FIELD(dry_multiplier),
    FIELD(dry_base),
    FIELD(dry_allowed_length),
    FIELD(dry_penalty_last_n),
    FIELD(no_repeat_ngram_size),
    FIELD(num_prompt_tokens),
    FIELD(num_logprobs),
    FIELD(processed_logprobs),
    FIELD(sequence_index),
    FIELD(position),
    FIELD(seed),
};
#undef FIELD

template <typename T, typename Valid>
void check(const char* name, T SamplingRow::* field, const SamplingRow* rows, size_t num_rows, Valid valid,
           const char* wanted) {
    for (size_t row = 0; row < num_rows; ++row) {
        const T value = rows[row].*field;
        if (valid(value)) continue;
        raise_typed("InvalidRequestError",
                    std::string(name) + " of row " + std::to_string(row) + " is " +
                        nb::cast<std::string>(nb::str(nb::cast(value))) + "; it must be " + wanted,
                    name);
    }
}

void check_ranges(const SamplingRow* rows, size_t num_rows) {
    check(
        "temperature", &SamplingRow::temperature, rows, num_rows, [](float t) { return t >= 0.0f && std::isfinite(t); },
        "0 (greedy) or above");
    check("top_k", &SamplingRow::top_k, rows, num_rows, [](int32_t k) { return k >= 0; }, "0 (keep all) or above");
    check(
        "top_p", &SamplingRow::top_p, rows, num_rows, [](float p) { return p > 0.0f && p <= 1.0f; },
        "above 0 and at most 1");
    check("min_p", &SamplingRow::min_p, rows, num_rows, [](float p) { return p >= 0.0f && p <= 1.0f; }, "from 0 to 1");
    check(
        "num_logprobs", &SamplingRow::num_logprobs, rows, num_rows, [](int32_t n) { return n >= -1; },
        "-1 (none) or above");
}

// Scratch stays with the thread: page faults on fresh memory would cost more than the sampling.
Sampler& thread_sampler(const SamplingKernels& kernels, int64_t vocab_size) {
    thread_local const SamplingKernels* current = nullptr;
    thread_local std::unique_ptr<Sampler> sampler;
    if (current != &kernels || !sampler || sampler->max_vocab_size() < vocab_size) {
        sampler = std::make_unique<Sampler>(kernels, vocab_size);
        current = &kernels;
    }
    return *sampler;
}

template <typename T, typename... Sizes>
nb::object to_numpy(std::vector<T>&& values, Sizes... sizes) {
    auto* owned = new std::vector<T>(std::move(values));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(owned->data(), {static_cast<size_t>(sizes)...}, owner));
}

void check_vocab_size(int64_t vocab_size) {
    if (vocab_size >= 1 && vocab_size <= kMaxVocabSize) return;
    raise_typed("BackendError", "vocabulary of " + std::to_string(vocab_size) + " tokens; 1 to " +
                                    std::to_string(kMaxVocabSize) + " can be sampled");
}

nb::tuple sample(const Logits& logits, const Rows& row_bytes, const std::optional<std::string>& isa) {
    const size_t num_rows = row_bytes.shape(0) / sizeof(SamplingRow);
    const auto vocab_size = static_cast<int64_t>(logits.shape(1));
    if (logits.shape(0) != num_rows) {
        raise_typed("BackendError", "logits have shape (" + std::to_string(logits.shape(0)) + ", " +
                                        std::to_string(vocab_size) + "), but there are " + std::to_string(num_rows) +
                                        " rows to sample");
    }
    const auto* rows = reinterpret_cast<const SamplingRow*>(row_bytes.data());
    check_ranges(rows, num_rows);
    check_vocab_size(vocab_size);

    const SamplingKernels& kernels = kernels_for(isa);
    int32_t width = 0;
    for (size_t row = 0; row < num_rows; ++row) width = std::max(width, rows[row].num_logprobs);
    width = std::min(width, static_cast<int32_t>(vocab_size));
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<int32_t> token_ids(num_rows), top_ids(num_rows * width, -1);
    std::vector<float> logprobs(num_rows, nan), top_logprobs(num_rows * width, nan);
    size_t row = 0;
    {
        nb::gil_scoped_release release;
        Sampler& sampler = thread_sampler(kernels, vocab_size);
        for (; row < num_rows; ++row) {
            if (!sampler.begin_row(logits.data() + row * vocab_size, vocab_size)) break;
            const SamplingRow& params = rows[row];
            const uint64_t bits = draw_bits(params.seed, params.sequence_index, params.position, kStreamSample);
            token_ids[row] = sampler.choose(params, bits);
            if (params.num_logprobs < 0) continue;
            logprobs[row] = sampler.raw_logprob(token_ids[row]);
            sampler.top_logprobs(params.num_logprobs, top_ids.data() + row * width, top_logprobs.data() + row * width);
        }
    }
    if (row < num_rows) {
        raise_typed("BackendError",
                    describe_bad_logits(logits.data() + row * vocab_size, vocab_size, static_cast<int64_t>(row)));
    }
    return nb::make_tuple(to_numpy(std::move(token_ids), num_rows), to_numpy(std::move(logprobs), num_rows),
                          to_numpy(std::move(top_ids), num_rows, width),
                          to_numpy(std::move(top_logprobs), num_rows, width));
}

nb::tuple survivors(
    const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& logits,
    const nb::ndarray<const uint8_t, nb::shape<sizeof(SamplingRow)>, nb::c_contig, nb::device::cpu>& row_bytes,
    const std::optional<std::string>& isa) {
    const auto vocab_size = static_cast<int64_t>(logits.shape(0));
    check_vocab_size(vocab_size);
    Sampler& sampler = thread_sampler(kernels_for(isa), vocab_size);
    if (!sampler.begin_row(logits.data(), vocab_size)) {
        raise_typed("BackendError", describe_bad_logits(logits.data(), vocab_size, 0));
    }
    SamplingRow row;
    std::memcpy(&row, row_bytes.data(), sizeof row);
    const Sampler::Survivors kept = sampler.survivors(row);
    return nb::make_tuple(to_numpy(std::vector<int32_t>(kept.ids, kept.ids + kept.size), kept.size),
                          to_numpy(std::vector<uint64_t>(kept.weights, kept.weights + kept.size), kept.size));
}

}  // namespace

void bind_sampling(nb::module_& module) {
    nb::list fields;
    for (const Field& field : kFields) fields.append(nb::make_tuple(field.name, field.type, field.offset));
    module.attr("SAMPLING_FIELDS") = fields;
    module.def("sample", &sample, nb::arg("logits"), nb::arg("rows"), nb::arg("isa") = nb::none(),
               "Choose one token a row; `logits` are [num_rows, vocab_size], `rows` the bytes of a SamplingBatch's.\n"
               "Returns the arrays of a SampledTokens, in order. Raises as pellucid.decoding.sampler.sample does.");
    module.def("survivors", &survivors, nb::arg("logits"), nb::arg("row"), nb::arg("isa") = nb::none(),
               "Tokens of one row [vocab_size] that survive the transforms, by rising id, and their integer weights:\n"
               "int32 and uint64 [n]. `row` is the bytes of one of a SamplingBatch's.");
}

}  // namespace pellucid
