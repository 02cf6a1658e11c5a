"""From the tensors of a source to the canonical ones: each taken exactly once, every shape checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.models.family import TensorNames
from pellucid.models.spec import ModelSpec, tensor_shapes
from pellucid.weights.tensor import WeightTensor

MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a canonical tensor comes from.

    Attributes:
        name: the source's name.
        interleaved_heads: number of heads whose rows must be put into half-split order; 0 where they are.
    """

    name: str
    interleaved_heads: int = 0


def tensor_sources(spec: ModelSpec, names: TensorNames) -> dict[str, TensorSource]:
    """Canonical name -> source, in the order of `models.spec.tensor_shapes`."""
    return {canonical: _source(spec, names, canonical) for canonical in tensor_shapes(spec)}


def check_tensors(
    spec: ModelSpec,
    sources: Mapping[str, TensorSource],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    not_weights: frozenset[str] = frozenset(),
) -> None:
    """Check that a file holds what the spec asks for and nothing else.

    Args:
        spec: the model.
        sources: from `tensor_sources`.
        shapes: what the file holds: logical shapes by its own names.
        not_weights: tensors that the spec has taken in already.

    Raises:
        ModelFileError: tensors are missing, or a shape is not the one that the spec asks for.
        UnsupportedModelError: tensors are left over, so the model does something that the spec does not say.
    """
    taken = {source.name for source in sources.values()}
    missing = [name for name in taken if name not in shapes]
    if missing:
        raise ModelFileError(f"{_listed(missing)} missing from the file", param=sorted(missing)[0])
    left_over = [name for name in shapes if name not in taken and name not in not_weights]
    if left_over:
        raise UnsupportedModelError(
            f"{_listed(left_over)} not part of a {spec.architecture} model as supported here",
            param=sorted(left_over)[0],
        )
    for canonical, shape in tensor_shapes(spec).items():
        name = sources[canonical].name
        if shapes[name] != shape:
            raise ModelFileError(
                f"tensor {name} has shape {list(shapes[name])}; the metadata asks for {list(shape)}", param=name
            )


def split_interleaved_heads(tensor: WeightTensor, num_heads: int) -> WeightTensor:
    """Put each head's output rows from interleaved RoPE pairs (0, d/2, 1, d/2 + 1, ...) into half-split order.

    The encoded rows move as they are, so this is exact for every format; the result is a copy.

    Args:
        tensor: [num_heads * head_dim, in_features], or a vector of an unblocked format.
        num_heads: query heads or KV heads.
    """
    unit_bytes = tensor.data.size // tensor.shape[0]
    pairs = tensor.data.reshape(num_heads, -1, 2, unit_bytes)
    return replace(tensor, data=pairs.swapaxes(1, 2).reshape(tensor.data.shape))


def _source(spec: ModelSpec, names: TensorNames, canonical: str) -> TensorSource:
    if canonical in names.model:
        return TensorSource(names.model[canonical])
    _, layer, suffix = canonical.split(".", 2)
    name = names.layer[suffix].format(layer=layer)
    if suffix not in names.interleaved_rope:
        return TensorSource(name)
    attention = spec.layers[int(layer)].attention
    is_query = suffix.startswith("attention.q_proj")
    return TensorSource(name, attention.num_attention_heads if is_query else attention.num_key_value_heads)


def _listed(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN])
    if len(names) > MAX_NAMES_SHOWN:
        shown += f" and {len(names) - MAX_NAMES_SHOWN} more"
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"
