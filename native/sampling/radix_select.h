// Where a running sum over floats by falling value reaches a target: linear in their number, whatever the values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace pellucid {

// Unsigned integers in the order of the floats (no NaN, no -0).
inline uint32_t order_key(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float from_order_key(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

class RadixSelect {
  public:
    struct Cut {
        uint32_t key;        // order_key of the last value within the target
        uint64_t remaining;  // measure that the values equal to it still have to reach
    };

    explicit RadixSelect(int64_t max_size) : pending_(new uint64_t[max_size]), bins_(new uint64_t[2 * kBins]) {}

    // Finds where the running sum of measure(i), by falling value, reaches `target` (>= 1, at most the whole sum), from
    // the highest digit of the values' keys on.
    template <typename Measure>
    Cut find(const float* values, int64_t size, uint64_t target, Measure measure) {
        uint64_t* const pending =
            pending_.get();  // key << 32 | index, of the values that share the digits found so far
        uint32_t key = 0;
        const auto search = [&](int shift, uint32_t mask, auto entry) {
            const auto digit_of = [&](uint64_t e) { return static_cast<uint32_t>(e >> 32 >> shift) & mask; };
            // Neighbours count into different halves: one value's bin is often the next one's too.
            uint64_t* const bins = bins_.get();
            std::fill_n(bins, 2 * kBins, uint64_t{0});
            for (int64_t i = 0; i < size; ++i) {
                const uint64_t e = entry(i);
                bins[(i & 1) * kBins + digit_of(e)] += measure(static_cast<uint32_t>(e));
            }
            uint32_t bin = mask;
            for (; bin > 0; --bin) {
                const uint64_t sum = bins[bin] + bins[kBins + bin];
                if (sum >= target) break;
                target -= sum;
            }
            key |= bin << shift;
            int64_t left = 0;
            for (int64_t i = 0; i < size; ++i) {
                const uint64_t e = entry(i);
                pending[left] = e;
                left += digit_of(e) == bin;
            }
            size = left;
        };
        search(21, 2047, [&](int64_t i) { return uint64_t{order_key(values[i])} << 32 | static_cast<uint64_t>(i); });
        search(10, 2047, [&](int64_t i) { return pending[i]; });
        search(0, 1023, [&](int64_t i) { return pending[i]; });
        return {key, target};
    }

    // The k-th largest value.
    float kth_largest(const float* values, int64_t size, int64_t k) {
        return from_order_key(find(values, size, static_cast<uint64_t>(k), [](int64_t) { return uint64_t{1}; }).key);
    }

  private:
    static constexpr int kBins = 2048;

    std::unique_ptr<uint64_t[]> pending_;
    std::unique_ptr<uint64_t[]> bins_;
};

}  // namespace pellucid
