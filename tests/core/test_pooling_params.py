from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.pooling_params import PoolingParams


def test_defaults() -> None:
    assert PoolingParams() == PoolingParams("mean", normalize=True)
    with pytest.raises(FrozenInstanceError):
        PoolingParams().normalize = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("pooling", "max"), ("pooling", None), ("pooling", ["mean"]), ("normalize", 1), ("normalize", "true")],
)
def test_what_is_wrong_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be") as caught:
        PoolingParams(**{name: value})
    assert caught.value.param == name
