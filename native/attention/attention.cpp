#include "vector_kernels.h"

namespace pellucid {

// The scores of one tile of query rows, and the block's keys and values as float32, the latter padded to whole vectors
// of 16.
int64_t attention_scratch_floats(int /*num_queries*/, int head_dim) {
    const int64_t padded_head_dim = (head_dim + 15) / 16 * 16;
    return kKvBlockSize * (kMaxQueryTile + head_dim + padded_head_dim);
}

}  // namespace pellucid
