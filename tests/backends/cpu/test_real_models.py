"""Bit equality of the native executor on the real models: chunks, threads, neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.weights import catalog
from pellucid.weights.loader import open_model
from tests.support.tiny_models import all_logits, make_batch, num_kv_groups

pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

from pellucid.backends.cpu.backend import CpuBackend

NUM_TOKENS = 530  # more than a step of the engine, and than Gemma's window
FIRST = 400  # logits from here on are compared


def load(name: str, threads: int) -> CpuBackend:
    entry = next(entry for entry in catalog.entries() if entry.name == name)
    if not catalog.is_cached(entry):
        pytest.skip(f"{name} is not in the cache; `pellucid pull {name}` fetches it")
    with open_model(catalog.cached_path(entry)) as file:
        return CpuBackend(file.spec, file.weights(), threads=threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_chunks_threads_and_neighbours_do_not_show(name: str) -> None:
    rng = np.random.default_rng(7)
    tokens = [int(token) for token in rng.integers(0, 40000, NUM_TOKENS)]
    wanted = all_logits(load(name, 1), tokens, 512, first=FIRST)
    for threads in (1, 2):
        backend = load(name, threads)
        for chunk in (1, 3, 17, 64, 512):
            assert np.array_equal(all_logits(backend, tokens, chunk, first=FIRST), wanted), (threads, chunk)
        for neighbours in (0, 1, 7):
            blocks = rng.permutation(9 * (neighbours + 1)).reshape(-1, 9)
            groups = num_kv_groups(backend)
            backend.allocate_kv_cache(groups * blocks.size)
            others = [[int(t) for t in rng.integers(0, 40000, 200 + 40 * i)] for i in range(neighbours)]
            logits = []
            for start in range(0, NUM_TOKENS, 53):
                pieces = [(tokens[start : start + 53], start, blocks[0])]
                pieces += [(o[start : start + 53], start, b) for o, b in zip(others, blocks[1:], strict=True)]
                rows = range(min(max(FIRST - start, 0), 53), len(pieces[0][0]))
                batch = make_batch([piece for piece in pieces if piece[0]], list(rows), groups=groups)
                logits.append(backend.forward(batch).logits.copy())
            assert np.array_equal(np.concatenate(logits), wanted), (threads, neighbours)
