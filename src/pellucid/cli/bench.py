"""`pellucid bench`: speed, cold start and memory, beside the machine's limits measured in the same run."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pellucid.cli.parser import add_engine_options, add_model_option
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.estimate.speed import Utilization

if TYPE_CHECKING:
    from pathlib import Path

    from pellucid import LLM
    from pellucid.cli.cold_start import ColdStart
    from pellucid.cli.model_cost import ModelCost

DESCRIPTION = """
Measure a model on this machine: prefill (reading a prompt) over several lengths, decode (one token after another), a
cold start to the first token in a fresh process, and peak memory. The read bandwidth and the int8 peak are measured
between the runs, and each speed is shown as a share of its limit: decode reads all weights for every token, prefill
multiplies them. A share above 100% would be nonsense and is reported as a measurement error.

Everything is repeated in turn; the table shows median, least and most. Token ids are fixed, the prefix cache is off.
"""

EXAMPLES = """
pellucid bench
pellucid bench --prefill 16,128,512,2048 --decode 64,256 --repeat 5
pellucid bench --model gemma-3-270m --threads 1 --json
"""

DECODE_PROMPT_TOKENS = 16


@dataclass(slots=True)
class Series:
    """The repetitions of one measurement.

    Attributes:
        rates: tokens a second, one a repetition.
        work: bytes (decode) or operations (prefill) that a token takes; None where the backend's work is not counted.
    """

    phase: str
    num_tokens: int
    work: float | None
    rates: list[float] = field(default_factory=list)

    def utilization(self, limit: float | None) -> Utilization | None:
        """The median beside the limit, where both are known."""
        if limit is None or self.work is None:
            return None
        return Utilization(statistics.median(self.rates) * self.work, limit)


def lengths(text: str) -> list[int]:
    """`64,512` -> [64, 512]."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument(
        "--prefill", type=lengths, default=[64, 512], metavar="N,N", help="prompt lengths in tokens (default: 64,512)"
    )
    parser.add_argument(
        "--decode", type=lengths, default=[128], metavar="N,N", help="numbers of tokens to decode (default: 128)"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="times to repeat everything (default: 3)")
    parser.add_argument(
        "--no-cold-start", dest="cold_start", action="store_false", help="leave the fresh processes out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.repeat < 1:
        raise InvalidRequestError(f"--repeat must be at least 1, not {args.repeat}", param="repeat")
    result = measure(args)
    if args.json:
        import json

        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        print_result(result)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything; JSON-ready; seconds, bytes, tokens a second."""
    from pellucid.cli import cold_start, machine, session
    from pellucid.cli.console import ProgressReport
    from pellucid.cli.model_cost import ModelCost
    from pellucid.weights import catalog

    with ProgressReport() as progress:
        path = catalog.resolve(args.model, progress=progress)
    # Fresh processes first: a large parent would hide their peak memory.
    options = engine_options(args)
    starts = [cold_start.measure(path, options=options) for _ in range(args.repeat if args.cold_start else 0)]
    with session.load_llm(args, enable_prefix_caching=False) as llm:
        cost = ModelCost.of(llm)
        series = [Series("prefill", n, cost.prefill_operations(n) / n if cost else None) for n in args.prefill]
        series += [
            Series("decode", n, cost.decode_bytes(DECODE_PROMPT_TOKENS, n) if cost else None) for n in args.decode
        ]
        limits = measure_speed(llm, cost, series, args.repeat)
        return {
            "model": args.model,
            "file": str(path),
            "file_bytes": path.stat().st_size,
            "backend": llm.backend_name,
            "threads": cost.threads if cost else None,
            "isa": cost.isa if cost else None,
            "repeat": args.repeat,
            "machine": machine.describe(),
            "limits": limits,
            "speed": [describe(item, limits) for item in series],
            "cold_start": describe_cold_starts(starts, path, llm) if starts else None,
        }


def engine_options(args: argparse.Namespace) -> list[str]:
    """The engine options of this command line, for another."""
    names = ("threads", "max_model_len", "backend", "kv_cache_dtype")
    given = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
    return [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]


def measure_speed(llm: LLM, cost: ModelCost | None, series: Sequence[Series], repeat: int) -> dict[str, float | None]:
    """Fill in the rates, each series in turn in every repetition.

    Returns the limits met on the way, the best of each; None where the work is not counted, so that a limit is no use.
    """
    from pellucid.cli import limits

    bandwidths: list[float] = []
    peaks: list[float] = []
    for repetition in range(repeat + 1):  # the first one warms up
        for item in series:
            rate = measure_rate(llm, item, salt=repetition)
            if repetition > 0:
                item.rates.append(rate)
        if cost is not None:
            bandwidths.append(limits.read_bandwidth(cost.threads, cost.weight_bytes))
            peaks.append(limits.int8_peak(cost.threads, cost.isa))
    return {
        "read_bandwidth_bytes_per_s": max(bandwidths, default=None),
        "int8_operations_per_s": max(peaks, default=None),
    }


def measure_rate(llm: LLM, item: Series, salt: int) -> float:
    """Tokens a second of one request of this kind."""
    from pellucid import SamplingParams

    prefill = item.phase == "prefill"
    prompt = fixed_ids(item.num_tokens if prefill else DECODE_PROMPT_TOKENS, llm.spec.vocab_size, salt)
    max_tokens = 1 if prefill else item.num_tokens + 1
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
    metrics = llm.generate(prompt, params)[0].metrics
    if metrics.output_tokens != max_tokens:
        raise BackendError(f"asked for {max_tokens} tokens and got {metrics.output_tokens}: nothing to measure")
    return metrics.prefill_tokens_per_second if prefill else metrics.decode_tokens_per_second


def fixed_ids(count: int, vocab_size: int, salt: int) -> list[int]:
    """The same ids in every run, others for another `salt`."""
    return [(index * 7919 + 13 + salt * 104_729) % vocab_size for index in range(count)]


def describe(item: Series, limits: dict[str, float | None]) -> dict[str, Any]:
    prefill = item.phase == "prefill"
    limit = limits["int8_operations_per_s" if prefill else "read_bandwidth_bytes_per_s"]
    utilization = item.utilization(limit)
    median = statistics.median(item.rates)
    return {
        "phase": item.phase,
        "tokens": item.num_tokens,
        "median_tokens_per_s": median,
        "min_tokens_per_s": min(item.rates),
        "max_tokens_per_s": max(item.rates),
        "achieved": utilization.achieved if utilization else None,
        "unit": "operations/s" if prefill else "bytes/s",
        "share_of_limit": utilization.share if utilization else None,
        "share_text": str(utilization) if utilization else "limit not measured",
    }


def describe_cold_starts(starts: Sequence[ColdStart], path: Path, llm: LLM) -> dict[str, Any]:
    """First token and memory; the question and answer of a start fit in one KV block of each group of layers, whose
    bytes are `kv_bytes`."""
    from pellucid.estimate.memory import kv_bytes_per_block
    from pellucid.models.kv_groups import kv_groups

    first_tokens = [start.first_token for start in starts]
    peaks = [start.peak_rss for start in starts if start.peak_rss is not None]
    kv_bytes = len(kv_groups(llm.spec)) * kv_bytes_per_block(llm.spec, llm.config.cache.kv_cache_dtype)
    return {
        "median_first_token_s": statistics.median(first_tokens),
        "min_first_token_s": min(first_tokens),
        "max_first_token_s": max(first_tokens),
        "peak_rss_bytes": max(peaks, default=None),
        "kv_bytes": kv_bytes,
        "peak_rss_to_file_and_kv": max(peaks) / (path.stat().st_size + kv_bytes) if peaks else None,
    }


def print_result(result: dict[str, Any]) -> None:
    from pellucid.cli.console import format_bytes, print_table

    limits, start = result["limits"], result["cold_start"]
    threads = "" if result["threads"] is None else f"{result['threads']} threads, "
    print(
        f"{result['model']} ({format_bytes(result['file_bytes'])}), backend {result['backend']}, "
        f"{threads}{result['machine']['cpu'] or result['machine']['architecture']}\n"
    )
    print_table(
        ("", "tok/s", "min", "max", "achieved", "of the limit"),
        [speed_row(row) for row in result["speed"]],
        right=("tok/s", "min", "max", "achieved", "of the limit"),
    )
    if limits["read_bandwidth_bytes_per_s"] is None:
        print("\nShares of the machine's limits are only known for the native core.")
    else:
        print(
            f"\nlimits measured in this run: reading {limits['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s (decode), "
            f"int8 {limits['int8_operations_per_s'] / 1e9:.0f} GOPS with {result['isa']} (prefill)"
        )
    if start is not None:
        least, most = start["min_first_token_s"], start["max_first_token_s"]
        print(f"cold start to first token: {start['median_first_token_s']:.3f} s ({least:.3f} to {most:.3f})")
        print(f"peak memory: {peak_memory_text(start)}")


def peak_memory_text(start: dict[str, Any]) -> str:
    from pellucid.cli.console import format_bytes

    if start["peak_rss_bytes"] is None:
        return "not known: this process is larger than the one measured"
    return f"{format_bytes(start['peak_rss_bytes'])}, {start['peak_rss_to_file_and_kv']:.2f} x (file + KV in use)"


def speed_row(row: dict[str, Any]) -> tuple[str, ...]:
    unit = "GOPS" if row["phase"] == "prefill" else "GB/s"
    return (
        f"{row['phase']} {row['tokens']}",
        *(f"{row[f'{name}_tokens_per_s']:,.1f}" for name in ("median", "min", "max")),
        "" if row["achieved"] is None else f"{row['achieved'] / 1e9:,.1f} {unit}",
        row["share_text"],
    )
