// Speed of the vector kernels on one core: attention as a share of the float32 peak and of the read bandwidth that the
// same run measures, and the row kernels.
//
//   cmake --build build/dev --target vector_kernels_bench && build/dev/native/vector_kernels_bench
//   [portable|avx2|avx512]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu_info.h"
#include "peaks.h"
#include "vector_kernels.h"

namespace {

using pellucid::KvType;
using pellucid::VectorKernels;

double seconds_per_call(const auto& call) {
    using Clock = std::chrono::steady_clock;
    const auto time = [&](int64_t count) {
        const auto start = Clock::now();
        for (int64_t i = 0; i < count; ++i) call();
        return std::chrono::duration<double>(Clock::now() - start).count();
    };
    int64_t count = 1;
    while (time(count) < 0.001) count *= 2;
    double best = time(count);
    for (int repeat = 0; repeat < 24; ++repeat) best = std::min(best, time(count));
    return best / static_cast<double>(count);
}

template <typename T>
struct Aligned {
    explicit Aligned(size_t n)
        : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64))), size(n) {
        std::memset(static_cast<void*>(data), 0, n * sizeof(T));
    }
    ~Aligned() { std::free(data); }
    Aligned(const Aligned&) = delete;
    T* data;
    size_t size;
};

void fill(Aligned<float>& a, float sigma) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, sigma);
    for (size_t i = 0; i < a.size; ++i) a.data[i] = normal(generator);
}

// num_blocks KV blocks of normally distributed keys and values.
struct Cache {
    Cache(const VectorKernels& kernels, KvType type, int head_dim, int num_blocks)
        : block_bytes(static_cast<size_t>(pellucid::kv_block_bytes(type, head_dim))),
          bytes(2 * block_bytes * static_cast<size_t>(num_blocks)) {
        Aligned<float> row(static_cast<size_t>(head_dim) * 7);
        fill(row, 1.0f);
        for (int block = 0; block < num_blocks; ++block) {
            for (int slot = 0; slot < pellucid::kKvBlockSize; ++slot) {
                const int offset = (block + slot) % 6 * head_dim + slot % 3;
                kernels.kv_store(type, key(block), value(block), head_dim, slot, row.data + offset, row.data + offset);
            }
        }
    }
    char* key(int block) { return bytes.data + 2 * block_bytes * static_cast<size_t>(block); }
    char* value(int block) { return key(block) + block_bytes; }
    size_t block_bytes;
    Aligned<char> bytes;
};

struct Attention {
    Attention(const VectorKernels& table, KvType kv_type, int dim, int queries, int num_blocks)
        : kernels(table),
          type(kv_type),
          head_dim(dim),
          num_queries(queries),
          blocks(num_blocks),
          cache(table, kv_type, dim, num_blocks),
          query(rows() * columns()),
          max(rows()),
          sum(rows()),
          out(rows() * columns()),
          scratch(static_cast<size_t>(pellucid::attention_scratch_floats(queries, dim))),
          begin(rows(), 0),
          end(rows(), pellucid::kKvBlockSize) {
        fill(query, 0.3f);
    }
    size_t rows() const { return static_cast<size_t>(num_queries); }
    size_t columns() const { return static_cast<size_t>(head_dim); }
    void run(int block) {
        kernels.attention_block(type, cache.key(block), cache.value(block), head_dim, query.data, head_dim, num_queries,
                                begin.data(), end.data(), max.data, sum.data, out.data, scratch.data);
    }

    const VectorKernels& kernels;
    KvType type;
    int head_dim, num_queries, blocks;
    Cache cache;
    Aligned<float> query, max, sum, out, scratch;
    std::vector<int32_t> begin, end;
};

constexpr double kPeakSeconds = 0.2;

void prefill(const VectorKernels& kernels) {
    const double peak = pellucid::measure_f32_peak(1, kernels.name, kPeakSeconds);
    std::printf("\nattention_block, a block in cache; float32 peak %.0f GFLOP/s\n", peak * 1e-9);
    std::printf("%-6s %9s %8s %10s %6s %10s\n", "type", "head_dim", "queries", "GFLOP/s", "peak", "us");
    for (KvType type : {KvType::kBF16, KvType::kF16, KvType::kF32, KvType::kQ8}) {
        for (int head_dim : {64, 128, 256}) {
            for (int queries : {1, 3, 16, 64, 192}) {
                Attention attention(kernels, type, head_dim, queries, 1);
                const double seconds = seconds_per_call([&] { attention.run(0); });
                const double flops = 4.0 * queries * pellucid::kKvBlockSize * head_dim / seconds;
                std::printf("%-6s %9d %8d %10.1f %5.0f%% %10.2f\n", kv_type_name(type), head_dim, queries, flops * 1e-9,
                            100.0 * flops / peak, seconds * 1e6);
            }
        }
    }
}

void causal(const VectorKernels& kernels) {
    std::printf("\nattention_block, causal diagonal block (bf16), share of the time of a full block\n");
    for (int head_dim : {64, 256}) {
        Attention attention(kernels, KvType::kBF16, head_dim, 192, 1);
        const double full = seconds_per_call([&] { attention.run(0); });
        for (int i = 0; i < 192; ++i) attention.end[static_cast<size_t>(i)] = i / 3 + 1;
        const double diagonal = seconds_per_call([&] { attention.run(0); });
        std::printf("head_dim %3d: %.0f%%\n", head_dim, 100.0 * diagonal / full);
    }
}

void decode(const VectorKernels& kernels) {
    constexpr int64_t kCacheBytes = 128 << 20;
    const double bandwidth = pellucid::measure_read_bandwidth(1, kCacheBytes, kPeakSeconds);
    std::printf("\nattention_block + fold over 128 MiB of cache; read bandwidth %.1f GB/s\n", bandwidth * 1e-9);
    std::printf("%-6s %9s %8s %8s %6s\n", "type", "head_dim", "queries", "GB/s", "limit");
    for (KvType type : {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8}) {
        for (int head_dim : {64, 256}) {
            for (int queries : {1, 3, 4}) {
                const auto blocks = static_cast<int>(kCacheBytes / (2 * pellucid::kv_block_bytes(type, head_dim)));
                Attention attention(kernels, type, head_dim, queries, blocks);
                Aligned<float> max(attention.rows()), sum(attention.rows()), out(attention.out.size);
                const double seconds = seconds_per_call([&] {
                    for (int block = 0; block < blocks; ++block) {
                        attention.run(block);
                        kernels.attention_fold(head_dim, queries, max.data, sum.data, out.data, attention.max.data,
                                               attention.sum.data, attention.out.data);
                    }
                });
                const double speed = static_cast<double>(attention.cache.bytes.size) / seconds;
                std::printf("%-6s %9d %8d %8.1f %5.0f%%\n", kv_type_name(type), head_dim, queries, speed * 1e-9,
                            100.0 * speed / bandwidth);
            }
        }
    }
}

void row_kernels(const VectorKernels& kernels) {
    constexpr int kSize = 1536;
    Aligned<float> x(kSize), y(kSize), out(kSize);
    Aligned<int8_t> q(kSize);
    Aligned<pellucid::QuantBlock> blocks(kSize / 32);
    fill(x, 1.0f);
    fill(y, 1.0f);
    const auto report = [&](const char* name, const auto& call) {
        std::printf("%-16s %8.2f ns per 32 values\n", name, seconds_per_call(call) * 1e9 / (kSize / 32));
    };
    std::printf("\nrow kernels, %d values\n", kSize);
    report("rms_norm", [&] { kernels.rms_norm(x.data, y.data, 1e-5f, kSize, out.data); });
    report("add", [&] { kernels.add(out.data, y.data, kSize); });
    report("silu_mul", [&] { kernels.silu_mul(x.data, y.data, kSize, out.data); });
    report("gelu_tanh_mul", [&] { kernels.gelu_tanh_mul(x.data, y.data, kSize, out.data); });
    report("quantize", [&] { kernels.quantize(x.data, kSize, 1, q.data, blocks.data); });
    for (int i = 0; i < kSize; ++i) {
        out.data[i] = 1.0f;
        x.data[i] = 0.6f;
        y.data[i] = 0.8f;
    }
    report("rope", [&] { kernels.rope(out.data, x.data, y.data, kSize); });
    report("all_finite", [&] { kernels.all_finite(x.data, kSize); });
    for (KvType type : {KvType::kF16, KvType::kQ8}) {
        Cache cache(kernels, type, 64, 1);
        int slot = 0;
        report((std::string("kv_store 64 ") + kv_type_name(type)).c_str(), [&] {
            for (int i = 0; i < 24; ++i) {
                kernels.kv_store(type, cache.key(0), cache.value(0), 64, slot = (slot + 1) % 64, x.data, y.data);
            }
        });
    }
}

}  // namespace

int main(int argc, char** argv) {
    for (const pellucid::InstructionSet& set : pellucid::available_instruction_sets()) {
        if (argc > 1 && std::strcmp(set.vector->name, argv[1]) != 0) continue;
        std::printf("%s\n", set.vector->name);
        row_kernels(*set.vector);
        prefill(*set.vector);
        causal(*set.vector);
        decode(*set.vector);
        return 0;
    }
    std::fprintf(stderr, "this machine has no instruction set '%s'; there are:", argv[1]);
    for (const pellucid::InstructionSet& set : pellucid::available_instruction_sets()) {
        std::fprintf(stderr, " %s", set.vector->name);
    }
    std::fputs("\n", stderr);
    return 2;
}
