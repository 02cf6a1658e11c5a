#define PELLUCID_SIMD_AVX512
#include "matmul_avx512.inl.h"

namespace pellucid {
const MatmulKernels kMatmulKernelsAvx512 = {"avx512-vnni", simd_avx512::matmul};
}  // namespace pellucid
