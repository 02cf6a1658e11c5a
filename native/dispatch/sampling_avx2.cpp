#define PELLUCID_SIMD_AVX2
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

constinit const SamplingKernels kSamplingKernelsAvx2 = sampling_kernels("avx2");

}  // namespace pellucid
