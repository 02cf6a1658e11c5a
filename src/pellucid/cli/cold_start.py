"""How long a fresh process takes to its first token, and how much memory it takes at most."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pellucid.core.errors import BackendError

PROMPT = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One fresh `pellucid generate`. The model file may be in the system's page cache; nothing else is warm.

    Attributes:
        first_token: seconds from starting the process to the first byte of the answer.
        total: seconds to the end of the process.
        peak_rss: largest resident memory in bytes, mapped pages of the model file included; None where this process
            is larger itself.
    """

    first_token: float
    total: float
    peak_rss: int | None


def measure(model: str | Path, *, max_tokens: int = 16, options: Sequence[str] = ()) -> ColdStart:
    """Answer `PROMPT` in a fresh process.

    Raises:
        BackendError: the process failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", "pellucid", "generate", "--model", str(model), "--max-tokens", str(max_tokens)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--ignore-eos", "--no-timing", *options, PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        first_byte = os.read(process.stdout.fileno(), 1)
        first_token = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    total = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not first_byte:
        raise BackendError(f"a fresh process exited with {process.returncode}: {said.strip()}")
    # The system counts in what this process had when it made the new one: only a larger peak is the new one's own.
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return ColdStart(first_token, total, usage.ru_maxrss * unit if usage.ru_maxrss > own_peak else None)
