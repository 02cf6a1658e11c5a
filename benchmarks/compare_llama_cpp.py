"""Speed beside llama.cpp: the same file, the same threads, in turn within one run.

Each round runs, for both engines, a prefill of fixed token ids from an empty context and then a decode of one token at
a time. Pellucid's figures are those of whole requests (scheduling, sampling and detokenizing included, prefix cache
off); llama.cpp's are bare evaluations through llama-cpp-python. Medians over the rounds.

usage: compare_llama_cpp.py FILE.gguf --peer-python PATH [--threads 2] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from peer_process import PeerProcess
from report import report

from pellucid import LLM, BackendError, SamplingParams
from pellucid.cli import limits
from pellucid.cli.model_cost import ModelCost
from pellucid.estimate.speed import Utilization

SETTLE_SECONDS = 0.1  # an OpenMP pool spins for a while after its work; the other engine waits for that to end


def fixed_ids(count: int, vocab_size: int, salt: int) -> list[int]:
    """Token ids without a pattern a cache could use; a new `salt` gives new ones."""
    return [(index * 7919 + 13 + salt * 104_729) % min(vocab_size, 40_000) for index in range(count)]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    length = args.prefill + args.decode
    times: dict[str, dict[str, list[float]]] = {
        engine: {"prefill": [], "decode": []} for engine in ("pellucid", "llama.cpp")
    }
    bandwidths: list[float] = []
    with PeerProcess(args.peer_python, "llama.cpp", args.file, args.threads, length + 64, 0) as peer:
        llm = LLM(args.file, threads=args.threads, max_model_len=length + 64, enable_prefix_caching=False)
        cost = ModelCost.of(llm)
        if cost is None:
            raise BackendError("the native core is not built: there is nothing to compare")
        for round_index in range(args.rounds + 1):  # the first round warms up
            prompt = fixed_ids(args.prefill, llm.spec.vocab_size, round_index)
            followers = fixed_ids(args.decode, llm.spec.vocab_size, round_index + 1)
            params = SamplingParams(max_tokens=args.decode + 1, temperature=0, ignore_eos=True)
            metrics = llm.generate(prompt, params)[0].metrics
            time.sleep(SETTLE_SECONDS)
            seconds = {op: peer.ask(op, ids=ids)["seconds"] for op, ids in (("prefill", prompt), ("decode", followers))}
            time.sleep(SETTLE_SECONDS)
            bandwidth = limits.read_bandwidth(cost.threads, cost.weight_bytes)
            if round_index == 0:
                continue
            times["pellucid"]["prefill"].append(args.prefill / metrics.prefill)
            times["pellucid"]["decode"].append(args.decode / metrics.decode)
            times["llama.cpp"]["prefill"].append(args.prefill / seconds["prefill"])
            times["llama.cpp"]["decode"].append(args.decode / seconds["decode"])
            bandwidths.append(bandwidth)
        bytes_per_token = cost.decode_bytes(args.prefill, args.decode)
        version = peer.version
        llm.close()
    median = {
        engine: {phase: statistics.median(rates) for phase, rates in phases.items()} for engine, phases in times.items()
    }
    share = Utilization(median["pellucid"]["decode"] * bytes_per_token, max(bandwidths))
    return {
        "file": str(args.file),
        "threads": args.threads,
        "rounds": args.rounds,
        "prefill_tokens": args.prefill,
        "decode_tokens": args.decode,
        "peer": version,
        "tokens_per_s": times,
        "median_tokens_per_s": median,
        "ratio": {phase: median["pellucid"][phase] / median["llama.cpp"][phase] for phase in ("prefill", "decode")},
        "decode_read_bytes_per_s": share.achieved,
        "read_bandwidth_bytes_per_s": share.limit,
        "decode_bandwidth_share": share.share,
    }


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['file']}, {result['threads']} threads, medians of {result['rounds']} rounds, {result['peer']}")
    print(f"{'':12}{'prefill ' + str(result['prefill_tokens']):>16}{'decode ' + str(result['decode_tokens']):>16}")
    for engine, rates in result["median_tokens_per_s"].items():
        print(f"{engine:12}{rates['prefill']:>10.0f} tok/s{rates['decode']:>10.1f} tok/s")
    print(f"{'ratio':12}{result['ratio']['prefill']:>15.2f}x{result['ratio']['decode']:>15.2f}x")
    share = Utilization(result["decode_read_bytes_per_s"], result["read_bandwidth_bytes_per_s"])
    print(f"decode reads {share.achieved / 1e9:.1f} GB/s, {share} of the {share.limit / 1e9:.1f} GB/s measured")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--decode", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), compare, print_result)


if __name__ == "__main__":
    sys.exit(main())
