"""How a benchmark ends: its result as JSON or as text, or its error in one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from peer_process import PeerError

from pellucid import PellucidError


def report(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    print_result: Callable[[dict[str, Any]], None],
) -> int:
    """Measure and show, as JSON where `args.json` says so. The exit status: 2 where something could not be measured."""
    try:
        result = measure(args)
    except (PellucidError, PeerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result)
    return 0
