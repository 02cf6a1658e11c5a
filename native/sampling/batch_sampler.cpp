#include "batch_sampler.h"

#include "float_state.h"

namespace pellucid {

namespace {

// From here on other threads help, which takes them a few microseconds while they still spin from the forward pass.
// Sampling so many logits takes 0.04 to 0.4 ms.
constexpr int64_t kParallelLogits = 1 << 19;

}  // namespace

void BatchSampler::sample(float* logits, int64_t num_rows, int64_t vocab_size, const RowInput* inputs,
                          RowOutput* outputs, RowStatus* statuses) {
    const auto sample_rows = [&](int thread, int64_t begin, int64_t end) {
        // Which thread a row falls to must not show: the pool's flush subnormals, the caller's may or may not.
        const FloatState state(Subnormals::kKept);
        Sampler& sampler = *samplers_[static_cast<size_t>(thread)];
        for (int64_t row = begin; row < end; ++row) {
            statuses[row] = sampler.sample(logits + row * vocab_size, vocab_size, inputs[row], outputs[row]);
        }
    };
    const bool parallel = pool_.num_threads() > 1 && num_rows > 1 && num_rows * vocab_size >= kParallelLogits;
    make_samplers(parallel ? static_cast<size_t>(pool_.num_threads()) : 1, vocab_size);
    if (!parallel) {
        sample_rows(0, 0, num_rows);
        return;
    }
    auto work = [&](int thread) {
        pool_.parallel_for(thread, static_cast<int>(num_rows), 1,
                           [&](int begin, int end) { sample_rows(thread, begin, end); });
    };
    pool_.run(work);
}

Sampler& BatchSampler::sampler(int64_t vocab_size) {
    make_samplers(1, vocab_size);
    return *samplers_.front();
}

void BatchSampler::make_samplers(size_t count, int64_t vocab_size) {
    if (samplers_.size() < count) samplers_.resize(count);
    for (size_t thread = 0; thread < count; ++thread) {
        std::unique_ptr<Sampler>& sampler = samplers_[thread];
        if (sampler == nullptr || sampler->max_vocab_size() < vocab_size) {
            sampler = std::make_unique<Sampler>(kernels_, vocab_size);
        }
    }
}

}  // namespace pellucid
