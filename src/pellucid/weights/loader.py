"""Opens a model file: its spec at once, its weights as a stream in which each source tensor passes exactly once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.core.closing import Closing
from pellucid.core.errors import ModelFileError
from pellucid.models.family import GGUFHeader
from pellucid.models.registry import family_for_architecture
from pellucid.models.rope import ROPE_FACTORS
from pellucid.models.spec import ModelSpec
from pellucid.quant.formats import dequantize, is_finite
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.tensor import WeightTensor
from pellucid.weights.tensor_map import TensorSource, check_tensors, split_interleaved_heads, tensor_sources


class ModelFile(Closing):
    """An open model; a context manager.

    Attributes:
        path: where it lies.
        status: of the file, as it was opened.
        spec: what it computes.
        metadata: the file's key-value pairs, for the tokenizer and for inspection.
    """

    def __init__(self, source: GGUFFile, spec: ModelSpec, tensor_sources: Mapping[str, TensorSource]) -> None:
        self.path: Path = source.path
        self.status: os.stat_result = source.status
        self.spec = spec
        self.metadata: Mapping[str, object] = source.metadata
        self._source = source
        self._tensor_sources = tensor_sources

    def weights(self) -> Iterator[tuple[str, WeightTensor]]:
        """Every tensor of `models.spec.tensor_shapes(spec)`, once and in that order, under its canonical name.

        Asking for the next tensor takes the pages of the one before out of resident memory; its data stays readable.
        Matrices come as they lie in the file: whether their scales are finite is for the one who unpacks them to check
        (`require_finite`, or `quant.formats.is_finite`). Vectors are checked here.

        Raises:
            ModelFileError: a vector holds NaN or infinity, or the file has changed since it was opened.
        """
        for name, source in self._tensor_sources.items():
            self._source.require_unchanged()
            tensor = self._source.tensors[source.name]
            if len(tensor.shape) == 1:
                require_finite(source.name, tensor)
            if source.interleaved_heads:
                yield name, split_interleaved_heads(tensor, source.interleaved_heads)
            else:
                yield name, tensor
            self._source.release(tensor.data)
        self._source.require_unchanged()

    def release(self, data: NDArray[np.uint8]) -> None:
        """Take rows of a tensor's data that were consumed out of resident memory already, where the tensor is large.

        Args:
            data: of a tensor that `weights` gave, or some of its rows; it stays readable.
        """
        self._source.release(data)

    def close(self) -> None:
        """Unmap the file; tensors still held elsewhere stay valid."""
        self._source.close()


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Open a GGUF model and check that its metadata and its tensors fit together. Reads no weights.

    Raises:
        ModelNotFoundError: no such file.
        ModelFileError: the file is malformed, a tensor is missing or has another shape than the metadata asks for.
        UnsupportedModelError: the architecture, a feature or a tensor of it is not supported.
    """
    source = GGUFFile.open(path)
    try:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        family = family_for_architecture(_architecture(source.metadata))
        spec = family.spec_from_gguf(GGUFHeader(source.metadata, shapes, _rope_factors(source)))
        sources = tensor_sources(spec, family.gguf_names)
        check_tensors(spec, sources, shapes, not_weights=family.gguf_names.not_weights)
        return ModelFile(source, spec, sources)
    except BaseException:
        source.close()
        raise


def require_finite(name: str, tensor: WeightTensor) -> None:
    """Raises ModelFileError where a value of `tensor` would decode to NaN or infinity; `name` is for the message."""
    if not is_finite(tensor.data, tensor.format):
        raise not_finite(name, tensor)


def not_finite(name: str, tensor: WeightTensor) -> ModelFileError:
    """The error for a tensor that holds NaN or infinity."""
    return ModelFileError(
        f"tensor {name} ({tensor.format.name}) holds NaN or infinite weights: the file is damaged or was converted "
        "from a diverged model; fetch or convert it again",
        param=name,
    )


def _architecture(metadata: Mapping[str, object]) -> str:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError("general.architecture is missing: this is not a model", param="general.architecture")
    return architecture


def _rope_factors(source: GGUFFile) -> NDArray[np.float32] | None:
    tensor = source.tensors.get(ROPE_FACTORS)
    return None if tensor is None else dequantize(tensor.data, tensor.format).reshape(-1)
