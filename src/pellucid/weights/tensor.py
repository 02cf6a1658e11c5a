"""A weight as it lies in its file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pellucid.quant.formats import BlockFormat


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """An encoded tensor: a view into the mapped file, not a copy.

    Attributes:
        format: how the bytes encode numbers.
        shape: logical shape, [out_features, in_features] for matrices, [size] for vectors.
        data: uint8 [rows, row_bytes], C-contiguous; a vector is one row.
    """

    format: BlockFormat
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
