from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.pooling_params import PoolingParams, labelling


def test_labels() -> None:
    params = labelling([3, 1, 3])
    assert (params.pooling, params.normalize, params.label_token_ids) == ("last", False, (3, 1, 3))
    assert hash(params) == hash(labelling((3, 1, 3)))
    for wrong in ([], "1", [1.0], [-1], [2**31], [1] * 129, None, 3):
        with pytest.raises(InvalidRequestError) as caught:
            labelling(wrong)  # type: ignore[arg-type]
        assert caught.value.param == "label_token_ids"
    for name, options in (("pooling", {"normalize": False}), ("normalize", {"pooling": "last"})):
        with pytest.raises(InvalidRequestError) as caught:
            PoolingParams(label_token_ids=[1], **options)  # type: ignore[arg-type]
        assert caught.value.param == name


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
