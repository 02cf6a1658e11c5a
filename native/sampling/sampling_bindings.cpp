#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpuid_features.h"
#include "sampling.h"

namespace nb = nanobind;

namespace pellucid {

namespace {

template <typename T>
using Rows = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
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

template <typename T, typename Valid>
void check(const char* name, const Rows<T>& values, size_t num_rows, Valid valid, const char* wanted) {
    if (values.shape(0) != num_rows) {
        raise_typed("InvalidRequestError",
                    std::string(name) + " has " + std::to_string(values.shape(0)) + " entries for " +
                        std::to_string(num_rows) + " rows",
                    name);
    }
    for (size_t row = 0; row < num_rows; ++row) {
        if (valid(values.data()[row])) continue;
        raise_typed("InvalidRequestError",
                    std::string(name) + " of row " + std::to_string(row) + " is " +
                        nb::cast<std::string>(nb::str(nb::cast(values.data()[row]))) + "; it must be " + wanted,
                    name);
    }
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

nb::tuple sample(const Logits& logits, const Rows<float>& temperature, const Rows<int32_t>& top_k,
                 const Rows<float>& top_p, const Rows<float>& min_p, const Rows<uint64_t>& seed,
                 const Rows<uint32_t>& sequence_index, const Rows<uint32_t>& position,
                 const Rows<int32_t>& num_logprobs, const std::optional<std::string>& isa) {
    const size_t num_rows = logits.shape(0);
    const auto vocab_size = static_cast<int64_t>(logits.shape(1));
    const auto any = [](auto) { return true; };
    check(
        "temperature", temperature, num_rows, [](float t) { return t >= 0.0f && std::isfinite(t); },
        "0 (greedy) or above");
    check("top_k", top_k, num_rows, [](int32_t k) { return k >= 0; }, "0 (keep all) or above");
    check("top_p", top_p, num_rows, [](float p) { return p > 0.0f && p <= 1.0f; }, "above 0 and at most 1");
    check("min_p", min_p, num_rows, [](float p) { return p >= 0.0f && p <= 1.0f; }, "from 0 to 1");
    check("seed", seed, num_rows, any, "");
    check("sequence_index", sequence_index, num_rows, any, "");
    check("position", position, num_rows, any, "");
    check("num_logprobs", num_logprobs, num_rows, [](int32_t n) { return n >= -1; }, "-1 (none) or above");
    check_vocab_size(vocab_size);

    const SamplingKernels& kernels = kernels_for(isa);
    int32_t width = 0;
    for (size_t row = 0; row < num_rows; ++row) width = std::max(width, num_logprobs.data()[row]);
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
            const uint64_t bits =
                draw_bits(seed.data()[row], sequence_index.data()[row], position.data()[row], kStreamSample);
            token_ids[row] = sampler.choose(
                {temperature.data()[row], top_k.data()[row], top_p.data()[row], min_p.data()[row]}, bits);
            if (num_logprobs.data()[row] < 0) continue;
            logprobs[row] = sampler.raw_logprob(token_ids[row]);
            sampler.top_logprobs(num_logprobs.data()[row], top_ids.data() + row * width,
                                 top_logprobs.data() + row * width);
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

nb::tuple survivors(const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& logits,
                    float temperature, int32_t top_k, float top_p, float min_p, const std::optional<std::string>& isa) {
    const auto vocab_size = static_cast<int64_t>(logits.shape(0));
    check_vocab_size(vocab_size);
    Sampler& sampler = thread_sampler(kernels_for(isa), vocab_size);
    if (!sampler.begin_row(logits.data(), vocab_size)) {
        raise_typed("BackendError", describe_bad_logits(logits.data(), vocab_size, 0));
    }
    const Sampler::Survivors kept = sampler.survivors({temperature, top_k, top_p, min_p});
    return nb::make_tuple(to_numpy(std::vector<int32_t>(kept.ids, kept.ids + kept.size), kept.size),
                          to_numpy(std::vector<uint64_t>(kept.weights, kept.weights + kept.size), kept.size));
}

}  // namespace

void bind_sampling(nb::module_& module) {
    module.def(
        "sample", &sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
        nb::arg("min_p"), nb::arg("seed"), nb::arg("sequence_index"), nb::arg("position"), nb::arg("num_logprobs"),
        nb::arg("isa") = nb::none(),
        "Choose one token a row; arguments are logits [num_rows, vocab_size] and the arrays of a SamplingBatch.\n"
        "Returns the arrays of a SampledTokens, in order. Raises as pellucid.decoding.sampler.sample does.");
    module.def("survivors", &survivors, nb::arg("logits"), nb::arg("temperature") = 1.0f, nb::arg("top_k") = 0,
               nb::arg("top_p") = 1.0f, nb::arg("min_p") = 0.0f, nb::arg("isa") = nb::none(),
               "Tokens of one row [vocab_size] that survive the transforms, by rising id, and their integer weights:\n"
               "int32 and uint64 [n].");
}

}  // namespace pellucid
