"""Where rounding costs accuracy: mean KL to f32 with the inputs of one kind of matrix, or keys and values, rounded.

Runs the reference executor, whose weights are the file's own and whose arithmetic is f32, and rounds inputs as the
native core does: blocks of 32, symmetric int8, and where they are refined a second byte for the blocks that err most
(docs/kernels.md). The last columns are the share of blocks refined, and of blocks refined in one of 8 successive rows,
which is what it costs. With --kv-cache nothing but keys and values is rounded, to each KV cache dtype.

usage: rounding.py FILE.gguf [--kv-cache] [--text FILE] [--max-tokens 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.backends.reference.kv_cache import KVCache
from pellucid.core.batch import ForwardBatch
from pellucid.core.config import num_blocks_for
from pellucid.models.kv_groups import kv_groups
from pellucid.tokenizer import Tokenizer
from pellucid.weights.loader import open_model

KINDS = {
    "QKV": ("q_proj", "k_proj", "v_proj"),
    "attention output": ("o_proj",),
    "gate and up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head", "embed_tokens"),
}
REFINE_ABOVE = 2.0  # times the row's mean squared scale, as in native/activation_buffer.cpp
TILE_ROWS = 8
KV_CACHE_DTYPES = ("f16", "bf16", "q8")
PLAIN = dict.fromkeys(KINDS, False)
CASES: dict[str, dict[str, bool]] = {
    **{f"{kind} alone": {kind: False} for kind in KINDS},
    "all": PLAIN,
    "all, QKV refined": {**PLAIN, "QKV": True},
    "all, QKV, gate and up refined": {**PLAIN, "QKV": True, "gate and up": True},
    "all, QKV, gate, up and head refined": {**PLAIN, "QKV": True, "gate and up": True, "head": True},
    "all refined": dict.fromkeys(KINDS, True),
}


class RoundedInputs(ReferenceBackend):
    """The reference executor with inputs rounded: `rounding` names the kinds of matrix, and whether to refine.

    Attributes:
        refined: for each product, which blocks were refined: bool [rows, blocks].
    """

    rounding: Mapping[str, bool] = {}
    refined: list[NDArray[np.bool_]]

    def store_as(self, kv_cache_dtype: str, num_blocks: int) -> None:
        self._kv_cache = KVCache(self.spec, kv_cache_dtype)
        self.allocate_kv_cache(num_blocks)

    def _linear(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        for kind, names in KINDS.items():
            if name.split(".")[-1] in names and kind in self.rounding:
                x, refined = rounded(x, self.rounding[kind])
                if self.rounding[kind]:
                    self.refined.append(refined)
        return super()._linear(x, name)


def rounded(x: NDArray[np.float32], refine: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`x` [rows, columns] as its int8 form stands for it, and which of its blocks have a second byte."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    scale = largest / np.float32(127)
    levels = np.rint(blocks * (np.float32(127) / largest))
    low = np.clip(np.rint((blocks - levels * scale) * (256 / scale)), -127, 127)
    squares = scale.astype(np.float64) ** 2
    refined = (squares > REFINE_ABOVE * squares.mean(1, keepdims=True)) & refine
    return ((levels + np.where(refined, low / 256, 0)) * scale).astype(np.float32).reshape(x.shape), refined[..., 0]


def share_of_tiles(refined: NDArray[np.bool_]) -> float:
    whole = len(refined) // TILE_ROWS * TILE_ROWS
    return float(refined[:whole].reshape(-1, TILE_ROWS, refined.shape[1]).any(1).mean())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kv-cache", action="store_true", help="round keys and values instead of inputs")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("text.txt"))
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()

    with open_model(args.file) as model_file:
        ids = Tokenizer.from_gguf(model_file.metadata).encode(args.text.read_text())[: args.max_tokens]
        backend = RoundedInputs(model_file.spec, model_file.weights(), kv_cache_dtype="f32")
    num_tokens = len(ids)
    tables = np.arange(len(kv_groups(backend.spec)) * num_blocks_for(num_tokens), dtype=np.int32)
    backend.allocate_kv_cache(len(tables))
    positions = np.arange(num_tokens, dtype=np.int32)
    batch = ForwardBatch(
        input_ids=np.array(ids, np.int32),
        positions=positions,
        cu_seqlens=np.array([0, num_tokens], np.int32),
        kv_lens=np.array([num_tokens], np.int32),
        block_tables=tables.reshape(-1, 1, num_blocks_for(num_tokens)),
        logits_rows=positions,
    )
    exact = log_softmax(backend.forward(batch).logits)

    def compare() -> tuple[float, float]:
        found = log_softmax(backend.forward(batch).logits)
        divergence = (np.exp(exact) * (exact - found)).sum(-1).mean()
        return float(divergence), float((exact.argmax(-1) == found.argmax(-1)).mean())

    print(f"{args.file.name}, {num_tokens} tokens of {args.text.name}")
    if args.kv_cache:
        print(f"{'keys and values rounded':38s} mean KL     top-1")
        for dtype in KV_CACHE_DTYPES:
            backend.store_as(dtype, tables.size)
            divergence, agreement = compare()
            print(f"{dtype:38s} {divergence:.7f}   {agreement:.4f}", flush=True)
        return
    print(f"{'inputs rounded':38s} mean KL    top-1   blocks  tiles")
    for name, rounding in CASES.items():
        backend.rounding, backend.refined = rounding, []
        divergence, agreement = compare()
        line = f"{name:38s} {divergence:.5f}   {agreement:.4f}"
        if backend.refined:
            blocks = np.mean([refined.mean() for refined in backend.refined])
            tiles = np.mean([share_of_tiles(refined) for refined in backend.refined])
            line += f"  {blocks:6.1%} {tiles:6.1%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
