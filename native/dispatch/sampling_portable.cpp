#define PELLUCID_SIMD_PORTABLE
#include "../sampling/sampling_kernels.inl.h"

namespace pellucid {

constinit const SamplingKernels kSamplingKernelsPortable = sampling_kernels("portable");

}  // namespace pellucid
