"""How much memory things take. The only formula for the size of the KV cache is here."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import CapacityError, InvalidRequestError
from pellucid.core.kv_windows import max_blocks_of_sequence
from pellucid.models.kv_groups import kv_groups
from pellucid.models.spec import AttentionSpec, ModelSpec
from pellucid.quant.formats import BlockFormat, row_bytes

KV_MEMORY_SHARE = 0.5
"""Share of the memory that is free once the weights are loaded that the KV cache may take by default."""

KV_FORMATS = {"f16": BlockFormat.F16, "bf16": BlockFormat.BF16, "f32": BlockFormat.F32, "q8": BlockFormat.Q8_0}
"""How a KV head's key or value of one token is stored, by `kv_cache_dtype`."""


def kv_bytes_per_block(spec: ModelSpec, kv_cache_dtype: str) -> int:
    """Bytes of one KV block: keys and values of 64 tokens in every layer of the largest KV group.

    Raises:
        InvalidRequestError: no such dtype, or not for the model's heads.
    """
    per_layer = [_kv_bytes_per_token(layer.attention, kv_cache_dtype) for layer in spec.layers]
    return BLOCK_SIZE * max(sum(per_layer[index] for index in group.layers) for group in kv_groups(spec))


def kv_bytes_per_token(spec: ModelSpec, kv_cache_dtype: str) -> int:
    """Bytes of the keys and values of one token in every layer.

    Raises:
        InvalidRequestError: no such dtype, or not for the model's heads.
    """
    return sum(_kv_bytes_per_token(layer.attention, kv_cache_dtype) for layer in spec.layers)


def _kv_bytes_per_token(attention: AttentionSpec, kv_cache_dtype: str) -> int:
    return 2 * attention.num_key_value_heads * kv_head_bytes(attention.head_dim, kv_cache_dtype)


def kv_head_bytes(head_dim: int, kv_cache_dtype: str) -> int:
    """Bytes of one KV head's key of one token, and as many of its value.

    Raises:
        InvalidRequestError: no such dtype, or `head_dim` is not a whole number of its blocks.
    """
    format = KV_FORMATS.get(kv_cache_dtype)
    if format is None:
        raise InvalidRequestError(
            f"kv_cache_dtype must be one of {', '.join(KV_FORMATS)}, not {kv_cache_dtype!r}", param="kv_cache_dtype"
        )
    if head_dim % format.block_size:
        fitting = [name for name, format in KV_FORMATS.items() if head_dim % format.block_size == 0]
        raise InvalidRequestError(
            f"kv_cache_dtype {kv_cache_dtype!r} stores heads in blocks of {format.block_size}, but this model has "
            f"head_dim {head_dim}: use one of {', '.join(fitting)}",
            param="kv_cache_dtype",
        )
    return row_bytes(format, head_dim)


class KVCapacity(NamedTuple):
    """What was decided: `num_blocks` blocks, and sequences of at most `max_model_len` tokens."""

    num_blocks: int
    max_model_len: int


def decide_kv_capacity(
    *,
    bytes_per_block: int,
    windows: Sequence[int | None],
    max_num_batched_tokens: int,
    model_max_len: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
    free_memory: int,
    share: float = 1.0,
) -> KVCapacity:
    """How many KV blocks to have, and how long a sequence may be, in a model with KV groups of these `windows`.

    A sequence holds blocks for all its tokens where a group has no window, and elsewhere only for what its window and
    a step of `max_num_batched_tokens` touch. The budget is `kv_cache_memory`, else `KV_MEMORY_SHARE` of `free_memory`
    (bytes); never more blocks than `max_num_seqs` sequences of full length use. Without `max_model_len` a sequence may
    be as long as the model allows and the budget holds. Of both memories `share` is for this model, and the rest for
    another one.

    Raises:
        InvalidRequestError: `max_model_len` is beyond what the model was made for.
        CapacityError: the budget does not hold one sequence of `max_model_len`, or not one block, or is more than
            what is free.
    """
    if max_model_len is not None and max_model_len > model_max_len:
        raise InvalidRequestError(
            f"max_model_len is {max_model_len}, but this model was made for at most {model_max_len} tokens",
            param="max_model_len",
        )
    budget = int(share * (kv_cache_memory if kv_cache_memory is not None else KV_MEMORY_SHARE * free_memory))
    free_memory = int(share * free_memory)
    affordable = budget // bytes_per_block

    def needed_for(num_tokens: int) -> int:
        return max_blocks_of_sequence(windows, num_tokens, max_num_batched_tokens)

    affordable_len = bisect_right(range(1, model_max_len + 1), affordable, key=needed_for)
    source = "kv_cache_memory" if kv_cache_memory is not None else f"{KV_MEMORY_SHARE:.0%} of the free memory"
    if share < 1:
        source = f"the model's part of {source}, {share:.0%},"
    if affordable_len < 1:
        raise CapacityError(
            f"{source} is {budget:,} bytes, but one KV block of {BLOCK_SIZE} tokens takes {bytes_per_block:,}"
            + (f", and a sequence has {len(windows)} at least" if len(windows) > 1 else ""),
            param="kv_cache_memory",
        )
    if max_model_len is None:
        max_model_len = affordable_len
    needed = needed_for(max_model_len)
    if needed > affordable:
        raise CapacityError(
            f"max_model_len {max_model_len} needs {needed * bytes_per_block:,} bytes of KV cache, but {source} is "
            f"{budget:,}, enough for {affordable_len} tokens",
            param="max_model_len",
        )
    num_blocks = min(affordable, max_num_seqs * needed)
    if num_blocks * bytes_per_block > free_memory:  # only where the caller gives the budget
        raise CapacityError(
            f"{num_blocks} KV blocks take {num_blocks * bytes_per_block:,} bytes, but {free_memory:,} are free: "
            "give a smaller kv_cache_memory, max_num_seqs or max_model_len",
            param="kv_cache_memory",
        )
    return KVCapacity(num_blocks, max_model_len)


def free_memory() -> int:
    """Bytes a process can still take without swapping: what the system has, or what its control group leaves."""
    free = _system_free_memory()
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_integer(limit_file), _read_integer(usage_file)
        if limit is not None and usage is not None:
            return max(0, min(free, limit - usage + _reclaimable_memory()))
    return free


def _system_free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2


def _reclaimable_memory() -> int:
    """File pages that a control group counts as used but would give up."""
    for path in ("/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat"):
        try:
            for line in Path(path).read_text().splitlines():
                if line.startswith(("inactive_file ", "total_inactive_file ")):
                    return int(line.split()[1])
        except OSError:
            continue
    return 0


def _read_integer(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
