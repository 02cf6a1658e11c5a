// What this machine can do at most, measured: the denominators of every "share of limit".
//
// A peak is the best of many short rounds, over several access patterns or instruction sequences, with every thread at
// work at once, so that real work cannot beat it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pellucid {

// Instruction sets of this machine that peaks can be measured with, widest first, out of: amx (int8 only), avx512
// (F, BW, VNNI), avx2 (with FMA), portable.
std::vector<std::string> peak_isas();

// Bytes a second that `threads` threads read together from a buffer of `bytes` bytes, a contiguous share each. `bytes`
// is to be like the weights in question: what fits in a cache is read faster than memory. Takes `seconds`, and the time
// to touch every page of the buffer. Throws std::bad_alloc.
double measure_read_bandwidth(int threads, int64_t bytes, double seconds);

// int8 operations a second (a multiply-add is two) of `threads` threads from registers: tdpbusd, vpdpbusd, the better
// of vpmaddubsw + vpmaddwd + vpaddd and vpmaddubsw + vpaddw, or 16-bit products in portable C++. Takes `seconds`.
double measure_int8_peak(int threads, const std::string& isa, double seconds);

// float32 operations a second (a multiply-add is two) of `threads` threads from registers. Takes `seconds`.
double measure_f32_peak(int threads, const std::string& isa, double seconds);

}  // namespace pellucid
