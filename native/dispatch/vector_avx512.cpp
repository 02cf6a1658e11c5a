#define PELLUCID_SIMD_AVX512
#include "vector_kernels.inl.h"

namespace pellucid {

constinit const VectorKernels kVectorKernelsAvx512 = vector_kernels("avx512");

}  // namespace pellucid
