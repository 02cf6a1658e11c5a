// Instruction sets that the processor has and the operating system saves registers for, read from CPUID and XGETBV.
//
// Not __builtin_cpu_supports: its names differ between compilers, and zig's runtime lacks the table behind it.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)

#include <cpuid.h>

#include <cstdint>

namespace pellucid {

struct CpuidFeatures {
    bool avx2 = false;    // AVX2, FMA, F16C
    bool avx512 = false;  // those, and AVX-512 F, BW, DQ, VL, VNNI
    bool amx = false;     // those, and AMX-TILE, AMX-INT8; Linux wants a request before the first use
};

inline CpuidFeatures read_cpuid_features() {
    constexpr uint32_t kFma = 1u << 12, kOsSavesAvx = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;   // leaf 1, ECX
    constexpr uint32_t kAvx2 = 1u << 5, kAvx512FBwDqVl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // leaf 7, EBX
    constexpr uint32_t kAvx512Vnni = 1u << 11;                                                       // leaf 7, ECX
    constexpr uint32_t kAmxTileInt8 = 1u << 24 | 1u << 25;                                           // leaf 7, EDX
    constexpr uint32_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;                      // XCR0
    const auto has = [](uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; };

    CpuidFeatures features;
    uint32_t eax, ebx, leaf1, edx;
    if (!__get_cpuid(1, &eax, &ebx, &leaf1, &edx) || !has(leaf1, kFma | kOsSavesAvx | kAvx | kF16c)) return features;
    uint32_t leaf7_ebx, leaf7_ecx, leaf7_edx;
    if (!__get_cpuid_count(7, 0, &eax, &leaf7_ebx, &leaf7_ecx, &leaf7_edx)) return features;
    uint32_t saved, saved_high;
    asm volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
    features.avx2 = has(saved, kYmmState) && has(leaf7_ebx, kAvx2);
    features.avx512 =
        features.avx2 && has(saved, kZmmState) && has(leaf7_ebx, kAvx512FBwDqVl) && has(leaf7_ecx, kAvx512Vnni);
    features.amx = features.avx512 && has(saved, kTileState) && has(leaf7_edx, kAmxTileInt8);
    return features;
}

// Read once: under a hypervisor each CPUID instruction costs tens of microseconds.
inline const CpuidFeatures& cpuid_features() {
    static const CpuidFeatures features = read_cpuid_features();
    return features;
}

}  // namespace pellucid

#endif
