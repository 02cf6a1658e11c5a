// Processor features that the operating system saves the registers of too, read from CPUID and XGETBV.
//
// Not __builtin_cpu_supports: its names differ between compilers, and zig's runtime lacks the table behind it, so that
// the core would not link there.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)

#include <cpuid.h>

#include <cstdint>

namespace pellucid {

// By their /proc/cpuinfo names.
struct CpuidFeatures {
    bool fma = false, f16c = false, avx2 = false;
    bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512_vnni = false;
    bool amx_tile = false, amx_int8 = false;  // Linux wants a request before the first use

    // What the kernels of each name are compiled for.
    bool has_avx2() const { return avx2 && fma && f16c; }
    bool has_avx512() const { return has_avx2() && avx512f && avx512bw && avx512dq && avx512vl && avx512_vnni; }
    bool has_amx() const { return has_avx512() && amx_tile && amx_int8; }
};

inline CpuidFeatures read_cpuid_features() {
    constexpr uint32_t kOsSavesAvx = 27, kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
    const auto bit = [](uint32_t word, uint32_t index) { return (word >> index & 1) != 0; };
    CpuidFeatures features;
    uint32_t eax, ebx, ecx, edx, leaf1;
    if (!__get_cpuid(1, &eax, &ebx, &leaf1, &edx) || !bit(leaf1, kOsSavesAvx)) return features;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
    uint32_t saved, saved_high;
    asm volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
    const auto saves = [&](uint32_t state) { return (saved & state) == state; };
    if (saves(kYmmState)) {
        features.fma = bit(leaf1, 12);
        features.f16c = bit(leaf1, 29);
        features.avx2 = bit(ebx, 5);
    }
    if (saves(kZmmState)) {
        features.avx512f = bit(ebx, 16);
        features.avx512dq = bit(ebx, 17);
        features.avx512bw = bit(ebx, 30);
        features.avx512vl = bit(ebx, 31);
        features.avx512_vnni = bit(ecx, 11);
    }
    if (saves(kTileState)) {
        features.amx_tile = bit(edx, 24);
        features.amx_int8 = bit(edx, 25);
    }
    return features;
}

// Read once: under a hypervisor each CPUID instruction costs tens of microseconds.
inline const CpuidFeatures& cpuid_features() {
    static const CpuidFeatures features = read_cpuid_features();
    return features;
}

}  // namespace pellucid

#endif
