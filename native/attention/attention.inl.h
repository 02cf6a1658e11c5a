// Attention over one 64-token KV block, for the instruction set of the including file.
//
// Queries go in tiles of up to kQueryTile rows. A tile's scores are held in registers, 16 tokens a vector; its output
// likewise, 16 dimensions a vector. What fixes the bits of a row, whatever tile it falls in:
//   score     one chain of fused multiply-adds over the dimensions in order
//   exp sum   groups of 16 tokens as (0 + 1) + (2 + 3), then the lanes
//   output    one chain of fused multiply-adds over the tokens in order, from 0, and + 0 at the end
// A token that a row does not see but a neighbour in its tile does has weight 0 in that chain and adds a zero of either
// sign to it, which the closing + 0 makes invisible.
#pragma once

#include "kv_block.inl.h"

namespace pellucid {
inline namespace PELLUCID_SIMD_NAMESPACE {

// Register tiles: rows times vectors of accumulators, one vector of operands a column and one broadcast fit the
// register file. Many rows amortize the conversion of 16-bit operands; few rows take more columns, for enough
// independent chains.
#if defined(PELLUCID_SIMD_AVX512)
constexpr int kQueryTile = 12;
constexpr int token_tile(int queries) { return queries > 6 ? 2 : 4; }
constexpr int dim_tile(int queries) { return queries > 6 ? 2 : queries > 3 ? 4 : queries > 1 ? 8 : 16; }
#elif defined(PELLUCID_SIMD_AVX2)
constexpr int kQueryTile = 6;
constexpr int token_tile(int queries) { return queries > 2 ? 1 : 2; }
constexpr int dim_tile(int queries) { return queries > 3 ? 1 : queries > 1 ? 2 : 4; }
#else
constexpr int kQueryTile = 2;
constexpr int token_tile(int) { return 1; }
constexpr int dim_tile(int) { return 1; }
#endif
constexpr int next_smaller_tile(int queries) { return queries > 6 ? 6 : queries - 1; }

// Up to this many rows convert elements tile by tile; more have the block converted first, which costs a fixed
// time and then saves a twelfth to a third of a tile's.
constexpr int kMaxConvertingQueries = 32;
// Up to this many rows wait for memory rather than arithmetic.
constexpr int kMaxPrefetchingQueries = 6;
static_assert(kQueryTile <= kMaxQueryTile);

static TokenRange visible_tokens(const int32_t* begin, const int32_t* end, int rows) {
    TokenRange range = {kKvBlockSize, 0};
    for (int i = 0; i < rows; ++i) {
        if (begin[i] >= end[i]) continue;
        range.begin = begin[i] < range.begin ? begin[i] : range.begin;
        range.end = end[i] > range.end ? end[i] : range.end;
    }
    return range;
}

static bool every_row_sees_all(const int32_t* begin, const int32_t* end, int rows) {
    bool all = true;
    for (int i = 0; i < rows; ++i) all = all && begin[i] == 0 && end[i] == kKvBlockSize;
    return all;
}

// Brings in the keys of 16 pairs of dimensions further on, and the values of the same tokens: a token group's values
// lie as far into the value block as its keys into the key block. Blocks are scattered in memory, so that the
// processor's own prefetching starts anew with each; this reads twice as fast.
template <int kGroups, typename Element>
PELLUCID_INLINE void prefetch_tile(const Block<Element>& block, const Element* pair, int64_t group_stride) {
    constexpr int kPair = 2 * kLanes, kAhead = 16 * kPair, kCacheLine = 64 / sizeof(Element);
    PELLUCID_UNROLL
    for (int g = 0; g < kGroups; ++g) {
        PELLUCID_UNROLL
        for (int i = 0; i < kPair; i += kCacheLine) {
            const Element* line = pair + g * group_stride + i;
            __builtin_prefetch(line + kAhead, 0, 3);
            __builtin_prefetch(block.value + (line - block.key), 0, 2);
        }
    }
}

// scores[i][16 * group ...] of kQueries rows and kGroups groups.
template <KvType kType, int kQueries, int kGroups, bool kPrefetch>
static void score_tile(const Block<typename KvReader<kType>::Element>& block, int group, const float* query,
                       int64_t query_stride, float* scores) {
    using Reader = KvReader<kType>;
    const int head_dim = block.head_dim;
    const int64_t group_stride = static_cast<int64_t>(head_dim) * kLanes;
    const auto* key = block.key + group * group_stride;
    F32x16 sum[kQueries][kGroups];
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        PELLUCID_UNROLL
        for (int g = 0; g < kGroups; ++g) sum[i][g] = zero();
    }
    [[maybe_unused]] F32x16 scale[kGroups] = {};
    for (int d = 0; d < head_dim; d += 2, key += 2 * kLanes) {
        if constexpr (kPrefetch) prefetch_tile<kGroups>(block, key, group_stride);
        if constexpr (Reader::kScaled) {
            if (d % kQuantBlockSize == 0) {
                PELLUCID_UNROLL
                for (int g = 0; g < kGroups; ++g) scale[g] = key_scales(block, group + g, d);
            }
        }
        F32x16 k[kGroups];
        PELLUCID_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            k[g] = Reader::template key<0>(key + g * group_stride);
            if constexpr (Reader::kScaled) k[g] = mul(k[g], scale[g]);
        }
        PELLUCID_UNROLL
        for (int i = 0; i < kQueries; ++i) {
            const F32x16 q = broadcast(query[i * query_stride + d]);
            PELLUCID_UNROLL
            for (int g = 0; g < kGroups; ++g) sum[i][g] = fma(q, k[g], sum[i][g]);
        }
        PELLUCID_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            k[g] = Reader::template key<1>(key + g * group_stride);
            if constexpr (Reader::kScaled) k[g] = mul(k[g], scale[g]);
        }
        PELLUCID_UNROLL
        for (int i = 0; i < kQueries; ++i) {
            const F32x16 q = broadcast(query[i * query_stride + d + 1]);
            PELLUCID_UNROLL
            for (int g = 0; g < kGroups; ++g) sum[i][g] = fma(q, k[g], sum[i][g]);
        }
    }
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        PELLUCID_UNROLL
        for (int g = 0; g < kGroups; ++g) store(scores + i * kKvBlockSize + (group + g) * kLanes, sum[i][g]);
    }
}

template <KvType kType, int kQueries, bool kPrefetch>
static void score_rows(const Block<typename KvReader<kType>::Element>& block, TokenRange range, const float* query,
                       int64_t query_stride, float* scores) {
    constexpr int kTile = token_tile(kQueries);
    int group = range.first_group();
    const int end = range.end_group();
    for (; group + kTile <= end; group += kTile) {
        score_tile<kType, kQueries, kTile, kPrefetch>(block, group, query, query_stride, scores);
    }
    if constexpr (kTile > 2) {
        for (; group + 2 <= end; group += 2) {
            score_tile<kType, kQueries, 2, kPrefetch>(block, group, query, query_stride, scores);
        }
    }
    if constexpr (kTile > 1) {
        if (group < end) score_tile<kType, kQueries, 1, kPrefetch>(block, group, query, query_stride, scores);
    }
}

// One group of 16 scores of a row, -inf where the row does not see the token.
PELLUCID_INLINE F32x16 visible_scores(const float* scores, int group, int begin, int end) {
    const int first = group * kLanes;
    if (begin <= first && end >= first + kLanes) return load(scores + first);
    const int from = begin < first ? 0 : begin > first + kLanes ? kLanes : begin - first;
    const int to = end < first ? 0 : end > first + kLanes ? kLanes : end - first;
    return select(lane_range(from, to), load(scores + first), broadcast(-__builtin_inff()));
}

// Four of a tile's rows; beyond the last it repeats.
template <int kQueries>
PELLUCID_INLINE F32x16 reduce_four(F32x16 (*reduce)(F32x16, F32x16, F32x16, F32x16), const F32x16 (&rows)[kQueries],
                                   int row) {
    constexpr int kLast = kQueries - 1;
    return reduce(rows[row], rows[row + 1 < kLast ? row + 1 : kLast], rows[row + 2 < kLast ? row + 2 : kLast],
                  rows[row + 3 < kLast ? row + 3 : kLast]);
}

// A tile's scores to exp(score - max), in place. Without kMasked every row sees the whole block.
template <int kQueries, bool kMasked>
static void softmax_tile(float* scores, TokenRange range, const int32_t* begin, const int32_t* end, float* max_out,
                         float* sum_out) {
    constexpr int kQuads = (kQueries + 3) / 4;
    const auto load_scores = [&](int i, int g) {
        const float* row = scores + i * kKvBlockSize;
        if constexpr (!kMasked) return load(row + g * kLanes);
        if (g < range.first_group() || g >= range.end_group()) return broadcast(-__builtin_inff());
        return visible_scores(row, g, begin[i], end[i]);
    };

    F32x16 row_max[kQueries], row_sum[kQueries], shift[kQuads];
    float maxima[kQuads * 4], sums[kQuads * 4];
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        row_max[i] = max(max(load_scores(i, 0), load_scores(i, 1)), max(load_scores(i, 2), load_scores(i, 3)));
    }
    PELLUCID_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
        const F32x16 largest = reduce_four(reduce_max4, row_max, quad * 4);
        store_quarters(maxima + quad * 4, bits(largest));
        // A row that sees nothing has weights exp(-inf) = 0.
        shift[quad] = select(equal(largest, broadcast(-__builtin_inff())), zero(), largest);
    }
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        const F32x16 row_shift = broadcast_quarter(shift[i / 4], i % 4);
        F32x16 weight[kTokenGroups];
        PELLUCID_UNROLL
        for (int g = 0; g < kTokenGroups; ++g) {
            weight[g] = exp_not_positive(sub(load_scores(i, g), row_shift));
            store(scores + i * kKvBlockSize + g * kLanes, weight[g]);
        }
        row_sum[i] = add(add(weight[0], weight[1]), add(weight[2], weight[3]));
    }
    PELLUCID_UNROLL
    for (int quad = 0; quad < kQuads; ++quad) {
        store_quarters(sums + quad * 4, bits(reduce_four(reduce_add4, row_sum, quad * 4)));
    }
    memcpy(max_out, maxima, sizeof(float) * kQueries);
    memcpy(sum_out, sums, sizeof(float) * kQueries);
}

// out[i][dim ...] of kQueries rows and kVectors vectors, of which the last has `last` lanes.
template <KvType kType, int kQueries, int kVectors>
static void value_tile(const Block<typename KvReader<kType>::Element>& block, TokenRange range, const float* weights,
                       int dim, int last, float* out) {
    using Reader = KvReader<kType>;
    const int head_dim = block.head_dim;
    F32x16 sum[kQueries][kVectors];
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        PELLUCID_UNROLL
        for (int n = 0; n < kVectors; ++n) sum[i][n] = zero();
    }
    const auto* value = block.value + static_cast<int64_t>(range.begin) * block.value_stride + dim;
    [[maybe_unused]] const float* scale = nullptr;
    if constexpr (Reader::kScaled) scale = block.value_scale + range.begin * block.scales() + dim / kQuantBlockSize;
    for (int t = range.begin; t < range.end; ++t, value += block.value_stride) {
        F32x16 v[kVectors];
        PELLUCID_UNROLL
        for (int n = 0; n < kVectors; ++n) {
            v[n] = Reader::value(value + n * kLanes);
            // Two vectors to a scale; a lone one finds its own.
            if constexpr (Reader::kScaled) v[n] = mul(v[n], broadcast(scale[n / 2]));
        }
        PELLUCID_UNROLL
        for (int i = 0; i < kQueries; ++i) {
            const F32x16 w = broadcast(weights[i * kKvBlockSize + t]);
            PELLUCID_UNROLL
            for (int n = 0; n < kVectors; ++n) sum[i][n] = fma(w, v[n], sum[i][n]);
        }
        if constexpr (Reader::kScaled) scale += block.scales();
    }
    PELLUCID_UNROLL
    for (int i = 0; i < kQueries; ++i) {
        float* row = out + static_cast<int64_t>(i) * head_dim + dim;
        PELLUCID_UNROLL
        for (int n = 0; n < kVectors; ++n) {
            const F32x16 total = add(sum[i][n], zero());
            if (n < kVectors - 1 || last == kLanes) {
                store(row + n * kLanes, total);
            } else {
                store_partial(row + n * kLanes, total, last);
            }
        }
    }
}

template <KvType kType, int kQueries, int kVectors>
static int value_columns(const Block<typename KvReader<kType>::Element>& block, TokenRange range, const float* weights,
                         int dim, float* out) {
    for (; dim + (kVectors - 1) * kLanes < block.head_dim; dim += kVectors * kLanes) {
        const int rest = block.head_dim - dim - (kVectors - 1) * kLanes;
        value_tile<kType, kQueries, kVectors>(block, range, weights, dim, rest < kLanes ? rest : kLanes, out);
    }
    if constexpr (kVectors > 1) return value_columns<kType, kQueries, kVectors / 2>(block, range, weights, dim, out);
    return dim;
}

template <KvType kType, int kQueries, bool kPrefetch>
static void attend_tile(const Block<typename KvReader<kType>::Element>& block, const float* query, int64_t query_stride,
                        const int32_t* begin, const int32_t* end, float* max, float* sum, float* out, float* scores) {
    const TokenRange range = visible_tokens(begin, end, kQueries);
    if (range.begin >= range.end) {
        for (int i = 0; i < kQueries; ++i) {
            max[i] = -__builtin_inff();
            sum[i] = 0.0f;
        }
        memset(out, 0, sizeof(float) * kQueries * static_cast<unsigned>(block.head_dim));
        return;
    }
    score_rows<kType, kQueries, kPrefetch>(block, range, query, query_stride, scores);
    if (every_row_sees_all(begin, end, kQueries)) {
        softmax_tile<kQueries, false>(scores, range, begin, end, max, sum);
    } else {
        softmax_tile<kQueries, true>(scores, range, begin, end, max, sum);
    }
    value_columns<kType, kQueries, dim_tile(kQueries)>(block, range, scores, 0, out);
}

template <KvType kType, int kQueries, bool kPrefetch>
static void attend_rows(const Block<typename KvReader<kType>::Element>& block, const float* query, int64_t query_stride,
                        int num_queries, const int32_t* begin, const int32_t* end, float* max, float* sum, float* out,
                        float* scores) {
    int row = 0;
    for (; row + kQueries <= num_queries; row += kQueries) {
        attend_tile<kType, kQueries, kPrefetch>(block, query + row * query_stride, query_stride, begin + row, end + row,
                                                max + row, sum + row, out + static_cast<int64_t>(row) * block.head_dim,
                                                scores);
    }
    if constexpr (kQueries > 1) {
        attend_rows<kType, next_smaller_tile(kQueries), kPrefetch>(
            block, query + row * query_stride, query_stride, num_queries - row, begin + row, end + row, max + row,
            sum + row, out + static_cast<int64_t>(row) * block.head_dim, scores);
    }
}

template <KvType kType>
static void attend_block(const void* key_block, const void* value_block, int head_dim, const float* query,
                         int64_t query_stride, int num_queries, const int32_t* begin, const int32_t* end, float* max,
                         float* sum, float* out, float* scratch) {
    const bool expands = head_dim % kLanes != 0 || (kType != KvType::kF32 && num_queries > kMaxConvertingQueries);
    TokenRange range = {};
    if (expands || KvReader<kType>::kScaled) range = visible_tokens(begin, end, num_queries);
    float* scores = scratch;
    float* expanded = scores + kQueryTile * kKvBlockSize;
    float* value_scales = expanded + kKvBlockSize * (head_dim + padded(head_dim));
    const auto block = open_block<kType>(key_block, value_block, head_dim, range, value_scales);
    if (expands) {
        const Block<float> floats = expand<kType>(block, range, expanded);
        attend_rows<KvType::kF32, kQueryTile, false>(floats, query, query_stride, num_queries, begin, end, max, sum,
                                                     out, scores);
    } else if (num_queries <= kMaxPrefetchingQueries) {
        constexpr int kTile = kQueryTile < kMaxPrefetchingQueries ? kQueryTile : kMaxPrefetchingQueries;
        attend_rows<kType, kTile, true>(block, query, query_stride, num_queries, begin, end, max, sum, out, scores);
    } else {
        attend_rows<kType, kQueryTile, false>(block, query, query_stride, num_queries, begin, end, max, sum, out,
                                              scores);
    }
}

static void attention_block(KvType type, const void* key_block, const void* value_block, int head_dim,
                            const float* query, int64_t query_stride, int num_queries, const int32_t* begin,
                            const int32_t* end, float* max, float* sum, float* out, float* scratch) {
    const auto attend = type == KvType::kF32    ? attend_block<KvType::kF32>
                        : type == KvType::kF16  ? attend_block<KvType::kF16>
                        : type == KvType::kBF16 ? attend_block<KvType::kBF16>
                                                : attend_block<KvType::kQ8>;
    attend(key_block, value_block, head_dim, query, query_stride, num_queries, begin, end, max, sum, out, scratch);
}

static void scale_and_add(float* running, float keep, const float* out, float gain, int n) {
    const F32x16 a = broadcast(keep), b = broadcast(gain);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(running + i, fma(load(out + i), b, mul(load(running + i), a)));
    if (i < n) {
        const F32x16 v = fma(load_partial(out + i, n - i), b, mul(load_partial(running + i, n - i), a));
        store_partial(running + i, v, n - i);
    }
}

static void attention_fold(int head_dim, int num_queries, float* running_max, float* running_sum, float* running_out,
                           const float* max_in, const float* sum_in, const float* out) {
    const float minus_infinity = -__builtin_inff();
    for (int row = 0; row < num_queries; row += kLanes) {
        const int n = num_queries - row < kLanes ? num_queries - row : kLanes;
        const F32x16 old_max = load_partial(running_max + row, n), block_max = load_partial(max_in + row, n);
        const F32x16 new_max = max(old_max, block_max);
        const F32x16 keep = exp_not_positive(sub(old_max, new_max)), gain = exp_not_positive(sub(block_max, new_max));
        const F32x16 old_sum = load_partial(running_sum + row, n);
        const F32x16 new_sum = fma(load_partial(sum_in + row, n), gain, mul(old_sum, keep));
        const Mask16 sees_nothing = equal(block_max, broadcast(minus_infinity));
        store_partial(running_max + row, new_max, n);
        store_partial(running_sum + row, select(sees_nothing, old_sum, new_sum), n);

        float row_keep[kLanes], row_gain[kLanes];
        store(row_keep, keep);
        store(row_gain, gain);
        for (int i = 0; i < n; ++i) {
            if (max_in[row + i] == minus_infinity) continue;
            const int64_t offset = static_cast<int64_t>(row + i) * head_dim;
            scale_and_add(running_out + offset, row_keep[i], out + offset, row_gain[i], head_dim);
        }
    }
}

static void attention_finish(int head_dim, const float* running_out, float running_sum, float* out) {
    const F32x16 total = broadcast(running_sum);
    int i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) store(out + i, div(load(running_out + i), total));
    if (i < head_dim) store_partial(out + i, div(load_partial(running_out + i, head_dim - i), total), head_dim - i);
}

}  // namespace PELLUCID_SIMD_NAMESPACE
}  // namespace pellucid
