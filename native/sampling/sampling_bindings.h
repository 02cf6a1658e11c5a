// The sampler on numpy arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "batch_sampler.h"

namespace pellucid {

using LogitsArray = nanobind::ndarray<float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using RowBytes = nanobind::ndarray<const uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// The lists of a SamplingBatch, each None or with an entry a row.
struct SamplingLists {
    nanobind::object tokens, bias, masks, dry_breakers;
};

// Samples a batch; `rows` are the bytes of a SamplingBatch's. Returns the attributes of a SampledTokens, in order.
// Raises as pellucid.decoding.sampler.sample does.
nanobind::tuple sample_batch(BatchSampler& sampler, const LogitsArray& logits, const RowBytes& rows,
                             const SamplingLists& lists);

}  // namespace pellucid
