from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from pellucid.core.capture import LAYER_OPERATIONS, CaptureParams, operation_names
from pellucid.core.errors import InvalidRequestError


def test_lists_of_any_kind_become_tuples_of_integers() -> None:
    params = CaptureParams(
        residual=range(2), mlp=np.array([3, -1]), positions=[0], attention={5}, heads=(1,), queries=[-1]
    )
    assert (params.residual, params.mlp, params.positions) == ((0, 1), (3, -1), (0,))
    assert (params.attention, params.heads, params.queries) == ((5,), (1,), (-1,))
    assert CaptureParams(residual=True).residual is True


@pytest.mark.parametrize(
    ("wish", "param", "message"),
    [
        ({}, "capture", "asks for nothing"),
        ({"residual": []}, "residual", "not an empty one"),
        ({"residual": 1}, "residual", "list of 1 to .* layers, or true or false, not 1"),
        ({"residual": None}, "residual", "not None"),
        ({"mlp": "all"}, "mlp", "not 'all'"),
        ({"mlp": [True]}, "mlp", "not True"),
        ({"mlp": [0.5]}, "mlp", "not 0.5"),
        ({"attention": count()}, "attention", "more than 1048576"),
        ({"attention": [2**40]}, "attention", "an integer from"),
        ({"attention": True, "heads": 3}, "heads", "not 3"),
        ({"attention": True, "queries": b"x"}, "queries", "positions"),
        ({"operations": 1}, "operations", "true or false"),
        ({"operations": True, "positions": [0]}, "positions", "residual and mlp"),
        ({"residual": True, "heads": [0]}, "heads", "chooses among attention"),
        ({"residual": True, "queries": [0]}, "queries", "chooses among attention"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wish: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        CaptureParams(**wish)
    assert refused.value.param == param


def test_operations_are_named_in_order() -> None:
    names = operation_names(2)
    assert names[0] == (None, "prepare")
    assert names[1:8] == [(0, name) for name in LAYER_OPERATIONS]
    assert names[8:15] == [(1, name) for name in LAYER_OPERATIONS]
    assert names[15:] == [(None, "head_input"), (None, "lm_head")]
