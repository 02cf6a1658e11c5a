#define PELLUCID_SIMD_AVX512
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

const SamplingKernels kSamplingKernelsAvx512 = {"avx512", row_max, exp_weights, collect};

}  // namespace pellucid
