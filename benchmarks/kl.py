"""Accuracy beside llama.cpp: how far the logits of a quantized file are from the f32 model of the same weights.

For each position of a text: KL(p || q) in nats, p from the f32 model, q from the engine; and whether both hold the same
token most likely. Perplexity is of the text itself. Everything runs on the same token ids.

The f32 logits come from --hf-folder through transformers (the file dequantized to a transformers folder), or, without
it, from Pellucid's reference executor, which computes in f32 on the dequantized weights of the file.

usage: kl.py FILE.gguf --peer-python PATH [--hf-folder DIR] [--text FILE] [--max-tokens 1024] [--threads 2] [--json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_process import PeerError, PeerProcess
from report import report

from pellucid import LLM
from pellucid.tokenizer import Tokenizer
from pellucid.weights.gguf import GGUFFile

CHUNK = 32
Logits = NDArray[np.float32]


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def compare(reference: Logits, logits: Logits, ids: list[int]) -> dict[str, float]:
    """Mean and 99th percentile of the KL divergence, top-1 agreement, and perplexity of `logits` on `ids`."""
    divergences, agreements, losses = [], [], []
    for start in range(0, len(ids), CHUNK):
        rows = slice(start, start + CHUNK)
        p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        following = ids[start + 1 : start + 1 + CHUNK]
        losses.append(-q[np.arange(len(following)), following])
    divergence = np.concatenate(divergences)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1_agreement": float(np.concatenate(agreements).mean()),
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
    }


def pellucid_logits(args: argparse.Namespace, ids: list[int], backend: str, kv_cache_dtype: str) -> tuple[str, Logits]:
    """The name of the backend that ran, and its logits."""
    with LLM(
        args.file,
        threads=args.threads,
        max_model_len=len(ids) + 64,
        backend=backend,
        kv_cache_dtype=kv_cache_dtype,
    ) as llm:
        return llm.backend_name, llm.logits(ids)


def load(path: Path) -> Logits:
    mapped: Logits = np.load(path, mmap_mode="r")
    return mapped


def peer_logits(peer: PeerProcess, ids: list[int], path: Path) -> Logits:
    peer.ask("logits", ids=ids, path=str(path))
    return load(path)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer_of(args.file).encode(text)[: args.max_tokens]
    with tempfile.TemporaryDirectory() as folder:
        # The peer first: where it cannot run, nothing else needs to.
        with PeerProcess(args.peer_python, "llama.cpp", args.file, args.threads, len(ids) + 64, 1) as peer:
            version = peer.version
            theirs = peer_logits(peer, ids, Path(folder, "llama.cpp.npy"))
        if args.hf_folder:
            python = args.hf_python or args.peer_python
            with PeerProcess(python, "transformers", args.hf_folder, args.threads) as peer:
                source, reference = peer.version, peer_logits(peer, ids, Path(folder, "f32.npy"))
        else:
            source, reference = pellucid_logits(args, ids, "reference", "f32")
        backend, ours = pellucid_logits(args, ids, args.backend, args.kv_cache_dtype)
        if not reference.shape == ours.shape == theirs.shape:
            raise PeerError(f"logits differ in shape: {reference.shape}, {ours.shape}, {theirs.shape}")
        return {
            "file": str(args.file),
            "text": str(args.text),
            "tokens": len(ids),
            "reference": source,
            "backend": backend,
            "kv_cache_dtype": args.kv_cache_dtype,
            "peer": version,
            "f32": compare(reference, reference, ids),
            "pellucid": compare(reference, ours, ids),
            "llama.cpp": compare(reference, theirs, ids),
        }


def tokenizer_of(file: str) -> Tokenizer:
    with GGUFFile.open(file) as source:
        return Tokenizer.from_gguf(source.metadata)


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['file']} on {result['tokens']} tokens of {result['text']}")
    print(f"f32: {result['reference']}; pellucid: {result['backend']}, KV {result['kv_cache_dtype']}; {result['peer']}")
    print(f"{'':12}{'mean KL':>10}{'p99 KL':>10}{'top-1':>9}{'perplexity':>12}")
    for engine in ("f32", "pellucid", "llama.cpp"):
        row = result[engine]
        print(
            f"{engine:12}{row['kl_mean']:>10.5f}{row['kl_p99']:>10.4f}"
            f"{row['top1_agreement']:>9.4f}{row['perplexity']:>12.3f}"
        )
    print(f"mean KL, pellucid / llama.cpp: {result['pellucid']['kl_mean'] / result['llama.cpp']['kl_mean']:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--hf-folder", help="the same weights as a float32 transformers folder")
    parser.add_argument(
        "--hf-python", help="Python of an environment with torch and transformers (default: the peer's)"
    )
    parser.add_argument("--backend", default="auto", help="Pellucid's backend (default: auto)")
    parser.add_argument("--kv-cache-dtype", default="f16", help="Pellucid's KV cache (default: f16)")
    parser.add_argument("--text", default=str(Path(__file__).with_name("text.txt")))
    parser.add_argument("--max-tokens", type=int, default=1024, help="most tokens of the text to use (default: 1024)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
