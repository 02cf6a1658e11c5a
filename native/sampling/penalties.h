// Logit bias and the penalties on what the text already holds, on a row of logits in place: src/pellucid/decoding/
// penalties.py, at a cost that goes by the tokens and not by the vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "sampling_row.h"

namespace pellucid {

class Penalties {
  public:
    // Whether there is anything to do for this row.
    static bool any(const RowInput& input);

    // Changes logits[0..vocab_size), all but the masks of docs/decoding.md's step 6. Returns false where one that it
    // came upon is NaN or +inf, which it leaves as it is.
    bool apply(float* logits, int64_t vocab_size, const RowInput& input);

    // After `apply`: makes the tokens -inf that would repeat an n-gram, but for what is NaN or +inf; `revert_bans`
    // takes that back.
    void ban_repeated_ngrams(float* logits, int64_t vocab_size, const RowInput& input);
    void revert_bans(float* logits);

    // The logit of a token before `apply`, given what it is now.
    float original(int32_t token, float now) const;

  private:
    void forget_counts();
    void replace(float* logits, int32_t id, float value);
    void penalize_seen(float* logits, int64_t vocab_size, const RowInput& input);
    void dry(float* logits, int64_t vocab_size, const RowInput& input);
    void match_suffix(Span<int32_t> tokens);

    std::vector<int32_t> counts_;  // by token id; 0 outside of a call
    std::vector<int32_t> ids_;
    std::vector<int32_t> matches_;
    std::vector<std::pair<int32_t, float>> replaced_;  // logits as they were, in the order of replacement
    std::size_t first_ban_ = 0;
    bool valid_ = true;
};

}  // namespace pellucid
