// What this machine can run, and which kernels that means.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "matmul.h"
#include "sampling_kernels.h"
#include "vector_kernels.h"

namespace pellucid {

// Kernels of one instruction set. From the weakest: "portable", "avx2", "avx512", "amx".
struct InstructionSet {
    const char* name;
    const MatmulKernels* matmul;
    const VectorKernels* vector;
    const SamplingKernels* sampling;
};

// Those this machine can run, the best first. Asking for AMX's tile registers is part of finding out.
const std::vector<InstructionSet>& available_instruction_sets();

// The named one, or the best. Throws std::invalid_argument naming what is available.
const InstructionSet& choose_instruction_set(const std::optional<std::string>& name);

// Processor features that the choice rests on, by their /proc/cpuinfo names.
std::vector<std::string> cpu_features();

}  // namespace pellucid
