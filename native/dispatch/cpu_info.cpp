#include "cpu_info.h"

#include <stdexcept>

#include "cpuid_features.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pellucid {

namespace {

#if defined(__x86_64__) || defined(_M_X64)

// Linux keeps the tile registers from a process until it asks.
bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#endif

std::vector<InstructionSet> find_instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(__x86_64__) || defined(_M_X64)
    const CpuidFeatures& features = cpuid_features();
    if (features.has_amx() && request_tiles()) {
        sets.push_back({"amx", &kMatmulKernelsAmx, &kVectorKernelsAvx512, &kSamplingKernelsAvx512});
    }
    if (features.has_avx512()) {
        sets.push_back({"avx512", &kMatmulKernelsAvx512, &kVectorKernelsAvx512, &kSamplingKernelsAvx512});
    }
    if (features.has_avx2()) sets.push_back({"avx2", &kMatmulKernelsAvx2, &kVectorKernelsAvx2, &kSamplingKernelsAvx2});
#endif
    sets.push_back({"portable", &kMatmulKernelsPortable, &kVectorKernelsPortable, &kSamplingKernelsPortable});
    return sets;
}

}  // namespace

const std::vector<InstructionSet>& available_instruction_sets() {
    static const std::vector<InstructionSet> sets = find_instruction_sets();
    return sets;
}

const InstructionSet& choose_instruction_set(const std::optional<std::string>& name) {
    const auto& sets = available_instruction_sets();
    if (!name) return sets.front();
    std::string names;
    for (const InstructionSet& set : sets) {
        if (*name == set.name) return set;
        names += std::string(names.empty() ? "" : ", ") + set.name;
    }
    throw std::invalid_argument("no instruction set '" + *name + "' on this machine; it has " + names);
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> features;
#if defined(__x86_64__) || defined(_M_X64)
    const CpuidFeatures& found = cpuid_features();
#define PELLUCID_FEATURE(name) \
    if (found.name) features.push_back(#name);
    PELLUCID_FEATURE(avx2)
    PELLUCID_FEATURE(fma)
    PELLUCID_FEATURE(f16c)
    PELLUCID_FEATURE(avx512f)
    PELLUCID_FEATURE(avx512bw)
    PELLUCID_FEATURE(avx512dq)
    PELLUCID_FEATURE(avx512vl)
    PELLUCID_FEATURE(avx512_vnni)
    PELLUCID_FEATURE(amx_tile)
    PELLUCID_FEATURE(amx_int8)
#undef PELLUCID_FEATURE
#endif
    return features;
}

}  // namespace pellucid
