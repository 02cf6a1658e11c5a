"""What a loaded model reads and computes for a token, for the shares of the machine's limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pellucid.estimate import memory, speed

if TYPE_CHECKING:
    from pellucid import LLM
    from pellucid.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The native core's work for a token.

    Attributes:
        spec: the model.
        weight_bytes: bytes of packed weights that decoding a token reads.
        kv_bytes_per_token: bytes of one token in the KV cache, all layers.
        threads: threads that share the work.
        isa: the instruction set that does it.
    """

    spec: ModelSpec
    weight_bytes: int
    kv_bytes_per_token: float
    threads: int
    isa: str

    @classmethod
    def of(cls, llm: LLM) -> ModelCost | None:
        """The cost of the model in `llm`; None where another backend runs it, whose work is not counted."""
        if llm.backend_name != "cpu":
            return None
        from pellucid.backends.cpu.backend import CpuBackend

        backend = llm.backend
        assert isinstance(backend, CpuBackend)
        kv_bytes_per_token = memory.kv_bytes_per_token(llm.spec, llm.config.cache.kv_cache_dtype)
        return cls(llm.spec, backend.weight_bytes, kv_bytes_per_token, backend.threads, backend.isa)

    def decode_bytes(self, context_len: int, num_tokens: int) -> float:
        """Bytes a decoded token reads on average, when `num_tokens` follow a context of `context_len` tokens."""
        middle = context_len + num_tokens // 2
        return speed.decode_bytes(self.spec, self.weight_bytes, self.kv_bytes_per_token, middle)

    def prefill_operations(self, num_tokens: int) -> int:
        """Multiplications and additions of the matrix products of a prefill of `num_tokens`."""
        return speed.prefill_operations(self.spec, num_tokens)
