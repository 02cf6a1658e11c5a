// Samples the rows of a batch, on several threads where that pays.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sampling.h"
#include "thread_pool.h"

namespace pellucid {

class BatchSampler {
  public:
    BatchSampler(const SamplingKernels& kernels, ThreadPool& pool) : kernels_(kernels), pool_(pool) {}

    // Samples rows of `logits`, [num_rows][vocab_size], which may be overwritten.
    void sample(float* logits, int64_t num_rows, int64_t vocab_size, const RowInput* inputs, RowOutput* outputs,
                RowStatus* statuses);

    // The sampler of the calling thread, for rows of that size.
    Sampler& sampler(int64_t vocab_size);

  private:
    void make_samplers(size_t count, int64_t vocab_size);

    const SamplingKernels& kernels_;
    ThreadPool& pool_;
    // Scratch stays: page faults on fresh memory would cost more than the sampling.
    std::vector<std::unique_ptr<Sampler>> samplers_;
};

}  // namespace pellucid
