"""Where rounding activations to int8 costs accuracy: mean KL to f32 with the inputs of one kind of matrix rounded.

Runs the reference executor, whose weights are the file's own and whose arithmetic is f32, and rounds inputs as the
native core does: blocks of 32, symmetric int8, in one or two terms (docs/kernels.md).

usage: rounding.py FILE.gguf [--text FILE] [--max-tokens 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.batch import BLOCK_SIZE, ForwardBatch
from pellucid.tokenizer import Tokenizer
from pellucid.weights.loader import open_model

KINDS = {
    "QKV": ("q_proj", "k_proj", "v_proj"),
    "attention output": ("o_proj",),
    "gate and up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head", "embed_tokens"),
}
EVERYTHING = dict.fromkeys(KINDS, 1)
CASES: dict[str, dict[str, int]] = {
    **{f"{kind} alone": {kind: 1} for kind in KINDS},
    "all, one term": EVERYTHING,
    "all, two terms in QKV, down and head": {**EVERYTHING, "QKV": 2, "down": 2, "head": 2},
}


class RoundedInputs(ReferenceBackend):
    """The reference executor with inputs rounded: `terms` names how often, by kind of matrix."""

    terms: Mapping[str, int] = {}

    def _linear(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        for kind, names in KINDS.items():
            if name.split(".")[-1] in names:
                x = rounded(x, self.terms.get(kind, 0))
        return super()._linear(x, name)


def rounded(x: NDArray[np.float32], terms: int) -> NDArray[np.float32]:
    """`x` [rows, columns] as `terms` int8 terms stand for it; as it is for 0."""
    if terms == 0:
        return x
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    first = (np.rint(blocks * (127 / largest)) * (largest / 127)).astype(np.float32).reshape(x.shape)
    return first + rounded(x - first, terms - 1) if terms > 1 else first


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("text.txt"))
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()

    with open_model(args.file) as model_file:
        ids = Tokenizer.from_gguf(model_file.metadata).encode(args.text.read_text())[: args.max_tokens]
        backend = RoundedInputs(model_file.spec, model_file.weights(), kv_cache_dtype="f32")
    num_tokens = len(ids)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    backend.allocate_kv_cache(num_blocks)
    positions = np.arange(num_tokens, dtype=np.int32)
    batch = ForwardBatch(
        input_ids=np.array(ids, np.int32),
        positions=positions,
        cu_seqlens=np.array([0, num_tokens], np.int32),
        kv_lens=np.array([num_tokens], np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        logits_rows=positions,
    )
    exact = log_softmax(backend.forward(batch).logits)
    print(f"{args.file.name}, {num_tokens} tokens of {args.text.name}\n{'inputs rounded':38s} mean KL    top-1")
    for name, terms in CASES.items():
        backend.terms = terms
        found = log_softmax(backend.forward(batch).logits)
        divergence = (np.exp(exact) * (exact - found)).sum(-1).mean()
        agreement = (exact.argmax(-1) == found.argmax(-1)).mean()
        print(f"{name:38s} {divergence:.5f}   {agreement:.4f}", flush=True)


if __name__ == "__main__":
    main()
