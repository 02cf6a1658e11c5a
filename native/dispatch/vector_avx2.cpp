#define PELLUCID_SIMD_AVX2
#include "vector_kernels.inl.h"

namespace pellucid {

constinit const VectorKernels kVectorKernelsAvx2 = vector_kernels("avx2");

}  // namespace pellucid
