"""What a loaded model reads and computes for a token, for the shares of the machine's limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pellucid.core.batch import BLOCK_SIZE
from pellucid.estimate import speed
from pellucid.estimate.memory import kv_bytes_per_block

if TYPE_CHECKING:
    from pathlib import Path

    from pellucid import LLM
    from pellucid.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Attributes:
    weight_bytes: encoded size of the matrices that a decoded token is multiplied by.
    kv_bytes_per_token: bytes of one token in the KV cache, all layers.
    """

    spec: ModelSpec
    weight_bytes: int
    kv_bytes_per_token: float

    @classmethod
    def of(cls, llm: LLM) -> ModelCost:
        block_bytes = kv_bytes_per_block(llm.spec, llm.config.cache.dtype)
        return cls(llm.spec, weight_bytes(llm.model_path, llm.spec), block_bytes / BLOCK_SIZE)

    def decode_bytes(self, context_len: int, num_tokens: int) -> float:
        """Bytes a decoded token reads on average, when `num_tokens` follow a context of `context_len` tokens."""
        middle = context_len + num_tokens // 2
        return speed.decode_bytes(self.spec, self.weight_bytes, self.kv_bytes_per_token, middle)

    def prefill_operations(self, num_tokens: int) -> int:
        """Multiplications and additions of the matrix products of a prefill of `num_tokens`."""
        return speed.prefill_operations(self.spec, num_tokens)


def weight_bytes(path: Path, spec: ModelSpec) -> int:
    """Bytes of every matrix in the file; an embedding counts where it is the LM head too, else it is only looked up."""
    from pellucid.weights.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        matrices = {name: tensor.data.nbytes for name, tensor in file.tensors.items() if len(tensor.shape) == 2}
    if not spec.tie_word_embeddings:
        matrices.pop("token_embd.weight", None)
    return sum(matrices.values())
