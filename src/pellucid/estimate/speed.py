"""What a token costs in bytes and operations, and how near a measured speed is to the machine's measured limits.

The roofline view (Williams, Waterman & Patterson, 2009): decoding one sequence reads every weight once a token, so read
bandwidth bounds it; prefill multiplies the same weights by many tokens, so integer arithmetic bounds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pellucid.models.spec import ModelSpec, tensor_shapes


@dataclass(frozen=True, slots=True)
class Utilization:
    """A measured rate beside the limit measured in the same run.

    Attributes:
        achieved: rate in bytes a second or operations a second.
        limit: the machine's limit in the same unit.
    """

    achieved: float
    limit: float

    @property
    def share(self) -> float | None:
        """achieved / limit, or None where that is above 1 or not a number: then one of the two was measured wrongly."""
        share = self.achieved / self.limit if self.limit > 0 else math.nan
        return share if 0 <= share <= 1 else None

    def __str__(self) -> str:
        share = self.share
        return "measurement error" if share is None else f"{share:.0%}"


def matmul_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Weights that multiply every token (all layers), and those of the LM head, which multiply only sampled tokens."""
    shapes = tensor_shapes(spec)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.") and len(shape) == 2)
    return layers, spec.vocab_size * spec.hidden_size


def prefill_operations(spec: ModelSpec, num_tokens: int) -> int:
    """Multiplications and additions of the matrix products that prefill `num_tokens` and give one row of logits.

    Attention is left out: this counts what runs on the integer units.
    """
    layers, head = matmul_parameters(spec)
    return 2 * (layers * num_tokens + head)


def kv_tokens_read(spec: ModelSpec, context_len: int) -> float:
    """Tokens of the KV cache that decoding reads at a context of `context_len`, averaged over the layers by KV size.

    A layer with a sliding window reads at most its window.
    """
    sizes = [layer.attention.num_key_value_heads * layer.attention.head_dim for layer in spec.layers]
    windows = [layer.attention.sliding_window or context_len for layer in spec.layers]
    return sum(size * min(context_len, window) for size, window in zip(sizes, windows, strict=True)) / sum(sizes)


def decode_bytes(spec: ModelSpec, weight_bytes: int, kv_bytes_per_token: float, context_len: int) -> float:
    """Bytes that decoding one token of one sequence must read.

    Args:
        weight_bytes: encoded size of the weights that multiply a token (all layers and the LM head).
        kv_bytes_per_token: bytes that one token takes in the KV cache, all layers.
        context_len: tokens in the context, the new one included.
    """
    return weight_bytes + kv_bytes_per_token * kv_tokens_read(spec, context_len)
