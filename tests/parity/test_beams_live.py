"""Beam search against `generate` of transformers itself: `make parity`."""

from __future__ import annotations

import pytest

from tests.parity import goldens
from tests.parity.beam_cases import BEAM_CASES, SMOLLM2

pytest.importorskip("torch", reason="needs torch: pip install 'pellucid[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'pellucid[parity]'")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_the_tiny_goldens_are_what_transformers_gives_today(model: str) -> None:
    """A few of them: each takes it a second."""
    check_golden(model, slice(0, None, 15))


@pytest.mark.slow
def test_all_goldens_are_what_transformers_gives_today() -> None:
    for model in BEAM_CASES:
        check_golden(model, slice(None))


def check_golden(model: str, cases: slice) -> None:
    recorded = goldens.read(f"beams-{model}")
    made = goldens.make_beams(BEAM_CASES[model][cases])
    if made is None:
        pytest.skip(f"{SMOLLM2} is not in the cache: pellucid pull {SMOLLM2}")
    for name, golden in made.items():
        assert golden["sequences"] == recorded[name]["sequences"], name
        assert golden["scores"] == pytest.approx(recorded[name]["scores"], abs=1e-3), name
