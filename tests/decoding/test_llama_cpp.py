"""The transforms that are llama.cpp's against llama.cpp's own samplers, where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from pellucid.decoding import distribution, mirostat, penalties, temperature, truncation
from pellucid.decoding.distribution import Logits
from pellucid.weights.catalog import DEFAULT_MODEL, cached_path, entries, is_cached
from tests.support.logits import kept, random_logits, softmax

llama = pytest.importorskip("llama_cpp", reason="an oracle that is compared with where it is installed")

NUM_ROWS = 200


def applied(sampler: Any, logits: Logits, tokens: Iterable[int] = ()) -> Logits:
    """What a llama.cpp sampler that has seen `tokens` leaves of a row."""
    for token in tokens:
        llama.llama_sampler_accept(sampler, token)
    entries = (llama.llama_token_data * logits.size)()
    for token, logit in enumerate(logits.tolist()):
        entries[token].id, entries[token].logit = token, logit
    row = llama.llama_token_data_array(entries, logits.size, -1, False)
    llama.llama_sampler_apply(sampler, ctypes.byref(row))
    out = np.full(logits.size, -np.inf, dtype=np.float32)
    for i in range(row.size):
        out[row.data[i].id] = row.data[i].logit
    llama.llama_sampler_free(sampler)
    return out


def rows() -> Iterator[tuple[np.random.Generator, Logits]]:
    for seed in range(NUM_ROWS):
        generator = np.random.default_rng(seed)
        yield generator, random_logits(seed, int(generator.choice([2, 5, 30, 500])))


def uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.float32(generator.uniform(low, high)))


def test_top_n_sigma() -> None:
    for generator, logits in rows():
        n = uniform(generator, 0.2, 3)
        assert kept(truncation.top_n_sigma(logits, n)) == kept(applied(llama.llama_sampler_init_top_n_sigma(n), logits))


def test_typical_p() -> None:
    for generator, logits in rows():
        p = uniform(generator, 0.05, 0.99)
        assert kept(truncation.typical_p(logits, p)) == kept(applied(llama.llama_sampler_init_typical(p, 1), logits))


def test_xtc() -> None:
    for generator, logits in rows():
        threshold = uniform(generator, 0.01, 0.5)
        theirs = applied(llama.llama_sampler_init_xtc(1.0, threshold, 0, 1), logits)
        assert kept(truncation.xtc(logits, threshold)) == kept(theirs)


def test_dynamic_temperature() -> None:
    for generator, logits in rows():
        value, spread, exponent = uniform(generator, 0.1, 2), uniform(generator, 0, 2), uniform(generator, 0.2, 3)
        theirs = applied(llama.llama_sampler_init_temp_ext(value, spread, exponent), logits)
        ours = distribution.probabilities(temperature.dynamic_temperature(logits, value, spread, exponent))
        assert np.max(np.abs(ours - softmax(theirs))) < 5e-5  # theirs adds the entropy up in float32


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat(version: int) -> None:
    num_cut = 0
    for generator, logits in rows():
        tau = uniform(generator, 0.1, 6)
        if version == 1:
            if logits.size < 5:
                continue  # two tokens that nearly tie have a k beyond theirs, an int
            ours = mirostat.mirostat_v1(logits, 2 * tau)
            theirs = applied(llama.llama_sampler_init_mirostat(logits.size, 1, tau, 0.1, 100), logits)
        else:
            ours = mirostat.mirostat_v2(logits, 2 * tau)
            theirs = applied(llama.llama_sampler_init_mirostat_v2(1, tau, 0.1), logits)
        assert kept(ours) == kept(theirs)
        num_cut += len(kept(ours)) < logits.size
    assert num_cut > NUM_ROWS // 2


def test_dry() -> None:
    """Its breakers are strings, so a model's vocabulary is needed to say that there are none."""
    entry = next(entry for entry in entries() if entry.name == DEFAULT_MODEL)
    if not is_cached(entry):
        pytest.skip(f"{DEFAULT_MODEL} is not in the cache: pellucid pull {DEFAULT_MODEL}")
    model = llama.Llama(str(cached_path(entry)), vocab_only=True, verbose=False)
    num_changed = 0
    for generator, logits in rows():
        tokens = generator.integers(0, min(logits.size, 4), generator.integers(1, 60)).astype(np.int32)
        multiplier, growth = uniform(generator, 0.1, 3), uniform(generator, 1, 3)
        allowed_length, last_n = int(generator.integers(1, 5)), int(generator.choice([5, 20, 100]))
        sampler = llama.llama_sampler_init_dry(model._model.vocab, multiplier, growth, allowed_length, last_n, None, 0)
        ours = penalties.dry(
            logits,
            tokens,
            multiplier=multiplier,
            base=growth,
            allowed_length=allowed_length,
            last_n=last_n,
            breakers=np.empty(0, dtype=np.int32),
        )
        np.testing.assert_allclose(ours, applied(sampler, logits, tokens.tolist()), rtol=1e-5, atol=1e-6)
        num_changed += not np.array_equal(ours, logits)
    assert num_changed > NUM_ROWS // 4
