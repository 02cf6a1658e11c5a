// The sampling kernels: what of sampling a row depends on the instruction set. Every set gives the same bits.
//
// Probabilities are integers, rint(2^40 * exp(logit - max)): their sums do not depend on order, instruction set or
// threads.
#pragma once

#include <cstdint>

namespace pellucid {

constexpr int kWeightBits = 40;
constexpr int64_t kMaxVocabSize = int64_t{1} << 22;  // weights surely sum to less than 2^63
constexpr int64_t kMaximaGroup = 256;                // logits that share 16 lane maxima
constexpr int64_t kWeightChunk = 1024;               // weights that share one sum
constexpr int kNumTails = 8;                         // thresholds that `estimate_tails` takes
constexpr int64_t kCollectSlack = 16;                // entries that `collect` may write beyond what it returns

constexpr int64_t num_maxima(int64_t n) { return (n + kMaximaGroup - 1) / kMaximaGroup * 16; }
constexpr int64_t num_weight_chunks(int64_t n) { return (n + kWeightChunk - 1) / kWeightChunk; }

// scaled(x) = (x - offset) * factor + 0, each operation rounded alone.
struct SamplingKernels {
    const char* name;

    // The largest of x[0..n), or NaN where some x is NaN or +inf. maxima[16 * g + l] is the largest of
    // x[256 * g + l + 16 * j], j < 16; -inf where there is none.
    float (*row_max)(const float* x, int64_t n, float* maxima);

    // weights[i] = 2^40 * exp(scaled(x[i])) in float32, for scaled(x) <= 0; the weight itself is rint of it. With null
    // `weights`, only the sums.
    // chunk_sums[c] is the exact sum of the integer weights of chunk c. Returns the sum of all.
    uint64_t (*exp_weights)(const float* x, int64_t n, float offset, float factor, float* weights,
                            uint64_t* chunk_sums);

    // The sum of the integers rint(weight * -scaled(x)), for `weights` as exp_weights wrote them: products in float64,
    // of the integer weights. Where scaled(x) is far enough below 0 for a weight of 0, nothing is added.
    uint64_t (*gap_sum)(const float* x, int64_t n, float offset, float factor, const float* weights);

    // Sums over scaled(x), where it is not -inf, of -scaled(x) and of its square: in float64, index i to lane i mod 16
    // by rising i, the lanes then by rising lane. Returns how many there are.
    int64_t (*spread)(const float* x, int64_t n, float offset, float factor, double* sum, double* sum_of_squares);

    // How many x are not -inf.
    int64_t (*count_finite)(const float* x, int64_t n);

    // Makes x[i] -inf where bit i % 32 of mask[i / 32] is not set. Returns what row_max does of x as it was; where that
    // is NaN, what is NaN or +inf stays.
    float (*apply_mask)(float* x, int64_t n, const uint32_t* mask);

    // kept[i] = scaled(x[i]), or -inf where its integer weight is 0; `exps` are what exp_weights wrote.
    void (*keep_weighted)(const float* x, int64_t n, float offset, float factor, const float* exps, float* kept);

    // Writes, by rising index, the index and scaled(x) of every x with scaled(x) >= threshold; returns how many. With
    // `maxima`, those of row_max, it does not look at groups that hold none.
    int64_t (*collect)(const float* x, int64_t n, const float* maxima, float offset, float factor, float threshold,
                       int32_t* ids, float* values);

    // tails[j] = about the sum of the weights below thresholds[j], from a sample of them. Only ever a hint.
    void (*estimate_tails)(const float* weights, int64_t n, const float* thresholds, float* tails);
};

extern const SamplingKernels kSamplingKernelsPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const SamplingKernels kSamplingKernelsAvx2;    // AVX2, FMA, F16C
extern const SamplingKernels kSamplingKernelsAvx512;  // AVX-512 F, BW, DQ, VL
#endif

}  // namespace pellucid
