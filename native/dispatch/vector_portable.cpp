#define PELLUCID_SIMD_PORTABLE
#include "vector_kernels.inl.h"

namespace pellucid {

constinit const VectorKernels kVectorKernelsPortable = vector_kernels("portable");

}  // namespace pellucid
