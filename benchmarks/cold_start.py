"""Cold start: fresh `pellucid generate` processes, time to the first byte of the answer and peak resident memory.

The file's pages may be in the system's cache, as after a pull; the process, its imports and the weights are not warm.

usage: cold_start.py FILE.gguf [--rounds 5] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pellucid import PellucidError
from pellucid.cli import cold_start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    options = [] if args.threads is None else ["--threads", str(args.threads)]
    try:
        starts = [cold_start.measure(args.file, options=options) for _ in range(args.rounds)]
        size = args.file.stat().st_size
    except (PellucidError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"file": str(args.file), "file_bytes": size, "starts": [asdict(start) for start in starts]}))
        return 0
    first = [start.first_token for start in starts]
    peaks = [start.peak_rss for start in starts if start.peak_rss is not None]
    print(
        f"first token: {statistics.median(first):.3f} s, {min(first):.3f} to {max(first):.3f} s in {len(first)} starts"
    )
    print(f"peak memory: {max(peaks) / 1e6:.0f} MB, {max(peaks) / size:.2f} x the file of {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
