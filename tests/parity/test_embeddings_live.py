"""The recorded embeddings against transformers as it is today: `make parity`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parity import goldens
from tests.parity.cases import REAL, TINY, TOLERANCE

pytest.importorskip("torch", reason="needs torch: pip install 'pellucid[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'pellucid[parity]'")

pytestmark = pytest.mark.parity


def assert_close(made: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert made.keys() == recorded.keys()
    for pooling, golden in made.items():
        difference = np.abs(np.array(golden["begins"]) - np.array(recorded[pooling]["begins"])).max()
        assert difference <= TOLERANCE * golden["scale"] / 10


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name: str) -> None:
    made = goldens.make_embeddings(name)
    assert made is not None
    assert_close(made, goldens.read("embeddings")[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    made = goldens.make_embeddings(name)
    if made is None:
        pytest.skip(f"{name} is not in the cache: pellucid pull {name}")
    assert_close(made, goldens.read("embeddings")[name])
