"""Philox4x32-10 against the known answers of Random123 (Salmon et al., 2011)."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import rng

# counter, key, result: `philox4x32 10` of Random123's kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], result: tuple[int, int, int, int]
) -> None:
    assert rng.philox4x32(counter, key) == result


def test_layout_of_a_draw() -> None:
    """Seed, sequence index, position and stream go where the specification says."""
    counter, key, result = KNOWN_ANSWERS[2]
    words = rng.philox4x32((counter[0], counter[1], counter[2], 0), key)
    bits = rng.draw_bits(key[1] << 32 | key[0], counter[0], counter[1], counter[2])
    assert bits == words[0] << 32 | words[1]
    assert words != result


def test_every_argument_matters() -> None:
    draws = {rng.draw_bits(*arguments) for arguments in np.ndindex(4, 4, 4, 4)}
    assert len(draws) == 4**4
    assert rng.draw_bits(1 << 40, 0, 0) != rng.draw_bits(0, 0, 0)


def test_uniform_is_a_multiple_of_2_to_the_minus_53_below_1() -> None:
    assert rng.uniform(0) == 0.0
    assert rng.uniform(2**64 - 1) == 1.0 - 2.0**-53
    assert rng.uniform(1 << 63) == 0.5
    draws = np.array([rng.uniform(rng.draw_bits(7, 0, position)) for position in range(4000)])
    assert np.all(draws * 2.0**53 == np.floor(draws * 2.0**53))
    counts = np.histogram(draws, bins=16, range=(0, 1))[0]
    assert np.sum((counts - 250) ** 2 / 250) < 50  # chi-squared, 15 degrees of freedom: p > 1e-5


def test_known_answers_catch_a_missing_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_ROUNDS", 9)
    counter, key, result = KNOWN_ANSWERS[0]
    assert rng.philox4x32(counter, key) != result
