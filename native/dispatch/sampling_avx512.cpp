#define PELLUCID_SIMD_AVX512
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

constinit const SamplingKernels kSamplingKernelsAvx512 = sampling_kernels("avx512");

}  // namespace pellucid
