"""What a family file provides: how a description becomes a ModelSpec, and how a source names the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a family may read of a GGUF file; the weights themselves are not among it.

    Attributes:
        metadata: the file's key-value pairs.
        shapes: logical shape of every tensor, by the file's name.
        rope_factors: the `rope_freqs.weight` tensor as float32 [rotary_dim / 2], where the file has one.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How one kind of source names the tensors of `models.spec.tensor_shapes`.

    Attributes:
        model: canonical name -> source name, outside the layers.
        layer: canonical name below `layers.N.` -> source name, with `{layer}` for N.
        interleaved_rope: names of `layer` whose output rows lie as interleaved RoPE pairs and must be put into the
            half-split order.
        not_weights: source names that the spec, not the weights, has taken in.
    """

    model: Mapping[str, str]
    layer: Mapping[str, str]
    interleaved_rope: frozenset[str] = frozenset()
    not_weights: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. Both functions raise ModelFileError for a malformed description and UnsupportedModelError for a
    feature that is not supported, each naming the field.

    Attributes:
        spec_from_gguf: GGUF header -> spec.
        spec_from_config: a transformers config.json -> spec.
    """

    architecture: str
    spec_from_gguf: Callable[[GGUFHeader], ModelSpec]
    gguf_names: TensorNames
    spec_from_config: Callable[[Mapping[str, Any]], ModelSpec]
    hf_names: TensorNames
