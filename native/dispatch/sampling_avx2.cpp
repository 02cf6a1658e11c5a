#define PELLUCID_SIMD_AVX2
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

const SamplingKernels kSamplingKernelsAvx2 = {"avx2", row_max, exp_weights, collect};

}  // namespace pellucid
