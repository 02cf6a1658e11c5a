#define PELLUCID_SIMD_PORTABLE
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

const SamplingKernels kSamplingKernelsPortable = {"portable", row_max, exp_weights, collect};

}  // namespace pellucid
