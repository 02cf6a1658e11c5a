"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, sequence index, position, stream), so it does not depend on what else runs.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

STREAM_SAMPLE = 0
"""The draw that chooses a token. Other uses of randomness at the same position take other streams."""

STREAM_XTC = 1
"""The coin that decides whether XTC applies."""


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10; all words are 32-bit unsigned."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def draw_bits(seed: int, sequence_index: int, position: int, stream: int = STREAM_SAMPLE) -> int:
    """64 random bits: words 0 (high) and 1 (low) of the block with key = seed (low word first) and
    counter = (sequence_index, position, stream, 0).

    Args:
        seed: unsigned 64-bit.
        sequence_index: unsigned 32-bit, index of the sequence within its request.
        position: unsigned 32-bit, absolute position of the token to be chosen.
        stream: unsigned 32-bit, what the draw is for.
    """
    word0, word1, _, _ = philox4x32((sequence_index, position, stream, 0), (seed & _MASK, seed >> 32))
    return word0 << 32 | word1


def uniform(bits: int) -> float:
    """The upper 53 of 64 bits as a float64 in [0, 1), a multiple of 2**-53."""
    return (bits >> 11) * 2.0**-53
