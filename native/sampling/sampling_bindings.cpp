#include "sampling_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cpu_info.h"
#include "sampling_fields.h"

namespace nb = nanobind;

namespace pellucid {

namespace {

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const char* numpy_name(FieldType type) {
    switch (type) {
        case FieldType::kFloat32:
            return "float32";
        case FieldType::kInt32:
            return "int32";
        case FieldType::kUint32:
            return "uint32";
        default:
            return "uint64";
    }
}

// Raises a class of pellucid.core.errors.
[[noreturn]] void raise_typed(const char* name, const std::string& message, const char* param = nullptr) {
    const nb::object type = nb::module_::import_("pellucid.core.errors").attr(name);
    const nb::object error = param ? type(message, nb::arg("param") = param) : type(message);
    PyErr_SetObject(type.ptr(), error.ptr());
    throw nb::python_error();
}

void check_vocab_size(int64_t vocab_size) {
    if (vocab_size >= 1 && vocab_size <= kMaxVocabSize) return;
    raise_typed("BackendError", "vocabulary of " + std::to_string(vocab_size) + " tokens; 1 to " +
                                    std::to_string(kMaxVocabSize) + " can be sampled");
}

void check_ranges(const std::vector<SamplingRow>& rows) {
    for (const SamplingField& field : kSamplingFields) {
        if (field.wanted == nullptr) continue;
        for (size_t row = 0; row < rows.size(); ++row) {
            const double value = field.value(rows[row]);
            if (field.in_range(value)) continue;
            raise_typed("InvalidRequestError",
                        std::string(field.name) + " of row " + std::to_string(row) + " is " +
                            nb::cast<std::string>(nb::str(nb::cast(value))) + "; it must be " + field.wanted,
                        field.name);
        }
    }
}

// The entries of a SamplingBatch's lists, as the sampler takes them.
class Inputs {
  public:
    Inputs(const RowBytes& row_bytes, const SamplingLists& lists, int64_t vocab_size)
        : rows_(row_bytes.shape(0) / sizeof(SamplingRow)), inputs_(rows_.size()) {
        if (row_bytes.shape(0) != rows_.size() * sizeof(SamplingRow)) {
            throw nb::value_error("rows are not whole records of SAMPLING_DTYPE");
        }
        if (!rows_.empty()) std::memcpy(rows_.data(), row_bytes.data(), row_bytes.shape(0));
        check_ranges(rows_);
        for (size_t row = 0; row < rows_.size(); ++row) inputs_[row].row = &rows_[row];
        each(lists.tokens, "tokens", [&](RowInput& input, nb::handle entry) { input.tokens = span<int32_t>(entry); });
        each(lists.bias, "bias", [&](RowInput& input, nb::handle entry) {
            const auto pair = nb::cast<nb::tuple>(entry);
            const auto values = span<float>(pair[1]);
            input.bias_ids = span<int32_t>(pair[0]);
            input.bias_values = values.data;
            if (values.size != input.bias_ids.size) throw nb::value_error("bias has not as many values as token ids");
        });
        each(lists.masks, "masks", [&](RowInput& input, nb::handle entry) {
            const auto mask = span<uint32_t>(entry);
            if (mask.size != (vocab_size + 31) / 32) {
                raise_typed("BackendError", "the mask of row " + std::to_string(&input - inputs_.data()) + " has " +
                                                std::to_string(mask.size) + " words for a vocabulary of " +
                                                std::to_string(vocab_size) + " tokens");
            }
            input.mask = mask.data;
        });
        each(lists.dry_breakers, "dry_breakers", [&](RowInput& input, nb::handle entry) {
            input.dry_breakers = span<int32_t>(entry);
            if (!std::is_sorted(input.dry_breakers.begin(), input.dry_breakers.end())) {
                throw nb::value_error("dry_breakers are not ascending");
            }
        });
    }

    size_t size() const { return inputs_.size(); }
    const RowInput* data() const { return inputs_.data(); }

  private:
    template <typename Take>
    void each(const nb::object& list, const char* name, Take take) {
        if (list.is_none()) return;
        const auto entries = nb::cast<nb::list>(list);
        if (entries.size() != inputs_.size()) {
            throw nb::value_error((std::string(name) + " does not have an entry a row").c_str());
        }
        for (size_t row = 0; row < inputs_.size(); ++row) {
            if (!entries[row].is_none()) take(inputs_[row], entries[row]);
        }
    }

    template <typename T>
    Span<T> span(nb::handle entry) {
        const auto array = nb::cast<Vector<T>>(entry, false);
        kept_.push_back(nb::borrow(entry));
        return {array.data(), static_cast<int64_t>(array.shape(0))};
    }

    std::vector<SamplingRow> rows_;
    std::vector<RowInput> inputs_;
    std::vector<nb::object> kept_;  // while the interpreter is released
};

template <typename T, typename... Sizes>
nb::object to_numpy(std::vector<T>&& values, Sizes... sizes) {
    auto* owned = new std::vector<T>(std::move(values));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(owned->data(), {static_cast<size_t>(sizes)...}, owner));
}

}  // namespace

nb::tuple sample_batch(BatchSampler& sampler, const LogitsArray& logits, const RowBytes& row_bytes,
                       const SamplingLists& lists) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    const auto vocab_size = static_cast<int64_t>(logits.shape(1));
    const size_t num_rows = row_bytes.shape(0) / sizeof(SamplingRow);
    if (logits.shape(0) != num_rows) {
        raise_typed("BackendError", "logits have shape (" + std::to_string(logits.shape(0)) + ", " +
                                        std::to_string(vocab_size) + "), but there are " + std::to_string(num_rows) +
                                        " rows to sample");
    }
    check_vocab_size(vocab_size);
    const Inputs inputs(row_bytes, lists, vocab_size);

    int64_t width = 0;
    bool uses_mirostat = false;
    for (size_t row = 0; row < num_rows; ++row) {
        width = std::max<int64_t>(width, inputs.data()[row].row->num_logprobs);
        uses_mirostat = uses_mirostat || inputs.data()[row].row->mirostat != 0;
    }
    width = std::min(width, vocab_size);
    const auto stride = static_cast<size_t>(width);
    std::vector<int32_t> token_ids(num_rows, kNothingAllowed), top_ids(num_rows * stride, -1);
    std::vector<float> logprobs(num_rows, kNaN), top_logprobs(num_rows * stride, kNaN), mirostat_mu(num_rows);
    std::vector<RowOutput> outputs(num_rows);
    std::vector<RowStatus> statuses(num_rows);
    for (size_t row = 0; row < num_rows; ++row) {
        outputs[row].top_ids = top_ids.data() + row * stride;
        outputs[row].top_logprobs = top_logprobs.data() + row * stride;
    }
    {
        nb::gil_scoped_release release;
        sampler.sample(logits.data(), static_cast<int64_t>(num_rows), vocab_size, inputs.data(), outputs.data(),
                       statuses.data());
    }
    for (size_t row = 0; row < num_rows; ++row) {
        const RowOutput& output = outputs[row];
        const SamplingRow& wanted = *inputs.data()[row].row;
        mirostat_mu[row] = wanted.mirostat_mu;
        if (statuses[row] == RowStatus::kBadLogits) {
            raise_typed("BackendError", describe_bad_logits(logits.data() + row * static_cast<size_t>(vocab_size),
                                                            vocab_size, static_cast<int64_t>(row)));
        }
        const bool chosen = statuses[row] == RowStatus::kOk;
        const auto first_unused = chosen ? row * stride + static_cast<size_t>(output.num_top) : row * stride;
        std::fill(top_ids.begin() + first_unused, top_ids.begin() + (row + 1) * stride, -1);
        std::fill(top_logprobs.begin() + first_unused, top_logprobs.begin() + (row + 1) * stride, kNaN);
        if (!chosen) continue;
        token_ids[row] = output.token;
        mirostat_mu[row] = output.mirostat_mu;
        if (wanted.num_logprobs >= 0) logprobs[row] = output.logprob;
    }
    return nb::make_tuple(to_numpy(std::move(token_ids), num_rows), to_numpy(std::move(logprobs), num_rows),
                          to_numpy(std::move(top_ids), num_rows, stride),
                          to_numpy(std::move(top_logprobs), num_rows, stride),
                          uses_mirostat ? to_numpy(std::move(mirostat_mu), num_rows) : nb::none());
}

namespace {

nb::tuple sample(const LogitsArray& logits, const RowBytes& rows, const nb::object& tokens, const nb::object& bias,
                 const nb::object& masks, const nb::object& dry_breakers, const std::optional<std::string>& isa,
                 int threads) {
    ThreadPool pool(threads);
    BatchSampler sampler(*choose_instruction_set(isa).sampling, pool);
    return sample_batch(sampler, logits, rows, {tokens, bias, masks, dry_breakers});
}

nb::object survivors(const LogitsArray& logits, const RowBytes& rows, const nb::object& tokens, const nb::object& bias,
                     const nb::object& masks, const nb::object& dry_breakers, const std::optional<std::string>& isa) {
    const auto vocab_size = static_cast<int64_t>(logits.shape(1));
    check_vocab_size(vocab_size);
    const Inputs inputs(rows, {tokens, bias, masks, dry_breakers}, vocab_size);
    if (logits.shape(0) != 1 || inputs.size() != 1) throw nb::value_error("survivors are of one row");
    Sampler sampler(*choose_instruction_set(isa).sampling, vocab_size);
    Sampler::Survivors kept;
    const RowStatus status = sampler.survivors(logits.data(), vocab_size, *inputs.data(), kept);
    if (status == RowStatus::kNothingLeft) return nb::none();
    if (status == RowStatus::kBadLogits) raise_typed("BackendError", describe_bad_logits(logits.data(), vocab_size, 0));
    return nb::make_tuple(to_numpy(std::vector<int32_t>(kept.ids.begin(), kept.ids.end()), kept.ids.size),
                          to_numpy(std::vector<uint64_t>(kept.weights.begin(), kept.weights.end()), kept.weights.size));
}

// The portable kernels, which count the numbers that they are given to read.
struct Work {
    int64_t row_max, exp_weights, gap_sum, spread, count_finite, apply_mask, keep_weighted, collect, collect_by_maxima,
        estimate_tails;
};
Work work;

const SamplingKernels kCountingKernels = {
    .name = "counting",
    .row_max =
        [](const float* x, int64_t n, float* maxima) {
            work.row_max += n;
            return kSamplingKernelsPortable.row_max(x, n, maxima);
        },
    .exp_weights =
        [](const float* x, int64_t n, float offset, float factor, float* weights, uint64_t* chunk_sums) {
            work.exp_weights += n;
            return kSamplingKernelsPortable.exp_weights(x, n, offset, factor, weights, chunk_sums);
        },
    .gap_sum =
        [](const float* x, int64_t n, float offset, float factor, const float* weights) {
            work.gap_sum += n;
            return kSamplingKernelsPortable.gap_sum(x, n, offset, factor, weights);
        },
    .spread =
        [](const float* x, int64_t n, float offset, float factor, double* sum, double* sum_of_squares) {
            work.spread += n;
            return kSamplingKernelsPortable.spread(x, n, offset, factor, sum, sum_of_squares);
        },
    .count_finite =
        [](const float* x, int64_t n) {
            work.count_finite += n;
            return kSamplingKernelsPortable.count_finite(x, n);
        },
    .apply_mask =
        [](float* x, int64_t n, const uint32_t* mask) {
            work.apply_mask += n;
            return kSamplingKernelsPortable.apply_mask(x, n, mask);
        },
    .keep_weighted =
        [](const float* x, int64_t n, float offset, float factor, const float* exps, float* kept) {
            work.keep_weighted += n;
            kSamplingKernelsPortable.keep_weighted(x, n, offset, factor, exps, kept);
        },
    .collect =
        [](const float* x, int64_t n, const float* maxima, float offset, float factor, float threshold, int32_t* ids,
           float* values) {
            (maxima == nullptr ? work.collect : work.collect_by_maxima) += n;
            return kSamplingKernelsPortable.collect(x, n, maxima, offset, factor, threshold, ids, values);
        },
    .estimate_tails =
        [](const float* weights, int64_t n, const float* thresholds, float* tails) {
            work.estimate_tails += n;
            kSamplingKernelsPortable.estimate_tails(weights, n, thresholds, tails);
        },
};

nb::dict kernel_work(const LogitsArray& logits, const RowBytes& rows, const nb::object& tokens) {
    work = {};
    ThreadPool pool(1);
    BatchSampler sampler(kCountingKernels, pool);
    sample_batch(sampler, logits, rows, {tokens, nb::none(), nb::none(), nb::none()});
    nb::dict counts;
    const std::pair<const char*, int64_t> all[] = {
        {"row_max", work.row_max},
        {"exp_weights", work.exp_weights},
        {"gap_sum", work.gap_sum},
        {"spread", work.spread},
        {"count_finite", work.count_finite},
        {"apply_mask", work.apply_mask},
        {"keep_weighted", work.keep_weighted},
        {"collect", work.collect},
        {"collect_by_maxima", work.collect_by_maxima},
        {"estimate_tails", work.estimate_tails},
    };
    for (const auto& [name, count] : all) {
        if (count > 0) counts[name] = count;
    }
    return counts;
}

}  // namespace

void bind_sampling(nb::module_& module) {
    nb::list fields;
    for (const SamplingField& field : kSamplingFields) {
        fields.append(nb::make_tuple(field.name, numpy_name(field.type), field.offset));
    }
    module.attr("SAMPLING_FIELDS") = fields;
    module.def("sample", &sample, nb::arg("logits").noconvert(), nb::arg("rows"), nb::arg("tokens") = nb::none(),
               nb::arg("bias") = nb::none(), nb::arg("masks") = nb::none(), nb::arg("dry_breakers") = nb::none(),
               nb::arg("isa") = nb::none(), nb::arg("threads") = 1, "`Model.sample` without a model.");
    module.def("survivors", &survivors, nb::arg("logits").noconvert(), nb::arg("rows"), nb::arg("tokens") = nb::none(),
               nb::arg("bias") = nb::none(), nb::arg("masks") = nb::none(), nb::arg("dry_breakers") = nb::none(),
               nb::arg("isa") = nb::none(),
               "The distribution that one row, [1, vocab_size], is drawn from: tokens by rising id and their integer\n"
               "weights, int32 and uint64 [n]. None where the masks leave nothing. Temperature is above 0.");
    module.def("sampling_work", &kernel_work, nb::arg("logits").noconvert(), nb::arg("rows"),
               nb::arg("tokens") = nb::none(),
               "Samples and tells how many numbers each kernel was given, by its name; for tests of what rows cost.");
}

}  // namespace pellucid
