"""Accuracy beside llama.cpp: how far the logits of a quantized file are from the f32 model of the same weights.

For each position of a text: KL(p || q) in nats, p from the f32 model, q from the engine; and whether both hold the same
token most likely. Perplexity is of the text itself. Everything runs on the same token ids.

The f32 logits come from --hf-folder through transformers (the file dequantized to a transformers folder), or, without
it, from Pellucid's reference executor, which computes in f32 on the dequantized weights of the file.

usage: kl.py FILE.gguf --peer-python PATH [--hf-folder DIR] [--text benchmarks/text.txt] [--max-tokens 1024] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_process import PeerError, PeerProcess

from pellucid import LLM, PellucidError

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


def pellucid_logits(file: str, threads: int, ids: list[int], backend: str) -> Logits:
    llm = LLM(file, threads=threads, max_model_len=len(ids) + 64, backend=backend)
    try:
        return llm.logits(ids)
    finally:
        llm.close()


def peer_logits(python: str, engine: str, arguments: Sequence[object], ids: list[int], path: Path) -> Logits:
    with PeerProcess(python, engine, *arguments) as peer:
        peer.ask("logits", ids=ids, path=str(path))
    mapped: Logits = np.load(path, mmap_mode="r")
    return mapped


def measure(args: argparse.Namespace) -> dict[str, Any]:
    text = Path(args.text).read_text(encoding="utf-8")
    llm = LLM(args.file, threads=args.threads, max_model_len=256)
    ids = llm.tokenizer.encode(text)[: args.max_tokens]
    llm.close()
    with tempfile.TemporaryDirectory() as folder:
        if args.hf_folder:
            reference = peer_logits(
                args.peer_python, "transformers", (args.hf_folder, args.threads), ids, Path(folder, "f32.npy")
            )
        else:
            reference = pellucid_logits(args.file, args.threads, ids, "reference")
        ours = pellucid_logits(args.file, args.threads, ids, "auto")
        theirs = peer_logits(
            args.peer_python, "llama.cpp", (args.file, args.threads, len(ids) + 64, 1), ids, Path(folder, "peer.npy")
        )
        if not reference.shape == ours.shape == theirs.shape:
            raise PeerError(f"logits differ in shape: {reference.shape}, {ours.shape}, {theirs.shape}")
        return {
            "file": str(args.file),
            "text": str(args.text),
            "tokens": len(ids),
            "f32": compare(reference, reference, ids),
            "pellucid": compare(reference, ours, ids),
            "llama.cpp": compare(reference, theirs, ids),
        }


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['file']} on {result['tokens']} tokens of {result['text']}, against f32")
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
    parser.add_argument("--hf-folder", help="the same weights as a float32 transformers folder (needs torch there too)")
    parser.add_argument("--text", default=str(Path(__file__).with_name("text.txt")))
    parser.add_argument("--max-tokens", type=int, default=1024, help="most tokens of the text to use (default: 1024)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        result = measure(args)
    except (PellucidError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
