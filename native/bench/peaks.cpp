#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpuid_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#define PELLUCID_X86 1
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pellucid {

namespace {

// Makes a value opaque in its register: the compiler can neither hoist what is computed from it nor see that two chains
// compute the same.
#if defined(PELLUCID_X86)
#define PELLUCID_OPAQUE(value) asm volatile("" : "+v"(value))
#else
#define PELLUCID_OPAQUE(value) asm volatile("" : "+m"(value))
#endif
#if defined(__clang__)
#define PELLUCID_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PELLUCID_UNROLL _Pragma("GCC unroll 32")
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class SpinBarrier {
  public:
    explicit SpinBarrier(int count) : count_(count) {}

    void wait() {
        const int generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
            if (spins > 20000) std::this_thread::yield();
        }
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<int> generation_{0};
};

// Runs work(thread, variant) on all threads at once, round after round. Between rounds `next`, told the seconds from
// the first start to the last end, names the next round's variant, or -1 to stop; it is first told 0.
void run_rounds(int threads, const std::function<void(int, int)>& work, const std::function<int(double)>& next) {
    struct alignas(64) Span {
        double begin, end;
    };
    const auto count = static_cast<size_t>(threads);
    std::vector<Span> spans(count);
    SpinBarrier barrier(threads);
    std::atomic<int> launched{0};  // -1: give up
    int variant = next(0.0);
    const auto participate = [&](int thread) {
        while (variant >= 0) {
            barrier.wait();
            Span& span = spans[static_cast<size_t>(thread)];
            span.begin = now();
            work(thread, variant);
            span.end = now();
            barrier.wait();
            if (thread == 0) {
                double begin = spans[0].begin, end = spans[0].end;
                for (const Span& other : spans) {
                    begin = std::min(begin, other.begin);
                    end = std::max(end, other.end);
                }
                variant = next(end - begin);
            }
            barrier.wait();
        }
    };
    std::vector<std::thread> others;
    const auto join = [&] {
        for (std::thread& other : others) other.join();
    };
    try {
        for (int thread = 1; thread < threads; ++thread) {
            others.emplace_back([&, thread] {
                while (launched.load(std::memory_order_acquire) == 0) std::this_thread::yield();
                if (launched.load(std::memory_order_relaxed) > 0) participate(thread);
            });
        }
    } catch (...) {
        launched.store(-1, std::memory_order_release);
        join();
        throw;
    }
    launched.store(1, std::memory_order_release);
    participate(0);
    join();
}

// ---- read bandwidth ------------------------------------------------------------------------------------------------

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kStep = 256;  // bytes read from a stream before the next stream's turn
constexpr int64_t kMaxStreams = 8;
constexpr int64_t kReadGrain = kStep * kMaxStreams;
constexpr int64_t kBytesPerRound = 32 << 20;  // enough that the clock's cost does not show
constexpr int64_t kPage = 4096;

using ReadFunction = void (*)(const char* data, int64_t bytes, int64_t prefetch);

// Reads `bytes` (a multiple of kReadGrain) as kStreams parallel streams, prefetching so many bytes ahead; 0: not at
// all.
template <int kStreams>
void read_portable(const char* data, int64_t bytes, int64_t prefetch) {
    typedef uint64_t Vector __attribute__((vector_size(16)));
    const int64_t stream = bytes / kStreams;
    Vector sums[4] = {};
    for (int64_t at = 0; at < stream; at += kStep) {
        for (int s = 0; s < kStreams; ++s) {
            const char* p = data + s * stream + at;
            if (prefetch != 0) {
                for (int line = 0; line < kStep; line += 64) __builtin_prefetch(p + prefetch + line);
            }
            PELLUCID_UNROLL
            for (int i = 0; i < kStep / 16; ++i) {
                Vector v;
                std::memcpy(&v, p + 16 * i, sizeof v);
                sums[i % 4] ^= v;
            }
        }
    }
    for (Vector& sum : sums) PELLUCID_OPAQUE(sum);
}

#if defined(PELLUCID_X86)
template <int kStreams>
__attribute__((target("avx2"))) void read_avx2(const char* data, int64_t bytes, int64_t prefetch) {
    const int64_t stream = bytes / kStreams;
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t at = 0; at < stream; at += kStep) {
        for (int s = 0; s < kStreams; ++s) {
            const char* p = data + s * stream + at;
            if (prefetch != 0) {
                for (int line = 0; line < kStep; line += 64) __builtin_prefetch(p + prefetch + line);
            }
            PELLUCID_UNROLL
            for (int i = 0; i < kStep / 32; ++i) {
                sums[i % 4] =
                    _mm256_xor_si256(sums[i % 4], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
            }
        }
    }
    for (__m256i& sum : sums) PELLUCID_OPAQUE(sum);
}

template <int kStreams>
__attribute__((target("avx512f"))) void read_avx512(const char* data, int64_t bytes, int64_t prefetch) {
    const int64_t stream = bytes / kStreams;
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t at = 0; at < stream; at += kStep) {
        for (int s = 0; s < kStreams; ++s) {
            const char* p = data + s * stream + at;
            if (prefetch != 0) {
                for (int line = 0; line < kStep; line += 64) __builtin_prefetch(p + prefetch + line);
            }
            PELLUCID_UNROLL
            for (int i = 0; i < kStep / 64; ++i) {
                sums[i] = _mm512_xor_si512(sums[i], _mm512_load_si512(p + 64 * i));
            }
        }
    }
    for (__m512i& sum : sums) PELLUCID_OPAQUE(sum);
}
#endif

struct ReadPattern {
    ReadFunction read;
    int64_t prefetch;
};

std::vector<ReadPattern> read_patterns() {
    std::vector<ReadFunction> functions = {read_portable<1>, read_portable<4>};
#if defined(PELLUCID_X86)
    const CpuidFeatures& features = cpuid_features();
    if (features.has_avx2()) functions = {read_avx2<1>, read_avx2<2>, read_avx2<4>, read_avx2<8>};
    if (features.has_avx512()) functions = {read_avx512<1>, read_avx512<2>, read_avx512<4>, read_avx512<8>};
#endif
    std::vector<ReadPattern> patterns;
    for (const int64_t prefetch : {0, 1024, 4096}) {
        for (const ReadFunction read : functions) patterns.push_back({read, prefetch});
    }
    return patterns;
}

struct FreeBuffer {
    void operator()(char* p) const { std::free(p); }
};

}  // namespace

double measure_read_bandwidth(int threads, int64_t bytes, double seconds) {
    if (threads < 1 || bytes < threads * kReadGrain) {
        throw std::invalid_argument("threads must be at least 1, and bytes at least 2048 a thread");
    }
    const int64_t share = bytes / threads / kReadGrain * kReadGrain;
    const auto size = static_cast<size_t>((share * threads + kHugePage - 1) / kHugePage * kHugePage);
    const std::unique_ptr<char, FreeBuffer> buffer(static_cast<char*>(std::aligned_alloc(kHugePage, size)));
    if (!buffer) throw std::bad_alloc();
#if defined(__linux__)
    madvise(buffer.get(), size, MADV_HUGEPAGE);
#endif

    const std::vector<ReadPattern> patterns = read_patterns();
    const auto num_patterns = static_cast<int>(patterns.size());
    // A round reads the next window of each share, so that all of the buffer lies between two reads of the same bytes.
    const int64_t windows = std::max<int64_t>(1, share * threads / kBytesPerRound);
    const int64_t window = share / windows / kReadGrain * kReadGrain;
    const int64_t repeats = std::max<int64_t>(1, kBytesPerRound / (window * threads));
    const int kTouch = num_patterns;  // each thread touches its share first: the pages land near it
    std::vector<double> best(patterns.size(), 0.0);
    std::vector<int> ranking;
    int round = -2;
    int variant = kTouch;
    double deadline = 0.0;
    run_rounds(
        threads,
        [&](int thread, int pattern) {
            char* data = buffer.get() + thread * share;
            if (pattern == kTouch) {
                for (int64_t at = 0; at < share; at += kPage) data[at] = 1;
                return;
            }
            const ReadPattern& chosen = patterns[static_cast<size_t>(pattern)];
            for (int64_t i = 0; i < repeats; ++i) {
                chosen.read(data + (round + i) % windows * window, window, chosen.prefetch);
            }
        },
        // Every pattern once, then the three best in turn until the time is over.
        [&](double span) {
            ++round;
            if (round == 0) deadline = now() + seconds;
            if (round > 0) {
                double& rate = best[static_cast<size_t>(variant)];
                rate = std::max(rate, static_cast<double>(window * threads * repeats) / span);
                if (round >= num_patterns && now() > deadline) return -1;
            }
            if (round == num_patterns) {
                for (int i = 0; i < num_patterns; ++i) ranking.push_back(i);
                std::sort(ranking.begin(), ranking.end(),
                          [&](int a, int b) { return best[static_cast<size_t>(a)] > best[static_cast<size_t>(b)]; });
            }
            if (round >= 0) variant = round < num_patterns ? round : ranking[static_cast<size_t>(round % 3)];
            return variant;
        });
    return *std::max_element(best.begin(), best.end());
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

namespace {

// Runs a sequence `iterations` times; returns the operations of one iteration.
using ArithmeticFunction = int64_t (*)(int64_t iterations);

#if defined(PELLUCID_X86)

constexpr int kAccumulators512 = 20;  // covers a latency of 5 on two ports twice, and leaves registers for operands
constexpr int kAccumulators256 = 12;
constexpr int kChains = 6;

__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t int8_avx512(int64_t iterations) {
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
    PELLUCID_OPAQUE(a);
    PELLUCID_OPAQUE(b);
    __m512i sums[kAccumulators512];
    PELLUCID_UNROLL
    for (__m512i& sum : sums) {
        sum = _mm512_setzero_si512();
        PELLUCID_OPAQUE(sum);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kAccumulators512; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    }
    PELLUCID_UNROLL
    for (__m512i& sum : sums) PELLUCID_OPAQUE(sum);
    return kAccumulators512 * 64 * 2;
}

__attribute__((target("avx512f"))) int64_t f32_avx512(int64_t iterations) {
    __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
    PELLUCID_OPAQUE(a);
    PELLUCID_OPAQUE(b);
    __m512 sums[kAccumulators512];
    PELLUCID_UNROLL
    for (__m512& sum : sums) {
        sum = _mm512_setzero_ps();
        PELLUCID_OPAQUE(sum);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kAccumulators512; ++i) sums[i] = _mm512_fmadd_ps(sums[i], a, b);
    }
    PELLUCID_UNROLL
    for (__m512& sum : sums) PELLUCID_OPAQUE(sum);
    return kAccumulators512 * 16 * 2;
}

// Products summed to 32 bits at once.
__attribute__((target("avx2"))) int64_t int8_avx2_widening(int64_t iterations) {
    __m256i b = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
    PELLUCID_OPAQUE(b);
    PELLUCID_OPAQUE(ones);
    __m256i a[kChains], sums[kChains];
    PELLUCID_UNROLL
    for (int i = 0; i < kChains; ++i) {
        a[i] = _mm256_set1_epi8(1);
        sums[i] = _mm256_setzero_si256();
        PELLUCID_OPAQUE(sums[i]);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kChains; ++i) {
            PELLUCID_OPAQUE(a[i]);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a[i], b), ones));
        }
    }
    PELLUCID_UNROLL
    for (__m256i& sum : sums) PELLUCID_OPAQUE(sum);
    return kChains * 32 * 2;
}

// Products summed in 16 bits, as 4-bit weights allow for a few steps.
__attribute__((target("avx2"))) int64_t int8_avx2_narrow(int64_t iterations) {
    __m256i b = _mm256_set1_epi8(2);
    PELLUCID_OPAQUE(b);
    __m256i a[kChains], sums[kChains];
    PELLUCID_UNROLL
    for (int i = 0; i < kChains; ++i) {
        a[i] = _mm256_set1_epi8(1);
        sums[i] = _mm256_setzero_si256();
        PELLUCID_OPAQUE(sums[i]);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kChains; ++i) {
            PELLUCID_OPAQUE(a[i]);
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(a[i], b));
        }
    }
    PELLUCID_UNROLL
    for (__m256i& sum : sums) PELLUCID_OPAQUE(sum);
    return kChains * 32 * 2;
}

__attribute__((target("avx2,fma"))) int64_t f32_avx2(int64_t iterations) {
    __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
    PELLUCID_OPAQUE(a);
    PELLUCID_OPAQUE(b);
    __m256 sums[kAccumulators256];
    PELLUCID_UNROLL
    for (__m256& sum : sums) {
        sum = _mm256_setzero_ps();
        PELLUCID_OPAQUE(sum);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kAccumulators256; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);
    }
    PELLUCID_UNROLL
    for (__m256& sum : sums) PELLUCID_OPAQUE(sum);
    return kAccumulators256 * 8 * 2;
}

#if defined(__linux__)
#define PELLUCID_AMX 1

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // a row

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Linux keeps the tile registers from a process until it asks.
bool request_amx() {
    constexpr int kArchRequestPermission = 0x1023, kTileDataFeature = 18;
    return syscall(SYS_arch_prctl, kArchRequestPermission, kTileDataFeature) == 0;
}

// Four accumulators, two tiles of each operand: as many as eight tiles allow.
__attribute__((target("amx-tile,amx-int8"))) int64_t int8_amx(int64_t iterations) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = kTileRows;
        config.row_bytes[tile] = kTileBytes;
    }
    alignas(64) static const char operand[kTileRows * kTileBytes] = {};
    // GCC takes ldtilecfg to read 8 bytes only, and would drop the stores to the rest.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, operand, kTileBytes);
    _tile_loadd(5, operand, kTileBytes);
    _tile_loadd(6, operand, kTileBytes);
    _tile_loadd(7, operand, kTileBytes);
    for (int64_t n = 0; n < iterations; ++n) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return 4 * kTileRows * kTileRows * kTileBytes * 2;
}
#endif

#endif  // x86

constexpr int kPortableChains = 8;
typedef float F32x4 __attribute__((vector_size(16)));

int64_t f32_portable(int64_t iterations) {
    F32x4 a = {0.5f, 0.5f, 0.5f, 0.5f}, b = a;
    PELLUCID_OPAQUE(a);
    PELLUCID_OPAQUE(b);
    F32x4 sums[kPortableChains] = {};
    PELLUCID_UNROLL
    for (F32x4& sum : sums) PELLUCID_OPAQUE(sum);
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kPortableChains; ++i) sums[i] = sums[i] * a + b;
    }
    PELLUCID_UNROLL
    for (F32x4& sum : sums) PELLUCID_OPAQUE(sum);
    return kPortableChains * 4 * 2;
}

#if defined(PELLUCID_X86)
// What a compiler makes of 16-bit products where only SSE2 may be assumed.
int64_t int8_portable(int64_t iterations) {
    __m128i b = _mm_set1_epi16(2);
    PELLUCID_OPAQUE(b);
    __m128i a[kChains], sums[kChains];
    PELLUCID_UNROLL
    for (int i = 0; i < kChains; ++i) {
        a[i] = _mm_set1_epi16(1);
        sums[i] = _mm_setzero_si128();
        PELLUCID_OPAQUE(sums[i]);
    }
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_UNROLL
        for (int i = 0; i < kChains; ++i) {
            PELLUCID_OPAQUE(a[i]);
            sums[i] = _mm_add_epi32(sums[i], _mm_madd_epi16(a[i], b));
        }
    }
    PELLUCID_UNROLL
    for (__m128i& sum : sums) PELLUCID_OPAQUE(sum);
    return kChains * 8 * 2;
}
#else
int64_t int8_portable(int64_t iterations) {
    typedef int16_t I16x8 __attribute__((vector_size(16)));
    I16x8 a = {1, 1, 1, 1, 1, 1, 1, 1};
    I16x8 sums[kPortableChains] = {};
    PELLUCID_UNROLL
    for (I16x8& sum : sums) PELLUCID_OPAQUE(sum);
    for (int64_t n = 0; n < iterations; ++n) {
        PELLUCID_OPAQUE(a);
        PELLUCID_UNROLL
        for (int i = 0; i < kPortableChains; ++i) sums[i] += a * a;
    }
    PELLUCID_UNROLL
    for (I16x8& sum : sums) PELLUCID_OPAQUE(sum);
    return kPortableChains * 8 * 2;
}
#endif

double measure_arithmetic(int threads, const std::vector<ArithmeticFunction>& sequences, double seconds) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    constexpr double kRound = 1e-3;  // seconds
    constexpr int64_t kTrial = 20000;
    double best = 0.0;
    for (const ArithmeticFunction sequence : sequences) {
        const double begin = now();
        const int64_t operations = sequence(kTrial);
        const int64_t iterations = std::max<int64_t>(
            kTrial, static_cast<int64_t>(static_cast<double>(kTrial) * kRound / std::max(now() - begin, 1e-9)));
        const double deadline = now() + seconds / static_cast<double>(sequences.size());
        run_rounds(
            threads, [&](int, int) { sequence(iterations); },
            [&](double span) {
                if (span > 0.0) best = std::max(best, static_cast<double>(operations * iterations * threads) / span);
                return now() < deadline ? 0 : -1;
            });
    }
    return best;
}

struct Arithmetic {
    std::string isa;
    std::vector<ArithmeticFunction> int8;
    std::vector<ArithmeticFunction> f32;
};

std::vector<Arithmetic> available_arithmetic() {
    std::vector<Arithmetic> sets;
#if defined(PELLUCID_X86)
    const CpuidFeatures& features = cpuid_features();
#if defined(PELLUCID_AMX)
    if (features.has_amx() && request_amx()) sets.push_back({"amx", {int8_amx}, {}});
#endif
    if (features.has_avx512()) sets.push_back({"avx512", {int8_avx512}, {f32_avx512}});
    if (features.has_avx2()) sets.push_back({"avx2", {int8_avx2_widening, int8_avx2_narrow}, {f32_avx2}});
#endif
    sets.push_back({"portable", {int8_portable}, {f32_portable}});
    return sets;
}

double measure(int threads, const std::string& isa, double seconds,
               std::vector<ArithmeticFunction> Arithmetic::* sequences) {
    std::string names;
    for (const Arithmetic& set : available_arithmetic()) {
        if ((set.*sequences).empty()) continue;
        if (set.isa == isa) return measure_arithmetic(threads, set.*sequences, seconds);
        names += (names.empty() ? "" : ", ") + set.isa;
    }
    throw std::invalid_argument("no peak to measure with instruction set '" + isa + "'; this machine has " + names);
}

}  // namespace

std::vector<std::string> peak_isas() {
    std::vector<std::string> names;
    for (const Arithmetic& set : available_arithmetic()) names.push_back(set.isa);
    return names;
}

double measure_int8_peak(int threads, const std::string& isa, double seconds) {
    return measure(threads, isa, seconds, &Arithmetic::int8);
}

double measure_f32_peak(int threads, const std::string& isa, double seconds) {
    return measure(threads, isa, seconds, &Arithmetic::f32);
}

}  // namespace pellucid
