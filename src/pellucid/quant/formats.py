"""Block formats of GGUF: what a tensor's bytes mean, as bit-exact numpy codecs."""

from __future__ import annotations

from enum import IntEnum


class BlockFormat(IntEnum):
    """GGUF tensor types; the value is the type's number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
