from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pellucid.core.capture import CaptureParams
from pellucid.core.errors import InvalidRequestError
from pellucid.engine.capture_selection import CaptureSelection
from tests.support.tiny_models import GEMMA3, tiny_spec

SPEC = tiny_spec(GEMMA3)  # 7 layers of 4 heads


def select(*, num_prompt_tokens: int = 10, num_computed: int = 15, **wish: Any) -> CaptureSelection:
    params = CaptureParams(**wish)
    selection = CaptureSelection(params, SPEC)
    selection.choose_tokens(params, num_prompt_tokens, num_computed)
    return selection


def test_indices_come_out_rising_and_once() -> None:
    selection = select(residual=[-1, 5, 6], mlp=[3, 0, 3], attention=[-7], heads=[-1, 0, 3], queries=[14, -10, 0])
    assert selection.residual_points.tolist() == [10, 11, 12, 13, 14]
    assert selection.mlp == (0, 3)
    assert selection.attention == (0,)
    assert selection.heads.tolist() == [0, 3]
    assert selection.queries is not None
    assert selection.queries.tolist() == [0, 14]


def test_true_is_all() -> None:
    selection = select(residual=True, mlp=True, attention=True)
    assert selection.residual_points.tolist() == list(range(15))
    assert selection.mlp == selection.attention == tuple(range(7))
    assert selection.heads.tolist() == [0, 1, 2, 3]
    assert selection.rows(3, 6).tolist() == selection.query_rows(3, 6).tolist() == [3, 4, 5]


def test_tokens_of_a_step() -> None:
    selection = select(residual=[0], positions=[2, 7, 8, 14], attention=[0], queries=[-1])
    assert [selection.rows(begin, begin + 5).tolist() for begin in (0, 5, 10)] == [[2], [7, 8], [14]]
    assert [selection.query_rows(begin, begin + 5).tolist() for begin in (0, 5, 10)] == [[], [9], []]
    assert select(attention=[0]).rows(0, 5).tolist() == []


@pytest.mark.parametrize(
    ("wish", "first"),
    [
        ({"operations": True}, None),
        ({"mlp": [0]}, 0),
        ({"residual": [0], "positions": [6, 4]}, 4),
        ({"residual": [0], "positions": [6, 4], "attention": [0], "queries": [3]}, 3),
        ({"residual": [0], "positions": [6, 4], "attention": [0]}, 0),
        ({"attention": [0], "queries": [-1]}, 9),
    ],
)
def test_the_first_token_of_which_something_is_wanted(wish: dict[str, Any], first: int | None) -> None:
    assert select(**wish).first_token == first


@pytest.mark.parametrize(
    ("wish", "param", "message"),
    [
        ({"residual": [7]}, "residual", r"residual has 7, but the model has layers 0 to 6 \(or -7 to -1"),
        ({"mlp": [-8]}, "mlp", "mlp has -8"),
        ({"attention": [100]}, "attention", "attention has 100"),
        ({"attention": True, "heads": [4]}, "heads", r"heads has 4, but there are heads 0 to 3 \(or -4 to -1"),
        ({"attention": True, "queries": [15]}, "queries", "queries has 15, but the request computes tokens 0 to 14"),
        ({"mlp": True, "positions": [-11]}, "positions", "-10 to -1, from the end of the prompt"),
    ],
)
def test_what_is_not_there_is_refused_with_the_range(wish: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        select(**wish)
    assert refused.value.param == param


def test_layers_of_different_numbers_of_heads_need_a_choice() -> None:
    first, second, *rest = SPEC.layers
    attention = replace(second.attention, num_attention_heads=2)
    spec = replace(SPEC, layers=(first, replace(second, attention=attention), *rest))
    with pytest.raises(InvalidRequestError, match="2 to 4 heads") as refused:
        CaptureSelection(CaptureParams(attention=True), spec)
    assert refused.value.param == "heads"
    assert CaptureSelection(CaptureParams(attention=[0, 2]), spec).heads.tolist() == [0, 1, 2, 3]
    assert CaptureSelection(CaptureParams(attention=True, heads=[1]), spec).heads.tolist() == [1]
    with pytest.raises(InvalidRequestError, match="heads 0 to 1"):
        CaptureSelection(CaptureParams(attention=True, heads=[3]), spec)


def test_bytes() -> None:
    selection = select(residual=[0], mlp=[1, 2], positions=[0, 1], attention=[0], heads=[0])
    assert selection.sizes(15) == {"residual": [4 * 3 * 2 * 64], "mlp": [4 * 2 * 96] * 2, "attention": [4 * 15 * 15]}
    assert selection.peak_bytes(15) == 1536 + 2 * 768 + 900 + 1536
    assert select(operations=True).peak_bytes(15) == 0
