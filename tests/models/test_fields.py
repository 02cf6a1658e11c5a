from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.fields import Fields


def test_reads_numbers_of_python_and_numpy() -> None:
    fields = Fields({"x.layers": np.uint32(3), "x.eps": np.float32(0.5), "x.theta": 10000, "x.on": True}, "x.")
    assert fields.integer("layers", maximum=10) == 3
    assert fields.positive("eps") == 0.5
    assert fields.positive("theta") == 10000.0
    assert fields.flag("on", False) is True
    assert fields.integer("missing", 7, maximum=10) == 7


@pytest.mark.parametrize("value", [None, 0, 11, -1, 1.0, True, "3", math.nan])
def test_an_integer_that_is_not_one_in_range_is_refused_by_name(value: object) -> None:
    with pytest.raises(ModelFileError, match=r"^x\.layers ") as caught:
        Fields({"x.layers": value}, "x.").integer("layers", maximum=10)
    assert caught.value.param == "x.layers"


@pytest.mark.parametrize("value", [None, 0, -1.0, math.nan, math.inf, True, "1e-5"])
def test_a_number_that_is_not_positive_and_finite_is_refused_by_name(value: object) -> None:
    with pytest.raises(ModelFileError, match=r"^x\.eps "):
        Fields({"x.eps": value}, "x.").positive("eps")


def test_values_that_differ_by_layer_are_not_taken_for_damage() -> None:
    for value in ([4, 8], np.array([4, 8])):
        with pytest.raises(UnsupportedModelError, match=r"x\.heads differs by layer"):
            Fields({"x.heads": value}, "x.").integer("heads", maximum=10)


def test_only_known_and_neutral_fields_pass() -> None:
    known, neutral = frozenset({"layers"}), {"expert_count": 0}
    Fields({"x.layers": 2, "x.expert_count": 0, "y.other": 1}, "x.").refuse_other_than(known, neutral)
    with pytest.raises(UnsupportedModelError, match=r"x\.expert_count = 8 is not supported; only 0 is"):
        Fields({"x.expert_count": 8}, "x.").refuse_other_than(known, neutral)
    with pytest.raises(UnsupportedModelError, match=r"x\.ssm\.state_size = 16 is not supported"):
        Fields({"x.ssm.state_size": 16}, "x.").refuse_other_than(known, neutral)
